"""What `bench.py gpu` measures. Each step is a function of sizes that returns milliseconds, operations and memory.

Weights are random, which costs as much as trained weights. The planes, latents and tokens of a scene are random too, so that only
the measured program is compiled.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lrm_jax import models
from lrm_jax.commands import train
from lrm_jax.kernels import attention as kernels_attention
from lrm_jax.kernels import field as kernels_field
from lrm_jax.ops import cameras, grids
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import flops, setup
from lrm_jax.types import Batch, Views

sys.path.insert(0, str(Path(__file__).parent))
import bench_train  # noqa: E402
import measure  # noqa: E402

CONFIGS = Path(__file__).parents[1] / "configs"
AXES = ((0, 1), (0, 2), (1, 2))  # axes of the planes in the pieces
SECONDS = 2.0  # of runs at most, but always at least three runs


class Step(NamedTuple):
    """One row of the table."""

    work: str  # name, the same as in a row of bench_results/originals_h200.json
    limit: float  # seconds, including compilation
    run: Callable[[], dict]
    alone: bool = False  # runs in its own process, so that its peak memory is not mixed with others


# -- pieces


def product(side: int) -> dict:
    """A plain product of two square bfloat16 matrices. Its rate is the one to compare all others with."""
    a = measure.normal(jax.ShapeDtypeStruct((side, side), jnp.bfloat16))
    return timed(lambda a: a @ a, a)


def lookup(num_points: int, side: int, width: int, gradient: bool) -> dict:
    """The sum of the lookups in three planes, or the gradient with respect to float32 planes."""
    planes, _, xyz = _field(num_points, side, width, 2, jnp.float32 if gradient else jnp.bfloat16)

    def look_up(planes, xyz):
        return grids.sample_triplane(planes, xyz, AXES)

    return timed(_gradient(look_up, 0) if gradient else look_up, planes, xyz)


def products(num_points: int, width: int, num_layers: int, gradient: bool) -> dict:
    """The products of the decoder after its first layer, with SiLU, on precomputed features."""
    x = measure.normal(jax.ShapeDtypeStruct((num_points, width), jnp.bfloat16))
    kernels = [kernel for kernel, _ in _layers(width, num_layers)[1:]]

    def mlp(x, kernels):
        for kernel in kernels:
            x = jax.nn.silu(x) @ kernel.astype(x.dtype)
        return x

    return timed(_gradient(mlp, (0, 1)) if gradient else mlp, x, kernels)


def field(num_points: int, side: int, width: int, num_layers: int, gradient: bool) -> dict:
    """The lookup and the products, or the gradient with respect to the planes and the layers."""
    planes, kernels, xyz = _field(num_points, side, width, num_layers, jnp.bfloat16)

    def evaluate(planes, kernels, xyz):
        return kernels_field.field(planes, kernels, xyz, AXES, "silu")

    return timed(_gradient(evaluate, (0, 1)) if gradient else evaluate, planes, kernels, xyz)


def attention(batch: int, length: int, num_keys: int, heads: int, gradient: bool) -> dict:
    """The attention of the models, in bfloat16 with heads of 64."""
    q, k = (
        measure.normal(jax.ShapeDtypeStruct((batch, tokens, heads, 64), jnp.bfloat16))
        for tokens in (length, num_keys)
    )

    def attend(q, k):
        return kernels_attention.attention(q, k, k)

    return timed(_gradient(attend, (0, 1)) if gradient else attend, q, k)


def _gradient(function, argnums):
    """The gradient of the sum of squares of everything that `function` returns."""

    def total(*arguments):
        leaves = jax.tree.leaves(function(*arguments))
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in leaves)

    return jax.grad(total, argnums)


def _field(num_points, side, width, num_layers, dtype):
    """Planes, layers, and points of views of 64 x 64 rays by 128 samples, in the order in which a view is rendered."""
    planes = measure.normal(jax.ShapeDtypeStruct((3, side, side, width), dtype))
    rng, num_views = np.random.default_rng(1), max(num_points // (64 * 64 * 128), 1)
    # Rays are half a cell apart, and samples two thirds of one.
    right, down, forward = rng.standard_normal((3, num_views, 1, 1, 3)) * 3**-0.5
    column, row = np.meshgrid(np.arange(64) - 31.5, np.arange(64) - 31.5)
    origins = (column[..., None] * right + row[..., None] * down) / side
    steps = 4 / 3 / side * (np.arange(128) - 63.5)[:, None] * forward[:, 0]
    rays = kernels_field.in_tiles(jnp.asarray(origins, jnp.float32))
    xyz_RS3 = rays[:, None] + jnp.repeat(jnp.asarray(steps, jnp.float32), 64 * 64, axis=0)
    xyz = kernels_field.samples_in_tiles(xyz_RS3)[:num_points]
    return planes, _layers(width, num_layers), xyz


def _layers(width, num_layers):
    """Kernels and biases of a decoder, without its first layer, which was already applied to the planes."""
    sizes = [width] * num_layers + [4]
    return [
        (0.1 * measure.normal(jax.ShapeDtypeStruct(shape, jnp.float32)), jnp.zeros(shape[1]))
        for shape in zip(sizes[:-1], sizes[1:], strict=True)
    ]


# -- families


def planes(family: str, variant: str, dtype: str) -> dict:
    """One image to planes."""
    model = models.build(family, variant, dtype=dtype)
    source = model.prepare([measure.image()])
    params = _params(model, source, _rays(1, 8, model.source_distance))
    return timed(partial(_apply, model, "encode"), params, source)


def view(family: str, variant: str, side: int, dtype: str) -> dict:
    """One square view of a scene."""
    model = models.build(family, variant, dtype=dtype)
    rays = _rays(1, side, model.source_distance)
    return timed(partial(_apply, model, "render"), *_scene(model), rays)


def mesh(family: str, variant: str, resolution: int, dtype: str) -> dict:
    """The mesh of a scene, from the device's planes to the host's triangles."""
    model = models.build(family, variant, dtype=dtype)
    extract, per_point = measure.mesh_extraction(model, *_scene(model), resolution)
    start = time.perf_counter()
    evaluated = extract()
    first = time.perf_counter() - start
    seconds = median_seconds(extract)
    return result(seconds, per_point * evaluated, first_seconds=first)


def encode_views(family: str, variant: str, num_views: int, dtype: str) -> dict:
    """Families of posed views: what is computed once per scene."""
    model = models.build(family, variant, dtype=dtype)
    source, rays = _views(model, num_views), _rays(1, model.image_size, 1.0)
    params = _params(model, source, rays)
    return timed(partial(_apply, model, "encode"), params, source)


def view_of_volume(num_views: int, side: int) -> dict:
    """One-2-3-45: one square view, with colours from all source views."""
    model = models.build("one2345", "one2345")
    source, rays = _views(model, num_views), _rays(1, side, 1.0)
    params = _params(model, source, rays)
    # Random features would be of no cameras.
    scene = jax.jit(partial(_apply, model, "encode"))(params, source)
    return timed(partial(_apply, model, "render"), params, scene, rays)


def frame(variant: str, num_views: int, num_frames: int) -> dict:
    """LVSM: one frame's share of several frames rendered together."""
    model = models.build("lvsm", variant, dtype="bfloat16")
    source, rays = _views(model, num_views), _rays(num_frames, model.image_size, 1.0)
    params = _params(model, source, rays)
    scene = jax.eval_shape(partial(_apply, model, "encode"), params, source)
    scene = jax.tree.map(measure.normal, scene)
    return timed(partial(_apply, model, "render"), params, scene, rays, num_frames=num_frames)


