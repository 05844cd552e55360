"""The computations of `lrm evaluate`: renderings and their scores, on the devices, and means over objects or scenes."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lrm_jax.metrics import lpips, mean_object, surface_metrics, visual_hull
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops import image_metrics
from lrm_jax.ops.compositing import blend
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.types import Cameras, Views

IMAGE_NAMES = ("psnr", "ssim", "lpips", "iou")
NAMES = (*IMAGE_NAMES, *surface_metrics.NAMES)
COMPILING = " (the first batch takes longer: it is compiled)"


@dataclasses.dataclass
class Result:
    """The scores of one object or scene. A score that does not exist has no entry."""

    scores: dict[str, float]
    guesses: dict[str, dict[str, float]]  # scores of the baselines, by name
    strip: bytes  # its images for the page, from `report_page.strip`
    unaligned: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Programs:
    """The model and the metrics, each compiled for one shape."""

    num_devices: int  # a batch is split over them, so B must be a multiple
    # (source Views[B N], Cameras[B V]) -> list of B scenes [1 ...], rgb on white [B V S S 3], alpha [B V S S] or None
    predict: Callable
    compare: Callable  # (rgb, alpha or None, true rgb, true alpha) -> dict of [B V]
    compare_guess: Callable  # the same without LPIPS, which takes longer than all other metrics
    # (scene [1 ...], xyz [Q 3]) -> field values [Q], on the device of the scene; None: the family has no surface
    field: Callable | None


def compiled(model, params, network, size: int) -> Programs:
    """The programs for images of size x size pixels, on all devices. `network`: weights of LPIPS, or None."""
    device_mesh = sharding.make_device_mesh()
    params = jax.device_put(params, NamedSharding(device_mesh, PartitionSpec()))
    params_of = batch_axes.by_device(params, device_mesh)

    @sharding.jit
    def render(params, source: Views, targets: Cameras):
        variables = {"params": params}
        scene = model.apply(variables, source, method="encode")
        rays = ops_cameras.pixel_rays(targets, size, size)
        rendering = model.apply(variables, scene, rays, method="render")
        return batch_axes.constrain_batch(
            (scene, blend(rendering, jnp.ones((1, 1, 1, 1, 3))).rgb, rendering.alpha)
        )

    def predict(source: Views, targets: Cameras):
        with jax.set_mesh(device_mesh):
            batch = batch_axes.global_batch((source, targets), device_mesh)
            scene, rgb, alpha = render(params, *batch)
        parts = batch_axes.by_device(scene, device_mesh).values()
        rows = range(rgb.shape[0] // device_mesh.size)
        scenes = [jax.tree.map(lambda x, i=i: x[i : i + 1], part) for part in parts for i in rows]
        return scenes, rgb, alpha

    @jax.jit
    def compare(network, rgb, alpha, target_rgb, target_alpha):
        rgb = rgb.clip(0, 1)
        found = {
            "psnr": image_metrics.psnr(rgb, target_rgb),
            "ssim": image_metrics.ssim(rgb, target_rgb),
        }
        if alpha is not None:
            found["iou"] = image_metrics.iou(alpha, target_alpha)
        if network is not None:
            # Accelerators would otherwise multiply with less than float32 precision.
            with jax.default_matmul_precision("highest"):
                found["lpips"] = lpips.distance(network, rgb, target_rgb)
        return found

    @sharding.jit
    def query(params, scene, xyz):
        return model.apply({"params": params}, scene, xyz[None], method="query")[0][0]

    def field(scene, xyz):
        (device,) = jax.tree.leaves(scene)[0].devices()
        return query(params_of[device], scene, xyz)

    return Programs(
        num_devices=device_mesh.size,
        predict=predict,
        compare=functools.partial(compare, jax.device_put(network)),
        compare_guess=functools.partial(compare, None),
        field=field if hasattr(model, "query") else None,
    )


def image_protocol(with_lpips: bool) -> dict[str, str]:
    """How the protocol describes the image metrics."""
    return {
        "psnr": "dB, for each view; the value of an object or a scene is the mean over its target views",
        "ssim": "Gaussian window of 11 pixels, sigma 1.5, for each view, in colour",
        "lpips": "VGG16, version 0.1, for each view"
        if with_lpips
        else f"not computed: {lpips.REMEDY}",
    }


def on_white(premultiplied: np.ndarray) -> np.ndarray:
    """Composites premultiplied RGBA [*B 4] on white: [*B 3]."""
    return premultiplied[..., :3] + (1 - premultiplied[..., 3:])


def nearest_source(source_c2w: np.ndarray, target_c2w: np.ndarray) -> np.ndarray:
    """For each target camera c2w [*B V 4 4], the number [*B V] of the source camera c2w [*B N 4 4] that is nearest to it."""
    source, target = source_c2w[..., None, :, :3, 3], target_c2w[..., :, None, :3, 3]
    return np.linalg.norm(target - source, axis=-1).argmin(-1)


def summarize(results: dict[str, Result], skipped: dict[str, str]) -> dict:
    """The content of `evaluation.json` about scores: means, medians, and each object's scores. None: a score does not exist."""
    scores = {uid: x.scores for uid, x in results.items()}
    unaligned = {uid: x.unaligned for uid, x in results.items() if x.unaligned}
    return {
        "mean": over(scores.values(), np.mean),
        "median": over(scores.values(), np.median),
        "count": {name: sum(name in x for x in scores.values()) for name in NAMES},
        "baseline": baseline([x.guesses for x in results.values()]),
        "unaligned": {
            "mean": over(unaligned.values(), np.mean, surface_metrics.NAMES),
            "objects": unaligned,
        },
        "skipped": skipped,
        "objects": {uid: {name: x.get(name) for name in NAMES} for uid, x in scores.items()},
    }


