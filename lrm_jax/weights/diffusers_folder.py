"""Zero123 in diffusers' form: a folder with a folder of weights and a config for each network."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from flax import linen as nn

from lrm_jax.models.zero123 import layouts
from lrm_jax.parallel import whole_files
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files
from lrm_jax.weights.model_file import RECORD, record_text

# The networks, and their files of weights without the suffix.
NETWORKS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "image_encoder": "model",
    "clip_camera_projection": "diffusion_pytorch_model",
}
NAMES = ("diffusion_pytorch_model.safetensors", "model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")  # fmt: skip


def is_one(folder: Path) -> bool:
    """Whether a folder is of this form."""
    return (folder / "unet").is_dir()


def read(folder: Path) -> dict[str, np.ndarray]:
    """All tensors, as "network/name".

    Raises:
      InputError: a network is missing, or a file is damaged.
    """
    state = {}
    for network in NETWORKS:
        files = [folder / network / name for name in NAMES]
        file = next((path for path in files if path.exists()), None)
        if file is None:
            raise InputError(
                f"{folder}: {network} has none of {', '.join(NAMES)}: download the whole of diffusers' folder"
            )
        content, _ = tensor_files.read(file)
        if not isinstance(content, Mapping):
            raise InputError(f"{file}: holds no named tensors: download it again")
        state |= {f"{network}/{name}": value for name, value in content.items()}
    return state


def write(folder: Path, model: nn.Module, params: Mapping, training: Mapping) -> list[Path]:
    """Writes a model, all files or none. Returns their paths."""
    state = layouts.to_diffusers(params, model)
    files = [folder / network / f"{name}.safetensors" for network, name in NETWORKS.items()]
    texts = {folder / network / "config.json": json.dumps(config, indent=2) for network, config in configs(model).items()}  # fmt: skip
    texts[folder / RECORD] = record_text(model, training, "unet")
    paths = [*files, *texts]
    with whole_files.replacing(*paths) as temporary:
        for network, path in zip(NETWORKS, temporary, strict=False):
            own = {k.removeprefix(network + "/"): v for k, v in state.items() if k.startswith(network + "/")}  # fmt: skip
            tensor_files.write_safetensors(path, own, {"format": "pt"})
        for path, text in zip(temporary[len(files) :], texts.values(), strict=True):
            path.write_text(text, encoding="utf-8")
    return paths


def configs(model: nn.Module) -> dict[str, dict]:
    """The config.json of the networks that diffusers and transformers have classes for."""
    last = len(model.multiples) - 1
    down, up = [], []
    for level in range(last + 1):
        attention = "CrossAttn" if level in model.attention_levels else ""
        down.append(f"{attention}DownBlock2D")
        up.insert(0, f"{attention}UpBlock2D")
    side = model.image_size // 2 ** (len(model.autoencoder["multiples"]) - 1)
    unet = {
        "_class_name": "UNet2DConditionModel",
        "sample_size": side,
        "in_channels": 8,
        "out_channels": 4,
        "block_out_channels": [model.channels * m for m in model.multiples],
        "layers_per_block": model.num_blocks,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": model.num_heads,  # diffusers' name for the number of heads here
        "cross_attention_dim": model.context_width,
    }
    levels = len(model.autoencoder["multiples"])
    vae = {
        "_class_name": "AutoencoderKL",
        "sample_size": model.image_size,
        "latent_channels": 4,
        "block_out_channels": [model.autoencoder["channels"] * m for m in model.autoencoder["multiples"]],
        "layers_per_block": model.autoencoder["num_blocks"],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": 0.18215,
    }  # fmt: skip
    tower = model.tower
    image_encoder = {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        "hidden_act": "quick_gelu",
        "hidden_size": tower["width"],
        "intermediate_size": 4 * tower["width"],
        "num_attention_heads": tower["num_heads"],
        "num_hidden_layers": tower["depth"],
        "image_size": tower["side"],
        "patch_size": tower["patch"],
        "projection_dim": tower["out"],
    }
    return {"unet": unet, "vae": vae, "image_encoder": image_encoder}
