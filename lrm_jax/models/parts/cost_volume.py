"""Cost volumes: how well the views of a scene agree at every voxel of the cube [-1, 1]^3, and a 3D U-Net that refines this.

SparseNeuS (https://arxiv.org/abs/2206.05737, section 3.1): a voxel's features are the variance and the mean of those that the
views have where it projects to. Only voxels that several views see are active. The reference's U-Net is sparse: it computes active
sites only, with torchsparse. Nine tenths of the voxels of an object in the middle of its views are active, so here it is dense,
with masks that make it the same function.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from lrm_jax.models.parts import norms, torch_layout
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import grids
from lrm_jax.types import Cameras


def project(cameras: Cameras, xyz_Q3: Float[Array, "Q 3"]) -> tuple[Array, Array]:
    """As `ops.cameras.project` for one camera, but finite: points in the plane of its centre project to nowhere."""
    uv_Q2, z_Q = ops_cameras.project(cameras, xyz_Q3)
    return jnp.where(jnp.abs(z_Q)[:, None] < 1e-6, 1e6, uv_Q2), z_Q


def in_image(uv_Q2: Float[Array, "Q 2"], z_Q: Float[Array, "Q"], height: int, width: int):
    """Whether points project between the centres of an image's outermost pixels."""
    half_2 = 0.5 / jnp.array([[width, height]], jnp.float32)
    return ((uv_Q2 >= half_2) & (uv_Q2 <= 1 - half_2)).all(-1) & (z_Q > 0)


def grid_points(side: int) -> Float[Array, "X Y Z 3"]:
    """The voxels of a volume, from -1 to 1 along each axis; the first index is x."""
    along = jnp.linspace(-1.0, 1.0, side)
    return jnp.stack(jnp.meshgrid(along, along, along, indexing="ij"), axis=-1)


def cost_volume(
    features_VHWC: Float[Array, "V H W C"], cameras: Cameras, side: int, unmasked: bool
) -> tuple[Float[Array, "X Y Z 2*C"], Bool[Array, "X Y Z"]]:
    """The variance and the mean of the views' features at every voxel, and which voxels are active.

    The views are added one after another, so that memory does not grow with their number.

    Args:
      features_VHWC: of one scene.
      cameras: Cameras[V].
      side: of the volume, in voxels.
      unmasked: also add the features of views that do not see the voxel: of a pixel that the voxel misses by less than one, or
        that it would be mirrored to from behind the camera.

    Returns:
      Features, 0 where a voxel is not active: where fewer than two views see it.
    """
    xyz_Q3 = grid_points(side).reshape(-1, 3)
    V, H, W, C = features_VHWC.shape

    @jax.checkpoint
    def add(sums, view):
        total, squares, count = sums
        features_HWC, camera = view
        uv_Q2, z_Q = project(camera, xyz_Q3)
        seen_Q = in_image(uv_Q2, z_Q, H, W)
        found_QC = grids.sample_plane(features_HWC, 2 * uv_Q2 - 1).astype(jnp.float32)
        if not unmasked:
            found_QC = jnp.where(seen_Q[:, None], found_QC, 0)
        return (total + found_QC, squares + jnp.square(found_QC), count + seen_Q), None

    zeros = jnp.zeros((xyz_Q3.shape[0], C))
    (total, squares, count), _ = jax.lax.scan(
        add, (zeros, zeros, jnp.zeros(xyz_Q3.shape[0])), (features_VHWC, cameras)
    )
    active_Q = count > min(1, V - 1)
    share_Q1 = 1 / (count + 1e-5)[:, None]
    mean_QC = total * share_Q1
    cost = jnp.concatenate([squares * share_Q1 - jnp.square(mean_QC), mean_QC], axis=-1)
    cost = jnp.where(active_Q[:, None], cost, 0)
    return cost.reshape(side, side, side, 2 * C), active_Q.reshape(side, side, side)


class MaskedConv(nn.Module):
    """3 x 3 x 3 convolution, batch norm and ReLU at the active sites of a level, as in a sparse network.

    `step` is "same", "down" (stride 2) or "up" (transposed, stride 2: to a level with one site less than twice as many).
    """

    features: int
    step: str = "same"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x_BXYZC, mask_BXYZ, of_scene: bool):
        """`mask_BXYZ`: the active sites of the result."""
        fan = self.features if self.step == "up" else x_BXYZC.shape[-1]
        init = nn.initializers.uniform(2 / (27 * fan) ** 0.5)

        def centred(key, shape):
            return init(key, shape) - 1 / (27 * fan) ** 0.5

        # The reference's order: the offset along x changes fastest.
        kernel_KCF = self.param("kernel", centred, (27, x_BXYZC.shape[-1], self.features))
        kernel = kernel_KCF.reshape(3, 3, 3, *kernel_KCF.shape[1:]).transpose(2, 1, 0, 3, 4)
        x_BXYZC, kernel = x_BXYZC.astype(self.dtype), kernel.astype(self.dtype)
        if self.step == "up":
            y_BXYZF = transposed_convolution(x_BXYZC, kernel)
        else:
            y_BXYZF = convolution(x_BXYZC, kernel, 2 if self.step == "down" else 1)
        y_BXYZF = norms.BatchNorm(name="norm")(y_BXYZF, of_scene, mask_BXYZ)
        # Masked again: the norm's bias would fill the other sites.
        return jnp.where(mask_BXYZ[..., None], nn.relu(y_BXYZF), 0)


