"""LRM (https://arxiv.org/abs/2311.04400) and OpenLRM (https://github.com/3DTopia/OpenLRM): from one image and its camera to a
triplane radiance field. Their transformer blocks are modulated by the camera (ModLN).

ViT tokens -> learned plane tokens, refined by transformer blocks that attend to the ViT tokens and are modulated by the source
camera -> upsampled planes -> MLP -> volume rendering. The world is z-up, normalised so that the source camera is at (0, -d, 0)
and looks at the origin.
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
from lrm_jax.models.parts.layers import MLP, Attention, dense, layer_norm, stack, torch_linear_init
from lrm_jax.ops import cameras, resize, sampling, volrend
from lrm_jax.types import Cameras, Rays, Rendering, Views

PLANE_AXES = (
    (0, 1),
    (0, 2),
    (2, 1),
)  # Parity: the third plane is (z, y), not (y, z) as in TripoSR.

_OPENLRM = dict(decoder_layers=4, camera_numbers=16, source_distance=2.0, source_focal=0.75)
VARIANTS = {
    # The paper, table 6 of the appendix: 20 camera numbers, 10 decoder layers, 128 samples in one pass.
    "lrm": dict(
        image_size=512, encoder=vit.VARIANTS["dino-vitb16"], normalize_image=True, width=1024, depth=16, num_heads=16,
        plane_channels=80, decoder_layers=10, camera_numbers=20, num_samples=128, num_importance=0, source_distance=2.0,
        source_focal=0.75,
    ),
    # OpenLRM's architecture at the paper's size, with the paper's DINO encoder.
    "openlrm-large-dino": dict(
        image_size=512, encoder=vit.VARIANTS["dino-vitb16"], normalize_image=True, width=1024, depth=16, num_heads=16,
        plane_channels=80, num_samples=64, num_importance=64, **_OPENLRM,
    ),
    # https://huggingface.co/zxhezexin/openlrm-{obj,mix}-{small,base,large}-1.1
    "openlrm-small-1.1": dict(
        image_size=224, encoder=vit.VARIANTS["dinov2-vits14-reg"], normalize_image=False, width=512, depth=12, num_heads=8,
        plane_channels=32, num_samples=48, num_importance=48, **_OPENLRM,
    ),
    "openlrm-base-1.1": dict(
        image_size=336, encoder=vit.VARIANTS["dinov2-vitb14-reg"], normalize_image=False, width=768, depth=12, num_heads=12,
        plane_channels=48, num_samples=48, num_importance=48, **_OPENLRM,
    ),
    "openlrm-large-1.1": dict(
        image_size=448, encoder=vit.VARIANTS["dinov2-vitb14-reg"], normalize_image=False, width=1024, depth=16, num_heads=16,
        plane_channels=80, num_samples=64, num_importance=64, **_OPENLRM,
    ),
    "tiny": dict(
        image_size=32, encoder=vit.VARIANTS["tiny"], normalize_image=True, width=32, depth=2, num_heads=2, plane_tokens=4,
        plane_channels=8, decoder_width=16, camera_width=16, num_samples=6, num_importance=6, **_OPENLRM,
    ),
}  # fmt: skip


class LRM(nn.Module):
    """Camera-conditioned single-image triplane model."""

    image_size: int
    encoder: Mapping
    normalize_image: bool  # Parity: OpenLRM v1.1 feeds DINOv2 raw [0, 1] colours.
    width: int
    depth: int
    num_heads: int
    plane_channels: int
    decoder_layers: int
    camera_numbers: int  # 16: 3x4 pose and intrinsics; 20: 4x4 pose and intrinsics
    num_samples: int
    num_importance: int  # 0: one pass
    source_distance: float
    source_focal: float  # as a fraction of the image's side
    plane_tokens: int = 32  # side of a plane in tokens
    decoder_width: int = 64
    camera_width: int = 1024
    radius: float = 1.0  # half the side of the cube that the planes span
    surface_level: float = 3.0
    background: float = 1.0
    # which OpenLRM release's parameter names `to_torch` writes: "1.0" or "1.1"
    release: str = "1.1"
    ray_chunk: int | None = None  # rays rendered at a time; None: chosen for the device
    remat: str = "blocks"  # what is kept for the backward pass, one of `layers.REMAT`
    dtype: str = "float32"

    def setup(self):
        self.image_encoder = vit.ViT(**self.encoder, remat=self.remat, dtype=self.dtype)
        num_tokens = 3 * self.plane_tokens**2
        self.plane_queries = self.param(
            "plane_queries", nn.initializers.normal(self.width**-0.5), (1, num_tokens, self.width)
        )
        self.camera_embedder = CameraEmbedder(self.camera_width, self.dtype)
        self.transformer = Transformer(self.depth, self.num_heads, self.remat, self.dtype)
        self.upsampler = triplane.Upsample(self.plane_channels, dtype=self.dtype)
        self.decoder = triplane.Decoder(
            3 * self.plane_channels, self.decoder_width, self.decoder_layers
        )

    def __call__(self, source: Views, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Reconstructs the source view and renders rays [B V H W]."""
        return self.render(self.encode(source), rays, keys_B)

    def encode(self, source: Views) -> dict[str, Float[Array, "B 3 h w C"]]:
        """The planes of one view on white, [B 1 H W 3], with its normalised camera."""
        rgb_BHW3 = source.rgb[:, 0]
        tokens_BMD = self.image_encoder(
            vit.normalize(rgb_BHW3) if self.normalize_image else rgb_BHW3
        )
        camera_BD = self.camera_embedder(camera_vector(source.cameras, self.camera_numbers)[:, 0])
        B, side = tokens_BMD.shape[0], self.plane_tokens
        queries_BLD = jnp.broadcast_to(
            self.plane_queries, (B, *self.plane_queries.shape[1:])
        ).astype(self.dtype)
        x_BLD = self.transformer(queries_BLD, tokens_BMD, camera_BD)
        return {"triplane": self.upsampler(x_BLD.reshape(B, 3, side, side, self.width))}

    def render(self, scene: dict, rays: Rays, keys_B: jax.Array | None = None) -> Rendering:
        """Marches rays [B V H W] through the field; with a key for each scene, both passes are jittered."""
        return triplane.render(
            self._march, scene["triplane"], self.decoder(), self.dtype, rays, keys_B, self.ray_chunk
        )

    def query(
        self, scene: dict, xyz: Float[Array, "B Q 3"]
    ) -> tuple[Float[Array, "B Q"], Float[Array, "B Q 3"]]:
        """Density and sRGB colour of the field at points."""

        def field_of(projected, layers, xyz_Q3):
            raw_density, rgb = self._raw_field(projected, layers, xyz_Q3)
            return nn.softplus(raw_density - 1.0), rgb

        return triplane.query(field_of, scene["triplane"], self.decoder(), self.dtype, xyz)

    def prepare(self, rgba: list[np.ndarray]) -> Views:
        """Images as the reference prepares them: padded to a square, on white, resized without antialiasing."""
        images = [cutout.blend(recentre.pad_to_square(x), self.background) for x in rgba]
        rgb = np.stack([resize.resize_bicubic(x, self.image_size) for x in images])
        eye, up = jnp.array([0.0, -self.source_distance, 0.0]), jnp.array([0.0, 0.0, 1.0])
        camera = np.asarray(cameras.look_at(eye, jnp.zeros(3), up))
        intrinsics = np.float32([self.source_focal, self.source_focal, 0.5, 0.5])
        seen_by = Cameras(
            c2w=np.broadcast_to(camera, (len(rgba), 1, 4, 4)),
            fxfycxcy=np.broadcast_to(intrinsics, (len(rgba), 1, 4)),
        )
        return Views(rgb=rgb[:, None], cameras=seen_by)

    def _raw_field(self, projected, layers, xyz_X3, at=field.field):
        """Raw density and colour at points: with `at=field.along_rays`, at [R S] of them."""
        raw_X4 = at(projected, layers, xyz_X3 / self.radius, PLANE_AXES, "relu")
        # The range of colours is widened by 0.001 at both ends: EG3D, after MipNeRF (https://arxiv.org/abs/2103.13415, appendix).
        return raw_X4[..., 0], nn.sigmoid(raw_X4[..., 1:]) * 1.002 - 0.001

    def _march(self, projected, layers, rays: Rays, key) -> Rendering:
        near, far = sampling.ray_box(rays.origins, rays.dirs, self.radius)
        hit = far > near
        near, far = jnp.where(hit, near, 0.0), jnp.where(hit, far, 1.0)
        keys = (None, None) if key is None else jax.random.split(key)

        def field_at(t_RS):
            xyz_RS3 = rays.origins[:, None] + t_RS[..., None] * rays.dirs[:, None]
            density, rgb = self._raw_field(projected, layers, xyz_RS3, field.along_rays)
            inside = jnp.all(jnp.abs(xyz_RS3) <= self.radius, axis=-1)
            # Parity: outside the box colour is 0, and raw density so low that its mean with any neighbour gives no density.
            density = jnp.where(inside, density, jnp.finfo(jnp.float32).min / 8)
            return density, jnp.where(inside[..., None], rgb, 0.0)

        t_RS = sampling.stratified(near, far, self.num_samples, keys[0])
        density_RS, rgb_RS3 = field_at(t_RS)
        if self.num_importance:
            weights = volrend.compositing_weights(_mid_density(density_RS), t_RS)
            t_fine = sampling.importance(
                t_RS, jax.lax.stop_gradient(weights), self.num_importance, keys[1]
            )
            density_fine, rgb_fine = field_at(t_fine)
            t_RS = jnp.concatenate([t_RS, t_fine], axis=-1)
            order = jnp.argsort(t_RS, axis=-1)
            t_RS = jnp.take_along_axis(t_RS, order, axis=-1)
            density_RS = jnp.take_along_axis(
                jnp.concatenate([density_RS, density_fine], axis=-1), order, axis=-1
            )
            rgb_RS3 = jnp.take_along_axis(
                jnp.concatenate([rgb_RS3, rgb_fine], axis=-2), order[..., None], axis=-2
            )
        rendering = volrend.composite(
            _mid_density(density_RS), 0.5 * (rgb_RS3[:, :-1] + rgb_RS3[:, 1:]), t_RS
        )
        return Rendering(
            rgb=jnp.where(hit[:, None], rendering.rgb, 0.0),
            alpha=jnp.where(hit, rendering.alpha, 0.0),
            depth=jnp.where(hit, rendering.depth, 0.0),
        )


