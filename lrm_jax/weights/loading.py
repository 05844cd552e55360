"""`lrm convert`, and weights from anywhere: our model files, training runs, the references' checkpoints, Hugging Face.

    lrm convert model.ckpt triposr.safetensors          a reference's checkpoint to our model file
    lrm convert triposr.safetensors folder --to torch   and back, to the bit
    lrm convert vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth     the network of the loss and metric LPIPS
    lrm convert imagenet-vgg-verydeep-19.mat vgg19.safetensors                  the network of LVSM's perceptual loss

Our model file is a safetensors file: parameters by their dotted path, and in its metadata the family, its fields and a summary
of the training.
"""

import argparse
import json
import posixpath
import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lrm_jax import lpips, models, perceptual, tensor_files, vgg
from lrm_jax.references import (
    CONFIG_NAMES,
    RUN_FIELDS,
    WEIGHTS_NAMES,
    check_state_dict,
    family,
    from_checkpoint,
    from_reference,
    param_shapes,
    what_it_is,
    write_reference,
)
from lrm_jax.report import Stages
from lrm_jax.types import InputError

__all__ = ["from_reference", "load_model", "load_weights", "main", "save_model"]

BUNDLED = Path(__file__).parent / "assets" / "nano.safetensors"
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")
FORMAT = {"format": "lrm_jax", "version": "1"}


