"""Reads 3D files as triangles in the normalised world: corners, colours and random points of the surface.

The world has z up (the files are y-up, as glTF requires), and the object's bounding box is centred on the origin.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import trimesh

from lrm_jax.ops import srgb
from lrm_jax.types import InputError
from rendering.protocols import rng_of
from rendering.sources import locate

Y_UP_TO_Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)  # (x, y, z) -> (x, -z, y)


@dataclasses.dataclass
class Triangles:
    """An object as M independent triangles. One gather by triangle number finds everything."""

    xyz: np.ndarray  # [M 3 3] float32 corners, normalised world
    facing: np.ndarray  # [M 3] float32, normal of the plane, with twice the area as its length
    # Three arrays [M 9] float32: the value at the first corner, and the steps to the two others. The values are the shading normal (3),
    # texture coordinates with (0, 0) at the lower left (2), and linear RGBA that multiplies the texture (4).
    attributes: tuple[np.ndarray, np.ndarray, np.ndarray]
    material: np.ndarray  # [M] number of the material
    textures: dict[int, np.ndarray]  # by material, if it has a texture: [h w 4] float32 linear RGBA
    cutout: np.ndarray  # [M] bool: rays pass if alpha is below one half
    centre: np.ndarray  # [3] float64: normalised = (z-up place in the file - centre) * scale
    scale: float


def load_triangles(
    path: Path, box: float | None = None, *, file_normals: bool = False
) -> Triangles:
    """Reads a 3D file. Applies the scene graph, turns y up into z up, and normalises.

    Args:
      path: the file.
      box: longest side of the object's bounding box after scaling; None: the farthest vertex is at distance 1.
      file_normals: shade with the file's normals if it has them. Otherwise every triangle is flat.

    Raises:
      InputError: the file has no surface. A broken file raises whatever trimesh raises.
    """
    scene = trimesh.load_scene(path, process=False, resolver=_Resolver(str(path)))
    parts = list(_parts(scene))
    if not parts:
        raise InputError("no triangles")
    linear = path.suffix.lower() in (".glb", ".gltf")
    pieces = [_corners(part, linear=linear, file_normals=file_normals) for part in parts]
    xyz, normals, uv, rgba = (np.concatenate([piece[i] for piece in pieces]) for i in range(4))
    if not np.isfinite(xyz).all():
        raise InputError("vertices that are not finite (NaN or infinity)")
    xyz, normals = xyz @ Y_UP_TO_Z_UP.T, normals @ Y_UP_TO_Z_UP.T
    low, high = xyz.min((0, 1)), xyz.max((0, 1))
    xyz = xyz - (low + high) / 2
    radius = np.linalg.norm(xyz, axis=-1).max() if box is None else (high - low).max() / box
    if radius == 0:
        raise InputError("all vertices are one point")
    xyz = (xyz / radius).astype(np.float32)
    facing = np.cross(xyz[:, 1] - xyz[:, 0], xyz[:, 2] - xyz[:, 0])
    if not facing.any():
        raise InputError("no surface: every triangle has area 0")
    first, second, third = np.nan_to_num(
        np.concatenate([normals, uv, rgba], axis=-1).astype(np.float32)
    ).swapaxes(0, 1)
    count = [len(part.faces) for part in parts]
    return Triangles(
        xyz=xyz,
        facing=facing,
        attributes=tuple(np.ascontiguousarray(a) for a in (first, second - first, third - first)),
        material=np.repeat(np.arange(len(parts)), count),
        textures={i: piece[4] for i, piece in enumerate(pieces) if piece[4] is not None},
        cutout=np.repeat([piece[5] for piece in pieces], count),
        centre=(low + high) / 2,
        scale=float(1 / radius),
    )


class _Resolver(trimesh.resolvers.FilePathResolver):
    """Finds referenced files in the same places as `check_complete`. trimesh's own resolver would continue without many of them."""

    def get(self, name: str) -> bytes:
        return locate(Path(self.parent), name).read_bytes()


def _parts(scene: trimesh.Scene) -> Iterator[trimesh.Trimesh]:
    """Yields the triangles of a scene, placed by its graph. `scene.dump` does the same but loses the normals."""
    for node in scene.graph.nodes_geometry:
        transform, name = scene.graph[node]
        geometry = scene.geometry[name]
        if isinstance(geometry, trimesh.Trimesh) and len(geometry.faces):
            part = geometry.copy(include_cache=True)
            part.apply_transform(transform)
            yield part


