"""Interpolated lookup in feature grids."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CORNERS = [
    np.array([[x, y, z]], np.float32) for x in (0, 1) for y in (0, 1) for z in (0, 1)
]  # of a cell, in indices


def sample_plane(plane: Float[Array, "h w C"], xy: Float[Array, "Q 2"]) -> Float[Array, "Q C"]:
    """Bilinear lookup with zeros outside: torch's grid_sample(align_corners=False, padding_mode="zeros").

    Args:
      plane: a feature plane. [-1, 1]^2 spans it from the outer edge of the first cell to the outer edge of the last.
      xy: x along w, y along h.
    """
    h, w, _ = plane.shape
    size = jnp.array([w, h], xy.dtype)[None]
    position = (xy + 1) * 0.5 * size - 0.5
    low = jnp.floor(position)
    fraction = position - low
    flat = plane.reshape(h * w, -1)
    result = 0.0
    for dy in (0, 1):
        for dx in (0, 1):
            column, row = low[:, 0] + dx, low[:, 1] + dy
            weight = jnp.abs(1 - dx - fraction[:, 0]) * jnp.abs(1 - dy - fraction[:, 1])
            inside = (column >= 0) & (column < w) & (row >= 0) & (row < h)
            index = (jnp.clip(row, 0, h - 1) * w + jnp.clip(column, 0, w - 1)).astype(jnp.int32)
            weight = jnp.where(inside, weight, 0.0).astype(plane.dtype)
            result = result + weight[:, None] * flat.at[index].get(mode="promise_in_bounds")
    return result


def sample_triplane(
    triplane: Float[Array, "3 h w C"], xyz: Float[Array, "Q 3"], axes: tuple[tuple[int, int], ...]
) -> Float[Array, "Q C"]:
    """Looks points up in three planes and sums; `axes[p]` are the coordinates along plane p's width and height.

    Computed in float32, whatever the planes' type. The gradient adds to a cell once for every lookup: 16 bits cannot hold such a
    sum, and for 2 million points an H200 took 4.2 s instead of 12 ms.
    """

    # A loop, so that the sum is stored: XLA would fuse the lookups into each consumer of the sum and repeat them there.
    def add(total, plane_and_xy):
        return total + sample_plane(*plane_and_xy), None

    xy_PQ2 = xyz[:, jnp.array(axes)].transpose(1, 0, 2)
    total = jnp.zeros((xyz.shape[0], triplane.shape[-1]), jnp.float32)
    total, _ = jax.lax.scan(add, total, (triplane.astype(jnp.float32), xy_PQ2))
    return total.astype(triplane.dtype)


def sample_volume(
    volume: Float[Array, "X Y Z C"], index: Float[Array, "Q 3"], outside: str
) -> Float[Array, "Q C"]:
    """Trilinear lookup at fractional indices along x, y and z.

    Args:
      outside: what lies beyond the volume: "zeros", or "edge" for its outermost values.
    """
    low = jax.lax.stop_gradient(jnp.floor(index))
    result = 0.0
    for corner in CORNERS:
        weight = jnp.prod(1 - corner + (2 * corner - 1) * (index - low), axis=-1)
        result = result + weight[:, None] * _voxels(volume, low + corner, outside)
    return result


def sample_volume_with_gradient(
    volume: Float[Array, "X Y Z C"], index: Float[Array, "Q 3"], outside: str
) -> tuple[Float[Array, "Q C"], Float[Array, "Q 3 C"]]:
    """As `sample_volume`, and the derivative with respect to the three indices.

    The derivative is a difference of the same eight voxels, so that its own gradient is one more sum, not a scatter of one.
    """
    low = jax.lax.stop_gradient(jnp.floor(index))
    value, gradient = 0.0, 0.0
    for corner in CORNERS:
        x, y, z = (1 - corner + (2 * corner - 1) * (index - low)).T
        found_QC = _voxels(volume, low + corner, outside)
        others_Q3 = jnp.stack([y * z, x * z, x * y], axis=-1) * (2 * corner - 1)
        value = value + (x * y * z)[:, None] * found_QC
        gradient = gradient + others_Q3[..., None] * found_QC[:, None]
    return value, gradient


def _voxels(volume_XYZC, index_Q3, outside):
    """The values of the voxels with these whole numbers as indices."""
    size = np.array([volume_XYZC.shape[:3]], np.float32)
    inside = ((index_Q3 >= 0) & (index_Q3 < size)).all(-1)
    i, j, k = jnp.clip(index_Q3, 0, size - 1).astype(jnp.int32).T
    row = (i * volume_XYZC.shape[1] + j) * volume_XYZC.shape[2] + k
    flat = volume_XYZC.reshape(-1, volume_XYZC.shape[-1])
    found_QC = flat.at[row].get(mode="promise_in_bounds")
    return found_QC if outside == "edge" else jnp.where(inside[:, None], found_QC, 0)
