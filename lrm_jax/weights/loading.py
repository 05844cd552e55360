"""Loads weights from anywhere: our model files, training runs, the references' checkpoints, Hugging Face."""

import json
import posixpath
import re
from pathlib import Path

import jax
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict

from lrm_jax import models
from lrm_jax.types import InputError
from lrm_jax.weights import diffusers_folder, references, tensor_files
from lrm_jax.weights.model_file import (
    FORMAT,
    RECORD,
    described,
    from_model_file,
    is_finite,
    variant_of,
)
from lrm_jax.weights.references import (
    CONFIG_NAMES,
    WEIGHTS_NAMES,
    from_checkpoint,
    what_it_is,
)

BUNDLED = Path(__file__).parents[1] / "assets" / "nano.safetensors"
DTYPES = ("float32", "bfloat16", "float16")
SUFFIXES = (".safetensors", ".ckpt", ".pth", ".pt", ".bin")


def load_weights(
    weights: str | None = None, dtype: str | None = None
) -> tuple[nn.Module, dict, dict]:
    """Loads a reconstruction model.

    Args:
      weights: a model file, a reference's checkpoint file, a folder with one (such as a Hugging Face snapshot), the workdir of a
        training run, `WORKDIR@STEP` for one of its steps, `hf:ORG/NAME`, `hf:ORG/NAME/FILE`, or None for the bundled model.
      dtype: what the module computes in: "float32", "bfloat16" or "float16". None: the module's default, float32.

    Returns:
      The module, its parameters (float32, on the device), and a dict of `family`, `variant`, `training`, `path` and `assumed`:
      a line for each field that follows neither from shapes, nor from a config, nor from a record of ours.

    Raises:
      InputError: the file is missing, damaged, of no known family, or does not have its family's tensors; `dtype` is unknown.
    """
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype {dtype}: not one of {', '.join(DTYPES)}: choose one of them")
    model, params, info = read_weights(weights)
    if not hasattr(model, "encode"):
        raise InputError(
            f"{weights}: an image encoder alone: give a whole model, such as hf:stabilityai/TripoSR"
        )
    model = model if dtype is None else model.clone(dtype=dtype)
    flat = flatten_dict(params)
    del params  # each array is freed once it is on the device: two copies of a full-size model fill a laptop's memory
    return model, unflatten_dict({k: jax.device_put(flat.pop(k)) for k in list(flat)}), info


def training_data(training: dict) -> dict:
    """The fields of `data` in the config of a model's training record; {} if there is none."""
    return training.get("config", {}).get("data", {})


def read_weights(weights: str | None) -> tuple[nn.Module, dict, dict]:
    """As `load_weights`, but with NumPy arrays, and also for encoders alone."""
    path, step = _locate(weights)
    if step is not None or _is_workdir(path):
        model, params, training = _read_workdir(path, step)
        assumed = []
    else:
        if diffusers_folder.is_one(path):
            content, metadata, path = diffusers_folder.read(path), {}, path / "unet"
        else:
            path = _weights_in(path) if path.is_dir() else path
            content, metadata = tensor_files.read(path)
        try:
            model, params, training, assumed = _from_file(content, metadata, path)
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
    for name, value in flatten_dict(params, sep=".").items():
        if not is_finite(value):
            raise InputError(
                f"{path}: {name} has numbers that are not finite, so it is damaged or its run diverged: use another file"
            )
    info = {
        "family": models.name_of(model),
        "variant": variant_of(model),
        "training": training,
        "path": str(path) if step is None else f"{path}@{step}",
        "assumed": assumed,
    }
    return model, params, info


def _locate(weights):
    """The path of a file or folder of weights, and the requested step or None."""
    if weights is None:
        if not BUNDLED.exists():
            raise InputError(
                "this installation has no bundled model: give one with --weights, such as hf:stabilityai/TripoSR"
            )
        return BUNDLED, None
    if weights.startswith("hf:"):
        return download(weights.removeprefix("hf:")), None
    path = Path(weights).expanduser()
    if path.exists():
        return path, None
    folder, _, step = weights.rpartition("@")
    if folder and step.isdecimal() and Path(folder).expanduser().is_dir():
        return Path(folder).expanduser(), int(step)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", weights) and path.suffix not in SUFFIXES:
        raise InputError(
            f"{weights}: no such file or folder: check the path, or write hf:{weights} for the one on Hugging Face"
        )
    return path, None


