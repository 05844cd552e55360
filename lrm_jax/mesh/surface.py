"""Coloured meshes: a field's level set with normals and vertex colours or a texture."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, Int32

from lrm_jax.images.png import to_uint8
from lrm_jax.mesh.lattice import in_chunks


@dataclasses.dataclass(frozen=True)
class Surface:
    """A coloured mesh; faces are counter-clockwise seen from outside."""

    vertices: np.ndarray  # float32 [N 3] world, z up
    faces: np.ndarray  # int32 [M 3]
    colors: np.ndarray  # uint8 [N 3] sRGB
    normals: np.ndarray  # float32 [N 3] outward, unit length
    uv: np.ndarray | None = None  # float32 [N 2] in [0, 1], as in glTF: from the top left, v down
    texture: np.ndarray | None = None  # uint8 [T T 3] sRGB


def sample(
    function: Callable,
    xyz: Float[np.ndarray, "Q 3"],
    *,
    chunk: int = 2**15,
    progress: Callable | None = None,
    label: str = "colors",
) -> Float32[np.ndarray, "Q ..."]:
    """Evaluates `function`: xyz[chunk 3] -> [chunk ...] at any number of points, in calls of one shape."""
    return in_chunks(function, len(xyz), lambda rows: xyz[rows], chunk, progress, label)


def vertex_normals(
    vertices: Float32[np.ndarray, "N 3"], faces: Int32[np.ndarray, "M 3"]
) -> Float32[np.ndarray, "N 3"]:
    """Unit normals: the mean of the face normals around each vertex, weighted by area. Outward for counter-clockwise faces.

    Not the field's gradient: it takes as many queries as the surface itself, and is noise where a density saturates.
    """
    corners = vertices[faces].astype(np.float64)
    face_normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals = np.stack(
        [
            np.bincount(faces.ravel(), np.repeat(along, 3), len(vertices))
            for along in face_normals.T
        ],
        -1,
    )
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    # If the faces cancel, there is no outside, but the files still need a unit vector.
    return np.where(length > 0, normals / np.maximum(length, 1e-300), [[0, 0, 1]]).astype(
        np.float32
    )


def paint(
    vertices: Float32[np.ndarray, "N 3"],
    faces: Int32[np.ndarray, "M 3"],
    color: Callable,
    *,
    chunk: int = 2**15,
    progress: Callable | None = None,
) -> Surface:
    """Adds normals, and vertex colours from `color`: xyz[Q 3] -> sRGB[Q 3] in [0, 1]."""
    rgb = sample(color, vertices, chunk=chunk, progress=progress)
    return Surface(vertices, faces, to_uint8(rgb), vertex_normals(vertices, faces))


def moved(surface: Surface, motion: Float[np.ndarray, "4 4"]) -> Surface:
    """The surface after a similarity of its world."""
    scale = np.linalg.norm(motion[:3, 0])
    vertices = surface.vertices @ motion[:3, :3].T + motion[:3, 3]
    normals = surface.normals @ motion[:3, :3].T / scale
    return dataclasses.replace(
        surface, vertices=vertices.astype(np.float32), normals=normals.astype(np.float32)
    )


def decimated(
    vertices: Float32[np.ndarray, "N 3"], faces: Int32[np.ndarray, "M 3"], max_faces: int
) -> tuple[Float32[np.ndarray, "n 3"], Int32[np.ndarray, "m 3"]]:
    """Reduces a mesh to at most about `max_faces` triangles (quadric decimation); unused vertices are dropped."""
    if len(faces) > max_faces:
        import fast_simplification  # here: few meshes are that large

        vertices, faces = fast_simplification.simplify(vertices, faces, target_count=max_faces)
    used, faces = np.unique(faces, return_inverse=True)
    return vertices[used].astype(np.float32), faces.reshape(-1, 3).astype(np.int32)
