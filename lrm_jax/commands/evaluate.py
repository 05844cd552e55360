"""`lrm evaluate`: how near a model comes to objects that are known from all sides, or to videos of scenes.

    lrm evaluate --data data/kaykit --split val --baseline-data data/kaykit         the bundled model
    lrm evaluate --weights hf:stabilityai/TripoSR --data data/gso --lpips lpips_vgg16.safetensors
    lrm evaluate --weights scene_decoder_only_256.pt --data data/re10k --index evaluation_index_re10k.json

One view of each object is given to the model, or to a family that takes posed views (LVSM) as many as it was trained with.
Other views are compared with what it renders (PSNR, SSIM, LPIPS, foreground IoU), the surface that it finds with the true one
(Chamfer distance, F-scores), and both with the mean object, a guess that looks at no image. With --index, views of scenes
are compared: given and asked for are those that pixelSplat's index names, of all scenes, and the guess is the nearest given image.
Prints a table; leaves `evaluation.json` and `evaluation.html`. An object that cannot be read is named and
left out of the means; one of which the model makes no surface is named, and has F-scores of 0.
"""

import argparse
import json
import sys
from pathlib import Path

from lrm_jax.commands import arguments
from lrm_jax.commands.versions import versions
from lrm_jax.data import held_out
from lrm_jax.evaluation import objects, report_page, scenes
from lrm_jax.evaluation.scores import summarize
from lrm_jax.metrics import lpips
from lrm_jax.parallel import messages, whole_files
from lrm_jax.types import InputError
from lrm_jax.weights import loading


def main(argv: list[str]) -> int:
    """Runs `lrm evaluate`. Returns the exit code: 0 where at least one object could be evaluated."""
    args = parse(argv)
    stages = messages.Stages()
    whole_files.check_writable(args.out)
    folders = [] if args.index else held_out.find(args.data, args.split)
    network = None if args.lpips is None else lpips.load(args.lpips)
    with stages("load", f" {args.weights or 'the bundled model'}"):
        model, params, info = loading.load_weights(args.weights)
    if args.index:
        results, skipped, words = scenes.evaluate(model, params, network, info, args, stages)
    else:
        results, skipped, words = objects.evaluate(
            model, params, network, info, folders, args, stages
        )
    tell(skipped)
    count = len(results.keys() | skipped.keys())
    if not results:
        uid, cause = next(iter(skipped.items()))
        raise InputError(
            f"{args.data}: none of {count} objects can be used: the first, {uid}: {cause}"
        )
    summary = summarize(results, skipped) | {
        "protocol": words,
        "model": {k: info[k] for k in ("family", "variant", "path", "training")},
        "data": {"path": str(args.data), "split": args.index or args.split, "objects": count},
        "seconds": stages.seconds,
        "versions": versions(),
    }
    page = report_page.page(summary, {uid: x.strip for uid, x in results.items()})
    text = json.dumps(summary, indent=2, default=str, allow_nan=False)
    files = {"evaluation.json": text.encode(), "evaluation.html": page}
    whole_files.write_files(args.out, files)
    print(report_page.table(summary))
    stages.say(f"done: {', '.join(str(args.out / name) for name in files)}")
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = argparse.ArgumentParser(
        prog="lrm evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help="folder of rendered objects (tools/render_objects.py); with --index, of scenes",
    )
    add(
        "--index",
        metavar="FILE",
        help="pixelSplat's file of the views of each scene: evaluate scenes, with a family that takes posed views",
    )
    add(
        "--sources",
        type=int,
        help="views of an object that are given, to a family that takes posed views (default: as in training)",
    )
    add(
        "--weights",
        help="model file, reference checkpoint, folder, training workdir, or hf:ORG/NAME (default: the bundled model)",
    )
    add("--out", type=Path, default=Path("out"), help="folder for the results (default: out)")
    add(
        "--split",
        choices=("all", "val", "train"),
        default="all",
        help="which objects: val are those that training on this folder holds out (default: all)",
    )
    add("--views", type=int, default=8, help="target views of each object (default: 8)")
    add(
        "--size",
        type=int,
        help="side of the compared images (default: 128; with --index, that of the model's)",
    )
    add(
        "--resolution",
        type=int,
        default=128,
        help="lattice points along an axis of the surface's grid (default: 128)",
    )
    add(
        "--lpips", metavar="FILE", help=f"weights of LPIPS; without, it is left out: {lpips.REMEDY}"
    )
    add(
        "--baseline-data",
        type=Path,
        metavar="DIR",
        help="folder whose training objects the mean object is made of (default: the other evaluated objects, which favours it)",
    )
    add(
        "--scale",
        choices=("data", "image"),
        help="data: objects have the size in the model's world that they have in the data's, as where it was trained by `lrm train`; "
        "image: the size that they seem to have from the source camera that the model assumes (default: data for models that "
        "were trained so, image for the references' checkpoints and for models trained with data.normalize=image)",
    )
    args = parser.parse_args(argv)
    for name in ("split", "views", "sources", "resolution", "scale", "baseline_data"):
        if args.index and getattr(args, name) != parser.get_default(name):
            raise InputError(
                f"--{name.replace('_', '-')} has no effect with --index, which names the views: leave it out"
            )
    arguments.check_ranges(
        args, views=(1, 1000), size=(16, 2048), resolution=(8, 2048), sources=(1, 100)
    )
    return args


def tell(skipped: dict[str, str]) -> None:
    """What is left out of the means, on stderr: one line for a cause."""
    by_cause = {}
    for uid, cause in skipped.items():
        by_cause.setdefault(cause, []).append(uid)
    for cause, uids in by_cause.items():
        names = ", ".join(uids[:5]) + (f" and {len(uids) - 5} more" if len(uids) > 5 else "")
        print(f"lrm: {names}: {cause}", file=sys.stderr, flush=True)