def _apply(model, method, params, *arguments):
    return model.apply({"params": params}, *arguments, method=method)


def _params(model, source, rays):
    shapes = jax.eval_shape(model.init, jax.random.key(0), source, rays)
    return measure.random_params(shapes["params"])


def _scene(model):
    """Parameters and planes of a triplane model: everything that `render` and `query` need."""
    source = model.prepare([measure.image()])
    params = _params(model, source, _rays(1, 8, model.source_distance))
    scene = jax.eval_shape(partial(_apply, model, "encode"), params, source)
    params = {name: params[name] for name in ("decoder", "plane_queries")}
    return params, jax.tree.map(measure.normal, scene)


def _rays(num_views, side, distance):
    orbit = cameras.orbit(num_views, distance, 20.0, 40.0)
    return jax.tree.map(lambda x: x[None], cameras.pixel_rays(orbit, side, side))


def _views(model, num_views):
    orbit = jax.tree.map(lambda x: x[None], cameras.orbit(num_views, 1.0, 20.0, 50.0))
    rgb = np.random.default_rng(2).random((1, num_views, *[model.image_size] * 2, 3), np.float32)
    return Views(rgb=jnp.asarray(rgb), cameras=orbit)


# -- training


def training_step(config: str, *overrides: str) -> dict:
    """The training step of a config (such as `openlrm.py:base`) on one device, on noise images."""
    config, *_ = train.parse(
        ["--config", f"{CONFIGS}/{config}", *overrides, "--workdir", "unused"]
    )  # fmt: skip
    device_mesh = sharding.make_device_mesh(**config.sharding, devices=jax.devices()[:1])
    row = bench_train.measure_step(config, device_mesh, noise_batch(config, device_mesh), 5)
    return result(
        row["seconds"],
        1e12 * row["tflop"],
        samples_per_second=row["samples_per_second"],
        mfu=row["mfu"],
        planned_gb=row["planned_gb"],
        first_seconds=row["compile_seconds"],
    )