def baseline(guesses: list[dict[str, dict[str, float]]]) -> dict:
    """The mean scores of the baselines. `guesses`: [object][baseline][score].

    The mean object is predicted in several ways, and the best one for images and the best one for surfaces make its scores.
    The other baselines are in `others`. Scenes have only one baseline.
    """

    def values(name):
        return (
            surface_metrics.NAMES
            if name in (*mean_object.SHAPES, visual_hull.NAME)
            else IMAGE_NAMES
        )

    names = dict.fromkeys(name for x in guesses for name in x)
    means = {
        name: over([x[name] for x in guesses if name in x], np.mean, values(name)) for name in names
    }
    ways = [x for x in means if x in (*mean_object.IMAGES, *mean_object.SHAPES)] or list(means)
    image = max((x for x in ways if "psnr" in means[x]), key=lambda x: means[x]["psnr"])
    shapes = [x for x in ways if "chamfer" in means[x]]
    shape = min(shapes, key=lambda x: means[x]["chamfer"], default=None)
    nothing = dict.fromkeys(NAMES)
    best = means[image] | means.get(shape, dict.fromkeys(surface_metrics.NAMES))
    name = "mean object" if image in mean_object.IMAGES else image
    others = {x: nothing | means[x] for x in means if x not in ways}
    return {
        "name": name,
        "mean": best,
        "images": image,
        "surface": shape,
        "others": others,
        "guesses": means,
    }


def baselines(summary: Mapping) -> dict[str, dict[str, float | None]]:
    """The baselines of a summary by name, with their scores in the order of `NAMES`."""
    best = summary["baseline"]
    return {best["name"]: best["mean"], **best["others"]}


def over(
    rows: Iterable[dict[str, float]], function: Callable, names: tuple[str, ...] = NAMES
) -> dict[str, float | None]:
    """The mean or median (`function`) of each score over the objects that have it; None if no object has it."""
    rows = list(rows)
    columns = {name: [x[name] for x in rows if name in x] for name in names}
    return {name: float(function(x)) if x else None for name, x in columns.items()}
