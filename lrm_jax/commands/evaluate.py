"""Compare a model with held-out views and true surfaces of objects, or with held-out views of scenes.

    lrm evaluate --data data/kaykit --split val --baseline-data data/kaykit         the bundled model
    lrm evaluate --weights hf:stabilityai/TripoSR --data data/gso --lpips lpips_vgg16.safetensors
    lrm evaluate --weights scene_decoder_only_256.pt --data data/re10k --index evaluation_index_re10k.json

Objects (--data): the model gets one view of each object, or, if its family takes posed views (LVSM, One-2-3-45), as many as in
training. Its renderings are compared with other views (PSNR, SSIM, LPIPS, foreground IoU), and its mesh with points on the true
surface (Chamfer distance, F-scores). The baseline is the mean object: the mean image and the mean size of other objects. For posed
views, two more baselines use the same views: the source image with the nearest camera, and, if the family has a surface, the visual
hull, which is carved from the silhouettes.

Scenes (--data with --index): the index file names the views that the model gets and the views that it must predict, for every
scene. The baseline is the given image with the nearest camera.

Prints a table and writes `evaluation.json` and `evaluation.html` to --out. Objects that cannot be used are named on stderr and
left out of the means. If the model finds no surface, the F-scores of that object are 0.

Exit code: 0 every object was evaluated; 1 some could not be used, the others are evaluated; 2 none could be used, or wrong usage.
"""

import argparse
import json
import sys
from pathlib import Path

from lrm_jax import api
from lrm_jax.commands import arguments
from lrm_jax.commands.versions import versions
from lrm_jax.data import held_out
from lrm_jax.evaluation import objects, report_page, scenes
from lrm_jax.evaluation.scores import summarize
from lrm_jax.metrics import lpips
from lrm_jax.parallel import messages, whole_files
from lrm_jax.types import InputError


def main(argv: list[str]) -> int:
    """Runs `lrm evaluate`. Returns the exit code: 0, or 1 if some objects or scenes could not be used.

    Raises:
      InputError: none could be used.
    """
    args = parse(argv)
    stages = messages.Stages()
    whole_files.check_writable(args.out)
    folders = [] if args.index else held_out.find(args.data, args.split)
    network = None if args.lpips is None else lpips.load(args.lpips)
    with stages("load", f" {args.weights or 'the bundled model'}"):
        model = api.load(args.weights)
    module, params, info = model.module, model.params, model.info
    if args.index:
        results, skipped, words = scenes.evaluate(module, params, network, info, args, stages)
    else:
        results, skipped, words = objects.evaluate(
            module, params, network, info, folders, args, stages
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
    failed = f", {count - len(results)} could not be used" if len(results) < count else ""
    paths = " and ".join(str(args.out / name) for name in files)
    stages.say(f"done: {len(results)} of {count} evaluated{failed}: {paths}")
    return 1 if failed else 0


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = arguments.parser("lrm evaluate", __doc__)
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help="folder of rendered objects, from tools/render_objects.py; with --index, folder of scenes",
    )
    add(
        "--index",
        metavar="FILE",
        help="evaluate scenes: pixelSplat's JSON file, which names the views of each scene. The model must take posed views",
    )
    add(
        "--sources",
        type=int,
        help="number of views of each object to give the model, if its family takes posed views; they are spread evenly over "
        "those that training draws them from (default: as in training)",
    )
    add("--weights", help=arguments.WEIGHTS)
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: out)")
    add(
        "--split",
        choices=("all", "val", "train"),
        default="all",
        help="objects to evaluate: val for those that `lrm train` holds out, train for the others (default: all)",
    )
    add(
        "--views",
        type=int,
        default=8,
        help="number of views of each object to compare (default: 8)",
    )
    add(
        "--size",
        type=int,
        help="side of the compared images in pixels (default: 128; with --index, the image size of the model)",
    )
    add(
        "--resolution",
        type=int,
        default=128,
        help="grid points along each axis for extracting the mesh (default: 128)",
    )
    add(
        "--lpips",
        metavar="FILE",
        help=f"weights of LPIPS. Without them, LPIPS is not computed: {lpips.REMEDY}",
    )
    add(
        "--baseline-data",
        type=Path,
        metavar="DIR",
        help="average the training objects in this folder into the mean object (default: average the other evaluated objects, "
        "which makes the baseline look better than it should)",
    )
    add(
        "--scale",
        choices=("data", "image"),
        help="size of an object in the model's world. data: its size in the data, for models that `lrm train` trained that way. "
        "image: its size in the image, as seen by the camera that the model assumes, for PyTorch checkpoints and for models "
        "trained with data.normalize=image (default: as the model was trained)",
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
    """Prints to stderr which objects are left out of some or all means: one line per cause."""
    by_cause = {}
    for uid, cause in skipped.items():
        by_cause.setdefault(cause, []).append(uid)
    for cause, uids in by_cause.items():
        names = ", ".join(uids[:5]) + (f" and {len(uids) - 5} more" if len(uids) > 5 else "")
        print(f"lrm: {names}: {cause}", file=sys.stderr, flush=True)