def noise_batch(config, device_mesh) -> Batch:
    """A batch with the config's sizes: opaque noise images from cameras around the object."""
    rng = np.random.default_rng(3)

    def views(x: Views) -> Views:
        count, num_views = x.rgb.shape[:2]
        orbit = cameras.orbit(num_views, 2.0, 20.0, 40.0)
        return Views(
            rgb=rng.integers(0, 256, x.rgb.shape, np.uint8),
            alpha=np.full(x.alpha.shape, 255, np.uint8),
            cameras=jax.tree.map(
                lambda x: np.broadcast_to(np.asarray(x)[None], (count, *x.shape)), orbit
            ),
        )

    shapes = setup.abstract_batch(config, device_mesh, config.data.batch_size)
    batch = Batch(source=views(shapes.source), target=views(shapes.target))
    return batch_axes.global_batch(batch, device_mesh)


# -- timing


def timed(function, *arguments, num_frames: int = 1) -> dict:
    """Compiles `function`, runs it a few times, and returns its time and operations divided by `num_frames`."""
    jitted = sharding.jit(function)
    work = flops.count(jitted, *arguments)
    start = time.perf_counter()
    compiled = jitted.lower(*arguments).compile()
    jax.block_until_ready(compiled(*arguments))
    first = time.perf_counter() - start
    seconds = median_seconds(lambda: jax.block_until_ready(compiled(*arguments)))
    planned = compiled.memory_analysis()
    return result(
        seconds / num_frames,
        work / num_frames,
        planned_gb=(planned.argument_size_in_bytes + planned.temp_size_in_bytes) / 1e9,
        first_seconds=first,
    )


