"""A texture instead of vertex colours: decimates a mesh, unwraps it, and bakes the colour field. On the CPU, without OpenGL."""

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, Float32, Int32, UInt32
from scipy import ndimage

from lrm_jax.images.png import to_uint8
from lrm_jax.mesh.surface import Surface, decimated, paint, sample
from lrm_jax.types import InputError

# xatlas 0.0.11 takes seconds for this many, and dies of a segmentation fault at 82,000.
MAX_FACES = 20_000
GROUP = 2**19  # texels in the triangles' bounding boxes handled at once

# Runs in a process of its own, so that a crash does not end this one.
UNWRAP = """
import sys, numpy as np, xatlas
task = np.load(sys.argv[1])
options = xatlas.PackOptions()
options.resolution, options.padding, options.bilinear = int(task["size"]), 2, True
atlas = xatlas.Atlas()
atlas.add_mesh(task["vertices"], task["faces"])
atlas.generate(xatlas.ChartOptions(), options)
sources, faces, uv = atlas[0]
np.savez(sys.argv[2], sources=sources, faces=faces, uv=uv)
"""


def bake_texture(
    surface: Surface,
    color: Callable,
    size: int,
    *,
    max_faces: int = MAX_FACES,
    chunk: int = 2**15,
    progress: Callable | None = None,
) -> Surface:
    """Decimates the surface to at most `max_faces` (quadric decimation), unwraps it, and bakes the colour field into a texture.

    Texels between the charts repeat the nearest texel inside one, so that filtering shows no seams.

    Args:
      color: xyz[Q 3] -> sRGB[Q 3] in [0, 1]. Always called with Q = `chunk`.
      size: texels along a side of the texture.
      progress: as in `extract`.

    Returns:
      A surface with `uv` and `texture`. Vertices are repeated along the seams.

    Raises:
      InputError: the atlas could not be made.
    """
    vertices, faces = decimated(surface.vertices, surface.faces, max_faces)
    whole = paint(vertices, faces, color, chunk=chunk, progress=progress)
    sources, faces, uv = _unwrap(vertices, faces, size)
    vertices = vertices[sources]

    texels = _rasterize(uv * size, vertices, faces, size)
    inside = ~np.isnan(texels[..., 0])
    rgb = sample(color, texels[inside], chunk=chunk, progress=progress, label="texture")
    texture = np.zeros((size, size, 3), np.uint8)
    texture[inside] = to_uint8(rgb)
    rows, columns = ndimage.distance_transform_edt(
        ~inside, return_distances=False, return_indices=True
    )
    return Surface(
        vertices, faces, whole.colors[sources], whole.normals[sources], uv, texture[rows, columns]
    )


def _unwrap(
    vertices: Float32[np.ndarray, "N 3"], faces: Int32[np.ndarray, "M 3"], size: int
) -> tuple[UInt32[np.ndarray, " n"], Int32[np.ndarray, "m 3"], Float32[np.ndarray, "n 2"]]:
    """An atlas by xatlas (https://github.com/jpcy/xatlas): the source vertex of each new vertex, faces, and uv in [0, 1]."""
    with tempfile.TemporaryDirectory() as folder:
        task, found = Path(folder, "task.npz"), Path(folder, "found.npz")
        # xatlas drops faces with an area below 1e-7. Scaled to a mean area of one, only degenerate faces are that small.
        a, b, c = np.moveaxis(vertices[faces], 1, 0)
        area = np.linalg.norm(np.cross(b - a, c - a), axis=-1).mean() / 2
        np.savez(task, vertices=vertices / np.sqrt(area), faces=faces, size=size)
        done = subprocess.run(
            [sys.executable, "-c", UNWRAP, task, found], capture_output=True, text=True
        )
        if done.returncode:
            cause = (done.stderr.strip().splitlines() or [""])[
                -1
            ] or f"ended with code {done.returncode}"
            raise InputError(
                f"no texture atlas for {len(faces)} faces: xatlas {cause}: use vertex colours instead of a texture, "
                "or ask for fewer faces"
            )
        with np.load(found) as result:
            sources, faces, uv = (result[name] for name in ("sources", "faces", "uv"))
    dropped = (uv[faces] == 0).all((1, 2))
    return sources, faces[~dropped].astype(np.int32), uv.astype(np.float32)


def _rasterize(
    xy: Float32[np.ndarray, "N 2"],
    vertices: Float32[np.ndarray, "N 3"],
    faces: Int32[np.ndarray, "M 3"],
    size: int,
) -> Float32[np.ndarray, "size size 3"]:
    """The surface point at each texel (row, column); NaN where there is none.

    A texel that no triangle covers gets the nearest point of a triangle within one texel of its centre, because bilinear
    lookups on that triangle read it.
    """
    corners, points = xy[faces].astype(np.float64), vertices[faces].astype(np.float64)
    low = np.clip(np.ceil(corners.min(1) - 1.5), 0, size).astype(np.int64)
    high = np.clip(np.floor(corners.max(1) + 0.5) + 1, low, size).astype(np.int64)
    spans = high - low
    areas = spans.prod(-1)
    texels = np.full((size, size, 3), np.nan, np.float32)
    groups = np.split(np.arange(len(faces)), np.flatnonzero(np.diff(np.cumsum(areas) // GROUP)) + 1)
    for group in groups:
        face = np.repeat(group, areas[group])
        nth = np.arange(len(face)) - np.repeat(np.cumsum(areas[group]) - areas[group], areas[group])
        columns = low[face, 0] + nth % spans[face, 0]
        rows = low[face, 1] + nth // spans[face, 0]
        centers = np.stack([columns, rows], -1) + 0.5
        weights, covered = _nearest_in_triangles(centers, corners[face])
        reached = np.abs(np.einsum("kc,kcd->kd", weights, corners[face]) - centers).max(-1) <= 1
        reached &= np.isnan(texels[rows, columns, 0])
        for chosen in (reached, covered):
            xyz = np.einsum("kc,kcd->kd", weights[chosen], points[face[chosen]])
            texels[rows[chosen], columns[chosen]] = xyz
    return texels


def _nearest_in_triangles(
    xy: Float[np.ndarray, "K 2"], corners: Float[np.ndarray, "K 3 2"]
) -> tuple[Float[np.ndarray, "K 3"], Bool[np.ndarray, " K"]]:
    """Barycentric coordinates of each triangle's point nearest to `xy`, and whether `xy` lies inside the triangle."""
    x, y = np.moveaxis(corners - xy[:, None], -1, 0)
    pairs = ((1, 2), (2, 0), (0, 1))
    # The areas of the triangles that `xy` forms with each side.
    weights = np.stack([x[:, b] * y[:, c] - x[:, c] * y[:, b] for b, c in pairs], -1)
    total = weights.sum(-1, keepdims=True)
    weights = np.divide(weights, total, out=np.full_like(weights, -1), where=total != 0)
    inside = (weights >= 0).all(-1)
    best = np.where(inside, 0, np.inf)
    for b, c in pairs:
        side = np.stack([x[:, c] - x[:, b], y[:, c] - y[:, b]], -1)
        along = -(x[:, b] * side[:, 0] + y[:, b] * side[:, 1])
        along = np.clip(along / np.maximum((side**2).sum(-1), 1e-12), 0, 1)
        distance = np.hypot(x[:, b] + along * side[:, 0], y[:, b] + along * side[:, 1])
        nearer = distance < best
        best[nearer] = distance[nearer]
        on_side = np.zeros_like(weights)
        on_side[:, b], on_side[:, c] = 1 - along, along
        weights[nearer] = on_side[nearer]
    return weights, inside
