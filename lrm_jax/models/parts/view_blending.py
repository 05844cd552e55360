"""The colour of points as a blend of what the source views show there: pure functions of explicit weights.

IBRNet (https://arxiv.org/abs/2102.13090, section 3.2) without its ray transformer, as SparseNeuS uses it (section 3.3 there): each
view's weight comes from its own features, their mean and variance over the views, the volume's features, and the angle between the
direction of that view and the one that the colour is wanted for.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from lrm_jax.models.parts import torch_layout
from lrm_jax.models.parts.feature_pyramid import CHANNELS
from lrm_jax.models.parts.layers import torch_linear_init

IMAGE = 3 + CHANNELS  # colour and features of a view
# name of a layer in the reference: (inputs, outputs)
LAYERS = {
    "ray_dir_fc.0": (4, 16), "ray_dir_fc.2": (16, IMAGE), "base_fc.0": (16 + 3 * IMAGE, 64), "base_fc.2": (64, 32),
    "vis_fc.0": (32, 32), "vis_fc.2": (32, 33), "vis_fc2.0": (32, 32), "vis_fc2.2": (32, 1), "rgb_fc.0": (37, 16),
    "rgb_fc.2": (16, 8), "rgb_fc.4": (8, 1),
}  # fmt: skip


class Blending(nn.Module):
    """The weights: (kernel, bias) by layer, and the scalar "s"."""

    @nn.compact
    def __call__(self) -> dict:
        weights = {"s": self.param("s", lambda _: jnp.float32(0.2))}
        for name, (size, features) in LAYERS.items():
            ours = name.replace(".", "_")
            usual = nn.initializers.he_normal()
            init = torch_linear_init if name.startswith("ray_dir") else usual
            kernel = self.param(f"{ours}_kernel", init, (size, features))
            weights[name] = kernel, self.param(f"{ours}_bias", nn.initializers.zeros, (features,))
        return weights


def blend(
    weights: dict,
    geometry_QC: Float[Array, "Q C"],
    images_VQC: Float[Array, "V Q F"],
    angles_VQ4: Float[Array, "V Q 4"],
    seen_VQ: Bool[Array, "V Q"],
    dtype: str,
) -> Float[Array, "Q 3"]:
    """The colour of points.

    Args:
      geometry_QC: the volume's features.
      images_VQC: colour and features of each view where the point projects to.
      angles_VQ4: see `angles`.
      seen_VQ: the views that see the point. Without any, the colour is their plain mean.
      dtype: of the products.
    """

    def linear(name, x, part=slice(None), bias=True):
        kernel, bias_F = weights[name]
        y = x.astype(dtype) @ kernel[part].astype(dtype)
        return y + bias_F.astype(dtype).reshape((1,) * (y.ndim - 1) + (-1,)) if bias else y

    def mlp(name, x):
        return linear(f"{name}.2", nn.elu(linear(f"{name}.0", x)))

    seen_VQ1 = seen_VQ[..., None].astype(jnp.float32)
    x_VQF = images_VQC + nn.elu(mlp("ray_dir_fc", angles_VQ4)).astype(jnp.float32)
    # Views from the wanted direction count most. Parity: the smallest is over all views, also those that do not see the point.
    near_VQ1 = jnp.exp(jnp.abs(weights["s"]) * (angles_VQ4[..., 3:] - 1))
    near_VQ1 = (near_VQ1 - near_VQ1.min(0, keepdims=True)) * seen_VQ1
    near_VQ1 = near_VQ1 / (near_VQ1.sum(0, keepdims=True) + 1e-8)
    mean_QF = (near_VQ1 * x_VQF).sum(0)
    variance_QF = (near_VQ1 * jnp.square(x_VQF - mean_QF[None])).sum(0)
    # The first layer's product with what all views share is made once.
    shared_QF = jnp.concatenate([geometry_QC, mean_QF, variance_QF], axis=-1)
    size = shared_QF.shape[-1]
    shared_QF = linear("base_fc.0", shared_QF, slice(size))
    own_VQF = linear("base_fc.0", x_VQF, slice(size, None), bias=False)
    x_VQF = nn.elu(linear("base_fc.2", nn.elu(own_VQF + shared_QF[None])))
    y_VQF = nn.elu(mlp("vis_fc", x_VQF * near_VQ1.astype(dtype)))
    x_VQF = x_VQF + y_VQF[..., :32]
    visible_VQ1 = nn.sigmoid(y_VQF[..., 32:]) * seen_VQ1.astype(dtype)
    visible_VQ1 = nn.sigmoid(mlp("vis_fc2", x_VQF * visible_VQ1)) * seen_VQ1.astype(dtype)
    x_VQF = jnp.concatenate([x_VQF, visible_VQ1, angles_VQ4.astype(dtype)], axis=-1)
    x_VQF = nn.elu(linear("rgb_fc.0", x_VQF))
    logits_VQ1 = linear("rgb_fc.4", nn.elu(linear("rgb_fc.2", x_VQF))).astype(jnp.float32)
    share_VQ1 = jax.nn.softmax(jnp.where(seen_VQ[..., None], logits_VQ1, -1e9), axis=0)
    return (share_VQ1 * images_VQC[..., :3]).sum(0)


def angles(
    towards_Q3: Float[Array, "Q 3"], eyes_V3: Float[Array, "V 3"], xyz_Q3: Float[Array, "Q 3"]
) -> Float[Array, "V Q 4"]:
    """How the direction to each view differs from the wanted one: the unit vector of their difference, and their cosine.

    Args:
      towards_Q3: unit vectors from the points to where the colour is wanted for.
      eyes_V3: the centres of the views' cameras.
    """
    to_view_VQ3 = eyes_V3[:, None] - xyz_Q3[None]
    to_view_VQ3 = to_view_VQ3 / (jnp.linalg.norm(to_view_VQ3, axis=-1, keepdims=True) + 1e-6)
    difference_VQ3 = towards_Q3[None] - to_view_VQ3
    length_VQ1 = jnp.linalg.norm(difference_VQ3, axis=-1, keepdims=True)
    cos_VQ1 = (towards_Q3[None] * to_view_VQ3).sum(-1, keepdims=True)
    found = jnp.concatenate([difference_VQ3 / jnp.maximum(length_VQ1, 1e-6), cos_VQ1], axis=-1)
    return jax.lax.stop_gradient(found)


def entries(torch: str, ours: str) -> list[torch_layout.Entry]:
    """A `Blending`."""
    table = [torch_layout.same(f"{torch}s", f"{ours}.s")]
    for name in LAYERS:
        to = f"{ours}.{name.replace('.', '_')}"
        table.append(torch_layout.permuted(f"{torch}{name}.weight", f"{to}_kernel", (1, 0)))
        table.append(torch_layout.same(f"{torch}{name}.bias", f"{to}_bias"))
    return table
