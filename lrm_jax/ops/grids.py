"""Interpolated lookup in feature grids."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CORNERS = np.indices((2, 2, 2)).reshape(3, 8).T.astype(np.float32)  # of a cell, in indices


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
    found_Q8C, weights_Q83 = _corners(volume, index, outside)
    return jnp.einsum("qk,qkc->qc", jnp.prod(weights_Q83, axis=-1), found_Q8C, precision="highest")


def sample_volume_with_gradient(
    volume: Float[Array, "X Y Z C"], index: Float[Array, "Q 3"], outside: str
) -> tuple[Float[Array, "Q C"], Float[Array, "Q 3 C"]]:
    """As `sample_volume`, and the derivative with respect to the three indices.

    The derivative is a difference of the same eight voxels, so that its own gradient is one more sum, not a scatter of one.
    """
    found_Q8C, weights_Q83 = _corners(volume, index, outside)
    x, y, z = (weights_Q83[..., i] for i in range(3))
    slopes_Q83 = jnp.stack([y * z, x * z, x * y], axis=-1) * (2 * CORNERS - 1)[None]
    slope_Q3C = jnp.einsum("qki,qkc->qic", slopes_Q83, found_Q8C, precision="highest")
    return jnp.einsum("qk,qkc->qc", x * y * z, found_Q8C, precision="highest"), slope_Q3C


def _corners(volume_XYZC, index_Q3, outside):
    """The eight voxels around each point, and how near it is to each along the three axes, 0 to 1."""
    low_Q3 = jax.lax.stop_gradient(jnp.floor(index_Q3))
    fraction_Q83 = (index_Q3 - low_Q3)[:, None]
    weights_Q83 = 1 - CORNERS[None] + (2 * CORNERS - 1)[None] * fraction_Q83
    corner_Q83 = low_Q3[:, None] + CORNERS[None]
    size = np.array([[volume_XYZC.shape[:3]]], np.float32)
    i, j, k = jnp.moveaxis(jnp.clip(corner_Q83, 0, size - 1).astype(jnp.int32), -1, 0)
    row_Q8 = (i * volume_XYZC.shape[1] + j) * volume_XYZC.shape[2] + k
    flat = volume_XYZC.reshape(-1, volume_XYZC.shape[-1])
    found_Q8C = flat.at[row_Q8].get(mode="promise_in_bounds")
    if outside == "zeros":
        inside_Q8 = ((corner_Q83 >= 0) & (corner_Q83 < size)).all(-1)
        found_Q8C = jnp.where(inside_Q8[..., None], found_Q8C, 0)
    return found_Q8C, weights_Q83
