"""Convert a PyTorch checkpoint to a model file of lrm_jax, or back.

    lrm convert model.ckpt triposr.safetensors          a PyTorch checkpoint to a model file
    lrm convert triposr.safetensors folder --to torch   and back, bit for bit
    lrm convert zero123-xl.ckpt folder --to diffusers   Zero123 as diffusers' networks
    lrm convert vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth     the network of LPIPS, as loss and metric
    lrm convert imagenet-vgg-verydeep-19.mat vgg19.safetensors                  the network of LVSM's perceptual loss

A model file is a safetensors file. It names parameters by their dotted path; its metadata holds the model family, the family's
fields and a summary of the training. With --to torch, this metadata goes to lrm_jax.json, beside the files that the PyTorch code
loads, so that converting back gives the same model. An encoder alone is written in the format of transformers' from_pretrained.
"""

import argparse
from pathlib import Path
from types import ModuleType

import jax

from lrm_jax.commands import arguments
from lrm_jax.metrics import lpips, perceptual, vgg
from lrm_jax.parallel.messages import Stages
from lrm_jax.types import InputError
from lrm_jax.weights import diffusers_folder, tensor_files
from lrm_jax.weights.export import write_reference
from lrm_jax.weights.loading import SUFFIXES, read_weights
from lrm_jax.weights.model_file import save_model
from lrm_jax.weights.references import check_state_dict


def main(argv: list[str]) -> int:
    """Runs `lrm convert`."""
    args = parse(argv)
    dst = Path(args.dst)
    to_folder = args.to != "lrm_jax"
    if to_folder and (dst.is_file() or dst.suffix in SUFFIXES):
        raise InputError(f"{dst} is a file name, but --to {args.to} writes a folder: name a folder")
    if to_folder and args.dtype != "float32":
        raise InputError(
            f"--dtype {args.dtype} does not go with --to {args.to}, which writes float32: leave it out"
        )
    if to_folder and (dst / "checkpoints").is_dir():
        raise InputError(f"{dst} is the folder of a training run: name another folder")
    if args.force and args.to != "torch":
        raise InputError("--force has no effect without --to torch: leave it out")
    network = lpips if args.linear is not None else None
    network = perceptual if network is None and args.src.endswith(".mat") else network
    if network is not None and (args.to, args.dtype) != ("lrm_jax", "float32"):
        raise InputError(
            f"{args.src}: the network of a loss is written as float32 and only for lrm_jax: leave out --to and --dtype"
        )
    if args.to == "lrm_jax" and dst.is_dir():
        dst = dst / f"{'model' if network is None else network.NETWORK}.safetensors"
    if args.to == "lrm_jax" and dst.suffix != ".safetensors":
        raise InputError(
            f"{dst}: the name of a model file must end in .safetensors: change it, or add --to torch"
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
            written = write_reference(dst, model, params, info["training"], args.force)
        elif args.to == "diffusers":
            if info["family"] != "zero123" or model.autoencoder is None:
                raise InputError(
                    f"{args.src}: --to diffusers is for Zero123 with an autoencoder: use --to torch"
                )
            written = diffusers_folder.write(dst, model, params, info["training"])
        else:
            save_model(dst, model, params, info["training"], args.dtype)
            written = [dst]
    for path in written:
        print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments of `lrm convert`."""
    parser = arguments.parser("lrm convert", __doc__)
    parser.add_argument(
        "src",
        help="model file, PyTorch checkpoint (TripoSR, OpenLRM 1.0 and 1.1, LVSM, Zero123, One-2-3-45, DINO, DINOv2; a config.yaml or "
        "config.json in the same folder is read too), folder that holds one, training run (WORKDIR, or WORKDIR@STEP), hf:ORG/NAME or "
        "hf:ORG/NAME/FILE",
    )
    parser.add_argument(
        "dst",
        help="model file to write, *.safetensors; with --to torch, folder to write to",
    )
    parser.add_argument(
        "--to", choices=("lrm_jax", "torch", "diffusers"), default="lrm_jax",
        help="lrm_jax: a model file; torch: weights and config for the original PyTorch code; diffusers: Zero123's networks for "
        "diffusers and transformers (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32",
        help="number format of the model file; 16-bit formats halve its size and round the weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--force", action="store_true",
        help="with --to torch: write the model even if the PyTorch code cannot load it; lrm_jax can still read it back",
    )  # fmt: skip
    parser.add_argument(
        "--linear", metavar="FILE",
        help="linear heads of LPIPS: lpips/weights/v0.1/vgg.pth from the PyPI package lpips. src is then torchvision's VGG16",
    )  # fmt: skip
    return parser.parse_args(argv)


def convert_network(network: ModuleType, files: list[str], dst: Path) -> None:
    """Converts the network of a loss.

    Args:
      network: the module `lpips` or `perceptual`.
      files: for `lpips`, torchvision's VGG16 and the linear heads; for `perceptual`, MatConvNet's VGG19.
      dst: the file to write.

    Raises:
      InputError: a file is missing, damaged, or not what is expected.
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
