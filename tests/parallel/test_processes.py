"""Two processes with four CPU devices each agree with one process with eight. Run as a program, this file is one of the two."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lrm_jax.parallel import batch_axes, processes, sharding
from lrm_jax.training import checkpoints, optim

STEPS = 3
PLACES = [
    (8, 1, 1),
    (2, 2, 2),
    (1, 2, 4),
    (1, 1, 8),
]  # how many parts of a batch are read separately:
SHARES = [2, 2, 2, 1]


def whole_batch(step):
    """A global batch: [8 5] inputs and [8 3] outputs."""
    rng = np.random.default_rng(step)
    return {"x": rng.normal(size=(8, 5)), "y": rng.normal(size=(8, 3))}


def batch_of(step, device_mesh):
    """The same batch as a global array. This process reads only its part."""
    index, count = batch_axes.process_slice(device_mesh)
    part = jax.tree.map(
        lambda x: np.split(np.float32(x), count)[index],
        whole_batch(step),
    )
    return batch_axes.global_batch(part, device_mesh)


def initial_params():
    rng = np.random.default_rng(9)
    return {
        "fc1": {"kernel": jnp.float32(rng.normal(size=(5, 16))), "bias": jnp.zeros(16)},
        "fc2": {"kernel": jnp.float32(rng.normal(size=(16, 3))), "bias": jnp.zeros(3)},
    }


def make_step(optimizer):
    """A step of a small network, over two micro batches."""

    def loss(params, part):
        hidden = jax.nn.gelu(part["x"] @ params["fc1"]["kernel"] + params["fc1"]["bias"][None])
        y = hidden @ params["fc2"]["kernel"] + params["fc2"]["bias"][None]
        return jnp.mean((y - part["y"]) ** 2)

    def step(state, batch):
        parts = batch_axes.micro_batches(batch, 2)
        losses, grads = jax.lax.map(
            lambda part: jax.value_and_grad(loss)(state["params"], part), parts
        )
        grads = jax.tree.map(lambda x: x.mean(0), grads)
        updates, opt_state = optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "opt": opt_state}, losses.mean()

    return step


def start_run(device_mesh):
    """(init, step, abstract state) of a run with parameters split over `fsdp` and `tensor`."""
    optimizer = optim.make_optimizer(
        optax.constant_schedule(0.01), b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.05, clip_norm=1.0
    )

    def init():
        params = initial_params()
        return {"params": params, "opt": optimizer.init(params)}

    shapes = jax.eval_shape(init)
    shardings = sharding.infer(shapes, device_mesh)
    step = jax.jit(make_step(optimizer), out_shardings=(shardings, None), donate_argnums=0)
    return (
        jax.jit(init, out_shardings=shardings),
        step,
        checkpoints.abstract(shapes, shardings),
    )


def train(state, step, device_mesh):
    """The state after the steps of the run, and the loss of each step."""
    losses = []
    for number in range(STEPS):
        state, loss = step(state, batch_of(number, device_mesh))
        losses.append(float(loss))
    return state, losses


def one_of_two(coordinator, process_id, workdir):
    """Runs in each process: continues from a checkpoint saved by one process, and saves another."""
    processes.start(coordinator, 2, process_id)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    assert processes.any_process(process_id == 1) and not processes.any_process(False)

    for sizes, count in zip(PLACES, SHARES, strict=True):
        device_mesh = sharding.make_device_mesh(*sizes)
        assert batch_axes.process_slice(device_mesh) == (process_id % count, count), sizes
        whole = processes.to_host(batch_of(0, device_mesh))
        for name, value in whole_batch(0).items():
            np.testing.assert_array_equal(whole[name], np.float32(value))

    device_mesh = sharding.make_device_mesh(1, 4, 2)
    with jax.set_mesh(device_mesh), checkpoints.open_folder(workdir) as manager:
        _, step, abstract_state = start_run(device_mesh)
        state, data_state = checkpoints.restore(manager, abstract_state)
        assert data_state == {"next": 0}
        state, losses = train(state, step, device_mesh)
        kernel = state["params"]["fc1"]["kernel"]
        assert not kernel.is_fully_addressable and not kernel.is_fully_replicated
        checkpoints.save(manager, STEPS, state, {"next": STEPS})
        params = processes.to_host(state["params"])
    np.savez(Path(workdir) / f"{process_id}.npz", losses=losses, **params["fc1"])


def test_two_processes_agree_with_one_and_each_continues_from_the_others_checkpoint(tmp_path):
    device_mesh = sharding.make_device_mesh(1, 4, 2)
    with jax.set_mesh(device_mesh):
        init, step, abstract_state = start_run(device_mesh)
        with checkpoints.open_folder(tmp_path) as manager:
            checkpoints.save(manager, 0, init(), {"next": 0})

        with socket.create_server(("localhost", 0)) as server:
            coordinator = f"localhost:{server.getsockname()[1]}"
        env = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "JAX_PLATFORMS": "cpu",
        }
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, coordinator, str(i), str(tmp_path)],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for i in range(2)
        ]
        try:
            wanted, losses = train(init(), step, device_mesh)
            for process in processes:
                output, _ = process.communicate(timeout=300)
                assert process.returncode == 0, output
        finally:
            for process in processes:
                process.kill()

        with checkpoints.open_folder(tmp_path, read_only=True) as manager:
            assert sorted(manager.all_steps()) == [0, STEPS]
            state, data_state = checkpoints.restore(manager, abstract_state)
    assert data_state == {"next": STEPS}
    # The device mesh is the same, but sums over processes are in another order, in float32.
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
    assert not np.array_equal(state["params"]["fc1"]["kernel"], initial_params()["fc1"]["kernel"])
    for i in range(2):
        told = np.load(tmp_path / f"{i}.npz")
        np.testing.assert_allclose(told["losses"], losses, rtol=1e-5)
        np.testing.assert_array_equal(told["kernel"], state["params"]["fc1"]["kernel"])


if __name__ == "__main__":
    one_of_two(sys.argv[1], int(sys.argv[2]), sys.argv[3])
