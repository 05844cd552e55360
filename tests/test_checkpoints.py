import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lrm_jax import checkpoints, sharding
from lrm_jax.types import InputError, TrainState


def state_at(step, device_mesh, spec):
    kernel = jax.device_put(jnp.arange(64.0).reshape(8, 8) + step, NamedSharding(device_mesh, spec))
    params = {"kernel": kernel}
    key = jax.device_put(jax.random.key(step), NamedSharding(device_mesh, P()))
    number = jax.device_put(jnp.int32(step), NamedSharding(device_mesh, P()))
    return TrainState(
        step=number, params=params, ema_params=params, opt_state=(params, ()), key=key
    )


def test_the_last_two_are_kept_and_restored_onto_another_device_mesh(tmp_path):
    saved = {
        step: state_at(step, sharding.make_device_mesh(8, 1, 1), P("data")) for step in (1, 2, 3)
    }
    with checkpoints.open_folder(tmp_path) as manager:
        for step, state in saved.items():
            checkpoints.save(manager, step, state)
    with checkpoints.open_folder(tmp_path, read_only=True) as manager:
        assert sorted(manager.all_steps()) == [2, 3]
        other = state_at(0, sharding.make_device_mesh(2, 2, 2), P("fsdp", "tensor"))
        abstract = checkpoints.abstract(other, jax.tree.map(lambda x: x.sharding, other))
        restored = checkpoints.restore(manager, abstract)
    assert restored.params["kernel"].sharding == other.params["kernel"].sharding
    for got, want in zip(jax.tree.leaves(restored), jax.tree.leaves(saved[3]), strict=True):
        if jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
            got, want = jax.random.key_data(got), jax.random.key_data(want)
        np.testing.assert_array_equal(got, want)


def test_an_unfinished_save_is_not_there(tmp_path):
    state = state_at(1, sharding.make_device_mesh(8, 1, 1), P())
    with checkpoints.open_folder(tmp_path) as manager:
        checkpoints.save(manager, 1, state)
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with checkpoints.open_folder(tmp_path) as manager:
        assert manager.latest_step() == 1


def test_an_empty_folder_restores_nothing(tmp_path):
    with checkpoints.open_folder(tmp_path) as manager:
        assert checkpoints.restore(manager, {}) is None


@pytest.mark.parametrize("fault", ["another shape", "another name", "cut short"])
def test_a_checkpoint_that_does_not_fit_is_one_line_with_its_folder(tmp_path, fault):
    state = {"kernel": jnp.ones((4, 4))}
    with checkpoints.open_folder(tmp_path) as manager:
        checkpoints.save(manager, 7, state)
    if fault == "cut short":
        for path in (tmp_path / "checkpoints" / "7" / "default" / "d").iterdir():
            os.truncate(path, 10)
    wanted = {
        "another shape": {"kernel": jnp.ones((5, 4))},
        "another name": {"weight": jnp.ones((4, 4))},
    }
    wanted = wanted.get(fault, state)
    with checkpoints.open_folder(tmp_path, read_only=True) as manager:
        with pytest.raises(
            InputError, match="checkpoints/7: damaged, or of another model"
        ) as error:
            checkpoints.restore(
                manager, checkpoints.abstract(wanted, jax.tree.map(lambda x: x.sharding, wanted))
            )
    assert "\n" not in str(error.value)


READ_ALONE = """
import sys, jax, numpy as np
from lrm_jax import checkpoints
assert jax.device_count() == 1
shapes = {"ema_params": {"w": jax.ShapeDtypeStruct((8, 2), np.float32)}}
with checkpoints.open_folder(sys.argv[1], read_only=True) as manager:
    w = checkpoints.restore_part(manager, shapes)["ema_params"]["w"]
assert isinstance(w, np.ndarray)
np.testing.assert_array_equal(w, np.arange(16.0).reshape(8, 2))
"""


def test_what_eight_devices_saved_is_read_on_one(tmp_path):
    device_mesh = jax.make_mesh((8,), ("data",))
    sharded = NamedSharding(device_mesh, P("data"))
    w = jax.device_put(np.arange(16.0, dtype=np.float32).reshape(8, 2), sharded)
    with checkpoints.open_folder(tmp_path) as manager:
        checkpoints.save(manager, 3, {"ema_params": {"w": w}, "step": np.int32(3)})
        manager.wait_until_finished()
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-c", READ_ALONE, str(tmp_path)]
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
