import socket

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from tiny_models import abstract_params

from lrm_jax.kernels import attention as kernels_attention
from lrm_jax.parallel import batch_axes, processes, sharding
from lrm_jax.types import InputError


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("backbone/blocks/self_attn/q/kernel", (2, 32, 64), P(None, "fsdp", "tensor")),
        (
            "opt_state/1/0/mu/backbone/blocks/self_attn/out/kernel",
            (2, 64, 32),
            P(None, "tensor", "fsdp"),
        ),
        ("backbone/blocks/fc2/bias", (2, 32), P(None, None)),
        ("decoder/kernel_3", (16, 4), P("fsdp", "tensor")),
        ("plane_queries", (3, 4, 4, 32), P(None, None, None, "fsdp")),
        ("step", (), P()),
        (
            "decoder/kernel_3",
            (15, 4),
            P(None, "tensor"),
        ),  # 15 is not divisible by 2, so it is not split
    ],
)
def test_the_first_matching_rule_places_the_last_dimensions(path, shape, expected):
    device_mesh = sharding.make_device_mesh(2, 2, 2)
    assert sharding.spec_for(path, shape, device_mesh) == expected


def test_nearly_all_bytes_of_the_full_model_are_split_over_fsdp_and_tensor():
    device_mesh = sharding.make_device_mesh(1, 4, 2)
    params = abstract_params("triposr")
    shardings = sharding.infer(params, device_mesh)
    whole = sum(x.size for x in jax.tree.leaves(params))
    split = sum(
        np.prod(s.shard_shape(x.shape))
        for x, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings), strict=True)
    )
    assert split < whole / 7.5  # 8 devices; only norms, biases and embeddings are on more than one


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1)])
def test_sizes_that_do_not_fit_the_devices_are_an_error(sizes):
    with pytest.raises(InputError, match="8 devices"):
        sharding.make_device_mesh(*sizes)


def test_minus_one_takes_the_rest_of_the_devices():
    assert dict(sharding.make_device_mesh(-1, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}


def test_a_rule_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="no sharding rule matches other"):
        sharding.spec_for("other", (4,), sharding.make_device_mesh(), rules=((r"kernel$", P()),))


def test_a_global_batch_is_split_over_data_and_fsdp():
    device_mesh = sharding.make_device_mesh(2, 2, 2)
    host = {"x": np.arange(24, dtype=np.float32).reshape(8, 3)}
    batch = batch_axes.global_batch(host, device_mesh)
    assert batch["x"].sharding.shard_shape((8, 3)) == (2, 3)
    np.testing.assert_array_equal(batch["x"], host["x"])


def test_constrain_batch_pins_the_leading_axis_only_inside_a_device_mesh():
    x = np.ones((8, 3), np.float32)
    assert batch_axes.constrain_batch(x) is x
    device_mesh = sharding.make_device_mesh(4, 2, 1)
    with jax.set_mesh(device_mesh):
        constrained, odd = jax.jit(batch_axes.constrain_batch)((x, np.ones((3, 2), np.float32)))
    assert constrained.sharding.shard_shape(x.shape) == (1, 3)
    assert odd.shape == (3, 2)


