"""Renders views by ray casting: embree finds the triangles, and NumPy shades them. No OpenGL, no shadows, no reflections."""

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np
from embreex import rtcore_scene
from embreex.mesh_construction import TriangleMesh

from lrm_jax.images.png import to_uint8
from lrm_jax.ops import cameras as cameras_lib
from lrm_jax.ops import srgb
from lrm_jax.types import Cameras
from rendering.output import View
from rendering.protocols import Lighting, Settings
from rendering.surfaces import Triangles, look_up

SUPERSAMPLING = 2  # samples along each side of a pixel with detail
DETAIL = 0.02  # a larger change to the next pixel counts as detail, in square roots of linear light and in coverage
RAYS = 2**14  # at a time, so that the arrays stay in the cache, which makes it twice as fast


def render(
    triangles: Triangles, cameras: Cameras, lighting: Lighting, settings: Settings
) -> Iterator[View]:
    """Yields the views of an object from Cameras[V], one after another."""
    scene = rtcore_scene.EmbreeScene(robust=True)  # rays never slip through between two triangles
    TriangleMesh(
        scene,
        triangles.xyz.reshape(-1, 3),
        np.arange(triangles.xyz.size // 3, dtype=np.int32).reshape(-1, 3),
    )
    trace = functools.partial(_trace, triangles, scene, lighting, geometry=settings.geometry)
    for c2w, window in zip(cameras.c2w, windows(cameras, triangles, settings.size), strict=True):
        yield _render_view(trace, c2w, _sample_dirs(settings.size, settings.fov), window)


def windows(cameras: Cameras, triangles: Triangles, size: int) -> list[tuple[slice, slice]]:
    """For each of Cameras[V], the rows and columns of a size x size image that can show the object: its projected bounding box."""
    low, high = triangles.xyz.min((0, 1)), triangles.xyz.max((0, 1))
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(1, 8, 3)
    corners = np.repeat(corners.astype(np.float32), len(cameras.c2w), axis=0)
    uv, z = cameras_lib.project(
        Cameras(jnp.asarray(cameras.c2w), jnp.asarray(cameras.fxfycxcy)), jnp.asarray(corners)
    )
    uv, near = (
        np.asarray(uv),
        np.asarray(z).min(1) < 0.05,
    )  # if a corner is beside the camera, take the whole image
    start = np.where(near[:, None], 0, np.floor(uv.min(1) * size)).clip(0, size - 1).astype(int)
    stop = np.where(near[:, None], size, np.ceil(uv.max(1) * size)).clip(0, size).astype(int)
    stop = np.maximum(stop, start + 1)  # a flat object seen edge-on has no height
    return [(slice(a[1], b[1]), slice(a[0], b[0])) for a, b in zip(start, stop, strict=True)]


@functools.lru_cache(maxsize=2)
def _sample_dirs(size: int, fov: float) -> np.ndarray:
    """[H W 1+n*n 3] directions through the pixels' centres and their n*n parts, in the camera's frame. All views share them."""
    camera = Cameras(c2w=jnp.eye(4), fxfycxcy=cameras_lib.field_of_view(fov))
    n = SUPERSAMPLING
    centres = np.asarray(cameras_lib.pixel_rays(camera, size, size).dirs)[:, :, None]
    parts = np.asarray(cameras_lib.pixel_rays(camera, size * n, size * n).dirs)
    parts = parts.reshape(size, n, size, n, 3).swapaxes(1, 2).reshape(size, size, n * n, 3)
    return np.concatenate([centres, parts], axis=2)


def _render_view(trace, c2w: np.ndarray, dirs: np.ndarray, window: tuple[slice, slice]) -> View:
    """One view.

    Traces one ray through the centre of each pixel, then SUPERSAMPLING^2 rays through pixels that differ from a neighbour
    (adaptive sampling as in https://doi.org/10.1145/358876.358882, section 3: edges and fine texture cost more than plain areas).

    Args:
      trace: function (eye[3], dirs[R 3], geometry=) -> color[R 4], and (normal, distance)[R 4] or None.
      c2w: [4 4] pose with OpenCV axes.
      dirs: [H W 1+n*n 3] directions in the camera's frame, through the centres of the pixels and of their n*n parts.
      window: rows and columns that can show the object.
    """
    turn = c2w[:3, :3].T
    seen = dirs[window]
    color, surface = trace(c2w[:3, 3], seen[..., 0, :].reshape(-1, 3) @ turn)
    color = color.reshape(*seen.shape[:2], 4)
    detailed = _has_detail(color)
    samples, _ = trace(c2w[:3, 3], seen[detailed][:, 1:].reshape(-1, 3) @ turn, geometry=False)
    color[detailed] = samples.reshape(-1, SUPERSAMPLING**2, 4).mean(1)
    view = View(rgba=np.zeros((*dirs.shape[:2], 4), np.uint8))
    covered = color[..., 3] > 0
    straight = color[covered, :3] / color[covered, 3:]
    inside = view.rgba[window]
    inside[covered, :3] = _srgb_table()[(straight.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]
    inside[..., 3] = np.round(color[..., 3] * 255)
    if surface is not None:
        surface = surface.reshape(*seen.shape[:2], 4)
        view.depth = np.zeros(dirs.shape[:2], np.float32)
        view.normal = np.zeros((*dirs.shape[:2], 3), np.float32)
        view.depth[window] = surface[..., 3] * seen[..., 0, 2]
        view.normal[window] = surface[..., :3]
    return view


def _has_detail(color: np.ndarray) -> np.ndarray:
    """[H W] whether each pixel of color[H W 4] differs from the one above, below, left or right."""
    value = np.sqrt(np.pad(color, ((1, 1), (1, 1), (0, 0)), mode="edge"))
    down = (np.abs(np.diff(value[:, 1:-1], axis=0)) > DETAIL).any(-1)
    across = (np.abs(np.diff(value[1:-1], axis=1)) > DETAIL).any(-1)
    return down[1:] | down[:-1] | across[:, 1:] | across[:, :-1]


@functools.cache
def _srgb_table() -> np.ndarray:
    """uint8 sRGB for linear light in steps of 1/65535, which is fine enough for the darkest 8-bit steps."""
    return to_uint8(srgb.from_linear(np.arange(65536) / 65535))


def _trace(
    triangles: Triangles,
    scene: rtcore_scene.EmbreeScene,
    lighting: Lighting,
    eye: np.ndarray,
    dirs: np.ndarray,
    *,
    geometry: bool,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Traces rays from `eye` along dirs[R 3]. Returns [R 4] premultiplied linear colour and coverage, and with `geometry` also
    [R 4] the normal and the distance of the hit."""
    color = np.zeros((len(dirs), 4), np.float32)
    surface = np.zeros((len(dirs), 4), np.float32) if geometry else None
    for i in range(0, len(dirs), RAYS):
        part = slice(i, i + RAYS)
        into = None if surface is None else surface[part]
        _trace_part(triangles, scene, lighting, eye, dirs[part], color[part], into)
    return color, surface


def _trace_part(
    triangles: Triangles,
    scene: rtcore_scene.EmbreeScene,
    lighting: Lighting,
    eye: np.ndarray,
    dirs: np.ndarray,
    color: np.ndarray,
    surface: np.ndarray | None,
) -> None:
    rays, start = np.arange(len(dirs)), np.zeros(len(dirs), np.float32)
    origins = np.broadcast_to(eye.astype(np.float32), dirs.shape)
    while len(rays):
        hits = scene.run(np.ascontiguousarray(origins), dirs[rays], output=1)
        hit = np.flatnonzero(hits["primID"] >= 0)
        rays, ids, distance = rays[hit], hits["primID"][hit], start[hit] + hits["tfar"][hit]
        rgba, normal = _shade(triangles, lighting, ids, hits["u"][hit], hits["v"][hit], dirs[rays])
        hole = triangles.cutout[ids] & (rgba[:, 3] < 0.5)
        rgba[:, 3] = 1
        color[rays] = np.where(hole[:, None], 0, rgba) if hole.any() else rgba
        if surface is not None:
            surface[rays] = np.where(hole[:, None], 0, np.column_stack([normal, distance]))
        # Rays that hit a hole continue from just behind it.
        rays, start = rays[hole], distance[hole] + 1e-4
        origins = eye.astype(np.float32) + start[:, None] * dirs[rays]


def _shade(
    triangles: Triangles,
    lighting: Lighting,
    ids: np.ndarray,
    u: np.ndarray,
    v: np.ndarray,
    dirs: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Shades the hits of rays along `dirs` on triangles `ids` at barycentric (u, v). Returns [R 4] linear colour and the material's
    alpha, and [R 3] the unit normal of the visible side."""
    normal, rgba = look_up(triangles, ids, u, v)
    # The flat normal tells which side is visible, because a smooth normal may point past the silhouette.
    facing = triangles.facing[ids]
    side = np.copysign(
        1, np.einsum("rc,rc->r", facing, normal) * -np.einsum("rc,rc->r", facing, dirs)
    )
    normal *= (side / np.sqrt(np.einsum("rc,rc->r", normal, normal) + 1e-12))[:, None]
    sun = np.maximum(normal @ lighting.direction, 0)
    rgba[:, :3] *= (lighting.sky + lighting.above * normal[:, 2] + lighting.sun * sun)[:, None]
    return rgba, normal
