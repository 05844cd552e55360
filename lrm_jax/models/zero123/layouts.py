"""The two layouts of Zero123's checkpoints: the released one, of latent diffusion and CLIP's own code, and diffusers'.

Each is one table, read in both directions. Blocks are listed in the order in which the U-Net runs them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from lrm_jax.models.parts import torch_layout
from lrm_jax.models.parts.torch_layout import Entry, linear, norm, permuted
from lrm_jax.models.zero123 import diffusion
from lrm_jax.models.zero123.unet import attention_of

UNET, EMA = "model.diffusion_model.", "model_ema."
AUTOENCODER, TOWER = "first_stage_model.", "cond_stage_model.model.visual."
PROJECTION = "cc_projection"
# Released files hold more, which sampling does not need: the text side of CLIP, and constants of the schedule.
OWN = (UNET, AUTOENCODER, TOWER, PROJECTION)


class Place(NamedTuple):
    """A block of the U-Net in the three namings."""

    ours: str
    released: str
    diffusers: str
    kind: str  # "block", "attention" or "convolution"
    shortcut: bool = False


def places(multiples, attention_levels, num_blocks) -> Iterator[Place]:
    """The blocks of a U-Net, in order."""
    last, number = len(multiples) - 1, 1
    widths = [1]  # of the skips, in units of `channels`
    width = 1
    for level, multiple in enumerate(multiples):
        for i in range(num_blocks):
            ours, at, to = f"down{level}_{i}", f"input_blocks.{number}.", f"down_blocks.{level}."
            yield Place(ours, at + "0", f"{to}resnets.{i}", "block", width != multiple)
            if level in attention_levels:
                yield Place(attention_of(ours), at + "1", f"{to}attentions.{i}", "attention")
            width, number = multiple, number + 1
            widths.append(width)
        if level < last:
            yield Place(
                f"shrink{level}", f"input_blocks.{number}.0.op", f"{to}downsamplers.0.conv", "convolution"
            )  # fmt: skip
            number += 1
            widths.append(width)
    yield Place("middle_0", "middle_block.0", "mid_block.resnets.0", "block")
    yield Place(attention_of("middle_0"), "middle_block.1", "mid_block.attentions.0", "attention")
    yield Place("middle_1", "middle_block.2", "mid_block.resnets.1", "block")
    number = 0
    for level in reversed(range(last + 1)):
        for i in range(num_blocks + 1):
            ours, at = f"up{level}_{i}", f"output_blocks.{number}."
            to = f"up_blocks.{last - level}."
            # The skip makes the input wider than the output.
            yield Place(ours, at + "0", f"{to}resnets.{i}", "block", True)
            part = 1
            if level in attention_levels:
                yield Place(attention_of(ours), at + "1", f"{to}attentions.{i}", "attention")
                part = 2
            if level and i == num_blocks:
                yield Place(
                    f"grow{level}", f"{at}{part}.conv", f"{to}upsamplers.0.conv", "convolution"
                )
            number += 1


def convolution(torch: str, ours: str) -> list[Entry]:
    """torch.nn.Conv2d."""
    return [
        permuted(torch + ".weight", ours + ".kernel", (2, 3, 1, 0)),
        torch_layout.same(torch + ".bias", ours + ".bias"),
    ]


# -- the U-Net


def unet_entries(model, released: bool) -> list[Entry]:
    """The U-Net and its context, with the names of the released file or of diffusers."""
    at = UNET if released else "unet/"
    ends = (
        ("time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2")
        if released
        else ("time_embedding.linear_1", "time_embedding.linear_2", "conv_in", "conv_norm_out", "conv_out")
    )  # fmt: skip
    time_1, time_2, first, last_norm, last = (at + name for name in ends)
    table = [
        *linear(time_1, "unet.time_fc1"),
        *linear(time_2, "unet.time_fc2"),
        *convolution(first, "unet.conv_in"),
        *norm(last_norm, "unet.norm_out"),
        *convolution(last, "unet.conv_out"),
    ]
    for place in places(model.multiples, model.attention_levels, model.num_blocks):
        theirs = at + (place.released if released else place.diffusers)
        if place.kind == "block":
            table += _block(theirs, place, released)
        elif place.kind == "attention":
            table += _attention(theirs, place.ours)
        else:
            table += convolution(theirs, "unet." + place.ours)
    return table


def _block(theirs: str, place: Place, released: bool) -> list[Entry]:
    names = (
        ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
        if released
        else ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
    )  # fmt: skip
    norm1, conv1, time, norm2, conv2, shortcut = (f"{theirs}.{name}" for name in names)
    ours = "unet." + place.ours
    return [
        *norm(norm1, ours + ".norm1"),
        *convolution(conv1, ours + ".conv1"),
        *linear(time, ours + ".time"),
        *norm(norm2, ours + ".norm2"),
        *convolution(conv2, ours + ".conv2"),
        *(convolution(shortcut, ours + ".shortcut") if place.shortcut else ()),
    ]


def _attention(theirs: str, name: str) -> list[Entry]:
    ours, context, at = "unet." + name, "context." + name, theirs + ".transformer_blocks.0."
    table = [
        *norm(theirs + ".norm", ours + ".norm"),
        *convolution(theirs + ".proj_in", ours + ".proj_in"),
        *convolution(theirs + ".proj_out", ours + ".proj_out"),
        *norm(at + "norm1", ours + ".norm1"),
        *norm(at + "norm2", context + ".norm"),
        *norm(at + "norm3", ours + ".norm3"),
        *linear(at + "ff.net.0.proj", ours + ".fc1"),
        *linear(at + "ff.net.2", ours + ".fc2"),
    ]
    for attn, to in (("attn1", ours + ".self_attn"), ("attn2", context)):
        for x in "qkv":
            table += linear(f"{at}{attn}.to_{x}", f"{to}.{x}", bias=False)
        table += linear(f"{at}{attn}.to_out.0", to + ".out")
    return table


# -- the autoencoder


def autoencoder_entries(model, released: bool) -> list[Entry]:
    """The encoder and the decoder."""
    at = AUTOENCODER if released else "vae/"
    table = [
        *convolution(at + "quant_conv", "encoder.quant"),
        *convolution(at + "post_quant_conv", "decoder.post_quant"),
    ]
    last = "norm_out" if released else "conv_norm_out"
    for ours in ("encoder", "decoder"):
        for x in ("conv_in", "conv_out"):
            table += convolution(f"{at}{ours}.{x}", f"{ours}.{x}")
        table += norm(f"{at}{ours}.{last}", f"{ours}.norm_out")
        table += _middle(f"{at}{ours}.", f"{ours}.middle.", released)
    multiples, num_blocks = model.autoencoder["multiples"], model.autoencoder["num_blocks"]
    levels = len(multiples)
    for level in range(levels):
        down = f"{at}encoder." + (f"down.{level}." if released else f"down_blocks.{level}.")
        up = f"{at}decoder." + (f"up.{level}." if released else f"up_blocks.{levels - 1 - level}.")
        block = "block" if released else "resnets"
        before, after = multiples[max(level - 1, 0)], multiples[min(level + 1, levels - 1)]
        for i in range(num_blocks):
            wider = i == 0 and multiples[level] != (before if level else 1)
            table += _plain_block(f"{down}{block}.{i}", f"encoder.down{level}_{i}", wider, released)
        for i in range(num_blocks + 1):
            narrower = i == 0 and multiples[level] != after
            table += _plain_block(f"{up}{block}.{i}", f"decoder.up{level}_{i}", narrower, released)
        if level < levels - 1:
            name = "downsample.conv" if released else "downsamplers.0.conv"
            table += convolution(down + name, f"encoder.shrink{level}")
        if level:
            name = "upsample.conv" if released else "upsamplers.0.conv"
            table += convolution(up + name, f"decoder.grow{level}")
    return table


def _plain_block(theirs: str, ours: str, shortcut: bool, released: bool) -> list[Entry]:
    table = [*norm(theirs + ".norm1", ours + ".norm1"), *norm(theirs + ".norm2", ours + ".norm2")]
    for x in ("conv1", "conv2"):
        table += convolution(f"{theirs}.{x}", f"{ours}.{x}")
    name = "nin_shortcut" if released else "conv_shortcut"
    return table + (convolution(f"{theirs}.{name}", ours + ".shortcut") if shortcut else [])


def _middle(theirs: str, ours: str, released: bool) -> list[Entry]:
    table = []
    for i in range(2):
        at = f"mid.block_{i + 1}" if released else f"mid_block.resnets.{i}"
        table += _plain_block(theirs + at, f"{ours}block_{i}", False, released)
    at = theirs + ("mid.attn_1." if released else "mid_block.attentions.0.")
    names = (
        ("norm", "q", "k", "v", "proj_out")
        if released
        else ("group_norm", "to_q", "to_k", "to_v", "to_out.0")
    )
    table += norm(at + names[0], ours + "norm")
    for name, x in zip(names[1:], ("q", "k", "v", "out"), strict=True):
        table += convolution(at + name, ours + x)
    return table


# -- CLIP's image tower, and the projection of its vector and the pose


def tower_entries(model, released: bool) -> list[Entry]:
    """The image tower."""
    at = TOWER if released else "image_encoder/vision_model."
    names = (
        ("conv1.weight", "class_embedding", "positional_embedding", "ln_pre", "ln_post")
        if released
        else ("embeddings.patch_embedding.weight", "embeddings.class_embedding", "embeddings.position_embedding.weight", "pre_layrnorm", "post_layernorm")
    )  # fmt: skip
    patches, cls, positions, norm_in, norm_out = (at + name for name in names)
    table = [
        permuted(patches, "image_tower.patches.kernel", (2, 3, 1, 0)),
        torch_layout.same(cls, "image_tower.cls_token"),
        torch_layout.same(positions, "image_tower.positions"),
        *norm(norm_in, "image_tower.norm_in"),
        *norm(norm_out, "image_tower.norm_out"),
    ]
    if released:
        table += [torch_layout.same(TOWER + "proj", "image_tower.projection.kernel")]
    else:
        table += linear("image_encoder/visual_projection", "image_tower.projection", bias=False)
    for i in range(model.tower["depth"]):
        block = at + (f"transformer.resblocks.{i}." if released else f"encoder.layers.{i}.")
        names = (
            {"attn.out_proj": "attn.out", "mlp.c_fc": "fc1", "mlp.c_proj": "fc2"}
            if released
            else {"self_attn.out_proj": "attn.out", "mlp.fc1": "fc1", "mlp.fc2": "fc2"}
        )
        for theirs, ours in names.items():
            table += linear(block + theirs, "image_tower.blocks." + ours, layer=i)
        for k in "12":
            name = f"ln_{k}" if released else f"layer_norm{k}"
            table += norm(block + name, f"image_tower.blocks.norm{k}", layer=i)
        qkv = [f"image_tower.blocks.attn.{x}" for x in "qkv"]
        if released:
            kernels, biases = ([f"{x}.{leaf}" for x in qkv] for leaf in ("kernel", "bias"))
            table += [Entry(block + "attn.in_proj_weight", tuple(kernels), (1, 0), i)]
            table += [Entry(block + "attn.in_proj_bias", tuple(biases), None, i)]
        else:
            for x, ours in zip("qkv", qkv, strict=True):
                table += linear(f"{block}self_attn.{x}_proj", ours, layer=i)
    return table


def entries(model, released: bool = True) -> list[Entry]:
    """The tensors that sampling needs, of which a model without an autoencoder has none of that."""
    table = [
        *unet_entries(model, released),
        *tower_entries(model, released),
        *linear(PROJECTION if released else "clip_camera_projection/proj", "projection"),
    ]
    return table + (autoencoder_entries(model, released) if model.autoencoder else [])


# -- the released file


def own_tensors(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors of `entries`, of either layout, under the released names.

    Of a released file, the U-Net's running means, with which the reference samples. The other tensors of training, CLIP's text side
    and the schedule's constants are dropped.
    """
    if any(name.startswith("unet/") for name in state):
        return from_diffusers(state)
    raw = [name for name in state if name.startswith(UNET)]
    means = {name: state[flattened(name)] for name in raw if flattened(name) in state}
    return {name: value for name, value in state.items() if name.startswith(OWN)} | means