def _mid_density(raw_RS):
    """Parity: an interval's density is the softplus of the mean of the raw densities at its ends, as in EG3D."""
    return nn.softplus(0.5 * (raw_RS[:, :-1] + raw_RS[:, 1:]) - 1.0)


def camera_vector(source: Cameras, numbers: int) -> Float[Array, "*B F"]:
    """The camera embedder's input: the pose's rows (3 for 16 numbers, 4 for 20), then fx, fy, cx, cy as fractions."""
    # Parity: the references' poses have OpenGL (Blender) camera axes.
    pose = cameras.opencv_to_opengl(source.c2w)[..., : (numbers - 4) // 4, :]
    return jnp.concatenate([pose.reshape(*pose.shape[:-2], -1), source.fxfycxcy], axis=-1)


class CameraEmbedder(nn.Module):
    """Two linear layers with a SiLU between them."""

    width: int
    dtype: str

    @nn.compact
    def __call__(self, camera_BC):
        hidden = nn.silu(nn.Dense(self.width, dtype=self.dtype, name="fc1")(camera_BC))
        return nn.Dense(self.width, dtype=self.dtype, name="fc2")(hidden)


class Transformer(nn.Module):
    """Modulated blocks, then a plain layer norm."""

    depth: int
    num_heads: int
    remat: str
    dtype: str

    @nn.compact
    def __call__(self, x_BLD, context_BMD, camera_BD):
        blocks = stack(
            Block, self.depth, self.remat, num_heads=self.num_heads, dtype=self.dtype, name="blocks"
        )
        x_BLD, _ = blocks(x_BLD, context_BMD, camera_BD)
        return layer_norm(1e-6, "norm")(x_BLD).astype(self.dtype)


class Block(nn.Module):
    """Cross-attention, self-attention, MLP; each is residual and follows a norm that the camera modulates."""

    num_heads: int
    dtype: str

    @nn.compact
    def __call__(self, x_BLD, context_BMD, camera_BD):
        cross_attn = Attention(
            self.num_heads, qkv_bias=False, out_bias=False, dtype=self.dtype, name="cross_attn"
        )
        self_attn = Attention(
            self.num_heads, qkv_bias=False, out_bias=False, dtype=self.dtype, name="self_attn"
        )
        mlp = MLP(expansion=4, dtype=self.dtype, name="mlp")
        x_BLD = x_BLD + cross_attn(ModLN(self.dtype, name="norm1")(x_BLD, camera_BD), context_BMD)
        x_BLD = x_BLD + self_attn(ModLN(self.dtype, name="norm2")(x_BLD, camera_BD))
        return x_BLD + mlp(ModLN(self.dtype, name="norm3")(x_BLD, camera_BD)), None


class ModLN(nn.Module):
    """Layer norm whose output a function of the camera scales and shifts (LRM, eq. 4-5). No gate, and not initialised to zero."""

    dtype: str

    @nn.compact
    def __call__(self, x_BLD, camera_BD):
        condition_BD = nn.silu(camera_BD)

        def modulation(name):
            layer = dense(
                x_BLD.shape[-1], dtype=self.dtype, kernel_init=torch_linear_init, name=name
            )
            return layer(condition_BD)[:, None]

        return layer_norm(1e-6, "norm")(x_BLD) * (1 + modulation("scale")) + modulation("shift")


MODEL = LRM


def entries(model: LRM) -> list[torch_layout.Entry]:
    """The names in OpenLRM's checkpoints of the model's `release`."""
    linear, norm = torch_layout.linear, torch_layout.norm
    encoder, at = model.encoder, "encoder.model."
    if _is_dinov2(encoder):
        registers = encoder.get("num_registers", 0) > 0
        table = vit.hub_entries(at, "image_encoder", encoder["depth"], registers, layer_scale=True)
    else:
        table = vit.hf_entries(at, "image_encoder", encoder["depth"])
    positions, upsampler = {
        "1.1": ("pos_embed", "upsampler"),
        "1.0": ("transformer.pos_embed", "transformer.deconv"),
    }[model.release]
    table += [
        torch_layout.same(positions, "plane_queries"),
        torch_layout.permuted(upsampler + ".weight", "upsampler.kernel", (0, 2, 3, 1)),
        torch_layout.same(upsampler + ".bias", "upsampler.bias"),
        *linear("camera_embedder.mlp.0", "camera_embedder.fc1"),
        *linear("camera_embedder.mlp.2", "camera_embedder.fc2"),
        *norm("transformer.norm", "transformer.norm"),
    ]
    for i in range(model.depth):
        at, to = f"transformer.layers.{i}.", "transformer.blocks."
        for k in "123":
            table += norm(at + f"norm{k}.norm", to + f"norm{k}.norm", layer=i)
            # Parity: shift comes first.
            table += linear(
                at + f"norm{k}.mlp.1", to + f"norm{k}.shift", to + f"norm{k}.scale", layer=i
            )
        for name in ("cross_attn", "self_attn"):
            qkv = [f"{to}{name}.{x}.kernel" for x in "qkv"]
            if (
                name == "self_attn" or encoder["width"] == model.width
            ):  # torch packs where all widths are equal
                table.append(
                    torch_layout.Entry(f"{at}{name}.in_proj_weight", tuple(qkv), (1, 0), i)
                )
            else:
                for x, ours in zip("qkv", qkv, strict=True):
                    table.append(
                        torch_layout.Entry(f"{at}{name}.{x}_proj_weight", (ours,), (1, 0), i)
                    )
            table += linear(f"{at}{name}.out_proj", f"{to}{name}.out", layer=i, bias=False)
        table += linear(at + "mlp.0", to + "mlp.fc1", layer=i)
        table += linear(at + "mlp.3", to + "mlp.fc2", layer=i)
    return table + triplane.decoder_entries("synthesizer.decoder.net.", model.decoder_layers)


def _is_dinov2(encoder):
    return encoder.get("layer_scale", False)


def from_torch(state: dict[str, np.ndarray], model: LRM) -> dict:
    """Parameters of an OpenLRM state dict."""
    return torch_layout.from_torch(entries(model), state)


def to_torch(params: dict, model: LRM) -> dict[str, np.ndarray]:
    """A state dict that OpenLRM loads strictly."""
    return torch_layout.to_torch(entries(model), params)


def fields_from_torch(state: dict[str, np.ndarray]) -> dict:
    """The model's fields that follow from the names and shapes of an OpenLRM state dict."""
    release = "1.0" if "transformer.pos_embed" in state else "1.1"
    positions = state["transformer.pos_embed" if release == "1.0" else "pos_embed"].shape
    upsampler = state[("transformer.deconv" if release == "1.0" else "upsampler") + ".weight"].shape
    at = "encoder.model."
    hub = at + "patch_embed.proj.weight" in state
    camera = state["camera_embedder.mlp.0.weight"].shape
    return dict(
        encoder=vit.hub_fields(at, state) if hub else vit.hf_fields(at, state),
        normalize_image=not hub,
        width=positions[2],
        depth=torch_layout.count(state, "transformer.layers."),
        plane_tokens=round((positions[1] / 3) ** 0.5),
        plane_channels=upsampler[1],
        decoder_width=state["synthesizer.decoder.net.0.weight"].shape[0],
        decoder_layers=torch_layout.count(state, "synthesizer.decoder.net."),
        camera_width=camera[0],
        camera_numbers=camera[1],
        release=release,
    )


def fields_from_config(config: dict) -> dict:
    """The fields that only OpenLRM's config.json (or v1.0's `kwargs["model"]`) states, not the shapes."""
    half = config["rendering_samples_per_ray"] // 2
    return dict(num_heads=config["transformer_heads"], num_samples=half, num_importance=half)


def config_to_torch(model: LRM) -> dict:
    """The config.json that goes with `to_torch`."""
    encoder = model.encoder
    config = {
        "camera_embed_dim": model.camera_width,
        "rendering_samples_per_ray": model.num_samples + model.num_importance,
        "transformer_dim": model.width,
        "transformer_layers": model.depth,
        "transformer_heads": model.num_heads,
        "triplane_low_res": model.plane_tokens,
        "triplane_high_res": 2 * model.plane_tokens,
        "triplane_dim": model.plane_channels,
        "encoder_freeze": False,
        "encoder_feat_dim": encoder["width"],
    }
    dinov2 = _is_dinov2(encoder)
    if model.release == "1.1":
        config["encoder_type"] = "dinov2" if dinov2 else "dino"
    usual = "dinov2_vitb14_reg" if dinov2 else "facebook/dino-vitb16"
    return config | {"encoder_model_name": encoders.published_name(encoder) or usual}
