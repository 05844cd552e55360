"""Check whether a checkpoint looks right: what it is, what had to be assumed, and what it makes of images.

    lrm check                                     the bundled model
    lrm check model.ckpt chair.png                a checkpoint, with an image of your own
    lrm check scene_decoder_only_256.pt garden    LVSM, with a folder of posed images

Prints one line for each check: `ok`, `!!` if something does not look right, or `--` for information. The image and the bundled
examples are reconstructed. Each is rendered from the camera of its image and compared with the image, and the field and its surface
are measured. The median over the images is judged, so a single difficult image does not fail a good checkpoint.

The last line is the verdict: `looks right`, or `does not look right:` and the first causes. It is not a proof: damage that barely
changes the reconstructions of the examples is not found, and the PyTorch original is not run for comparison.

Exit code: 0 looks right; 1 does not look right; 2 could not be checked, or wrong usage.
"""

import argparse
import json
from pathlib import Path

import jax

from lrm_jax import api
from lrm_jax.commands import arguments, checks
from lrm_jax.commands.checks import Finding
from lrm_jax.commands.versions import versions
from lrm_jax.images import captures
from lrm_jax.parallel import messages, whole_files
from lrm_jax.types import InputError

SMALL = 50e6  # parameters of a model whose encodings take little time


def main(argv: list[str]) -> int:
    """Runs `lrm check`. Returns the exit code."""
    args = parse(argv)
    stages, summary = messages.Stages(), {}
    if args.json:
        whole_files.check_writable(args.json.parent)
    found = check(args, stages, summary)
    for finding in found:
        mark = {True: "ok", False: "!!", None: "--"}[finding.ok]
        print(f"{mark}  {finding.name:<11} {finding.text}")
    verdict = verdict_of(found)
    print(verdict, flush=True)
    if args.json:
        summary |= {"verdict": verdict, "findings": [vars(x) for x in found]}
        summary |= {"seconds": stages.seconds, "arguments": vars(args), "versions": versions()}
        text = json.dumps(summary, indent=2, default=str)
        whole_files.write_file(args.json, text.encode())
    return int(any(x.ok is False for x in found))


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, checked."""
    parser = arguments.parser("lrm check", __doc__)
    add = parser.add_argument
    # fmt: off
    add("weights", nargs="?", help=arguments.WEIGHTS)
    add("image", nargs="?", type=Path, help="an image of an object; for LVSM and One-2-3-45 a folder of posed images (default: a bundled example; for these none)")
    add("--resolution", type=int, default=64, help="grid points along each axis, for the field and the mesh (default: 64)")
    add("--size", type=int, default=128, help="pixels along a side of the rendered views (default: 128)")
    add("--exchanges", action=argparse.BooleanOptionalAction, help="also try whether exchanging two tensors of an attention helps: ten more encodings (default: for models below 50 million parameters)")
    add("--json", type=Path, metavar="FILE", help="also write all numbers to this JSON file")
    # fmt: on
    args = parser.parse_args(argv)
    arguments.check_ranges(args, resolution=(16, 256), size=(32, 1024))
    return args


def verdict_of(found: list[Finding]) -> str:
    """The last line."""
    causes = [x.cause for x in found if x.ok is False]
    if causes:
        more = f", and {len(causes) - 3} more" if len(causes) > 3 else ""
        return f"does not look right: {'; '.join(causes[:3])}{more}"
    unseen = any(x.name == "views" and x.ok is None for x in found)
    return "looks right" + (", judging by the tensors alone" if unseen else "")


def check(args: argparse.Namespace, stages: messages.Stages, summary: dict) -> list[Finding]:
    """All findings; their numbers go into `summary`."""
    try:
        with stages("load", f" {args.weights or 'the bundled model'}"):
            model = api.load(args.weights)
    except InputError as error:
        # A wrong path says nothing about a checkpoint; a file that exists but cannot be loaded does.
        if args.weights is None or not Path(args.weights).expanduser().exists():
            raise
        return [Finding(False, "load", str(error), "it cannot be loaded")]
    summary["model"] = model.info | {"parameters": model.num_params}
    found = identity(model) + checks.tensors(jax.device_get(model.params))
    try:
        if model.draws_views:
            return found  # it draws views: what they should be is not known
        if hasattr(model.module, "prepare"):
            return found + of_images(model, args, stages, summary)
        return found + of_capture(model, args, stages, summary)
    except InputError as error:
        if "not finite" not in str(error):
            raise
        return [*found, Finding(False, "view", str(error), "what it renders is not finite")]


def identity(model: api.Model) -> list[Finding]:
    """What the model is, and what had to be assumed."""
    info = model.info
    text = f"{info['family']}, variant {info['variant']}, {model.num_params / 1e6:.1f} M parameters, images of {model.module.image_size} pixels"  # fmt: skip
    found = [Finding(None, "model", text), Finding(None, "file", str(info["path"]))]
    return found + [Finding(None, "assumed", line) for line in info.get("assumed", [])]


def of_images(model: api.Model, args, stages, summary: dict) -> list[Finding]:
    """The findings of a family that takes single images."""
    examples = sorted(arguments.EXAMPLES.glob("*.png"))
    paths = [args.image or examples[0]]
    paths += [x for x in examples if x.resolve() != paths[0].resolve()]
    scenes = {}
    for path in paths:
        with stages("reconstruct", f" {path}", "; compiles first"):
            scenes[str(path)] = model.reconstruct(path)
    framed = {path: checks.image_of(scene)[0] for path, scene in scenes.items()}
    measured = {}
    for path, scene in scenes.items():
        with stages("measure", f" {path}", "; compiles first"):
            others = [x for other, x in framed.items() if other != path]
            measured[path] = checks.numbers_of(scene, args.size, args.resolution, others)
    summary["images"] = measured
    knows_camera = model.info["family"] == "lrm" or bool(model.info["training"])
    found = checks.judged(measured, model.module.surface_level, knows_camera)
    with stages("mesh"):
        found.append(checks.mesh(list(scenes.values()), args.resolution))
    small = model.num_params < SMALL
    if small if args.exchanges is None else args.exchanges:
        with stages("exchanges", "; compiles first"):
            found.append(checks.exchanges(model, examples, args.size // 2))
    return found


def of_capture(model: api.Model, args, stages, summary: dict) -> list[Finding]:
    """The findings of a family that takes posed images."""
    if args.image is None:
        text = "not checked: give a folder of posed images, `lrm check WEIGHTS FOLDER`"
        return [Finding(None, "views", text)]
    capture = captures.read_capture(args.image)
    with stages("draw", f" views of {args.image}", "; compiles first"):
        finding, summary["views"] = checks.views(model, capture)
    return [finding]