def median_seconds(run: Callable[[], object]) -> float:
    """Median of ten runs, or of as many as `SECONDS` allow, but at least three. `run` must be compiled already."""
    times = []
    while len(times) < 3 or (len(times) < 10 and sum(times) < SECONDS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def result(seconds: float, work: float, **more: float) -> dict:
    """What each step returns.

    Args:
      seconds: median time.
      work: operations of the matrix products, as lrm_jax/training/flops.py counts them.
      more: planned_gb, for the arguments and temporaries of the compiled program; first_seconds, to compile and run it once.
    """
    row = {
        "ms": 1e3 * seconds,
        "tflop": work / 1e12,
        "tflop_per_second": work / 1e12 / seconds,
        "peak_gb": measure.peak_gb(),
        **more,
    }
    return {name: float(f"{value:.5g}") for name, value in row.items()}


# -- the table: cheap works come first, so that little is lost if one fails


def _pieces() -> list[Step]:
    tokens = dict(batch=8, length=3072, heads=16)
    points = dict(num_points=2**21, width=64)
    in_planes, decoder = dict(points, side=64), dict(points, num_layers=10)
    works = (
        ("attention, 3072 tokens", partial(attention, **tokens, num_keys=3072)),
        ("attention, 3072 tokens to 1025 keys", partial(attention, **tokens, num_keys=1025)),
        ("products of a decoder", partial(products, **decoder)),
        ("lookup in three planes", partial(lookup, **in_planes)),
        ("field", partial(field, **in_planes | decoder)),
    )
    steps = [Step("product of 8192^3", 30, partial(product, 8192))]
    for name, run in works:
        steps.append(Step(name, 30, partial(run, gradient=False)))
        steps.append(Step(f"{name}, gradient", 40, partial(run, gradient=True)))
    return steps


def _families() -> list[Step]:
    tripo = dict(family="triposr", variant="triposr")
    base = dict(family="lrm", variant="openlrm-base-1.1")
    frames = partial(frame, "decoder-only-256", num_frames=8)
    both = "encoder-decoder-256"
    volume = dict(family="one2345", variant="one2345", num_views=32, dtype="float32")
    return [
        Step("TripoSR, image to planes", 60, partial(planes, **tripo, dtype="bfloat16")),
        Step("TripoSR, image to planes, float32", 60, partial(planes, **tripo, dtype="float32")),
        Step("TripoSR, 256 x 256 view", 40, partial(view, **tripo, side=256, dtype="bfloat16")),
        Step("TripoSR, 256^3 mesh", 60, partial(mesh, **tripo, resolution=256, dtype="float32")),
        Step("OpenLRM base, image to planes", 60, partial(planes, **base, dtype="bfloat16")),
        Step("LVSM decoder-only, frame from 1 view", 40, partial(frames, num_views=1)),
        Step("LVSM decoder-only, frame from 4 views", 40, partial(frames, num_views=4)),
        Step("LVSM decoder-only, frame from 16 views", 60, partial(frames, num_views=16)),
        Step(
            "LVSM encoder-decoder, encode 4 views",
            40,
            partial(encode_views, "lvsm", both, 4, "bfloat16"),
        ),
        Step("One-2-3-45, 32 views to volume", 60, partial(encode_views, **volume)),
        Step("One-2-3-45, 256 x 256 view", 90, partial(view_of_volume, 32, 256)),
        Step("LVSM encoder-decoder, frame", 40, partial(frame, both, num_views=4, num_frames=8)),
    ]


def _training() -> list[Step]:
    works = (
        ("OpenLRM base", "openlrm.py:base", 16),
        ("LVSM decoder-only", "lvsm_scenes.py:decoder-only-256", 8),
        ("OpenLRM large", "openlrm.py:large", 8),
        ("LVSM encoder-decoder", "lvsm_scenes.py:encoder-decoder-256", 8),
        ("One-2-3-45", "one2345.py", 1),
    )
    steps = []
    for name, config, batch_size in works:
        run = partial(training_step, config, f"--config.data.batch_size={batch_size}")
        steps.append(Step(f"{name}, training step", 120, run, alone=True))
    return steps


STEPS = (*_pieces(), *_families(), *_training())
