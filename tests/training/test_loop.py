import json
import os
import signal
import sys
import tracemalloc
from pathlib import Path

import balls
import jax
import numpy as np
import pytest

from lrm_jax.commands import convert, train
from lrm_jax.data import pipeline
from lrm_jax.parallel import batch_axes, sharding
from lrm_jax.training import inputs, loop, setup, validation
from lrm_jax.types import InputError
from lrm_jax.weights import model_file

ROOT = Path(__file__).parents[2]
TINY = [
    "--config",
    "configs/nano.py:tiny",
    "--config.data.name=balls",
    "--config.data.prefetch=0",  # so that `balls.sample` is called in the order of the batches
]
NANO = ["--config.model.variant=nano", "--config.data.assumed_camera=(3.0,40.0)"]
TIMES = ("samples_per_second", "mfu", "data_wait")


@pytest.fixture(scope="module")
def balls_source():
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "lrm_jax.data.balls", balls)
        patched.setitem(inputs.SOURCES, "balls", "balls")
        yield


@pytest.fixture(scope="module")
def straight(balls_source, tmp_path_factory):
    """The folder of a run of the tiny config, from its start to its end."""
    workdir = tmp_path_factory.mktemp("straight")
    assert train.main([*TINY, "--workdir", str(workdir)]) == 0
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def equal_to_the_bit(a, b):
    return all(
        np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_terminated_and_resumed_equals_uninterrupted_to_the_bit(
    straight, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patched:
        patched.setattr(balls, "sample", after(2, terminate))
        assert train.main([*TINY, "--workdir", str(tmp_path / "resumed")]) == loop.INTERRUPTED
    stopped = rows(tmp_path / "resumed")[-1]["step"]
    assert stopped < 4
    assert not (tmp_path / "resumed" / "model.safetensors").exists()
    # A run that is killed between a report and a save leaves lines that the resumed run writes again.
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/loss": 7.0}\n{"step": 5, "tr')
    assert train.main([*TINY, "--workdir", str(tmp_path / "resumed")]) == 0
    assert "step 4/4  loss" in capsys.readouterr().err

    whole, resumed = rows(straight), rows(tmp_path / "resumed")
    assert [row["step"] for row in resumed] == [1, 2, 3, 4, 4]
    for a, b in zip(whole[:-1], resumed[:-1], strict=True):
        assert set(TIMES) <= set(a)
        assert a | dict.fromkeys(TIMES) == b | dict.fromkeys(TIMES)
    assert whole[-1] == resumed[-1]
    assert set(whole[-1]) == {"step", "val/psnr", "val/iou", "val/source_psnr"}
    models = [
        model_file.load_model(workdir / "model.safetensors")[1]
        for workdir in (straight, tmp_path / "resumed")
    ]
    assert equal_to_the_bit(*models)


def test_a_run_leaves_its_grids_parameters_and_model(straight, tmp_path):
    assert [p.name for p in (straight / "grids").iterdir()] == ["0000004.png"]
    assert "backbone/blocks/fc1/kernel" in (straight / "parameters.txt").read_text()
    assert list((straight / "tensorboard").iterdir())
    exported = tmp_path / "exported.safetensors"
    assert convert.main([str(straight), str(exported)]) == 0
    models = [model_file.load_model(x)[1] for x in (straight / "model.safetensors", exported)]
    assert equal_to_the_bit(*models)
    with pytest.raises(InputError, match="another model"):
        train.main([*TINY, "--workdir", str(straight), *NANO])


def test_between_reports_a_step_is_waited_for_only_after_the_next_has_started(
    balls_source, tmp_path, monkeypatch
):
    """Also after a report: while the device runs a step, the host has the time to prepare the next."""
    make_run, wait, started, waited = train.make_run, jax.block_until_ready, [], []

    def counted(config, device_mesh):
        run = make_run(config, device_mesh)

        def step(*arguments):
            state, scalars = run.step(*arguments)
            started.append(scalars)
            return state, scalars

        return run._replace(step=step)

    def count(x):
        number = next((i for i, scalars in enumerate(started, 1) if scalars is x), None)
        waited.append((number, len(started)))
        return wait(x)

    monkeypatch.setattr(train, "make_run", counted)
    monkeypatch.setattr(jax, "block_until_ready", count)
    arguments = ["--config.train.log_every=2", "--config.train.save_every=4"]
    assert train.main([*TINY, "--workdir", str(tmp_path / "run"), *arguments]) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [2, 4, 4]
    assert len(started) == 4
    assert [pair for pair in waited if pair[0]] == [(1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.train.setps=3"], "^the config has no key 'setps': did you mean 'steps'"),
        (
            ["--config.model.variant=huge"],
            "triposr has no variant 'huge'; it has triposr, nano, nano-fine, nano-symmetric, tiny",
        ),
        (["--config.train.steps=many"], "steps"),
        (["--config.data.batch_size=6"], "data.batch_size=6 does not divide by 8"),
        (["--config.sharding.tensor=3"], "does not arrange 8 devices"),
        (["--config.train.dress=3"], "^the config has no key 'dress': --config FILE --help lists"),
        (["--steps=3"], "^lrm train: unknown flag --steps: see lrm train --help"),
        (["--workdr=x"], "^lrm train: unknown flag --workdr: did you mean --workdir"),
        (["--process_id=one"], "process_id=one: invalid literal .*: see lrm train --help"),
        (["stray"], "^lrm train: unknown argument 'stray'"),
        (["--config=configs/absent.py"], "^configs/absent.py: no such config"),
        (
            ["--config=configs/nano.py:tyni"],
            "^lrm train: ValueError: no size 'tyni': choose one of fine, tiny",
        ),
        (["--config.train.init_from=absent.safetensors"], "absent.safetensors"),
        (["--config.data.name=objcts"], "^data.name='objcts': must be one of objects, records"),
        (["--config.losses.lpips=1.0"], "config.networks.lpips=FILE"),
        (["--config.train.render_size=(4,16)"], "train.patch=8 <= low <= high"),
        (["--config.train.render_size=(8,)"], "must be .low, high."),
        (["--config.train.accumulate=0"], "train.accumulate=0: must be at least 1"),
        (["--config.train.eval_scenes=0"], "train.eval_scenes=0: must be at least 1"),
        (["--config.train.eval_batch_size=12"], "eval_batch_size=12 does not divide by 8"),
        (["--dry_run", "--config.data.batch_size=6"], "data.batch_size=6 does not divide by 8"),
        (["--config.data.mix=(3,)"], "must be .., or two numbers"),
        (["--config.data.name=scenes"], "does not fit data.name=scenes .*unexpected keyword"),
        (["--config.train.accumulate=3"], "does not divide by 24"),
        (
            ["--config.data.assumed_camera=(3.0,40.0)"],
            "is not the camera that triposr:tiny assumes",
        ),
        (["--config.data.assumed_camera=(3.0,)"], "takes .distance, field of view."),
        (
            ["--config.optim.muon=bias"],
            "^optim.muon: 'bias' matches .*bias.*, which is not a matrix",
        ),
        (["--config.schedule.warmup_steps=9"], "warmup_steps=9 must be less than train.steps=4"),
    ],
)
def test_a_wrong_argument_is_one_line_and_leaves_no_workdir(
    balls_source, tmp_path, arguments, message
):
    with pytest.raises(InputError, match=message) as error:
        train.main([*TINY, "--workdir", str(tmp_path / "run"), *arguments])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def after(num_batches, act):
    """A `balls.sample` that calls `act` once, before the first sample after `num_batches` batches of the tiny config."""
    sample, calls = balls.sample, []

    def counted(*args):
        calls.append(args)
        if len(calls) == num_batches * 8 + 1:
            act()
        return sample(*args)

    return counted


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def poisoned(monkeypatch):
    """A list. While it is not empty, `balls.sample` gives NaN."""
    sample, poisoned = balls.sample, []

    def poison(*args):
        scene = sample(*args)
        if not poisoned:
            return scene
        return scene.replace(target=scene.target.replace(rgb=scene.target.rgb * np.nan))

    monkeypatch.setattr(balls, "sample", poison)
    return poisoned


def test_a_loss_that_is_never_finite_stops_the_run_and_is_not_saved(
    balls_source, poisoned, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "MAX_SKIPPED", 2)
    monkeypatch.setattr(balls, "sample", after(2, lambda: poisoned.append(True)))
    with pytest.raises(
        InputError, match="all of the last 2 updates were skipped.*last checkpoint is of step 2"
    ):
        train.main([*TINY, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_one_skipped_update_after_a_resume_does_not_stop_the_run(
    balls_source, poisoned, tmp_path, monkeypatch
):
    arguments = [*TINY, "--workdir", str(tmp_path / "run")]
    monkeypatch.setattr(balls, "sample", after(2, terminate))
    assert train.main(arguments) == loop.INTERRUPTED
    assert rows(tmp_path / "run")[-1]["step"] == 3
    poisoned.append(True)
    assert train.main(arguments) == 0
    last = rows(tmp_path / "run")[-2]  # the last row is from the evaluation
    assert last["step"] == 4 and last["skipped"] == 1


def test_a_folder_with_other_files_is_not_used_as_a_run(tmp_path):
    config, *_ = train.parse([*TINY, "--workdir", str(tmp_path)])
    path = tmp_path / "config.json"
    for text in ('{"architectures": []}', "[]", "{"):
        path.write_text(text)
        with pytest.raises(InputError, match="config.json is not that of a training run"):
            train.claim(tmp_path, config)
        assert path.read_text() == text
    path.write_text(json.dumps({"model": config.model.to_dict() | {"remat": "none"}}))
    train.claim(tmp_path, config)  # the same model with other settings of the run


@pytest.mark.parametrize("line", ["import absent", "x = y", "def f(:", "{}['absent']"])
def test_a_broken_config_is_one_line(tmp_path, line):
    (tmp_path / "mine.py").write_text(f"{line}\ndef get_config():\n    return None\n")
    with pytest.raises(InputError, match="check it against the config file") as error:
        train.main(["--config", str(tmp_path / "mine.py"), "--workdir", str(tmp_path / "run")])
    assert "Error" in str(error.value) and "\n" not in str(error.value)


def test_a_run_that_skips_every_update_fails(balls_source, poisoned, tmp_path):
    poisoned.append(True)
    with pytest.raises(InputError, match="all of the last 4 updates were skipped.*skip_norm"):
        train.main([*TINY, "--workdir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_run_starts_from_given_weights(straight, poisoned, tmp_path, monkeypatch):
    """Its only update is skipped, so that the output weights are the input weights."""
    weights, output = straight / "model.safetensors", tmp_path / "output.safetensors"
    arguments = [*TINY, f"--config.train.init_from={weights}"]
    poisoned.append(True)
    monkeypatch.setattr(balls, "sample", after(0, terminate))
    assert train.main([*arguments, "--workdir", str(tmp_path / "run")]) == loop.INTERRUPTED
    assert rows(tmp_path / "run")[-1]["skipped"] == 1
    assert convert.main([str(tmp_path / "run"), str(output)]) == 0
    assert equal_to_the_bit(*(model_file.load_model(path)[1] for path in (weights, output)))
    with pytest.raises(InputError, match="parameters are not those of config.model, the first"):
        train.main([*arguments, "--workdir", str(tmp_path / "other"), *NANO])


def test_a_crash_in_an_evaluation_does_not_come_again(balls_source, tmp_path, monkeypatch):
    """The checkpoint is written before the evaluation, even if the step is not a multiple of save_every."""
    arguments = [*TINY, "--config.train.save_every=100", "--workdir", str(tmp_path / "run")]

    def fail(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: too large")

    with monkeypatch.context() as patched:
        patched.setattr(loop, "evaluate", fail)
        with pytest.raises(RuntimeError, match="too large"):
            train.main([*arguments, "--config.train.eval_every=2"])
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["2"]
    assert train.main(arguments) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4, 4]
    assert (tmp_path / "run" / "model.safetensors").exists()


@pytest.fixture(scope="module")
def tiny_run():
    config = train.parse([*TINY, "--dry_run", "--config.train.eval_scenes=100"]).config
    config.data.target_size = 64
    device_mesh = sharding.make_device_mesh(**config.sharding)
    run = setup.make_run(config, device_mesh)
    with jax.set_mesh(device_mesh):
        yield run, device_mesh, config, run.init(None).params


def evaluated(tiny_run, num_val, batch_size=None):
    """Evaluates `num_val` scenes. Returns the scores, the grid, and the peak memory of NumPy and Python in bytes."""
    run, device_mesh, config, params = tiny_run
    config.train.eval_batch_size = batch_size
    source = balls.make(
        split="val", seed=0, num_target=2, source_size=32, target_size=config.data.target_size
    )
    data = inputs.Data(
        train=None,
        val=lambda size: pipeline.open_batches(source, size, prefetch=0),
        num_val=num_val,
        finish=[lambda batch: batch],
    )
    tracemalloc.start()
    scores, grid = validation.evaluate(run, params, data, device_mesh, config.train)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return scores, grid, peak


def test_an_evaluation_scores_new_views_and_each_scene_once(tiny_run):
    run, device_mesh, _, params = tiny_run
    scores, grid, _ = evaluated(tiny_run, 11)
    positions = balls.batch(0, 16, 2, 32, 64, seed=1)
    of_views, images = run.evaluate(params, batch_axes.global_batch(positions, device_mesh))
    psnr, iou = np.asarray(of_views["psnr"])[:11], np.asarray(of_views["iou"])[:11]
    # The first target view is the source view.
    np.testing.assert_array_equal(of_views["is_source"], [[True, False]] * 16)
    np.testing.assert_allclose(scores["val/psnr"], psnr[:, 1].mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["val/source_psnr"], psnr[:, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(scores["val/iou"], iou[:, 1].mean(), rtol=1e-5)
    # One batch or two: the same scenes, rendered by products of other shapes.
    one_batch = evaluated(tiny_run, 11, 16)[1]
    np.testing.assert_allclose(grid.astype(int), one_batch.astype(int), atol=1)
    assert grid.shape == (8 * 64, (1 + 2 * 3) * 64, 3) and grid.dtype == np.uint8
    # Each device keeps the renderings of its own scenes.
    for image in images.values():
        assert image.addressable_shards[0].data.shape[0] == 2


def test_what_an_evaluation_holds_on_the_host_does_not_grow_with_the_scenes(tiny_run):
    few, many = (evaluated(tiny_run, count, 8)[2] for count in (16, 64))
    assert many < 1.1 * few


def test_a_dry_run_prints_the_memory_of_both_programs_and_leaves_nothing(
    balls_source, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    config = [TINY[0], str(ROOT / TINY[1]), *TINY[2:]]
    monkeypatch.setattr(inputs, "open_data", None)
    assert train.main([*config, "--dry_run"]) == 0
    step, held_out = capsys.readouterr().out.splitlines()
    assert step.startswith("step: ") and held_out.startswith("evaluation: ")
    for line in (step, held_out):
        assert float(line.split()[1]) > 0 and "GB on each device" in line
    assert list(tmp_path.iterdir()) == []
