"""The field of a triplane: points are looked up in projected planes and go through the decoder's MLP.

One function, with a kernel for each kind of device.
"""

import einops
import jax.numpy as jnp
from jaxtyping import Array, Float

from lrm_jax.kernels import field_cuda, field_plain, field_tpu
from lrm_jax.parallel import sharding

RAW = field_tpu.RAW  # the name of a result that is worth keeping, see `field_tpu`
# Neighbouring points lie in few cells of a plane. So along rays, points are ordered in tiles: of 8 x 8 neighbouring rays by 16
# samples, and in each, of 4 x 4 rays by 8 samples.
TILE_SIDE, TILE_SAMPLES = 8, 16
_PIXELS, _PIXELS_IN_TILES = "V (h i a) (w j b) ...", "(V h w i j a b) ..."
_PIXEL_SIZES = dict(i=2, a=4, j=2, b=4)
_SAMPLES, _SAMPLES_IN_TILES = "(R i r) (S j s) x", "(R S i j r s) x"
_SAMPLE_SIZES = dict(i=4, r=16, j=2, s=8)


def field(
    projected_PhwF: Float[Array, "P h w F"],
    layers: list,
    xyz_Q3: Float[Array, "Q 3"],
    axes: tuple[tuple[int, int], ...],
    activation: str,
) -> Float[Array, "Q 4"]:
    """Raw density and raw colour at points, in float32.

    Args:
      projected_PhwF: the planes after the first layer without its bias, see `triplane.project_planes`; they span [-1, 1]^3 and
        are 0 outside. Their dtype is that of the products, which are added in float32.
      layers: kernels (in, out) and biases of the MLP, the first layer's too.
      xyz_Q3: in any order, but fast only if neighbours in the array are neighbours in space.
      axes: the two coordinates along each plane's width and height.
      activation: "relu" or "silu", before each layer but the first.
    """
    if is_fused(projected_PhwF):
        return field_cuda.field_by_triton(projected_PhwF, layers, xyz_Q3, axes, activation)
    if sharding.platform() == "tpu":
        return field_tpu.field_by_windows(projected_PhwF, layers, xyz_Q3, axes, activation)
    return field_plain.field_by_xla(projected_PhwF, layers, xyz_Q3, axes, activation)


def along_rays(
    projected_PhwF: Float[Array, "P h w F"],
    layers: list,
    xyz_RS3: Float[Array, "R S 3"],
    axes: tuple[tuple[int, int], ...],
    activation: str,
) -> Float[Array, "R S 4"]:
    """`field` at S increasing samples on each of R rays. On accelerators, rays come in the order of `in_tiles`."""
    R, S = xyz_RS3.shape[:2]
    if not orders_rays() or R % TILE_SIDE**2 or S % TILE_SAMPLES:
        raw_Q4 = field(projected_PhwF, layers, xyz_RS3.reshape(-1, 3), axes, activation)
        return raw_Q4.reshape(R, S, 4)
    raw_Q4 = field(projected_PhwF, layers, samples_in_tiles(xyz_RS3), axes, activation)
    counts = dict(R=R // TILE_SIDE**2, S=S // TILE_SAMPLES)
    return einops.rearrange(raw_Q4, f"{_SAMPLES_IN_TILES} -> {_SAMPLES}", **counts, **_SAMPLE_SIZES)


def samples_in_tiles(xyz_RS3: Float[Array, "R S 3"]) -> Float[Array, "Q 3"]:
    """S samples on each of R rays, which are `in_tiles`, in the order of points that `along_rays` gives to `field`."""
    return einops.rearrange(xyz_RS3, f"{_SAMPLES} -> {_SAMPLES_IN_TILES}", **_SAMPLE_SIZES)


def is_fused(projected_PhwF: Float[Array, "P h w F"]) -> bool:
    """Whether `field` is the kernel of GPUs, which keeps nothing for its gradient but its arguments."""
    return sharding.platform() == "gpu" and field_cuda.can(projected_PhwF)


def orders_rays() -> bool:
    """Whether rays should come in tiles: not on a CPU, whose cache holds the planes."""
    return sharding.platform() != "cpu"


def in_tiles(image_VHWX: Float[Array, "V H W *X"]) -> Float[Array, "R *X"]:
    """Pixels in the order that `along_rays` asks for. Edges are repeated until each side is a multiple of a tile's."""
    _, H, W, *X = image_VHWX.shape
    padding = ((0, 0), (0, -H % TILE_SIDE), (0, -W % TILE_SIDE), *[(0, 0)] * len(X))
    return einops.rearrange(
        jnp.pad(image_VHWX, padding, mode="edge"),
        f"{_PIXELS} -> {_PIXELS_IN_TILES}",
        **_PIXEL_SIZES,
    )


def from_tiles(
    tiled_RX: Float[Array, "R *X"], shape: tuple[int, int, int]
) -> Float[Array, "V H W *X"]:
    """The images of which `in_tiles` made `tiled_RX`."""
    V, H, W = shape
    h, w = -(-H // TILE_SIDE), -(-W // TILE_SIDE)
    return einops.rearrange(tiled_RX, f"{_PIXELS_IN_TILES} -> {_PIXELS}", V=V, h=h, w=w, **_PIXEL_SIZES)[:, :H, :W]  # fmt: skip
