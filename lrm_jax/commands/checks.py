"""What `lrm check` measures, and the limits within which a model looks right.

There is no ground truth to compare with. Instead: does the rendered given view match its image better than other images, is the
surface closed and inside the cube, does its outline match the rendering? These numbers do not depend on a family's units, so the limits
are the same for all. They were chosen with the bundled model and 396 damaged copies of it, and found 164 of the 183 copies that lost
3 dB or more. No other trained model was at hand. With two bundled examples, the image that is given decides only where these differ.
"""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Bool, Float
from scipy import ndimage

from lrm_jax import api
from lrm_jax.images import camera_paths, captures, model_input, recentre
from lrm_jax.mesh.surface import sample
from lrm_jax.ops import cameras, image_metrics, resize
from lrm_jax.ops.compositing import blend
from lrm_jax.types import Cameras, InputError

SIDE = 48  # pixels of the framed images that are compared
FILLS = 0.85  # of their side: what the object fills
SAME = 25.0  # dB: two images that are nearer show the same object
# dB: of the intact bundled model the best exchange gains -1.2, of nine copies with two tensors exchanged 0.8 to 16.
MAX_GAIN = 0.5


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report."""

    ok: bool | None  # None: information, not judged
    name: str
    text: str
    cause: str = ""  # for the verdict, if it is not ok


@dataclasses.dataclass(frozen=True)
class Limit:
    """The range of a number in which a model looks right, judged by the median over images."""

    name: str
    key: str
    low: float
    high: float
    text: str  # of the numbers of one image
    cause: str


# Beside each: the bundled model's median over its two examples; then the 5th and 95th percentiles over 95 images. Thin and flat objects
# exceed single limits (26 of the 95 do): so the median over the image and the examples is judged.
LIMITS = (
    Limit("inside", "inside", 1e-3, 0.6, "{inside:.1%} of the cube is inside the surface", "the object is too small or fills the cube"),  # 0.07; 0.009 to 0.16
    Limit("walls", "walls", 0, 0.01, "{walls:.1%} of the cube's walls are inside the surface", "the surface leaves the cube"),  # 0; 0 to 0
    Limit("pieces", "largest", 0.8, 1, "the largest piece has {largest:.0%} of the volume", "the surface is in pieces"),  # 1; 0.82 to 1
    Limit("outline", "outline", 0.75, 1, "the rendered outline overlaps the image's by {outline:.2f}", "the outline of the given view does not match the image"),  # 0.96; 0.48 to 0.97
    Limit("view", "margin", 5, 100, "PSNR {psnr:.1f} dB of the given view to its image, {margin:.1f} dB above the nearest other image", "the given view is not much closer to its image than to other images"),  # 13.1; 6.3 to 17.8
    Limit("colours", "colour", 0, 0.12, "off by {colour:.3f} (RMS) on the object", "the colours are wrong"),  # 0.05; 0.03 to 0.11
    Limit("saturated", "saturated", -1, 0.15, "saturated colour values: {saturated:+.1%} compared with the image", "the colours are saturated"),  # -0.1; -0.16 to 0
    Limit("opacity", "opacity", 0.85, 1, "{opacity:.2f} on the object", "the object is transparent"),  # 0.98; 0.78 to 0.995
    Limit("background", "fog", 0, 0.1, "opacity {fog:.3f} beside the object", "there is fog around the object"),  # 0.001; 0 to 0.05
    Limit("level", "agreement", 0.7, 1, "the surface's outline overlaps the rendered one by {agreement:.2f}", "the level of the surface does not fit the field"),  # 0.90; 0.64 to 0.95
)  # fmt: skip
SIZE = "the rendered object is {size:.2f} times as large as in the image"
# LRM is given the camera, and our runs train with the assumed one. The original TripoSR is not told how large the object is.
SIZE_LIMITS = {True: (0.85, 1.15), False: (0.6, 1.6)}  # 1.00; 0.89 to 1.02


# -- the tensors


def tensors(params: Mapping) -> list[Finding]:
    """Signs of damage in the parameters alone: empty, constant, extreme or exchanged tensors, and norms that were never trained."""
    flat = {name: np.asarray(x) for name, x in flatten_dict(dict(params), sep=".").items()}
    biases = {name for name in flat if re.search(r"(^|\.|_)bias(_\d+)?$", name)}
    scales = {name: x for name, x in flat.items() if re.search(r"norm\w*\.scale$", name)}
    kernels = {k: x for k, x in flat.items() if x.ndim > 1 and k not in biases | set(scales)}
    slices = {  # of kernels that are stacked, each layer's
        f"{name}[{i}]" if len(x) > 1 and x.ndim == 3 else name: one
        for name, x in kernels.items()
        for i, one in enumerate(x if x.ndim == 3 else [x])
    }
    rms = {name: float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) for name, x in slices.items()}  # fmt: skip
    middle = float(np.median([x for x in rms.values() if x] or [1]))
    wrong = {
        "mostly zeros": [k for k, x in slices.items() if (x == 0).mean() > 0.5],
        "constant": [k for k, x in slices.items() if x.size > 1 and x.any() and np.ptp(x) == 0],
        "of an odd magnitude": [k for k, x in rms.items() if not 1e-3 <= x / middle <= 1e3 and x],
        # A scale starts at 1 and rarely changes sign in training; about half of a bias is negative.
        "norm scales that are often negative": [
            k for k, x in scales.items() if ((x < 0).mean(-1) > 0.25).any()
        ],
    }
    found = [
        Finding(False, "tensors", f"{what}: {_few(names)}", f"{names[0]} is {what}"
                if not what.startswith("norm") else f"{names[0]} looks like a bias")
        for what, names in wrong.items()
        if names
    ]  # fmt: skip
    if scales and all((x == 1).all() for x in scales.values()):
        found.append(Finding(False, "training", "all norms are as at the start", "it was never trained"))  # fmt: skip
    low, high = min(rms.values()), max(rms.values())
    text = f"{len(flat)}, all finite, none of them empty; RMS of the kernels {low:.2g} to {high:.2g}"  # fmt: skip
    return found or [Finding(True, "tensors", text)]


def _few(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- the scene of an image


def framed(rgba: Float[np.ndarray, "H W 4"]) -> tuple[Float[np.ndarray, "S S 4"], float] | None:
    """A premultiplied image whose object is moved to the middle and scaled, and the share of the image's side that it filled.

    None where alpha is nowhere above 0.5.
    """
    rows, columns = np.nonzero(rgba[..., 3] > 0.5)
    if not len(rows):
        return None
    crop = rgba[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    height, width = crop.shape[:2]
    longer = max(height, width)
    square = np.zeros((round(longer / FILLS),) * 2 + (4,), np.float32)
    top, left = (len(square) - height) // 2, (len(square) - width) // 2
    square[top : top + height, left : left + width] = crop
    alpha = resize.resize_bilinear(square[..., 3:].repeat(3, -1), SIDE)[..., :1]
    small = np.concatenate([resize.resize_bilinear(square[..., :3], SIDE), alpha], -1)
    return small.astype(np.float32), longer / max(rgba.shape[:2])


def image_of(scene: api.Scene) -> tuple[Float[np.ndarray, "S S 4"], float]:
    """The image that a scene was made from, placed as the model sees it, and framed."""
    ratio = getattr(scene.model.module, "foreground_ratio", None)
    whole = recentre.pad_to_square(scene.image)
    placed = whole if ratio is None else recentre.recenter_foreground(scene.image, ratio)
    straight = placed.astype(np.float32) / 255
    found = framed(np.concatenate([straight[..., :3] * straight[..., 3:], straight[..., 3:]], -1))
    if found is None:
        raise InputError("the image is hardly opaque anywhere: give one that shows an object")
    return found


def numbers_of(scene: api.Scene, size: int, resolution: int, others: list[np.ndarray]) -> dict:
    """All that is measured of one scene.

    Args:
      size: side of the rendered view in pixels.
      resolution: grid points along the cube that the field is looked at on.
      others: framed images, that the given view is compared with besides its own.

    Raises:
      InputError: what the model renders is not finite.
    """
    module = scene.model.module
    rendering = next(scene.renderings(None, size))
    rgba = np.concatenate([rendering.rgb, rendering.alpha[..., None]], -1)
    field = field_on_grid(scene, resolution)
    inside = field > module.surface_level
    pieces, _ = ndimage.label(inside)
    walls = np.ones_like(inside)
    walls[1:-1, 1:-1, 1:-1] = False
    numbers = {
        "low": float(field.min()),
        "high": float(field.max()),
        "inside": float(inside.mean()),
        "walls": float(inside[walls].mean()),
        "largest": float(np.bincount(pieces[inside], minlength=1).max() / max(inside.sum(), 1)),
    }
    drawn = outline(inside, module.radius, scene.camera, max(resolution // 2, 8))
    seen = resize.resize_bilinear(rendering.alpha[..., None].repeat(3, -1), len(drawn))[..., 0]
    numbers["agreement"] = overlap(drawn, seen > 0.5)
    return numbers | compared(framed(rgba), image_of(scene), others)


def compared(view: tuple | None, image: tuple, others: list[np.ndarray]) -> dict[str, float]:
    """How near the framed given view is to its image, without regard to where it is and how large."""
    if view is None:
        return {"outline": 0.0, "size": 0.0, "psnr": 0.0, "margin": 0.0, "colour": 1.0, "saturated": 0.0, "opacity": 0.0, "fog": 1.0}  # fmt: skip
    (seen, share), (wanted, true_share) = view, image
    psnr = decibels(_on_white(seen), _on_white(wanted))
    other = max(
        (decibels(_on_white(seen), _on_white(x)) for x in others if decibels(x, wanted) < SAME),
        default=0.0,
    )
    on, off = wanted[..., 3] > 0.95, ndimage.binary_erosion(wanted[..., 3] < 0.05)
    both = (seen[..., 3] > 0.5) & (wanted[..., 3] > 0.5)
    a, b = (x[both][:, :3] / x[both][:, 3:] for x in (seen, wanted))

    def pure(x):
        return float(((x < 0.02) | (x > 0.98)).mean()) if x.size else 0.0

    return {
        "outline": overlap(seen[..., 3] > 0.5, wanted[..., 3] > 0.5),
        "size": share / true_share,
        "psnr": psnr,
        "margin": psnr - other,
        "colour": float(np.sqrt(np.square(a - b).mean())) if both.any() else 1.0,
        "saturated": pure(a) - pure(b),
        "opacity": float(seen[..., 3][on].mean()) if on.any() else 1.0,
        "fog": float(seen[..., 3][off].mean()) if off.any() else 0.0,
    }


def field_on_grid(scene: api.Scene, resolution: int) -> Float[np.ndarray, "X Y Z"]:
    """The field at the points of a grid over the whole cube; not finite ones as 0."""
    radius, encoded = scene.model.module.radius, jax.device_put(scene.encoded)
    axis = np.linspace(-radius, radius, resolution, dtype=np.float32)
    xyz = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    field = sample(lambda x: scene.model.field(encoded, x), xyz, chunk=scene.model.chunk)
    return np.nan_to_num(field, posinf=np.finfo(np.float32).max).reshape((resolution,) * 3)


def outline(
    inside: Bool[np.ndarray, "X Y Z"], radius: float, camera: Cameras, size: int
) -> Bool[np.ndarray, "size size"]:
    """The pixels in which Cameras[] see grid points that are inside, with the gaps between them closed."""
    xyz = (np.argwhere(inside) / (len(inside) - 1) * 2 - 1) * radius
    drawn = np.zeros((size + 4,) * 2, bool)
    if len(xyz):
        # One number of points for all scenes: it is compiled for each.
        padded = np.concatenate([xyz, np.full((inside.size - len(xyz), 3), xyz[0])])
        uv, z = (np.asarray(x) for x in cameras.project(camera, jnp.asarray(padded, jnp.float32)))
        columns, rows = np.floor(uv * size).astype(int).T
        shown = (z > 0) & (np.minimum(rows, columns) >= 0) & (np.maximum(rows, columns) < size)
        drawn[rows[shown] + 2, columns[shown] + 2] = True
    return ndimage.binary_closing(drawn)[2:-2, 2:-2]


def overlap(a: Bool[np.ndarray, "H W"], b: Bool[np.ndarray, "H W"]) -> float:
    """Intersection over union."""
    return float((a & b).sum() / max((a | b).sum(), 1))


def decibels(a: np.ndarray, b: np.ndarray) -> float:
    """PSNR of values in [0, 1]."""
    return float(image_metrics.decibels(jnp.asarray(np.square(a - b).mean())))


def _on_white(rgba):
    return rgba[..., :3] + 1 - rgba[..., 3:]


# -- the judgement


def judged(measured: dict[str, dict], level: float, knows_camera: bool) -> list[Finding]:
    """The findings on images.

    Args:
      measured: path -> `numbers_of`; the first one is the image that was asked for.
      level: of the surface.
      knows_camera: whether the model is made for the camera that the image is taken to be seen by.
    """
    first, numbers = next(iter(measured.values())), list(measured.values())
    crossed = np.mean([x["low"] < level < x["high"] for x in numbers]) > 0.5
    text = f"from {first['low']:.3g} to {first['high']:.3g}, the surface is at {level:g}"
    found = [Finding(bool(crossed), "field", text, "the field does not cross the level")]
    size = Limit("size", "size", *SIZE_LIMITS[knows_camera], SIZE, "the object is rendered at the wrong size")  # fmt: skip
    hard = []
    for limit in (*LIMITS, size):
        median = float(np.median([x[limit.key] for x in numbers]))
        ok = limit.low <= median <= limit.high
        text = limit.text.format(**first)
        if ok and not limit.low <= first[limit.key] <= limit.high:
            hard.append(limit.name)
            ok = None
        if not ok:
            text += f" (median of {len(numbers)} images {median:.3g}: expected {limit.low:g} to {limit.high:g})"  # fmt: skip
        found.append(Finding(ok, limit.name, text, limit.cause))
    if hard:
        text = f"difficult for this model ({', '.join(hard)}); the bundled examples are not"
        found.append(Finding(None, "image", text))
    return found


def mesh(scenes: list[api.Scene], resolution: int) -> Finding:
    """Whether the first scene's mesh is closed. If it is not, those of the others are judged: one object may not fit the cube."""
    told = ""
    for scene in scenes:
        try:
            made = scene.mesh(resolution)
        except InputError as error:
            told, cause = told or str(error), "there is no mesh"
            continue
        closed = bool(made.is_watertight)
        text = f"{len(made.faces):,} triangles, {'watertight' if closed else 'not watertight'}"
        if closed:
            return Finding(None if told else True, "mesh", told or text)
        told, cause = told or text, "the mesh is open"
    return Finding(False, "mesh", told, cause)


