"""Zero123 (https://arxiv.org/abs/2303.11328): an image of an object, turned as another camera sees it, by diffusion.

CLIP's vector of the image and the camera's motion -> one context token; the image's latent beside the noisy one -> a U-Net that
finds the noise -> DDIM -> an autoencoder's decoder. `render` draws: another key gives another image.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lrm_jax.images import cutout, recentre
from lrm_jax.models.parts import torch_layout
from lrm_jax.models.zero123 import autoencoder, clip, diffusion, layouts, unet
from lrm_jax.ops import cameras, resize
from lrm_jax.types import Rays, Rendering, Views

VARIANTS = {
    # zero123-xl.ckpt of https://huggingface.co/cvlab/zero123-weights; 105000.ckpt has the same sizes.
    "zero123": dict(
        image_size=256, channels=320, multiples=(1, 2, 4, 4), attention_levels=(0, 1, 2), num_blocks=2, num_heads=8,
        context_width=768, tower=dict(side=224, patch=14, width=1024, depth=24, num_heads=16, out=768),
        autoencoder=dict(channels=128, multiples=(1, 2, 4, 4), num_blocks=2),
    ),
    # Ours, for two CPU cores: it diffuses pixels, and trains its image tower: configs/zero123.py.
    "nano": dict(
        image_size=64, channels=64, multiples=(1, 2, 4), attention_levels=(1, 2), num_blocks=1, num_heads=4, context_width=128,
        tower=dict(side=64, patch=8, width=128, depth=4, num_heads=4, out=128), autoencoder=None, remat="none",
    ),
    "tiny": dict(
        image_size=16, channels=32, multiples=(1, 2), attention_levels=(1,), num_blocks=1, num_heads=2, context_width=16,
        tower=dict(side=16, patch=8, width=32, depth=1, num_heads=2, out=16),
        autoencoder=dict(channels=32, multiples=(1, 1), num_blocks=1), num_steps=3,
    ),
}  # fmt: skip
# The term of `objective`.
TERMS = ("noise_mse",)

BLOCK = 2  # side of the blocks of pixels that are latents without an autoencoder


class Zero123(nn.Module):
    """View synthesis by latent diffusion, given one view."""

    image_size: int
    channels: int  # of the U-Net
    multiples: tuple[int, ...]
    attention_levels: tuple[int, ...]
    num_blocks: int
    num_heads: int
    context_width: int
    tower: Mapping
    autoencoder: Mapping | None  # None: latents are the image's pixels, in blocks of 2 x 2
    num_steps: int = 50  # of sampling, about
    guidance: float = 3.0
    eta: float = 1.0  # share of DDPM's noise in a step
    # The camera that `prepare` assumes. Only motions relative to it count.
    source_distance: float = 1.2
    source_fov: float = 49.13
    source_elevation: float = 0.0  # degrees
    foreground_ratio: float = 0.75
    remat: str = "blocks"  # what is kept for the backward pass, one of `layers.REMAT`
    dtype: str = "float32"

    def setup(self):
        sizes = (self.channels, self.multiples, self.attention_levels, self.num_blocks)
        if self.autoencoder is None:
            channels = 3 * BLOCK**2
        else:
            channels = autoencoder.LATENT
            self.encoder = autoencoder.Encoder(**self.autoencoder, dtype=self.dtype)
            self.decoder = autoencoder.Decoder(**self.autoencoder, dtype=self.dtype)
        self.unet = unet.UNet(channels, *sizes, self.num_heads, self.remat, self.dtype)
        self.context = unet.Context(unet.attention_widths(*sizes), self.dtype)
        self.image_tower = clip.ImageTower(**self.tower, remat=self.remat, dtype=self.dtype)
        self.projection = nn.Dense(self.context_width, kernel_init=_identity_first)

    def __call__(self, source: Views, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Draws what rays [B V H W] see, from one view."""
        return self.render(self.encode(source), rays, keys_B)

    def encode(self, source: Views) -> dict:
        """CLIP's vector and the latent of one view on white, [B 1 H W 3], and the position of its camera."""
        rgb_BHW3 = source.rgb[:, 0]
        return {
            "embedding": self.image_tower(rgb_BHW3).astype(jnp.float32),
            "latent": self._moments(rgb_BHW3)[0],
            "eye": source.cameras.c2w[:, 0, :3, 3],
        }

    def render(self, scene: dict, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Draws the images that cameras at the origins of rays [B V H W] see, which look at the centre of the world.

        Images are drawn at the model's size and resized. View v of a scene is drawn from `fold_in(key, v)`, whatever the other
        views are. Without keys, all views are drawn from the same one.
        """
        B, V, H, W = rays.dirs.shape[:4]
        if keys_B is None:
            keys_N = jnp.broadcast_to(jax.random.key(0), (B * V,))
        else:
            of_views = jax.vmap(jax.random.fold_in, (None, 0))
            keys_N = jax.vmap(of_views, (0, None))(keys_B, jnp.arange(V)).reshape(-1)
        motion_BV4 = camera_motion(scene["eye"][:, None], rays.origins[:, :, 0, 0])
        context_BVD = self._project(scene["embedding"], motion_BV4)
        condition_NhwC = jnp.repeat(scene["latent"], V, axis=0)
        latents_NhwC = self._sample(context_BVD.reshape(B * V, -1), condition_NhwC, keys_N)
        latents_VBhwC = latents_NhwC.reshape(B, V, *latents_NhwC.shape[1:]).swapaxes(0, 1)
        # One view of each scene at a time: the decoder's activations are a hundred times as large as its input.
        rgb_VBHW3 = nn.scan(
            lambda module, _, z: (None, module.decode(z)), variable_broadcast="params", split_rngs={"params": False}
        )(self, None, latents_VBhwC)[1]  # fmt: skip
        rgb_BVHW3 = jnp.clip(0.5 * rgb_VBHW3.swapaxes(0, 1) + 0.5, 0.0, 1.0)
        if (H, W) != rgb_BVHW3.shape[2:4]:
            rgb_BVHW3 = jax.image.resize(rgb_BVHW3, (B, V, H, W, 3), "linear")
        return Rendering(rgb=rgb_BVHW3)

    def objective(
        self, source: Views, target: Views, keys_B: jax.Array, step: Int[Array, ""]
    ) -> dict[str, Float[Array, ""]]:
        """The mean square error of the noise that is found in noisy target views (https://arxiv.org/abs/2303.11328, equation 1).

        Args:
          source, target: on white, of the model's size. Each target view [B V] has its own noise, time step and dropout.
          step: has no influence.
        """
        B, V, H, W, _ = target.rgb.shape
        motion_BV4 = camera_motion(source.cameras.c2w[:, :1, :3, 3], target.cameras.c2w[..., :3, 3])
        rgb_NHW3 = target.rgb.reshape(B * V, H, W, 3)
        shape = (V, *self._latent_shape(H, W))

        def draws(key):
            keys = jax.random.split(key, 4)
            return (
                jax.random.randint(keys[0], (V,), 0, diffusion.TRAINED_STEPS),
                jax.random.normal(keys[1], shape),
                jax.random.normal(keys[2], shape),
                jax.random.uniform(keys[3], (V,)),
            )

        drawn = jax.tree.map(lambda x: x.reshape(B * V, *x.shape[2:]), jax.vmap(draws)(keys_B))
        errors_N = self.noise_errors(self.encode(source), motion_BV4, rgb_NHW3, *drawn)
        return {"noise_mse": errors_N.mean()}

    def noise_errors(
        self, scene, motion_BV4, rgb_NHW3, t_N, noise_NhwC, posterior_noise_NhwC, dropout_N
    ) -> Float[Array, "N"]:
        """The square error of each target view, N = B V, from the random numbers that `objective` draws."""
        mean_NhwC, moments = self._moments(rgb_NHW3)
        if moments is not None:
            mean_NhwC = autoencoder.drawn(moments, posterior_noise_NhwC) * diffusion.LATENT_SCALE
        noisy_NhwC = diffusion.with_noise(mean_NhwC, noise_NhwC, t_N)
        B, V = motion_BV4.shape[:2]
        no_prompt_N, no_image_N = dropped(dropout_N)
        embedding_BVD = jnp.repeat(scene["embedding"][:, None], V, axis=1)
        # Parity: a dropped prompt keeps the camera's motion.
        embedding_BVD = jnp.where(no_prompt_N.reshape(B, V, 1), 0.0, embedding_BVD)
        condition_NhwC = jnp.repeat(scene["latent"], V, axis=0)
        condition_NhwC = jnp.where(no_image_N[:, None, None, None], 0.0, condition_NhwC)
        context_BVD = self.projection(jnp.concatenate([embedding_BVD, motion_BV4], axis=-1))
        found_NhwC = self.unet(
            jnp.concatenate([noisy_NhwC, condition_NhwC], axis=-1), t_N, self.context(context_BVD.reshape(B * V, -1))
        )  # fmt: skip
        return jnp.square(found_NhwC - noise_NhwC).mean((1, 2, 3))

    def prepare(self, rgba: list[np.ndarray]) -> Views:
        """Images as One-2-3-45 prepares them for Zero123: the foreground centred in a square, on white, 8 bits.

        The camera is at azimuth 0; its elevation is not known, and 0 is assumed.
        """
        squares = [recentre.recenter_foreground(x, self.foreground_ratio) for x in rgba]
        floats = [cutout.composite(x, 1.0).astype(np.float32) / 255 for x in squares]
        rgb = np.stack([resize.resize_bilinear(x, self.image_size) for x in floats])
        camera = cameras.orbit(1, self.source_distance, self.source_elevation, self.source_fov)
        seen_by = jax.tree.map(lambda x: np.broadcast_to(x, (len(rgba), *x.shape)), camera)
        return Views(rgb=rgb[:, None], cameras=seen_by)

    def decode(self, z_BhwC: Float[Array, "B h w C"]) -> Float[Array, "B H W 3"]:
        """Images in about [-1, 1] from latents of unit variance."""
        if self.autoencoder is None:
            return from_blocks(z_BhwC)
        return self.decoder(z_BhwC / diffusion.LATENT_SCALE)

    def _moments(self, rgb_BHW3):
        """The condition's latent of images in [0, 1], and the autoencoder's moments, if there is one."""
        x_BHW3 = 2 * rgb_BHW3 - 1
        if self.autoencoder is None:
            return to_blocks(x_BHW3), None
        moments = self.encoder(x_BHW3)
        # Parity: the condition's latent is not scaled to unit variance.
        return autoencoder.mode(moments), moments

    def _latent_shape(self, height, width):
        if self.autoencoder is None:
            return height // BLOCK, width // BLOCK, 3 * BLOCK**2
        shrink = 2 ** (len(self.autoencoder["multiples"]) - 1)
        return height // shrink, width // shrink, autoencoder.LATENT

    def _project(self, embedding_BD, motion_BV4):
        embedding_BVD = jnp.repeat(embedding_BD[:, None], motion_BV4.shape[1], axis=1)
        return self.projection(jnp.concatenate([embedding_BVD, motion_BV4], axis=-1))

    def _sample(self, context_ND, condition_NhwC, keys_N):
        """Latents [N h w C] of unit variance."""

        def noise(step):
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_N, step)
            return jax.vmap(lambda key: jax.random.normal(key, condition_NhwC.shape[1:]))(keys)

        steps = diffusion.sampling_steps(self.num_steps, self.eta)
        predict = self.guided(context_ND, condition_NhwC)
        return diffusion.sample(self, predict, lambda i: noise(i + 1), noise(0), steps)[0]

    def guided(self, context_ND, condition_NhwC):
        """A function from (module, noisy latents [N h w C], t) to the noise in them, by classifier-free guidance
        (https://arxiv.org/abs/2207.12598): what is found without the condition and with it, further apart."""
        with_it, without = self.context(context_ND), self.context(None)
        N = context_ND.shape[0]
        # Parity: without the condition, the whole context is zero, not only CLIP's vector.
        vectors = jax.tree.map(
            lambda a, b: jnp.concatenate([jnp.broadcast_to(a, b.shape), b]), without, with_it
        )
        condition_MhwC = jnp.concatenate([jnp.zeros_like(condition_NhwC), condition_NhwC])

        def predict(module, x_NhwC, t):
            x_MhwC = jnp.concatenate([jnp.concatenate([x_NhwC, x_NhwC]), condition_MhwC], axis=-1)
            noise_MhwC = module.unet(x_MhwC, jnp.full((2 * N,), t), vectors)
            plain, found = jnp.split(noise_MhwC, 2)
            return plain + self.guidance * (found - plain)

        return predict


def camera_motion(
    from_B3: Float[Array, "*#B 3"], to_B3: Float[Array, "*#B 3"]
) -> Float[Array, "*#B 4"]:
    """How a camera moves: radians of the polar angle, sine and cosine of the azimuth's change, change of the distance.

    Args:
      from_B3, to_B3: the cameras' positions; z is up.
    """

    def spherical(eye):
        polar = jnp.arctan2(jnp.hypot(eye[..., 0], eye[..., 1]), eye[..., 2])
        return polar, jnp.arctan2(eye[..., 1], eye[..., 0]), jnp.linalg.norm(eye, axis=-1)

    (polar_0, azimuth_0, distance_0), (polar, azimuth, distance) = map(spherical, (from_B3, to_B3))
    turn = azimuth - azimuth_0
    change = (polar - polar_0, jnp.sin(turn), jnp.cos(turn), distance - distance_0)
    return jnp.stack(jnp.broadcast_arrays(*change), axis=-1)


def dropped(uniform_N: Float[Array, "N"]) -> tuple[jax.Array, jax.Array]:
    """Whether a sample's prompt and its image are dropped: one in twenty loses the one, one in twenty both, one in twenty the other."""
    return uniform_N < 0.1, (uniform_N >= 0.05) & (uniform_N < 0.15)


def to_blocks(x_BHWC: Float[Array, "B H W C"]) -> Float[Array, "B h w D"]:
    """Each block of pixels as the channels of one."""
    B, H, W, C = x_BHWC.shape
    x = x_BHWC.reshape(B, H // BLOCK, BLOCK, W // BLOCK, BLOCK, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, H // BLOCK, W // BLOCK, BLOCK**2 * C)


def from_blocks(x_BhwD: Float[Array, "B h w D"]) -> Float[Array, "B H W C"]:
    """The inverse of `to_blocks`."""
    B, h, w, D = x_BhwD.shape
    x = x_BhwD.reshape(B, h, w, BLOCK, BLOCK, -1).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, h * BLOCK, w * BLOCK, D // BLOCK**2)


def _identity_first(key, shape, dtype=jnp.float32):
    """The first columns pass CLIP's vector on; the camera's motion begins without influence."""
    return jnp.eye(*shape, dtype=dtype)


MODEL = Zero123


def entries(model: Zero123) -> list[torch_layout.Entry]:
    """The names in zero123-xl.ckpt of the tensors that sampling needs."""
    return layouts.entries(model)


def own_tensors(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of `entries` in a released file or diffusers' folder: see `layouts.own_tensors`."""
    return layouts.own_tensors(state)


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """The model's fields that follow from names and shapes."""
    return layouts.fields_from_torch(state)


def from_torch(state: dict[str, np.ndarray], model: Zero123) -> dict:
    """Parameters of a state dict with the names of `entries`: see `layouts.own_tensors`."""
    return torch_layout.from_torch(entries(model), state)


def to_torch(params: dict, model: Zero123) -> dict[str, np.ndarray]:
    """The state dict of a released file, without CLIP's text side, which Zero123 never uses.

    The running means of the U-Net are our parameters, and so are the weights themselves.
    """
    return layouts.released_file(torch_layout.to_torch(entries(model), params))