@pytest.mark.parametrize("count", [2, 4])
def test_micro_batches_are_all_rows_each_split_over_all_devices_and_nothing_is_sent(count):
    device_mesh = sharding.make_device_mesh(2, 2, 2)
    x = np.arange(16 * 3, dtype=np.float32).reshape(16, 3)

    def sums(batch):
        parts = batch_axes.micro_batches(batch, count)
        assert parts.shape == (count, 16 // count, 3)
        body = lambda total, part: (total + part[: 16 // count], (part * 2).sum(1))  # noqa: E731
        return jax.lax.scan(body, jnp.zeros((16 // count, 3)), parts)[1], parts

    with jax.set_mesh(device_mesh):
        batch = batch_axes.global_batch(x, device_mesh)
        compiled = jax.jit(sums).lower(batch).compile()
        _, parts = compiled(batch)
    assert parts.sharding.shard_shape(parts.shape) == (count, 16 // count // 4, 3)
    for i in range(count):
        np.testing.assert_array_equal(parts[i], x[i::count])
    text = compiled.as_text()
    assert not [
        name
        for name in ("all-to-all", "all-gather", "collective-permute", "all-reduce")
        if name in text
    ]


def test_micro_batches_that_do_not_divide_are_an_error_of_one_line():
    with jax.set_mesh(sharding.make_device_mesh(2, 2, 2)):
        with pytest.raises(
            InputError, match="a batch of 12 does not divide into 2 parts over 4 devices: .* of 8$"
        ):
            batch_axes.micro_batches(jnp.zeros((12, 3)), 2)
    assert batch_axes.micro_batches(jnp.zeros((12, 3)), 2).shape == (2, 6, 3)


SBATCH = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}
SLURM = SBATCH | {"SLURM_STEP_NODELIST": "node[1-2]"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (SLURM, "Slurm"),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (SBATCH, None),  # without srun: one process
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_ML_PLATFORM": "JAX"}, "GKE"),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_ML_PLATFORM": "JAX"}, None),
        ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, "GKE"),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # a single pod
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, "Kubernetes"),
        ({"TPU_ML_PLATFORM": "JAX"}, "Cloud TPU"),
    ],
)
def test_a_cluster_is_known_by_its_variables(environ, expected):
    assert processes.cluster_of(environ) == expected


@pytest.fixture
def started(monkeypatch):
    """Records the arguments of `jax.distributed.initialize` without running it."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **kw: calls.append((args, kw)))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "TPU_WORKER_HOSTNAMES", "TPU_ML_PLATFORM"):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_a_single_process_starts_nothing(started, monkeypatch):
    processes.start()
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.start(num_processes=1)
    assert started == []


def test_a_cluster_is_left_to_jax_and_flags_override_it(started, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    processes.start()
    with socket.create_server(("localhost", 0)) as server:
        coordinator = f"localhost:{server.getsockname()[1]}"
        processes.start(coordinator, 2, 1)
    (by_cluster, options), (by_flags, no_detection) = started
    assert by_cluster == (None, None, None) and "cluster_detection_method" not in options
    assert by_flags == (coordinator, 2, 1)
    assert no_detection["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("host:1", 2, None),
            "^coordinator=host:1 num_processes=2 process_id=None: give all three",
        ),
        ((None, 2, 0), "give all three, or none$"),
        (("host", 2, 0), "^coordinator=host: must be HOST:PORT"),
        (("host:1", 2, 2), "^process_id=2: must be from 0 to num_processes - 1 = 1"),
        (("localhost:1", 2, 1), "^coordinator=localhost:1: process 1 cannot reach process 0"),
        (("localhost:99999", 2, 1), "cannot reach process 0"),
    ],
)
def test_flags_that_cannot_work_are_one_line(started, monkeypatch, flags, message):
    monkeypatch.setattr(processes, "TIMEOUT", 0.0)
    with pytest.raises(InputError, match=message) as error:
        processes.start(*flags)
    assert "\n" not in str(error.value)
    assert started == []


def test_a_port_in_use_and_a_cluster_that_does_not_answer_are_one_line(started, monkeypatch):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(InputError, match=f"localhost:{port}: process 0 cannot listen"):
            processes.start(f"localhost:{port}", 2, 0)

    def fail(*args, **options):
        raise RuntimeError("Kubernetes API Error: 403\nIt appears that\n  the account")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(
        InputError,
        match=r"^Slurm: .*\(Kubernetes API Error: 403 It appears that the account\): give",
    ):
        processes.start()


def test_in_a_single_process_all_arrays_go_to_the_host_and_its_flag_decides():
    device_mesh = sharding.make_device_mesh(2, 2, 2)
    x = np.arange(24, dtype=np.float32).reshape(8, 3)
    whole = processes.to_host({"split": batch_axes.global_batch(x, device_mesh), "number": 3.0})
    assert isinstance(whole["split"], np.ndarray)
    np.testing.assert_array_equal(whole["split"], x)
    assert whole["number"] == 3.0
    assert batch_axes.process_slice(device_mesh) == (0, 1)
    assert processes.any_process(True) and not processes.any_process(False)


def test_attention_stays_split_over_scenes_where_queries_come_from_split_parameters():
    """Without this constraint, each of 64 chips computed the attention of all scenes: 1.2 TB (tools/aot.py, configs/lrm.py)."""
    device_mesh = sharding.make_device_mesh(data=1, fsdp=8, tensor=1)
    B, L, N, K = 8, 16, 2, 8

    def attend(queries_LD):
        q_BLNK = jnp.broadcast_to(queries_LD[None], (B, L, N * K)).reshape(B, L, N, K)
        return kernels_attention.attention(q_BLNK, q_BLNK, q_BLNK)

    with jax.set_mesh(device_mesh):
        queries = jax.ShapeDtypeStruct((L, N * K), jnp.float32, sharding=NamedSharding(device_mesh, P(None, "fsdp")))  # fmt: skip
        compiled = jax.jit(attend).lower(queries).compile()
    assert compiled.output_shardings.shard_shape((B, L, N, K)) == (1, L, N, K)


@pytest.mark.parametrize("sizes", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_local_rows_are_the_first_rows_on_this_process_each_once(sizes):
    device_mesh = sharding.make_device_mesh(*sizes)
    x = np.arange(48).reshape(16, 3)
    split = {"x": batch_axes.global_batch(x, device_mesh)}
    for count in (1, 3, 16):
        rows = batch_axes.local_rows(split, count)["x"]
        assert isinstance(rows, np.ndarray)
        np.testing.assert_array_equal(rows, x[:count])


def test_a_batch_is_split_once_even_if_calls_are_nested():
    """The library splits views, and inside it calls a family that splits scenes."""

    def add(shared, batch):
        return shared + batch

    def outer(shared, batch):
        assert len(batch) == 2
        return batch_axes.split_batch(add, shared, batch)

    batch = np.arange(16.0)
    with jax.set_mesh(sharding.make_device_mesh()):
        result = jax.jit(lambda: batch_axes.split_batch(outer, jnp.float32(1), batch))()
    np.testing.assert_array_equal(result, batch + 1)
    assert len(result.sharding.device_set) == 8