def exchanges(model: api.Model, images: list[Path], size: int) -> Finding:
    """Whether the given views are rendered better after two tensors of an attention are exchanged.

    Tries q and k, k and v, v and out of every attention, in all layers of a stack at once: this is what a conversion mixes up, and
    it can change a scene so little that the model only looks poor. The gain must hold for all images, as single ones gain by chance.
    """
    prepared = [model.prepare(image) for image in images]
    wanted = np.stack([resize.resize_bilinear(x.source.rgb[0, 0], size) for x in prepared])
    source = jax.tree.map(lambda *x: np.concatenate(x), *(x.source for x in prepared))
    rays = cameras.pixel_rays(source.cameras, size, size)

    @jax.jit
    def render(params, source, rays):
        return model.module.apply({"params": params}, source, rays)

    def psnr(flat):
        rendering = jax.device_get(render(unflatten_dict(flat, sep="."), source, rays))
        rgb = blend(rendering, model.module.background).rgb[:, 0]
        return np.array([decibels(np.nan_to_num(a), b) for a, b in zip(rgb, wanted, strict=True)])

    flat = flatten_dict(model.params, sep=".")
    now, gains = psnr(flat), {}
    for at in sorted(k.removesuffix(".q.kernel") for k in flat if k.endswith(".q.kernel")):
        for one, other in (("q", "k"), ("k", "v"), ("v", "out")):
            a, b = f"{at}.{one}.kernel", f"{at}.{other}.kernel"
            if flat[a].shape == flat[b].shape:
                changed = psnr(flat | {a: flat[b], b: flat[a]})
                gains[f"{one} and {other} of {at}"] = float((changed - now).min())
    best = max(gains, key=gains.get)
    text = f"{len(gains)} tried, the best changes the views by {gains[best]:+.1f} dB: {best}"
    return Finding(gains[best] <= MAX_GAIN, "exchanges", text, f"{best} look exchanged")