def flattened(name: str) -> str:
    """The name of the running mean of a tensor of the U-Net."""
    return EMA + name.removeprefix("model.").replace(".", "")


def released_file(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """All tensors of a released file but those of CLIP's text side, from those of `entries`."""
    means = {flattened(name): value for name, value in state.items() if name.startswith(UNET)}
    counts = {EMA + "decay": np.array(0.9999, np.float32)}
    counts[EMA + "num_updates"] = np.array(0, np.int32)
    return state | means | counts | diffusion.constants()


# -- diffusers' folder


def from_diffusers(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """diffusers' tensors, as "component/name", under the released names; one that has none keeps its own.

    Older files name the autoencoder's attention otherwise, and its layers may be 1 x 1 convolutions there or linear.
    """
    older = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    renamed = {}
    for name, value in state.items():
        if name.startswith("vae/") and ".attentions." in name:
            name = re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{older[m[1]]}.", name)
            value = value[..., None, None] if value.ndim == 2 else value
        if not name.endswith("embeddings.position_ids"):
            renamed[name] = value
    model = Sizes(**fields_from_diffusers(renamed))
    holders = {(path, e.layer): e.torch for e in entries(model) for path in e.ours}
    parts = {}
    for entry in entries(model, released=False):
        if entry.torch in renamed:
            holder = holders[entry.ours[0], entry.layer]
            parts.setdefault(holder, []).append(renamed.pop(entry.torch))
    # CLIP's own code packs queries, keys and values, and multiplies by the projection from the right.
    joined = {name: np.concatenate(values) for name, values in parts.items()}
    return {k: v.T if k == TOWER + "proj" else v for k, v in joined.items()} | renamed


def to_diffusers(params: dict, model) -> dict[str, np.ndarray]:
    """diffusers' tensors, as "component/name"."""
    return linear_attention(torch_layout.to_torch(entries(model, released=False), params))


def linear_attention(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """1 x 1 convolutions in the autoencoder's attention as diffusers' linear layers."""
    layers = re.compile(r"vae/.*\.attentions\.0\.to_.*weight")
    return {k: v[..., 0, 0] if layers.fullmatch(k) else v for k, v in state.items()}


# -- sizes from names and shapes


class Sizes(NamedTuple):
    """What the tables need of a model."""

    channels: int
    multiples: tuple[int, ...]
    attention_levels: tuple[int, ...]
    num_blocks: int
    context_width: int
    tower: dict
    autoencoder: dict | None


def fields_from_torch(state: Mapping[str, np.ndarray]) -> dict:
    """The sizes that follow from a released state dict's names and shapes."""
    channels = state[UNET + "input_blocks.0.0.weight"].shape[0]
    levels = [[]]
    for number in range(1, torch_layout.count(state, UNET + "input_blocks.")):
        at = f"{UNET}input_blocks.{number}."
        if at + "0.op.weight" in state:
            levels.append([])
        else:
            width = state[at + "0.in_layers.2.weight"].shape[0]
            levels[-1].append((width, at + "1.norm.weight" in state))
    tower = dict(
        positions=state[TOWER + "positional_embedding"],
        patches=state[TOWER + "conv1.weight"],
        out=state[TOWER + "proj"].shape[1],
        depth=torch_layout.count(state, TOWER + "transformer.resblocks."),
    )
    return _fields(
        channels, levels, state[PROJECTION + ".weight"], tower, _autoencoder(state, AUTOENCODER, "down.", "block.")
    )  # fmt: skip


def fields_from_diffusers(state: Mapping[str, np.ndarray]) -> dict:
    """The same from diffusers' names."""
    levels = []
    for level in range(torch_layout.count(state, "unet/down_blocks.")):
        at = f"unet/down_blocks.{level}."
        levels.append(
            [
                (state[f"{at}resnets.{i}.conv1.weight"].shape[0], f"{at}attentions.{i}.norm.weight" in state)
                for i in range(torch_layout.count(state, at + "resnets."))
            ]
        )  # fmt: skip
    at = "image_encoder/vision_model."
    tower = dict(
        positions=state[at + "embeddings.position_embedding.weight"],
        patches=state[at + "embeddings.patch_embedding.weight"],
        out=state["image_encoder/visual_projection.weight"].shape[0],
        depth=torch_layout.count(state, at + "encoder.layers."),
    )
    return _fields(
        state["unet/conv_in.weight"].shape[0], levels, state["clip_camera_projection/proj.weight"], tower,
        _autoencoder(state, "vae/", "down_blocks.", "resnets."),
    )  # fmt: skip


def _fields(channels, levels, projection, tower, autoencoder) -> dict:
    width, _, patch, _ = tower["patches"].shape
    side = round((tower["positions"].shape[0] - 1) ** 0.5) * patch
    return dict(
        channels=channels,
        multiples=tuple(blocks[0][0] // channels for blocks in levels),
        attention_levels=tuple(i for i, blocks in enumerate(levels) if blocks[0][1]),
        num_blocks=len(levels[0]),
        context_width=projection.shape[0],
        tower=dict(
            side=side, patch=patch, width=width, depth=tower["depth"], num_heads=max(width // 64, 1), out=tower["out"]
        ),
        autoencoder=autoencoder,
    )  # fmt: skip


def _autoencoder(state, at, down, block) -> dict | None:
    if at + "encoder.conv_in.weight" not in state:
        return None
    channels, at = state[at + "encoder.conv_in.weight"].shape[0], f"{at}encoder.{down}"
    widths = [
        state[f"{at}{level}.{block}0.conv1.weight"].shape[0]
        for level in range(torch_layout.count(state, at))
    ]
    return dict(
        channels=channels,
        multiples=tuple(width // channels for width in widths),
        num_blocks=torch_layout.count(state, f"{at}0.{block}"),
    )