def _corners(part: trimesh.Trimesh, *, linear: bool, file_normals: bool) -> tuple:
    """(xyz, normals, uv, rgba) per corner, the texture, and whether it cuts holes, for one part of a scene.

    Args:
      part: triangles with trimesh's visuals.
      linear: whether vertex colours are linear light (glTF) or sRGB (usual in .ply and .obj).
      file_normals: see `load_triangles`.
    """
    faces, visual = part.faces, part.visual
    # trimesh computes smooth normals on demand, which makes a box look round. Only normals from the file are in its cache.
    if file_normals and "vertex_normals" in part._cache:
        normals = part.vertex_normals[faces]
    else:
        normals = np.repeat(part.face_normals[:, None], 3, axis=1)
    uv, rgba = np.zeros((len(faces), 3, 2)), np.ones((len(faces), 3, 4))
    texture, cutout, colors = None, False, None
    if visual.kind == "texture":
        image, factor, cutout = _material(visual.material)
        colors = visual.vertex_attributes.get("color")
        if image is not None and visual.uv is not None:
            uv, texture = visual.uv[faces], _linear_rgba(np.asarray(image.convert("RGBA")))
        if factor is not None:
            rgba = rgba * (np.asarray(factor) / 255)
    elif visual.kind == "vertex":
        colors = visual.vertex_colors
    if visual.kind == "face":
        colors = np.repeat(visual.face_colors[:, None], 3, axis=1)
    elif colors is not None:
        colors = np.asarray(colors)[faces]
    if colors is not None:
        whole = np.iinfo(colors.dtype).max if colors.dtype.kind == "u" else 1
        scaled = colors[..., :3] / whole
        rgba[..., :3] *= scaled if linear else srgb.to_linear(scaled)
    return part.vertices[faces], normals, uv, rgba, texture, cutout


def _material(material) -> tuple:
    """(base colour image or None, 8-bit linear factor or None, whether alpha cuts holes) of a trimesh material."""
    if isinstance(material, trimesh.visual.material.SimpleMaterial):
        # The diffuse colour of an .obj is often trimesh's default grey. If there is a texture, it means nothing.
        return material.image, material.diffuse if material.image is None else None, False
    cutout = material.alphaMode in ("MASK", "BLEND")
    return material.baseColorTexture, material.baseColorFactor, cutout


def _linear_rgba(image: np.ndarray) -> np.ndarray:
    table = srgb.to_linear(np.arange(256) / 255).astype(np.float32)
    return np.concatenate([table[image[..., :3]], image[..., 3:].astype(np.float32) / 255], axis=-1)


def look_up(
    triangles: Triangles, ids: np.ndarray, u: np.ndarray, v: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Shading normal [R 3] (not normalised) and linear RGBA [R 4] at barycentric (u, v) of triangles `ids`."""
    corner, along_u, along_v = triangles.attributes
    attributes = corner[ids] + along_u[ids] * u[:, None] + along_v[ids] * v[:, None]
    normal, uv, rgba = np.split(attributes, [3, 5], axis=1)
    if triangles.textures:
        material = triangles.material[ids]
        for index, texture in triangles.textures.items():
            its = np.flatnonzero(material == index)
            rgba[its] *= sample_texture(texture, uv[its])
    return normal, rgba


def sample_texture(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear lookup in texture[h w 4] at uv[R 2]. (0, 0) is the lower left corner. The texture repeats outside [0, 1]."""
    height, width = texture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    left, top = np.floor(x), np.floor(y)
    right_part, bottom_part = (x - left)[:, None], (y - top)[:, None]
    columns = [(left.astype(np.int64) + i) % width for i in range(2)]
    rows = [(top.astype(np.int64) + i) % height * width for i in range(2)]
    texels = texture.reshape(-1, 4)
    above, below = (
        texels[row + columns[0]] * (1 - right_part) + texels[row + columns[1]] * right_part
        for row in rows
    )
    return above * (1 - bottom_part) + below * bottom_part


def random_points(triangles: Triangles, uid: str, count: int = 10000) -> np.ndarray:
    """[count 3] float32 points on the surface in the normalised world, uniform by area. The same uid gives the same points.

    The whole surface is sampled, including parts that are not visible from outside, but not the holes that a texture's alpha cuts.

    Raises:
      InputError: the texture makes the whole surface transparent.
    """
    rng = rng_of(uid, 2)
    area = np.cumsum(np.linalg.norm(triangles.facing.astype(np.float64), axis=1))
    found = []
    for _ in range(100):
        ids = np.searchsorted(area, rng.uniform(0, area[-1], count), side="right").clip(
            max=len(area) - 1
        )
        # Osada et al. 2002, "Shape distributions", section 4.1.
        root, along = np.sqrt(rng.uniform(size=count)), rng.uniform(size=count)
        u, v = (root * (1 - along)).astype(np.float32), (root * along).astype(np.float32)
        if triangles.cutout.any():
            solid = ~triangles.cutout[ids] | (look_up(triangles, ids, u, v)[1][:, 3] >= 0.5)
            ids, u, v = ids[solid], u[solid], v[solid]
        first, second, third = triangles.xyz[ids].swapaxes(0, 1)
        found.append(first + (second - first) * u[:, None] + (third - first) * v[:, None])
        if sum(map(len, found)) >= count:
            return np.concatenate(found)[:count]
    raise InputError("no surface: its texture is transparent (nearly) everywhere")
