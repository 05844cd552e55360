"""Variants of objects, for training: other proportions, other colours, and every other time a second object beside or on them.

More of what a model can learn from the same files. Ours; of its kind are the random compositions of LRM-Zero
(https://arxiv.org/abs/2406.09371), which stand primitives where objects of a collection stand here.
"""

import dataclasses

import numpy as np

from lrm_jax.data import splits
from rendering.protocols import rng_of
from rendering.surfaces import Triangles, normalized

STRETCH = 0.5  # an axis is scaled by exp(U[-STRETCH, STRETCH])
TAPER = 0.4  # at the top, where z is 1, an object is wider or narrower by up to this share
HUES = 6  # as many parts of the circle of hues change their colours apart from each other, and greys do
GREY = 0.15  # of saturation: less has no hue


def plan(objects: dict[str, tuple], count: int, seed: int) -> dict[str, tuple]:
    """uid~1, uid~2 ... -> (path, member, [path and member of the second object, if there is one]), `count` of each object.

    Those that `splits` holds out of training have none, and are in none.

    Args:
      objects: uid -> (path, member).
    """
    names = [uid for uid in objects if not splits.in_validation(uid)]
    planned = {}
    for uid in names:
        for number in range(1, count + 1):
            rng = rng_of(f"{uid}~{number}", seed, 3)
            other = objects[names[rng.integers(len(names))]]
            planned[f"{uid}~{number}"] = (*objects[uid], [other] if rng.uniform() < 0.5 else [])
    return planned


def vary(
    uid: str, triangles: Triangles, others: list[Triangles], box: float | None, seed: int
) -> Triangles:
    """The variant `uid` of an object, with others beside or on it, normalised as `load_triangles` does with `box`."""
    rng = rng_of(uid, seed, 4)
    varied = _recolored(_reshaped(triangles, rng), rng)
    for other in others:
        varied = _joined(varied, _recolored(_reshaped(other, rng), rng), rng)
    xyz, facing, centre, scale = normalized(varied.xyz, box)
    return dataclasses.replace(varied, xyz=xyz, facing=facing, centre=centre, scale=scale)


def _reshaped(triangles: Triangles, rng: np.random.Generator) -> Triangles:
    """Turned by quarters, stretched along the axes, and every other time tapered."""
    turn = np.linalg.matrix_power(np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]]), rng.integers(4))
    stretch = np.exp(rng.uniform(-STRETCH, STRETCH, 3))
    xyz = triangles.xyz @ turn.T * stretch
    taper = rng.uniform(-TAPER, TAPER) * (rng.uniform() < 0.5)
    xyz[..., :2] *= 1 + taper * xyz[..., 2:] / np.abs(xyz[..., 2]).max().clip(1e-6)
    # Flat triangles get the normals that they now have; smooth ones' follow the stretch, and not the little that a taper does.
    flat = np.cross(xyz[:, 1] - xyz[:, 0], xyz[:, 2] - xyz[:, 0])
    flat /= np.linalg.norm(flat, axis=1, keepdims=True) + 1e-12
    is_flat = ~np.any([step[:, :3] for step in triangles.attributes[1:]], axis=(0, 2))
    first, *steps = (np.array(a) for a in triangles.attributes)
    for values in (first, *steps):
        values[:, :3] = values[:, :3] @ turn.T / stretch
    first[is_flat, :3] = flat[is_flat]
    return dataclasses.replace(triangles, xyz=xyz.astype(np.float32), attributes=(first, *steps))


def _recolored(triangles: Triangles, rng: np.random.Generator) -> Triangles:
    """Every other time in other colours: those of a part of the circle of hues change their channels and brightness alike."""
    change = np.stack([np.eye(3)[rng.permutation(3)] for _ in range(HUES + 1)])
    change = (change * rng.uniform(0.4, 1.0, (HUES + 1, 1, 3))).astype(np.float32)
    if rng.uniform() < 0.5:
        return triangles
    if triangles.textures:
        textures = {}
        for index, texture in triangles.textures.items():
            rgb = np.einsum("hwc,hwcd->hwd", texture[..., :3], change[_hue(texture[..., :3])])
            textures[index] = np.concatenate([rgb, texture[..., 3:]], axis=-1)
        return dataclasses.replace(triangles, textures=textures)
    attributes = [np.array(a) for a in triangles.attributes]
    which = change[_hue(attributes[0][:, 5:8])]
    for values in attributes:
        values[:, 5:8] = np.einsum("mc,mcd->md", values[:, 5:8], which)
    return dataclasses.replace(triangles, attributes=tuple(attributes))


def _hue(rgb: np.ndarray) -> np.ndarray:
    """[...] which of HUES parts of the circle rgb[... 3] falls into; HUES for greys."""
    high, low = rgb.max(-1), rgb.min(-1)
    spread = high - low
    red, green, blue = np.moveaxis(rgb, -1, 0)
    hue = np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi)
    return np.where(
        spread < GREY * high, HUES, np.floor((hue + 0.5 / HUES) % 1 * HUES).clip(0, HUES - 1)
    ).astype(int)


def _joined(a: Triangles, b: Triangles, rng: np.random.Generator) -> Triangles:
    """Both as one: b is 0.3 to 1 times as large, and stands on the top of a, or beside it on the same ground, or in it."""
    xyz = b.xyz * rng.uniform(0.3, 1.0)
    low, high = a.xyz.min((0, 1)), a.xyz.max((0, 1))
    its_low, its_high = xyz.min((0, 1)), xyz.max((0, 1))
    move = rng.uniform(-0.3, 0.3, 3) * (high - low)
    if rng.uniform() < 0.4:
        move[2] = high[2] - its_low[2]
    else:
        axis, side = rng.integers(2), rng.integers(2)
        touching = (low[axis] - its_high[axis], high[axis] - its_low[axis])[side]
        move[axis] = touching * rng.uniform(0.6, 1.1)
        move[2] = low[2] - its_low[2]
    joined = {
        name: np.concatenate([getattr(a, name), getattr(b, name)]) for name in ("facing", "cutout")
    }
    offset = int(a.material.max()) + 1
    return dataclasses.replace(
        a,
        xyz=np.concatenate([a.xyz, (xyz + move).astype(np.float32)]),
        attributes=tuple(map(np.concatenate, zip(a.attributes, b.attributes, strict=True))),
        material=np.concatenate([a.material, b.material + offset]),
        textures=a.textures | {index + offset: t for index, t in b.textures.items()},
        **joined,
    )
