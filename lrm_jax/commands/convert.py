"""`lrm convert`: checkpoints between PyTorch's layouts and ours.

    lrm convert model.ckpt triposr.safetensors          a reference's checkpoint to our model file
    lrm convert triposr.safetensors folder --to torch   and back, to the bit
    lrm convert vgg16-397923af.pth lpips_vgg16.safetensors --linear vgg.pth     the network of the loss and metric LPIPS
    lrm convert imagenet-vgg-verydeep-19.mat vgg19.safetensors                  the network of LVSM's perceptual loss

Our model file is a safetensors file: parameters by their dotted path, and in its metadata the family, its fields and a summary
of the training. --to torch writes these beside the reference's own files, as lrm_jax.json, so that the way back gives the same
model. An encoder alone is written as transformers' from_pretrained loads it.
"""

import argparse
from pathlib import Path
from types import ModuleType

import jax

from lrm_jax.metrics import lpips, perceptual, vgg
from lrm_jax.parallel.messages import Stages
from lrm_jax.types import InputError
from lrm_jax.weights import tensor_files
from lrm_jax.weights.export import write_reference
from lrm_jax.weights.loading import SUFFIXES, read_weights
from lrm_jax.weights.model_file import save_model
from lrm_jax.weights.references import check_state_dict


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
    if args.to == "torch" and (dst / "checkpoints").is_dir():
        raise InputError(f"{dst}: the folder of a training run: name another for its export")
    if args.force and args.to != "torch":
        raise InputError("--force is of --to torch: leave it out")
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
            written = write_reference(dst, model, params, info["training"], args.force)
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
        " is read from the same folder), a folder with one, a training workdir, WORKDIR@STEP, hf:ORG/NAME, or hf:ORG/NAME/FILE",
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
        "--force", action="store_true",
        help="with --to torch: write also what the reference's code cannot load, for lrm_jax to read back",
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