def main(argv: list[str]) -> int:
    """Runs `lrm convert`."""
    args = parse(argv)
    dst = Path(args.dst)
    if args.to == "torch" and (dst.is_file() or dst.suffix in SUFFIXES):
        raise InputError(
            f"{dst}: --to torch writes a folder with weights and config: name a folder"
        )
    if args.to == "torch" and args.dtype != "float32":
        raise InputError(
            f"--dtype {args.dtype}: the references' files are float32: leave it out with --to torch"
        )
    network = lpips if args.linear is not None else None
    network = perceptual if network is None and args.src.endswith(".mat") else network
    if network is not None and (args.to, args.dtype) != ("lrm_jax", "float32"):
        raise InputError(
            f"{args.src}: a loss's network is kept as float32 and for lrm_jax only: leave out --to and --dtype"
        )
    if args.to == "lrm_jax" and dst.is_dir():
        dst = dst / f"{'model' if network is None else network.NETWORK}.safetensors"
    if args.to == "lrm_jax" and dst.suffix != ".safetensors":
        raise InputError(
            f"{dst}: a model file's name ends in .safetensors: rename it, or add --to torch"
        )
    stages = Stages()
    if network is not None:
        with stages(f"convert {args.src}"):
            convert_network(network, [f for f in (args.src, args.linear) if f is not None], dst)
        print(f"wrote {dst} ({dst.stat().st_size / 1e6:.1f} MB)")
        return 0
    with stages(f"read {args.src}"):
        model, params, info = read_weights(args.src)
    count = sum(x.size for x in jax.tree.leaves(params))
    with stages("write", f" {info['family']} ({info['variant']}), {count / 1e6:.1f} M parameters"):
        if args.to == "torch":
            written = write_reference(dst, model, params)
        else:
            save_model(dst, model, params, info["training"], args.dtype)
            written = [dst]
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of `lrm convert`."""
    parser = argparse.ArgumentParser(
        prog="lrm convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "src",
        help="a model file, a reference's checkpoint (TripoSR, OpenLRM 1.0 and 1.1, LVSM, DINO, DINOv2; its config.yaml or config.json"
        " is read from the same folder), a folder with one, a training workdir, hf:ORG/NAME, or hf:ORG/NAME/FILE",
    )
    parser.add_argument(
        "dst",
        help="the model file to write, *.safetensors; with --to torch the folder to write into",
    )
    parser.add_argument(
        "--to", choices=("lrm_jax", "torch"), default="lrm_jax",
        help="lrm_jax: our model file; torch: the weights and config that the PyTorch reference loads (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="number format of the model file; the 16-bit ones halve it and round (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--linear", metavar="FILE",
        help="LPIPS's linear heads, lpips/weights/v0.1/vgg.pth of the PyPI package lpips; src is then torchvision's VGG16",
    )  # fmt: skip
    return parser.parse_args(argv)


def convert_network(network: ModuleType, files: list[str], dst: Path) -> None:
    """Writes the network of a loss.

    Args:
      network: `lpips`, or `perceptual`.
      files: torchvision's VGG16 and LPIPS's heads; or MatConvNet's VGG19.
      dst: the file to write.

    Raises:
      InputError: a file that is missing, damaged, or something else.
    """
    contents = [tensor_files.read(Path(file).expanduser())[0] for file in files]
    try:
        if network is lpips:
            for content in contents:
                check_state_dict(content)
            params = lpips.from_torch(*contents)
        else:
            params = perceptual.from_matconvnet(*contents)
        vgg.save(dst, params, network.NETWORK)
    except InputError as error:
        raise InputError(f"{' with --linear '.join(files)}: {error}") from error


# -- weights from anywhere


def load_weights(weights: str | None = None) -> tuple[nn.Module, dict, dict]:
    """Loads a reconstruction model.

    Args:
      weights: a model file, a reference's checkpoint file, a folder with one (the form of a Hugging Face snapshot), a training
        workdir, `hf:ORG/NAME`, `hf:ORG/NAME/FILE`, or None for the bundled model.

    Returns:
      The module, its parameters (float32, on the device), and a dict of `family`, `variant`, `training` and `path`.

    Raises:
      InputError: no such file, damaged, of no known family, or with other tensors than its family has.
    """
    model, params, info = read_weights(weights)
    if not hasattr(model, "encode"):
        raise InputError(
            f"{weights}: an image encoder alone: give a whole model, as hf:stabilityai/TripoSR"
        )
    flat = flatten_dict(params)
    del (
        params
    )  # each array is freed once it is on the device: twice a full-size model is a laptop's memory
    return model, unflatten_dict({k: jax.device_put(flat.pop(k)) for k in list(flat)}), info


def training_data(training: dict) -> dict:
    """The fields of the config's `data` in a model's record of training; {} where there is none."""
    return training.get("config", {}).get("data", {})


def read_weights(weights: str | None) -> tuple[nn.Module, dict, dict]:
    """As `load_weights`, for encoders too, with NumPy arrays."""
    if weights is None:
        path = BUNDLED
        if not path.exists():
            raise InputError(
                "this installation has no bundled model: give one with --weights, as hf:stabilityai/TripoSR"
            )
    elif weights.startswith("hf:"):
        path = download(weights.removeprefix("hf:"))
    else:
        path = Path(weights).expanduser()
    if (path / "checkpoints").is_dir():
        model, params, training = _read_workdir(path)
    else:
        path = _weights_in(path) if path.is_dir() else path
        content, metadata = tensor_files.read(path)
        try:
            if metadata.get("format") == FORMAT["format"]:
                model, params, training = _from_model_file(content, metadata)
            else:
                (model, params), training = from_checkpoint(content, path), {}
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    for name, value in flatten_dict(params, sep=".").items():
        if not _is_finite(value):
            raise InputError(
                f"{path}: {name} has numbers that are not finite: damaged, or a run that diverged: use another file"
            )
    info = {
        "family": models.name_of(model),
        "variant": variant_of(model),
        "training": training,
        "path": str(path),
    }
    return model, params, info


def download(name: str) -> Path:
    """The folder of a Hugging Face repository, or one file of it, fetched or from the cache; only what the references use."""
    import huggingface_hub  # here: most commands need no network, and it is slow to import

    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-][\w./-]*))?", name)
    if match is None or ".." in name.split("/"):
        raise InputError(
            f"hf:{name}: expected hf:ORG/NAME, as hf:stabilityai/TripoSR, or hf:ORG/NAME/FILE"
        )
    repository, file = match.groups()
    *first, fallback = (
        WEIGHTS_NAMES  # some repositories have the same weights as both .safetensors and .bin
    )
    for weights_names in ([file],) if file else (first, [fallback]):
        try:
            beside = posixpath.dirname(file or "")
            configs = [posixpath.join(beside, name) for name in CONFIG_NAMES.values()]
            patterns = [*weights_names, *configs]
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        except (
            Exception
        ) as error:  # errors of the hub, the HTTP client and the disk have no common base
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(
                f"hf:{name}: cannot be downloaded ({reason}): check the name, the network and `hf auth login`,"
                " or download it elsewhere and give its folder"
            ) from error
        if file and (folder / file).exists():
            return folder / file
        if any((folder / weights).exists() for weights in weights_names):
            return folder
    if file:
        raise InputError(f"hf:{name}: {repository} has no file {file}: check its name there")
    raise InputError(
        f"hf:{name}: has none of {', '.join(WEIGHTS_NAMES)}: name the file of its weights, as hf:{name}/FILE"
    )


def _weights_in(folder):
    for name in WEIGHTS_NAMES:
        if (folder / name).exists():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        has = f"several ({', '.join(path.name for path in files[:4])})" if files else "none"
        raise InputError(
            f"{folder}: a folder with one file of weights was expected, this has {has}: give the file itself"
        )
    return files[0]


def _read_workdir(workdir):
    from lrm_jax import checkpoints  # here: Orbax takes seconds to import

    try:
        config = json.loads((workdir / "config.json").read_text())
        model = models.build(**what_it_is(config["model"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{workdir}: its config.json is not that of a training run ({error}): give a model file"
        ) from error
    with checkpoints.open_folder(workdir, read_only=True) as manager:
        step = manager.latest_step()
        if step is None:
            raise InputError(
                f"{workdir}: the run has not saved a checkpoint yet: wait for its first"
            )
        try:
            params = checkpoints.restore_part(manager, {"ema_params": param_shapes(model)})[
                "ema_params"
            ]
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{workdir}: checkpoint {step} does not fit config.json ({reason}): give a model file"
            ) from error
    return model, params, {"steps": step, "config": config}


def _is_finite(array):
    # NaN is the maximum of whatever it is among; np.isfinite of the whole would make a temporary array.
    with np.errstate(invalid="ignore"):
        return np.isfinite(array.max(initial=0)) and np.isfinite(array.min(initial=0))


# -- our model file


def save_model(
    path: str | Path, model: nn.Module, params: Mapping, training: Mapping, dtype: str = "float32"
) -> None:
    """Writes our model file, whole or not at all.

    Args:
      training: what people should know of where the parameters come from; JSON values.
      dtype: how numbers are stored: "float32", or rounded to "float16" or "bfloat16".

    Raises:
      InputError: `path` cannot be written, or a parameter is not finite in `dtype`.
    """
    stored = {}
    for name, value in flatten_dict(dict(params), sep=".").items():
        with np.errstate(over="ignore"):  # reported below
            stored[name] = np.asarray(value).astype(jnp.dtype(dtype), copy=False)
        if not _is_finite(stored[name]):
            raise InputError(
                f"{path}: {name} has numbers that are not finite in {dtype}: store it as float32, or train again"
            )
    fields = json.dumps(fields_of(model), default=dict)
    about = {"family": models.name_of(model), "variant": variant_of(model), "fields": fields}
    tensor_files.write_safetensors(
        Path(path), stored, FORMAT | about | {"training": json.dumps(training)}
    )


def load_model(path: str | Path) -> tuple[nn.Module, dict, dict]:
    """Reads a file of `save_model`: the module, float32 NumPy parameters, the training summary.

    Raises:
      InputError: not such a file, of a later version, or with other tensors than its fields tell.
    """
    content, metadata = tensor_files.read(path)
    try:
        return _from_model_file(content, metadata)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _from_model_file(tensors, metadata):
    if metadata.get("format") != FORMAT["format"]:
        raise InputError("not a model file of lrm_jax: make one with `lrm convert`")
    if metadata.get("version") != FORMAT["version"]:
        raise InputError(f"a model file of version {metadata.get('version')}: update lrm_jax")
    try:
        fields = {k: _hashable(v) for k, v in json.loads(metadata["fields"]).items()}
        model = family(metadata["family"]).MODEL(**fields)
        training = json.loads(metadata["training"])
        wanted = {k: x.shape for k, x in flatten_dict(param_shapes(model), sep=".").items()}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise InputError(
            f"its description is damaged or of a later lrm_jax ({str(error).splitlines()[0]}): update lrm_jax, or convert it again"
        ) from error
    tensor_files.check_names(
        {name: x.shape for name, x in tensors.items()},
        wanted,
        f"{metadata['family']} with its fields",
    )
    params = {name: np.asarray(value, np.float32) for name, value in tensors.items()}
    return model, unflatten_dict(params, sep="."), training


def variant_of(model: nn.Module) -> str:
    """The name of the variant that `model` is, or "custom"."""
    module = family(models.name_of(model))
    for name, fields in module.VARIANTS.items():
        if fields_of(module.MODEL(**fields)) == fields_of(model):
            return name
    return "custom"


def fields_of(model: nn.Module) -> dict:
    """The fields that make a model what it is, without those of how it is run."""
    names = [
        k for k in type(model).__dataclass_fields__ if k not in ("parent", "name", *RUN_FIELDS)
    ]
    return {k: dict(v) if isinstance(v := getattr(model, k), Mapping) else v for k in names}


def _hashable(value):
    """JSON has no tuples, and a module's fields no lists."""
    if isinstance(value, dict):
        return {k: _hashable(v) for k, v in value.items()}
    return tuple(_hashable(v) for v in value) if isinstance(value, list) else value
