"""The features of images for a cost volume: a pyramid of three scales, as SparseNeuS takes from CasMVSNet.

Papers: https://arxiv.org/abs/1612.03144 (feature pyramids), https://arxiv.org/abs/1912.06378 (CasMVSNet), https://arxiv.org/abs/2206.05737
(SparseNeuS, section 3.1).
"""

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.models.parts import norms, torch_layout
from lrm_jax.models.parts.layers import torch_linear_init

WIDTHS = (8, 16, 32)  # of the three scales: 1, 1/2, 1/4
CHANNELS = sum(WIDTHS)  # of the features that the scales give together
COMPRESSED = 16  # channels of the features in the cost volume


class ConvNorm(nn.Module):
    """Convolution without bias, activated norm."""

    features: int
    side: int = 3
    stride: int = 1
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BVHWC, of_scene: bool):
        x_BVHWC = convolution(self.features, self.side, self.stride, False, self.dtype, "conv")(
            x_BVHWC
        )
        return norms.BatchNorm(leaky=True, name="norm")(x_BVHWC, of_scene)


class FeaturePyramid(nn.Module):
    """Features of views at three scales, resized to the views and concatenated, coarsest first."""

    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, rgb_BVHW3: Float[Array, "B V H W 3"], of_scene: bool
    ) -> Float[Array, "B V H W 56"]:
        """Sides are multiples of 4."""

        def lateral(features, name):
            return convolution(features, 1, 1, True, self.dtype, name)

        def smooth(features, name):
            return convolution(features, 3, 1, True, self.dtype, name)

        scales, x = [], rgb_BVHW3.astype(self.dtype)
        for scale, width in enumerate(WIDTHS):
            first = dict(side=5, stride=2) if scale else {}
            x = ConvNorm(width, dtype=self.dtype, name=f"conv{scale}_0", **first)(x, of_scene)
            for layer in range(1, 3 if scale else 2):
                x = ConvNorm(width, dtype=self.dtype, name=f"conv{scale}_{layer}")(x, of_scene)
            scales.append(x)
        fine, middle, coarse = scales
        coarse = lateral(WIDTHS[2], "toplayer")(coarse)
        middle = upsampled(coarse, 2) + lateral(WIDTHS[2], "lat1")(middle)
        fine = upsampled(middle, 2) + lateral(WIDTHS[2], "lat0")(fine)
        middle, fine = smooth(WIDTHS[1], "smooth1")(middle), smooth(WIDTHS[0], "smooth0")(fine)
        return jnp.concatenate([upsampled(coarse, 4), upsampled(middle, 2), fine], axis=-1)


def convolution(
    features: int, side: int, stride: int, bias: bool, dtype: str, name: str
) -> nn.Conv:
    """A convolution with `side // 2` zeros around the image, as torch.nn.Conv2d counts padding."""
    return nn.Conv(
        features, (side, side), stride, padding=side // 2, use_bias=bias, dtype=dtype, name=name, kernel_init=torch_linear_init
    )  # fmt: skip


def upsampled(x_BVHWC: Float[Array, "B V H W C"], factor: int) -> Float[Array, "B V H2 W2 C"]:
    """Bilinear, corner pixels onto corner pixels (torch's align_corners=True), as products with two matrices."""
    rows, columns = (_corner_weights(size, factor) for size in x_BVHWC.shape[2:4])
    return jnp.einsum(
        "ih,jw,bvhwc->bvijc", rows.astype(x_BVHWC.dtype), columns.astype(x_BVHWC.dtype), x_BVHWC, precision="highest"
    )  # fmt: skip


def _corner_weights(size: int, factor: int) -> np.ndarray:
    position = np.arange(size * factor) * (size - 1) / max(size * factor - 1, 1)
    weights = np.maximum(1 - np.abs(np.arange(size) - position[:, None]), 0)
    return weights.astype(np.float32)


# -- names of the reference


def conv_entries(torch: str, ours: str, bias: bool) -> list[torch_layout.Entry]:
    """torch.nn.Conv2d, (out, in, y, x), to (y, x, in, out)."""
    entries = [torch_layout.permuted(torch + ".weight", ours + ".kernel", (2, 3, 1, 0))]
    return entries + [torch_layout.same(torch + ".bias", ours + ".bias")] * bias


def conv_norm_entries(torch: str, ours: str) -> list[torch_layout.Entry]:
    """A `ConvNorm`."""
    return [
        *conv_entries(torch + ".conv", ours + ".conv", bias=False),
        *norms.entries(torch + ".bn", ours + ".norm"),
    ]


def entries(torch: str, ours: str) -> list[torch_layout.Entry]:
    """A `FeaturePyramid`."""
    table = []
    for scale in range(3):
        for layer in range(3 if scale else 2):
            table += conv_norm_entries(f"{torch}conv{scale}.{layer}", f"{ours}.conv{scale}_{layer}")
    for name in ("toplayer", "lat1", "lat0", "smooth1", "smooth0"):
        table += conv_entries(f"{torch}{name}", f"{ours}.{name}", bias=True)
    return table
