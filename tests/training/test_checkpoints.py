import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lrm_jax.parallel import sharding
from lrm_jax.training import checkpoints
from lrm_jax.types import InputError, TrainState


def state_at(step, device_mesh, spec):
    kernel = jax.device_put(jnp.arange(64.0).reshape(8, 8) + step, NamedSharding(device_mesh, spec))
    params = {"kernel": kernel}
    key = jax.device_put(jax.random.key(step), NamedSharding(device_mesh, P()))
    number = jax.device_put(jnp.int32(step), NamedSharding(device_mesh, P()))
    return TrainState(
        step=number, params=params, ema_params=params, opt_state=(params, ()), key=key
    )


def abstract_of(state):
    return checkpoints.abstract(state, jax.tree.map(lambda x: x.sharding, state))


def assert_equal(state, wanted):
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("sizes", [(1, 2, 4), (2, 4, 1), (1, 1, 1)], ids=str)
def test_the_last_two_are_kept_and_restored_onto_another_device_mesh(tmp_path, sizes):
    saved = {
        step: state_at(step, sharding.make_device_mesh(8, 1, 1), P("data")) for step in (1, 2, 3)
    }
    with checkpoints.open_folder(tmp_path) as manager:
        for step, state in saved.items():
            checkpoints.save(manager, step, state, {"next": 10 * step})
    device_mesh = sharding.make_device_mesh(*sizes, devices=jax.devices()[: np.prod(sizes)])
    other = state_at(0, device_mesh, P("fsdp", "tensor"))
    with checkpoints.open_folder(tmp_path, read_only=True) as manager:
        assert sorted(manager.all_steps()) == [2, 3]
        restored, data_state = checkpoints.restore(manager, abstract_of(other))
    assert data_state == {"next": 30}
    assert restored.params["kernel"].sharding == other.params["kernel"].sharding
    assert_equal(restored, saved[3])


def test_every_fourth_is_kept_besides_the_last(tmp_path):
    with checkpoints.open_folder(tmp_path, keep=1, keep_every=4) as manager:
        for step in (2, 4, 6, 8, 10):
            checkpoints.save(manager, step, {"kernel": np.ones(2)})
        assert manager.latest_step() == 10
        checkpoints.save(manager, 10, {"kernel": np.zeros(2)})  # exists already, so nothing happens
    with checkpoints.open_folder(tmp_path, read_only=True) as manager:
        assert sorted(manager.all_steps()) == [4, 8, 10]
        part = checkpoints.restore_part(manager, {"kernel": jax.ShapeDtypeStruct((2,), np.float64)})
    np.testing.assert_array_equal(part["kernel"], 1)


@pytest.mark.parametrize("numbers", [dict(keep=0), dict(keep_every=0)], ids=str)
def test_keeping_no_checkpoint_is_an_error(tmp_path, numbers):
    with pytest.raises(InputError, match="must be 1 or more"):
        checkpoints.open_folder(tmp_path, **numbers).__enter__()


def test_an_unfinished_save_is_not_there_and_the_next_run_deletes_it(tmp_path):
    with checkpoints.open_folder(tmp_path) as manager:
        checkpoints.save(manager, 1, {"kernel": np.ones(2)})
    unfinished = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1" / "state", unfinished / "state")
    with checkpoints.open_folder(tmp_path, read_only=True) as manager:
        assert manager.latest_step() == 1
    assert unfinished.exists()  # another process may still be writing it
    with checkpoints.open_folder(tmp_path) as manager:
        assert manager.latest_step() == 1
        checkpoints.save(manager, 3, {"kernel": np.ones(2)})
    assert sorted(path.name for path in unfinished.parent.iterdir()) == ["1", "3"]