def drawn(
    model: api.Model, capture: captures.Capture, boxes: np.ndarray, chosen: np.ndarray
) -> np.ndarray:
    """The chosen views [V S S 3] of a capture as the model draws them, in [0, 1], on white; `boxes`: see `crop_images`."""
    size = model.module.image_size
    if not model.reconstructs_captures:
        path = camera_paths.CameraPath(capture.c2w[chosen], chosen.astype(float))
        return model.synthesize(capture, path=path).astype(np.float32) / 255
    fxfycxcy = cameras.crop_intrinsics(capture.fxfycxcy, boxes)
    own = Cameras(c2w=capture.c2w[chosen], fxfycxcy=fxfycxcy[chosen])
    renderings = model.encode_capture(capture).renderings(own, size)
    return np.stack([blend(x, 1.0).rgb for x in renderings])


def views(model: api.Model, capture: captures.Capture) -> tuple[Finding, list[dict]]:
    """Source views of posed images drawn again, by families that take these."""
    count = len(capture.c2w)
    chosen = np.unique(np.linspace(0, count - 1, min(4, count)).round().astype(int))
    if model.reconstructs_captures:
        capture = model_input.cut_out(capture)
    images, boxes = model_input.crop_images(capture, model.module.image_size)
    images = images.astype(np.float32) / 255
    frames = drawn(model, capture, boxes, chosen)
    numbers = []
    for frame, i in zip(frames, chosen, strict=True):
        psnr = [decibels(frame, x) for x in images]
        flat = decibels(images[i].mean((0, 1)), images[i])
        others = max(psnr[:i] + psnr[i + 1 :])
        numbers.append({"psnr": psnr[i], "gain": psnr[i] - flat, "margin": psnr[i] - others})
    psnr, gain, margin = (np.median([x[key] for x in numbers]) for key in ("psnr", "gain", "margin"))  # fmt: skip
    text = f"PSNR {psnr:.1f} dB of {len(chosen)} source views drawn again, {gain:.1f} dB above their mean colour, {margin:.1f} dB above another view"  # fmt: skip
    cause = "source views drawn again do not look like themselves"
    return Finding(bool(gain >= 3 and margin > 0), "views", text, cause), numbers
