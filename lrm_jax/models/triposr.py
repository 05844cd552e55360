"""TripoSR (https://arxiv.org/abs/2403.02151): from one image to a triplane radiance field, without a camera.

DINO tokens -> learned plane tokens, refined by transformer blocks that attend to the DINO tokens -> upsampled planes -> MLP ->
volume rendering. The world is z-up, with the source camera on the +x axis, looking at the origin.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lrm_jax.images import cutout, recentre
from lrm_jax.kernels import field
from lrm_jax.models.parts import encoders, torch_layout, triplane, vit
from lrm_jax.models.parts.layers import (
    Attention,
    geglu,
    layer_norm,
    sincos_code,
    sincos_grid,
    stack,
)
from lrm_jax.ops import cameras, resize, sampling, volrend
from lrm_jax.types import Rays, Rendering, Views

PLANE_AXES = ((0, 1), (0, 2), (1, 2))

NANO = dict(
    image_size=128,
    encoder=dict(patch=16, width=192, depth=3, num_heads=3, grid=8, resize="dino", norm_epsilon=1e-6),
    width=192, depth=4, num_heads=3, plane_tokens=8, upsample=4, plane_channels=24, decoder_width=32, decoder_layers=4,
    radius=1.1, num_samples=32, surface_level=5.0, source_distance=3.0, source_fov=40.0,
    source_elevation=20.0, remat="none",
)  # fmt: skip
NANO_FINE = {**NANO, "encoder": {**NANO["encoder"], "patch": 8, "grid": 16}, "plane_tokens": 12}

VARIANTS = {
    # config.yaml of https://huggingface.co/stabilityai/TripoSR
    "triposr": dict(
        image_size=512, encoder=vit.VARIANTS["dino-vitb16"], width=1024, depth=16, num_heads=16, plane_tokens=32,
        plane_channels=40, decoder_width=64, decoder_layers=10, radius=0.87, num_samples=128, surface_level=25.0,
        source_distance=1.9, source_fov=40.0,
    ),
    # The bundled model is `nano-symmetric`. It was first trained as `nano`, then as `nano-fine`: configs/nano.py.
    "nano": NANO,
    "nano-fine": NANO_FINE,
    "nano-symmetric": {**NANO_FINE, "symmetric": True},
    "tiny": dict(
        image_size=32, encoder=vit.VARIANTS["tiny"], width=32, depth=2, num_heads=2, plane_tokens=4, plane_channels=8,
        decoder_width=16, decoder_layers=3, radius=0.87, num_samples=8, surface_level=25.0, source_distance=1.9,
        source_fov=40.0,
    ),
}  # fmt: skip


class TripoSR(nn.Module):
    """Camera-free single-image triplane model."""

    image_size: int
    encoder: Mapping
    width: int
    depth: int
    num_heads: int
    plane_tokens: int  # side of a plane in tokens
    plane_channels: int
    decoder_width: int
    decoder_layers: int
    radius: float  # half the side of the cube that the planes span
    num_samples: int
    surface_level: float  # density, for chords of unit length: see `_march`
    source_distance: float
    source_fov: float  # degrees, vertical
    source_elevation: float = 0.0  # degrees
    symmetric: bool = False  # True: a mirrored image gives the mirrored planes
    upsample: int = 2
    norm_groups: int = 32
    foreground_ratio: float | None = 0.85  # None: objects keep their place in the image
    background: float = 0.5
    ray_chunk: int | None = None  # rays rendered at a time; None: chosen for the device
    remat: str = "blocks"  # what is kept for the backward pass, one of `layers.REMAT`
    dtype: str = "float32"

    def setup(self):
        self.image_tokenizer = vit.ViT(**self.encoder, remat=self.remat, dtype=self.dtype)
        side, width = self.plane_tokens, self.width
        self.plane_queries = self.param("plane_queries", _init_queries, (3, side, side, width))
        self.backbone = Backbone(
            self.depth, self.num_heads, self.norm_groups, self.remat, self.dtype
        )
        self.upsampler = triplane.Upsample(self.plane_channels, self.upsample, self.dtype)
        self.decoder = triplane.Decoder(
            3 * self.plane_channels, self.decoder_width, self.decoder_layers
        )

    def __call__(self, source: Views, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Reconstructs the source view and renders rays [B V H W]."""
        return self.render(self.encode(source), rays, keys_B)

    def encode(self, source: Views) -> dict[str, Float[Array, "B 3 h w C"]]:
        """The planes of one view on grey, [B 1 H W 3]; its camera is ignored.

        If the model is symmetric, they are averaged with the planes of the mirrored image, mirrored back.
        """
        rgb_BHW3 = source.rgb[:, 0]
        if not self.symmetric:
            return {"triplane": self._planes(rgb_BHW3)}
        # Each mirrored image is next to its original, so that a device has both.
        both = jnp.stack([rgb_BHW3, rgb_BHW3[:, :, ::-1]], axis=1)
        planes = self._planes(both.reshape(-1, *rgb_BHW3.shape[1:]))
        planes, mirrored = planes[::2], planes[1::2]
        return {"triplane": 0.5 * (planes + in_mirror(mirrored))}

    def _planes(self, rgb_BHW3):
        tokens_BMD = self.image_tokenizer(vit.normalize(rgb_BHW3))
        B, side = tokens_BMD.shape[0], self.plane_tokens
        queries_BLD = jnp.broadcast_to(
            self.plane_queries.reshape(1, -1, self.width), (B, 3 * side**2, self.width)
        )
        x_BLD = self.backbone(queries_BLD, tokens_BMD)
        return self.upsampler(x_BLD.reshape(B, 3, side, side, self.width))

    def render(self, scene: dict, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Marches rays [B V H W] through the field; with a key for each scene, samples are jittered within their intervals."""
        return triplane.render(
            self._march, scene["triplane"], self.decoder(), self.dtype, rays, keys_B, self.ray_chunk
        )

    def query(
        self, scene: dict, xyz: Float[Array, "B Q 3"]
    ) -> tuple[Float[Array, "B Q"], Float[Array, "B Q 3"]]:
        """Density and sRGB colour of the field at points."""
        return triplane.query(self._field, scene["triplane"], self.decoder(), self.dtype, xyz)

    def prepare(self, rgba: list[np.ndarray]) -> Views:
        """Images as the reference prepares them: foreground centred in a square, on grey, 8 bits, antialiased resize."""
        if self.foreground_ratio is None:
            squares = [recentre.pad_to_square(x) for x in rgba]
        else:
            squares = [recentre.recenter_foreground(x, self.foreground_ratio) for x in rgba]
        floats = [cutout.composite(x, self.background).astype(np.float32) / 255 for x in squares]
        rgb = np.stack([resize.resize_bilinear(x, self.image_size) for x in floats])
        camera = cameras.orbit(1, self.source_distance, self.source_elevation, self.source_fov)
        seen_by = jax.tree.map(lambda x: np.broadcast_to(x, (len(rgba), *x.shape)), camera)
        return Views(rgb=rgb[:, None], cameras=seen_by)

    def _field(self, projected, layers, xyz_X3, at=field.field):
        """Density and colour at points: with `at=field.along_rays`, at [R S] of them."""
        raw_X4 = at(projected, layers, xyz_X3 / self.radius, PLANE_AXES, "silu")
        # An infinite density would have a NaN gradient; exp(80) is just as opaque.
        return jnp.exp(jnp.minimum(raw_X4[..., 0] - 1.0, 80.0)), nn.sigmoid(raw_X4[..., 1:])

    def _march(self, projected, layers, rays: Rays, key) -> Rendering:
        # Parity: the box is shrunk by 0.1%, and a ray that crosses less than 0.01 of it is a miss.
        near, far = sampling.ray_box(rays.origins, rays.dirs, self.radius * 0.999)
        hit = far - near > 0.01
        length = jnp.where(hit, far - near, 1.0)
        # Parity: densities assume a chord of unit length, whatever its true length, so edges run from 0 to 1.
        edges = sampling.uniform_edges(jnp.zeros_like(near), jnp.ones_like(far), self.num_samples)
        fractions = 0.5 * (edges[:, :-1] + edges[:, 1:])
        if key is not None:
            fractions += (jax.random.uniform(key, fractions.shape) - 0.5) / self.num_samples
        t_RS = near[:, None] + length[:, None] * fractions
        xyz_RS3 = rays.origins[:, None] + t_RS[..., None] * rays.dirs[:, None]
        density_RS, rgb_RS3 = self._field(projected, layers, xyz_RS3, field.along_rays)
        density_RS = jnp.where(hit[:, None], density_RS, 0.0)
        rendering = volrend.composite(density_RS, rgb_RS3, edges)
        return rendering.replace(depth=near + length * rendering.depth)


def in_mirror(planes_BPhwC: Float[Array, "B 3 h w C"]) -> Float[Array, "B 3 h w C"]:
    """The planes of the scene mirrored in y = 0, the vertical plane through the source camera."""
    xy, xz, yz = planes_BPhwC[:, 0], planes_BPhwC[:, 1], planes_BPhwC[:, 2]
    return jnp.stack([xy[:, ::-1], xz, yz[:, :, ::-1]], axis=1)


# Initial values for training from scratch. Each plane token starts as the code of the image position that it projects to, and
# cross-attention starts with equal q and k projections. So if the encoder has the same width (nano), each token attends to that
# position from the first step.


def _init_queries(key, shape):
    """The source camera looks along -x, with y to the right and z up: image rows run along -z, columns along y."""
    _, side, _, width = shape
    code = sincos_code(side, width // 2)
    nowhere = jnp.zeros_like(code)
    along_x = (
        jax.random.normal(key, (width // 2, width)) * width**-0.5
    )  # distinguishes positions along x
    planes = [
        sincos_grid(nowhere, code).swapaxes(0, 1) + (code @ along_x)[None],  # y, x
        sincos_grid(code[::-1], nowhere) + (code @ along_x)[None],  # z, x
        sincos_grid(code[::-1], code),  # z, y
    ]
    return width**-0.5 * jnp.stack(planes)


def _init_identity(key, shape, dtype=jnp.float32):
    return jnp.eye(*shape, dtype=dtype)


def _init_same(key, shape, dtype=jnp.float32):
    return nn.initializers.lecun_normal()(jax.random.key(0), shape, dtype)


class Backbone(nn.Module):
    """Group norm, linear in, transformer blocks, linear out, residual."""

    depth: int
    num_heads: int
    norm_groups: int
    remat: str
    dtype: str

    @nn.compact
    def __call__(self, queries_BLD, context_BMD):
        width = queries_BLD.shape[-1]
        # Each group is normalised over its channels and all tokens.
        norm = nn.GroupNorm(
            self.norm_groups, epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32, name="norm"
        )
        x_BLD = nn.Dense(width, kernel_init=_init_identity, dtype=self.dtype, name="proj_in")(
            norm(queries_BLD)
        )
        x_BLD, _ = stack(
            Block, self.depth, self.remat, num_heads=self.num_heads, dtype=self.dtype, name="blocks"
        )(x_BLD, context_BMD)
        return nn.Dense(width, dtype=self.dtype, name="proj_out")(x_BLD) + queries_BLD.astype(
            x_BLD.dtype
        )


class Block(nn.Module):
    """Self-attention, cross-attention, GEGLU MLP; each pre-norm and residual."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BLD, context_BMD):
        self_attn = Attention(
            self.num_heads, qkv_bias=False, out_bias=True, dtype=self.dtype, name="self_attn"
        )
        cross_attn = Attention(
            self.num_heads,
            qkv_bias=False,
            out_bias=True,
            dtype=self.dtype,
            name="cross_attn",
            qk_init=_init_same,
        )
        x_BLD = x_BLD + self_attn(layer_norm(1e-5, "norm1")(x_BLD))
        x_BLD = x_BLD + cross_attn(layer_norm(1e-5, "norm2")(x_BLD), context_BMD)
        return x_BLD + geglu(self, layer_norm(1e-5, "norm3")(x_BLD)), None


MODEL = TripoSR


def entries(model: TripoSR) -> list[torch_layout.Entry]:
    """The names in TripoSR's model.ckpt, without its unused ViT pooler."""
    linear, norm = torch_layout.linear, torch_layout.norm
    table = [
        *vit.hf_entries("image_tokenizer.model.", "image_tokenizer", model.encoder["depth"]),
        torch_layout.permuted("tokenizer.embeddings", "plane_queries", (0, 2, 3, 1)),
        *norm("backbone.norm", "backbone.norm"),
        *linear("backbone.proj_in", "backbone.proj_in"),
        *linear("backbone.proj_out", "backbone.proj_out"),
        torch_layout.permuted("post_processor.upsample.weight", "upsampler.kernel", (0, 2, 3, 1)),
        torch_layout.same("post_processor.upsample.bias", "upsampler.bias"),
    ]
    for i in range(model.depth):
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn")):
            at, to = f"backbone.transformer_blocks.{i}.{theirs}.", f"backbone.blocks.{ours}."
            for x in "qkv":
                table += linear(f"{at}to_{x}", to + x, layer=i, bias=False)
            table += linear(at + "to_out.0", to + "out", layer=i)
        at = f"backbone.transformer_blocks.{i}."
        table += linear(at + "ff.net.0.proj", "backbone.blocks.fc1", layer=i)
        table += linear(at + "ff.net.2", "backbone.blocks.fc2", layer=i)
        for k in "123":
            table += norm(at + f"norm{k}", f"backbone.blocks.norm{k}", layer=i)
    return table + triplane.decoder_entries("decoder.layers.", model.decoder_layers)


def from_torch(state: dict[str, np.ndarray], model: TripoSR) -> dict:
    """Parameters of a TripoSR state dict; the pooler's two tensors are dropped."""
    return torch_layout.from_torch(entries(model), state)


def to_torch(params: dict, model: TripoSR) -> dict[str, np.ndarray]:
    """A state dict that TripoSR loads strictly: the pooler, which it never uses, is filled with zeros."""
    state = torch_layout.to_torch(entries(model), params)
    return state | {
        name: np.zeros(shape, np.float32) for name, shape in pooler_shapes(model).items()
    }


def pooler_shapes(model: TripoSR) -> dict[str, tuple[int, ...]]:
    """The reference's tensors that our model does not need."""
    width, at = model.encoder["width"], "image_tokenizer.model.pooler.dense."
    return {at + "weight": (width, width), at + "bias": (width,)}


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """The model's fields that follow from the shapes of a TripoSR state dict."""
    _, width, plane_tokens, _ = state["tokenizer.embeddings"].shape
    upsample = state["post_processor.upsample.weight"].shape
    return dict(
        encoder=vit.hf_fields("image_tokenizer.model.", state),
        width=width,
        depth=torch_layout.count(state, "backbone.transformer_blocks."),
        plane_tokens=plane_tokens,
        plane_channels=upsample[1],
        upsample=upsample[2],
        decoder_width=state["decoder.layers.0.weight"].shape[0],
        decoder_layers=torch_layout.count(state, "decoder.layers."),
    )


def fields_from_config(config: dict) -> dict:
    """The fields that only TripoSR's config.yaml states, not the shapes."""
    return dict(
        image_size=config["cond_image_size"],
        num_heads=config["backbone"]["num_attention_heads"],
        norm_groups=config["backbone"].get("norm_num_groups", 32),
        radius=config["renderer"]["radius"],
        num_samples=config["renderer"]["num_samples_per_ray"],
    )


def config_to_torch(model: TripoSR) -> dict:
    """The config.yaml that goes with `to_torch`."""
    encoder = encoders.published_name(model.encoder) or ""
    encoder = encoder if encoder.startswith("facebook/") else "facebook/dino-vitb16"
    return {
        "cond_image_size": model.image_size,
        "image_tokenizer_cls": "tsr.models.tokenizers.image.DINOSingleImageTokenizer",
        "image_tokenizer": {"pretrained_model_name_or_path": encoder},
        "tokenizer_cls": "tsr.models.tokenizers.triplane.Triplane1DTokenizer",
        "tokenizer": {"plane_size": model.plane_tokens, "num_channels": model.width},
        "backbone_cls": "tsr.models.transformer.transformer_1d.Transformer1D",
        "backbone": {
            "in_channels": model.width,
            "num_attention_heads": model.num_heads,
            "attention_head_dim": model.width // model.num_heads,
            "num_layers": model.depth,
            "cross_attention_dim": model.encoder["width"],
            "norm_num_groups": model.norm_groups,
        },
        "post_processor_cls": "tsr.models.network_utils.TriplaneUpsampleNetwork",
        "post_processor": {"in_channels": model.width, "out_channels": model.plane_channels},
        "decoder_cls": "tsr.models.network_utils.NeRFMLP",
        "decoder": {
            "in_channels": 3 * model.plane_channels,
            "n_neurons": model.decoder_width,
            "n_hidden_layers": model.decoder_layers - 1,
            "activation": "silu",
        },
        "renderer_cls": "tsr.models.nerf_renderer.TriplaneNeRFRenderer",
        "renderer": {
            "radius": model.radius,
            "feature_reduction": "concat",
            "density_activation": "exp",
            "density_bias": -1.0,
            "num_samples_per_ray": model.num_samples,
        },
    }