def test_an_empty_folder_restores_nothing(tmp_path):
    with checkpoints.open_folder(tmp_path) as manager:
        assert checkpoints.restore(manager, {}) is None


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"  # Orbax leaves unfinished reads to the garbage collector
)
def test_a_checkpoint_with_any_file_cut_short_is_restored_whole_or_one_line_with_its_folder(
    tmp_path,
):
    rng = np.random.default_rng(
        0
    )  # random, so that it needs more than one block of a file even after compression
    state = {
        "kernel": jnp.asarray(rng.normal(size=(64, 64))),
        "bias": jnp.asarray(rng.normal(size=8)),
    }
    with checkpoints.open_folder(tmp_path) as manager:
        for step in (6, 7):
            checkpoints.save(manager, step, state, {"next": step})
    folder, whole = tmp_path / "checkpoints" / "7", tmp_path / "whole"
    shutil.copytree(folder, whole)

    def cut(path):
        os.truncate(path, path.stat().st_size // 2)

    def empty(path):
        os.truncate(path, 0)

    def remove(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    names = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    faults = [(name, remove) for name in names]
    faults += [(name, do) for name in names if (whole / name).is_file() for do in (cut, empty)]
    fatal = set()
    for name, damage in faults:
        damage(folder / name)
        with checkpoints.open_folder(tmp_path, read_only=True) as manager:
            try:
                restored, data_state = checkpoints.restore(manager, abstract_of(state))
            except InputError as error:
                fatal.add(str(name))
                assert str(error).startswith(f"{folder}: damaged, or of another model ("), name
                assert str(error).endswith("delete this folder to go on from step 6"), name
                assert "\n" not in str(error) and len(str(error)) < 350, name
            else:
                assert_equal(restored, state)
                assert data_state == {"next": 7}, name
        shutil.rmtree(folder)
        shutil.copytree(whole, folder)
    assert {"state", "data", "state/manifest.ocdbt", "data/metadata"} <= fatal
    assert any(name.startswith("state/d/") for name in fatal)


@pytest.mark.parametrize("fault", ["another shape", "another name", "the layout before"])
def test_a_checkpoint_that_does_not_fit_is_one_line_with_its_folder(tmp_path, fault):
    state = {"kernel": jnp.ones((4, 4))}
    with checkpoints.open_folder(tmp_path) as manager:
        checkpoints.save(manager, 7, state)
    if fault == "the layout before":
        (tmp_path / "checkpoints/7/state").rename(tmp_path / "checkpoints/7/default")
    wanted = {
        "another shape": {"kernel": jnp.ones((5, 4))},
        "another name": {"weight": jnp.ones((4, 4))},
    }
    with checkpoints.open_folder(tmp_path, read_only=True) as manager:
        with pytest.raises(
            InputError, match="checkpoints/7: damaged, or of another model.*to start again$"
        ) as error:
            checkpoints.restore(manager, abstract_of(wanted.get(fault, state)))
    assert "\n" not in str(error.value)


def alone(program, *arguments):
    """Runs a program in a separate process, with one device."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, env=env, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )


READ_ALONE = """
import sys, jax, numpy as np
from lrm_jax.training import checkpoints
assert jax.device_count() == 1
shapes = {"ema_params": {"w": jax.ShapeDtypeStruct((8, 2), np.float32)}}
with checkpoints.open_folder(sys.argv[1], read_only=True) as manager:
    w = checkpoints.restore_part(manager, shapes)["ema_params"]["w"]
assert isinstance(w, np.ndarray)
np.testing.assert_array_equal(w, np.arange(16.0).reshape(8, 2))
"""


def test_what_eight_devices_saved_is_read_on_one(tmp_path):
    device_mesh = sharding.make_device_mesh()
    sharded = NamedSharding(device_mesh, P("data"))
    w = jax.device_put(np.arange(16.0, dtype=np.float32).reshape(8, 2), sharded)
    with checkpoints.open_folder(tmp_path) as manager:
        checkpoints.save(manager, 3, {"ema_params": {"w": w}, "step": np.int32(3)})
    result = alone(READ_ALONE, tmp_path)
    assert result.returncode == 0, result.stderr


SAVE_ON_A_FULL_DISK = """
import logging, resource, sys, numpy as np
from lrm_jax.training import checkpoints
from lrm_jax.types import InputError
logging.basicConfig(format="lrm: %(message)s", level=logging.WARNING)
small, big = ({"w": np.random.default_rng(0).random(n)} for n in (10, 1 << 18))
def attempt(last_call):
    try:
        with checkpoints.open_folder(sys.argv[1], keep=1) as manager:
            checkpoints.save(manager, 1, small)
            checkpoints.finish(manager)
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 17, resource.RLIM_INFINITY))
            checkpoints.save(manager, 2, big)
            last_call(manager)
    except InputError as error:
        print(error, flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
attempt(checkpoints.finish)
attempt(lambda manager: checkpoints.save(manager, 3, small))
attempt(lambda manager: None)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX limits stand for a full disk")
def test_a_full_disk_is_one_line_and_what_was_saved_is_still_there(tmp_path):
    result = alone(SAVE_ON_A_FULL_DISK, tmp_path)
    assert result.returncode == 0, result.stderr
    line = (
        f"{tmp_path}/checkpoints: the last checkpoint could not be written (File too large): "
        "that of step 1 is complete; free some space, then repeat the command"
    )
    assert result.stdout.splitlines() == [line] * 3
    assert result.stderr == ""
    with checkpoints.open_folder(tmp_path) as manager:
        assert manager.all_steps() == [1]
        wanted = {"w": np.random.default_rng(0).random(10)}
        restored, _ = checkpoints.restore(manager, wanted)
        np.testing.assert_array_equal(restored["w"], wanted["w"])
        checkpoints.save(manager, 4, restored)  # there is space again, and the run continues
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "4"]