def convolution(
    x_BXYZC: Float[Array, "B X Y Z C"], kernel: Float[Array, "3 3 3 C F"], stride: int
) -> Float[Array, "B x y z F"]:
    """3 x 3 x 3 convolution of a volume with zeros around it.

    As a convolution of the slices along x with their neighbours as further channels: on a CPU three times as fast.
    """
    padded = jnp.pad(x_BXYZC, ((0, 0), (1, 1), (0, 0), (0, 0), (0, 0)))
    last = padded.shape[1] - 3
    near = [jax.lax.slice_in_dim(padded, i, i + last + 1, stride, axis=1) for i in range(3)]
    near_BxYZC = jnp.concatenate(near, axis=-1)
    flat = near_BxYZC.reshape(-1, *near_BxYZC.shape[2:])
    kernel = kernel.transpose(1, 2, 0, 3, 4).reshape(3, 3, -1, kernel.shape[-1])
    y = jax.lax.conv_general_dilated(
        flat, kernel, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y.reshape(*near_BxYZC.shape[:2], *y.shape[1:])


def transposed_convolution(
    x_BXYZC: Float[Array, "B x y z C"], kernel: Float[Array, "3 3 3 C F"]
) -> Float[Array, "B X Y Z F"]:
    """3 x 3 x 3 transposed convolution with stride 2: n sites along an axis become 2 n - 1.

    Each site's contributions to the 27 sites around it are one product; then they are added up, one axis after another.
    """
    C, F = kernel.shape[3:]
    y = x_BXYZC @ kernel.transpose(3, 0, 1, 2, 4).reshape(C, 27 * F)
    y = y.reshape(*x_BXYZC.shape[:4], 3, 3, 3, F)
    for axis in (1, 2, 3):
        before, here, after = (jnp.take(y, i, axis=4) for i in range(3))
        # The site between two others gets the later contribution of one and the earlier of the other.
        between = jax.lax.slice_in_dim(after, 0, -1, axis=axis)
        between = between + jax.lax.slice_in_dim(before, 1, None, axis=axis)
        between = jnp.pad(between, [(0, int(i == axis)) for i in range(between.ndim)])
        y = jnp.stack([here, between], axis=axis + 1)
        y = y.reshape(*y.shape[:axis], -1, *y.shape[axis + 2 :])
        y = jax.lax.slice_in_dim(y, 0, -1, axis=axis)
    return y


class VolumeUNet(nn.Module):
    """The 3D U-Net over active voxels: three levels down and up, with sums across."""

    channels: int = 16
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        cost_BXYZC: Float[Array, "B X Y Z C"],
        active_BXYZ: Bool[Array, "B X Y Z"],
        of_scene: bool,
    ) -> Float[Array, "B X Y Z D"]:
        """The refined features, 0 where a voxel is not active."""
        masks = levels(active_BXYZ)
        x = jnp.pad(cost_BXYZC, ((0, 0), (0, 1), (0, 1), (0, 1), (0, 0)))

        def conv(number, level, features, step="same"):
            layer = MaskedConv(features, step, self.dtype, name=f"conv{number}")
            return lambda x: layer(x, masks[level], of_scene)

        x0 = conv(0, 0, self.channels)(x)
        x1 = conv(2, 1, 16)(conv(1, 1, 16, "down")(x0))
        x2 = conv(4, 2, 32)(conv(3, 2, 32, "down")(x1))
        x3 = conv(6, 3, 64)(conv(5, 3, 64, "down")(x2))
        x2 = x2 + conv(7, 2, 32, "up")(x3)
        x1 = x1 + conv(9, 1, 16, "up")(x2)
        x0 = x0 + conv(11, 0, self.channels, "up")(x1)
        return x0[:, :-1, :-1, :-1].astype(jnp.float32)


def levels(active_BXYZ: Bool[Array, "B X Y Z"]) -> list[Bool[Array, "B x y z"]]:
    """The active sites of the four levels: 2^l voxels apart at level l.

    As torchsparse 1.4 makes them: a coarse site is active if it is next to an active fine one, even beyond the end of the volume,
    but never below the smallest active coordinate of an axis.
    """
    masks = [jnp.pad(active_BXYZ, ((0, 0), (0, 1), (0, 1), (0, 1)))]
    for _ in range(3):
        fine = masks[-1]
        coarse = jax.lax.reduce_window(
            fine,
            False,
            jax.lax.bitwise_or,
            (1, 3, 3, 3),
            (1, 2, 2, 2),
            ((0, 0), (1, 1), (1, 1), (1, 1)),
        )
        for axis in (1, 2, 3):
            others = tuple({1, 2, 3} - {axis})
            smallest_B = jnp.argmax(fine.any(others), axis=1)
            index = 2 * jnp.arange(coarse.shape[axis])
            above = index[None] >= smallest_B[:, None]
            coarse = coarse & jnp.expand_dims(above, others)
        masks.append(coarse)
    return masks


def entries(torch: str, ours: str) -> list[torch_layout.Entry]:
    """A `VolumeUNet`."""
    table = []
    for number in (0, 1, 2, 3, 4, 5, 6, 7, 9, 11):
        at, to = f"{torch}conv{number}.net", f"{ours}.conv{number}"
        table.append(torch_layout.same(f"{at}.0.kernel", f"{to}.kernel"))
        table += norms.entries(f"{at}.1", f"{to}.norm")
    return table