def _from_file(content, metadata, path):
    """The model, its parameters, its training record and what was assumed, from the content of a file."""
    if metadata.get("format") == FORMAT["format"]:
        return *from_model_file(content, metadata), []
    known = described(path)
    if known is None:
        model, params, assumed = from_checkpoint(content, path)
        return model, params, {}, assumed
    model, training = known
    try:
        return *from_checkpoint(content, path, model)[:2], training, []
    except InputError as error:
        cause = str(error).removesuffix(": use an unchanged checkpoint")
        raise InputError(
            f"{RECORD} beside it describes another model ({cause}): delete it if these weights replace that model's"
        ) from error


def download(name: str) -> Path:
    """The local folder of a Hugging Face repository, or one file in it; downloads only files that the references use."""
    import huggingface_hub  # here: most commands need no network, and it is slow to import

    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/([\w.-][\w./-]*))?", name)
    if match is None or ".." in name.split("/"):
        raise InputError(
            f"hf:{name}: expected hf:ORG/NAME, such as hf:stabilityai/TripoSR, or hf:ORG/NAME/FILE"
        )
    repository, file = match.groups()
    *first, fallback = (
        WEIGHTS_NAMES  # some repositories have the same weights as .safetensors and as .bin
    )
    for weights_names in ([file],) if file else (first, [fallback]):
        try:
            beside = posixpath.dirname(file or "")
            names = dict.fromkeys([*CONFIG_NAMES.values(), RECORD])
            configs = [posixpath.join(beside, name) for name in names]
            patterns = [*weights_names, *configs]
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=patterns))
        except (
            Exception
        ) as error:  # errors of the hub, the HTTP client and the disk have no common base class
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
        f"hf:{name}: has none of {', '.join(WEIGHTS_NAMES)}: name its file of weights, as in hf:{name}/FILE"
    )


def _weights_in(folder):
    for name in WEIGHTS_NAMES:
        if (folder / name).exists():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if len(files) != 1:
        has = f"several ({', '.join(path.name for path in files[:4])})" if files else "none"
        raise InputError(
            f"{folder}: expected a folder with one file of weights, this has {has}: give the file itself"
        )
    return files[0]


def _is_workdir(path):
    """Whether `path` is the folder of a training run. Not if it has a model file and no steps: only the model was kept then."""
    steps = path / "checkpoints"
    return steps.is_dir() and (
        any(steps.iterdir()) or not any((path / name).exists() for name in WEIGHTS_NAMES)
    )


def _read_workdir(workdir, step):
    if not (workdir / "checkpoints").is_dir():
        raise InputError(
            f"{workdir}@{step}: {workdir} is not the folder of a training run, so it has no steps: leave out @{step}"
        )
    from lrm_jax.training import checkpoints  # here: Orbax takes seconds to import

    try:
        config = json.loads((workdir / "config.json").read_text())
        model = models.build(**what_it_is(config["model"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{workdir}: its config.json is not from a training run ({error}): give a model file"
        ) from error
    with checkpoints.open_folder(workdir, read_only=True) as manager:
        kept = sorted(manager.all_steps())
        if not kept:
            raise InputError(
                f"{workdir}: the run has not saved a checkpoint yet: wait for the first one"
            )
        if step is not None and step not in kept:
            raise InputError(
                f"{workdir}@{step}: step {step} was not kept: choose one of {', '.join(map(str, kept))}"
            )
        step = kept[-1] if step is None else step
        try:
            params = checkpoints.restore_part(
                manager, {"ema_params": references.param_shapes(model)}, step
            )["ema_params"]
        except (ValueError, KeyError, OSError) as error:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"{workdir}: checkpoint {step} does not fit config.json ({reason}): give a model file"
            ) from error
    return model, params, {"steps": step, "config": config}
