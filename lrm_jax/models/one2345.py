"""One-2-3-45 (https://arxiv.org/abs/2306.16928), its reconstruction: from posed views of an object to a signed distance field.

Features of the views -> their variance and mean at every voxel -> a 3D U-Net -> a signed distance from the volume's features ->
NeuS rendering, with colours blended from the views (SparseNeuS, https://arxiv.org/abs/2206.05737). The views may be photographs, or
drawn by a diffusion model around a single image.

The volume is the cube [-1, 1]^3. `ops.normalization.views_motion` moves a scene's world so that the cube holds what all views see.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lrm_jax.models.parts import (
    chunks,
    cost_volume,
    feature_pyramid,
    sdf,
    torch_layout,
    view_blending,
)
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import grids, neus
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.types import Cameras, Rays, Rendering, Views

VARIANTS = {
    # ckpt_215000.pth of https://huggingface.co/One-2-3-45/code. The released networks always normalise by the statistics of the
    # scene: they are never switched to evaluation.
    "one2345": dict(image_size=256, volume_side=96),
    # Ours, for two CPU cores: configs/one2345.py.
    "nano": dict(
        image_size=64, volume_side=48, num_samples=32, num_refined=4, train_rays=128, anneal_steps=500, late_steps=1, unmasked=False
    ),
    "tiny": dict(
        image_size=16, volume_side=8, num_samples=12, num_rounds=1, num_refined=4, train_rays=16, anneal_steps=2, late_steps=1
    ),
}  # fmt: skip
# The terms of `objective`.
TERMS = ("color_l1", "eikonal", "sparsity", "mask_l1")

# Points at a time, whose colours all views give: about 25 KB each.
POINTS = {"cpu": 2**12, "tpu": 2**15, "gpu": 2**16}


class Weights(NamedTuple):
    """What the pure functions below need of the parameters."""

    sdf: list
    blending: dict
    sharpness: jax.Array


class Samples(NamedTuple):
    """What the field has along rays, at the middles of their intervals."""

    t: jax.Array  # [R S] distance along the ray
    sdf: jax.Array  # [R S]
    gradient: jax.Array  # [R S 3]
    inside: jax.Array  # [R S] whether the voxel is active
    weight: jax.Array  # [R S] of compositing
    rgb: jax.Array  # [R S 3]
    num_seeing: jax.Array  # [R S] number of views that see the sample


class One2345(nn.Module):
    """Cost volume, signed distances, blended colours."""

    image_size: int  # in training; sides of given images are multiples of 4
    volume_side: int  # voxels, a multiple of 8
    num_samples: int = 64  # on a ray, before up-sampling
    num_rounds: int = 4  # of up-sampling
    num_refined: int = 16  # samples that a round adds
    train_rays: int = 512  # of a scene in a step
    anneal_steps: int = 25_000  # after these, surfaces that are seen from behind have no opacity
    late_steps: int = 50_000  # until the sparsity term has its weight, and the mask term begins
    # Parity: views add features to voxels that they do not see, see `cost_volume.cost_volume`.
    unmasked: bool = True
    # "scene": norms use the statistics of the given scene. "running": those of training.
    statistics: str = "scene"
    ray_chunk: int | None = None  # rays rendered at a time; None: chosen for the device
    dtype: str = "float32"

    surface_level = 0.0
    radius = 1.0
    normalize = "frusta"

    def setup(self):
        self.pyramid = feature_pyramid.FeaturePyramid(self.dtype)
        self.compress = feature_pyramid.ConvNorm(feature_pyramid.COMPRESSED, dtype=self.dtype)
        self.unet = cost_volume.VolumeUNet(dtype=self.dtype)
        self.sdf = sdf.SDF()
        self.blending = view_blending.Blending()
        self.log_sharpness = self.param("log_sharpness", lambda _: jnp.float32(0.2))

    def __call__(self, source: Views, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Reconstructs from the source views and renders rays [B V H W]."""
        return self.render(self.encode(source), rays, keys_B)

    def encode(self, source: Views) -> dict:
        """The volume, and the views with their features, of posed views [B V H W 3] on white."""
        return self._encode(source, self.statistics == "scene")

    def _encode(self, source: Views, of_scene: bool):
        features_BVHWC = self.pyramid(source.rgb, of_scene)
        compressed_BVHWC = self.compress(features_BVHWC, of_scene)
        volume_of = functools.partial(
            cost_volume.cost_volume, side=self.volume_side, unmasked=self.unmasked
        )
        cost_BXYZC, active_BXYZ = jax.vmap(volume_of)(compressed_BVHWC, source.cameras)
        images_BVHWC = jnp.concatenate([source.rgb.astype(self.dtype), features_BVHWC], axis=-1)
        return {
            "volume": self.unet(cost_BXYZC, active_BXYZ, of_scene),
            "active": active_BXYZ,
            "images": images_BVHWC,
            "cameras": source.cameras,
        }

    def render(self, scene: dict, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Marches rays [B V H W]; with a key for each scene, the first samples are jittered within their intervals."""

        def composited(samples):
            alpha_R = samples.weight.sum(-1)
            depth_R = (samples.weight * samples.t).sum(-1) / jnp.maximum(alpha_R, 1e-6)
            return Rendering(_weighted(samples), alpha_R, depth_R)

        return self._march(composited, scene, rays, keys_B)

    def query(
        self, scene: dict, xyz: Float[Array, "B Q 3"]
    ) -> tuple[Float[Array, "B Q"], Float[Array, "B Q 3"]]:
        """The signed distance, positive inside, and the colour that is seen along the surface's normal."""

        def look(weights, scene, xyz_Q3, _):
            distance_Q, gradient_Q3 = _signed_distance(weights, scene["volume"], xyz_Q3)
            towards_Q3 = gradient_Q3 / (
                jnp.linalg.norm(gradient_Q3, axis=-1, keepdims=True) + 1e-10
            )
            rgb_Q3, _ = _colors(weights, scene, xyz_Q3, towards_Q3, self.dtype)
            return -distance_Q, rgb_Q3

        return self._by_scene(look, scene, xyz)

    def objective(
        self, source: Views, target: Views, keys_B: jax.Array, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """The terms of the training loss (SparseNeuS, section 3.4), of random rays of the target views.

        Three quarters of the rays are of the object. A scene's terms are means over its rays; the result is their mean over scenes.

        Args:
          source, target: on white; the target with its alpha. The reference draws one target view; here rays are of all.
          step: number of updates made.

        Returns:
          "color_l1", of rays that cross more than eight samples that two views see; "eikonal", how far gradients are from unit
          length; "sparsity", how much surface there is near random points and samples; and "mask_l1", of alpha.
        """
        scene = self._encode(source, of_scene=True)
        keys_3B = jax.vmap(lambda key: jax.random.split(key, 3), out_axes=1)(keys_B)
        rays, wanted = jax.vmap(functools.partial(random_rays, count=self.train_rays))(
            keys_3B[0], target
        )
        anneal = jnp.minimum(step / self.anneal_steps, 1.0)

        def random_points(weights, scene, xyz_Q3, _):
            return jnp.exp(-100 * jnp.abs(_signed_distance(weights, scene["volume"], xyz_Q3)[0]))

        xyz_BQ3 = jax.vmap(lambda key: jax.random.uniform(key, (1024, 3), minval=-1.0))(keys_3B[2])
        sums = self._march(ray_sums, scene, rays, keys_3B[1], anneal)
        near_BQ = self._by_scene(random_points, scene, xyz_BQ3)
        terms_B = jax.vmap(loss_terms)(sums, wanted, near_BQ)
        late = jnp.minimum(step / self.late_steps, 1.0)
        terms_B["sparsity"] *= late
        terms_B["mask_l1"] *= jnp.floor(late)
        return jax.tree.map(jnp.mean, terms_B)

    def weights(self) -> Weights:
        """The parameters that rendering needs, for pure functions."""
        sharpness = jnp.clip(jnp.exp(10 * self.log_sharpness), 1e-6, 1e6)
        return Weights(self.sdf(), self.blending(), sharpness)

    def _march(self, function, scene, rays: Rays, keys_B, anneal=1.0):
        """`function(samples of rays [R])`, a tree of arrays [R ...], for rays [B ...]."""

        def distances(weights, scene, rays, key):
            return self._distances(weights, scene, rays, *bounds(rays), key)

        def shade(weights, scene, rays_and_t, _):
            rays, t_RS = rays_and_t
            near_R, far_R = bounds(rays)
            last_R = (far_R - near_R) / self.num_samples
            return function(shaded(weights, scene, rays, t_RS, last_R, anneal, self.dtype))

        # First the distances, which have no gradient, so that the backward pass does not find them again.
        points = self.num_samples + self.num_rounds * self.num_refined
        fixed = jax.lax.stop_gradient(scene)
        t = jax.lax.stop_gradient(self._by_scene(distances, fixed, rays, keys_B, points))
        return self._by_scene(shade, scene, (rays, t), None, points)

    def _by_scene(self, function, scene, inputs, keys_B=None, points=1):
        """Maps `function(weights, scene, inputs[R ...], key)` over scenes and chunks of their inputs, of so many points each."""
        chunk = self.ray_chunk or max(POINTS[sharding.platform()] // points, 1)

        def one_scene(weights, scene, inputs, key):
            return chunks.in_chunks(
                lambda part, key: function(weights, scene, part, key), inputs, key, chunk
            )

        def own_scenes(weights, scenes):
            return jax.lax.map(lambda scene: one_scene(weights, *scene), scenes)

        return batch_axes.split_batch(own_scenes, self.weights(), (scene, inputs, keys_B))

    def _distances(self, weights, scene, rays: Rays, near_R, far_R, key=None):
        """Distances along rays: even ones, and more near the surface."""
        even_S = jnp.linspace(0.0, 1.0, self.num_samples)
        t_RS = near_R[:, None] + (far_R - near_R)[:, None] * even_S[None]
        if key is not None:
            t_RS = jittered(key, t_RS)

        def evaluated(t_RS):
            xyz_Q3 = along(rays, t_RS).reshape(-1, 3)
            latent_QC = _latent(scene["volume"], xyz_Q3)
            distance_Q = sdf.value(weights.sdf, xyz_Q3, latent_QC)
            return distance_Q.reshape(t_RS.shape), is_active(scene["active"], xyz_Q3).reshape(
                t_RS.shape
            )

        distance_RS, inside_RS = evaluated(t_RS)
        for i in range(self.num_rounds):
            new_RS = neus.refined(t_RS, distance_RS, inside_RS, 64.0 * 2**i, self.num_refined)
            found_RS, active_RS = evaluated(new_RS)
            found_RS = jnp.where(active_RS, found_RS, neus.FAR_OUTSIDE)
            both = zip((t_RS, distance_RS, inside_RS), (new_RS, found_RS, active_RS), strict=True)
            joined = [jnp.concatenate(pair, axis=-1) for pair in both]
            t_RS, distance_RS, inside_RS = jax.lax.sort(joined, num_keys=1)
        return t_RS


MODEL = One2345


def bounds(rays: Rays) -> tuple[Float[Array, "R"], Float[Array, "R"]]:
    """Where rays [R] enter and leave the ball around the volume: 5 % more than a camera's distance to it."""
    distance_R = jnp.linalg.norm(rays.origins, axis=-1)
    # The reference's evaluation has a negative `near` inside the ball; this is what it trains with.
    return 0.95 * jnp.maximum(distance_R - 1, 0.02), 1.05 * (distance_R + 1)


def along(rays: Rays, t_RS: Float[Array, "R S"]) -> Float[Array, "R S 3"]:
    """The points at distances along rays [R]."""
    return rays.origins[:, None] + t_RS[..., None] * rays.dirs[:, None]


def jittered(key: jax.Array, t_RS: Float[Array, "R S"]) -> Float[Array, "R S"]:
    """Increasing distances, each moved at random between the middles of the intervals beside it."""
    middle_RS = 0.5 * (t_RS[:, 1:] + t_RS[:, :-1])
    low_RS = jnp.concatenate([t_RS[:, :1], middle_RS], axis=-1)
    high_RS = jnp.concatenate([middle_RS, t_RS[:, -1:]], axis=-1)
    return low_RS + (high_RS - low_RS) * jax.random.uniform(key, t_RS.shape)


def shaded(weights, scene, rays: Rays, t_RS, last, anneal, dtype: str) -> Samples:
    """The field at the middles of the intervals that begin at `t_RS`; the last interval has length `last` [R]."""
    length_RS = jnp.concatenate([jnp.diff(t_RS, axis=-1), last[:, None]], axis=-1)
    t_RS = t_RS + 0.5 * length_RS
    xyz_Q3 = along(rays, t_RS).reshape(-1, 3)
    inside_RS = is_active(scene["active"], xyz_Q3).reshape(t_RS.shape)
    distance_Q, gradient_Q3 = _signed_distance(weights, scene["volume"], xyz_Q3)
    distance_RS = jnp.where(inside_RS, distance_Q.reshape(t_RS.shape), neus.FAR_OUTSIDE)
    gradient_RS3 = jnp.where(inside_RS[..., None], gradient_Q3.reshape(*t_RS.shape, 3), 0.0)
    alpha_RS = neus.surface_opacity(
        distance_RS, gradient_RS3, rays.dirs, length_RS, inside_RS, weights.sharpness, anneal
    )
    eye_Q3 = jnp.broadcast_to(rays.origins[:, None], (*t_RS.shape, 3)).reshape(-1, 3)
    towards_Q3 = (eye_Q3 - xyz_Q3) / (
        jnp.linalg.norm(eye_Q3 - xyz_Q3, axis=-1, keepdims=True) + 1e-6
    )
    rgb_Q3, num_seeing_Q = _colors(weights, scene, xyz_Q3, towards_Q3, dtype)
    return Samples(
        t_RS, distance_RS, gradient_RS3, inside_RS, neus.weights(alpha_RS),
        rgb_Q3.reshape(*t_RS.shape, 3), num_seeing_Q.reshape(t_RS.shape),
    )  # fmt: skip


def _weighted(samples: Samples):
    return (samples.weight[..., None] * samples.rgb).sum(-2)


# -- lookups in the volume. Parity: the three have different rules at the volume's border.


def _index(volume_XYZC, xyz_Q3):
    return (xyz_Q3 + 1) * (0.5 * (volume_XYZC.shape[0] - 1))


def _in_cells(volume_XYZC, index_Q3):
    """Parity: a point on a face at -1 is outside, and one up to a cell beyond a face at 1 is inside."""
    return ((index_Q3 > 0) & (index_Q3 < volume_XYZC.shape[0])).all(-1)


def _latent(volume_XYZC, xyz_Q3):
    index_Q3 = _index(volume_XYZC, xyz_Q3)
    found_QC = grids.sample_volume(volume_XYZC, index_Q3, "edge")
    return jnp.where(_in_cells(volume_XYZC, index_Q3)[:, None], found_QC, 0)


def _signed_distance(weights: Weights, volume_XYZC, xyz_Q3):
    """The signed distance [Q] and its gradient [Q 3]."""
    index_Q3 = _index(volume_XYZC, xyz_Q3)
    found_QC, slope_Q3C = grids.sample_volume_with_gradient(volume_XYZC, index_Q3, "edge")
    valid_Q1 = _in_cells(volume_XYZC, index_Q3)[:, None]
    slope_Q3C = slope_Q3C * (0.5 * (volume_XYZC.shape[0] - 1))
    return sdf.value_and_gradient(
        weights.sdf, xyz_Q3, jnp.where(valid_Q1, found_QC, 0), jnp.where(valid_Q1[..., None], slope_Q3C, 0)
    )  # fmt: skip


def is_active(active_XYZ, xyz_Q3: Float[Array, "Q 3"]):
    """Whether the nearest voxel is active. Parity: here the faces of the cube are the outer faces of the voxels."""
    side = active_XYZ.shape[0]
    index_Q3 = jnp.round(((xyz_Q3 + 1) * side - 1) / 2)
    valid_Q = ((index_Q3 >= 0) & (index_Q3 < side)).all(-1)
    i, j, k = jnp.clip(index_Q3, 0, side - 1).astype(jnp.int32).T
    return active_XYZ[i, j, k] & valid_Q


def _colors(weights: Weights, scene, xyz_Q3, towards_Q3, dtype):
    """The colour of points [Q 3] as seen from `towards_Q3`, and the number of views that see each [Q]."""
    seen_VQ, geometry_QC, images_VQC = supports(scene, xyz_Q3)
    cameras = scene["cameras"]
    angles_VQ4 = view_blending.angles(towards_Q3, cameras.c2w[:, :3, 3], xyz_Q3)
    rgb_Q3 = view_blending.blend(
        weights.blending, geometry_QC, images_VQC, angles_VQ4, seen_VQ, dtype
    )
    return rgb_Q3, seen_VQ.sum(0)


def supports(scene, xyz_Q3):
    """What is known about points: which views see them [V Q], the volume's features [Q C], the views' colours and features [V Q F]."""
    volume, active = scene["volume"], scene["active"].astype(jnp.float32)[..., None]
    both = jnp.concatenate([volume, active], axis=-1)
    found_QC = grids.sample_volume(both, _index(volume, xyz_Q3), "zeros")
    valid_Q = (jnp.abs(xyz_Q3) < 1).all(-1) & (found_QC[:, -1] > 0)

    def of_view(image_HWC, camera: Cameras):
        uv_Q2, z_Q = cost_volume.project(camera, xyz_Q3)
        height, width = image_HWC.shape[:2]
        seen_Q = cost_volume.in_image(uv_Q2, z_Q, height, width)
        found_QC = grids.sample_plane(image_HWC, 2 * uv_Q2 - 1).astype(jnp.float32)
        return seen_Q & valid_Q, jnp.where(seen_Q[:, None], found_QC, 0)

    seen_VQ, images_VQC = jax.vmap(of_view)(scene["images"], scene["cameras"])
    return seen_VQ, found_QC[:, :-1], images_VQC


# -- the training loss


def random_rays(key: jax.Array, target: Views, count: int) -> tuple[Rays, Rendering]:
    """`count` rays [R] through random pixels of views [V H W], the first quarter anywhere, the others on the object; and what they see."""
    anywhere_key, object_key = jax.random.split(key)
    V, H, W = target.alpha.shape
    total = jnp.cumsum(target.alpha.reshape(-1) > 0)
    anywhere = jax.random.randint(anywhere_key, (count,), 0, V * H * W)
    nth = jax.random.randint(object_key, (count,), 0, jnp.maximum(total[-1], 1)) + 1
    on_object = jnp.searchsorted(total, nth)
    first = (jnp.arange(count) < count // 4) | (total[-1] == 0)
    pixel_R = jnp.where(first, anywhere, on_object)

    def at(x):
        return x.reshape(V * H * W, *x.shape[3:])[pixel_R]

    rays = jax.tree.map(at, ops_cameras.pixel_rays(target.cameras, H, W))
    return rays, Rendering(rgb=at(target.rgb), alpha=at(target.alpha))


def ray_sums(samples: Samples) -> dict[str, Float[Array, "R ..."]]:
    """What the loss needs of each ray [R]."""
    inside_RS = samples.inside.astype(jnp.float32)
    # At a sample that does not count the gradient is 0, where the norm has no derivative.
    safe_RS3 = jnp.where(samples.inside[..., None], samples.gradient, 1.0)
    length_RS = jnp.linalg.norm(safe_RS3, axis=-1)
    alpha_R = samples.weight.sum(-1)
    return {
        "rgb": _weighted(samples) + (1 - alpha_R)[:, None],  # on white
        "alpha": alpha_R,
        "valid": (samples.num_seeing >= 2).sum(-1) > 8,
        "eikonal": (jnp.square(length_RS - 1) * inside_RS).sum(-1),
        "num_inside": inside_RS.sum(-1),
        "near": jnp.exp(-100 * jnp.abs(samples.sdf)).mean(-1),
    }


def loss_terms(
    sums: dict, wanted: Rendering, near_Q: Float[Array, "Q"]
) -> dict[str, Float[Array, ""]]:
    """The terms of a scene's loss, from what its rays sum up."""
    valid_R = sums["valid"].astype(jnp.float32)
    error_R = jnp.abs(sums["rgb"] - wanted.rgb).mean(-1)
    label_R = wanted.alpha
    # Without background in the image, alpha says nothing about the mask.
    some_background = (label_R == 0).mean() > 0.02
    return {
        "color_l1": (error_R * valid_R).sum() / jnp.maximum(valid_R.sum(), 1),
        "eikonal": sums["eikonal"].sum() / (sums["num_inside"].sum() + 1e-5),
        "sparsity": 0.5 * (near_Q.mean() + sums["near"].mean()),
        "mask_l1": jnp.where(some_background, jnp.abs(sums["alpha"] - label_R).mean(), 0.0),
    }


# -- names of the reference


def entries(model: One2345) -> list[torch_layout.Entry]:
    """Names of the reference's checkpoint, whose networks are nested dicts: the first part of each name is a key of the file."""
    del model  # all sizes have the same tensors
    return [
        *feature_pyramid.entries("pyramid_feature_network.", "pyramid"),
        *feature_pyramid.conv_norm_entries("sdf_network_lod0.compress_layer", "compress"),
        *cost_volume.entries("sdf_network_lod0.sparse_costreg_net.", "unet"),
        *sdf.entries("sdf_network_lod0.sdf_layer.", "sdf"),
        *view_blending.entries("rendering_network_lod0.", "blending"),
        torch_layout.same("variance_network_lod0.variance", "log_sharpness"),
    ]


def own_tensors(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The state dict with a count of batches for every norm: InPlaceABN before 1.1.0 has none."""
    counts = {
        name.replace("running_var", "num_batches_tracked"): np.zeros((), np.int64)
        for name in state
        if name.endswith(".running_var")
    }
    return counts | state


def from_torch(state: dict[str, np.ndarray], model: One2345) -> dict:
    """Parameters of the reference's state dict."""
    return torch_layout.from_torch(
        entries(model), {name: np.asarray(value, np.float32) for name, value in state.items()}
    )


def to_torch(params: dict, model: One2345) -> dict[str, np.ndarray]:
    """The reference's state dict. Counts of batches are integers."""
    state = torch_layout.to_torch(entries(model), params)
    counts = (name for name in state if name.endswith("num_batches_tracked"))
    return state | {name: np.asarray(state[name], np.int64) for name in counts}


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """None: the tensors of all sizes have the same shapes."""
    return {}
