import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lrm_jax import sharding
from lrm_jax.models import build
from lrm_jax.types import InputError, Rays, Views


def abstract_params(variant):
    def init():
        model = build("triposr", variant)
        views = Views(rgb=jnp.zeros((1, 1, model.image_size, model.image_size, 3)), cameras=None)
        rays = Rays(origins=jnp.zeros((1, 1, 1, 1, 3)), dirs=jnp.ones((1, 1, 1, 1, 3)))
        return model.init(jax.random.key(0), views, rays)["params"]

    return jax.eval_shape(init)


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
        ("decoder/kernel_3", (15, 4), P(None, "tensor")),  # 2 does not divide 15: whole
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
    assert (
        split < whole / 7.5
    )  # 8 devices; only norms, biases and embeddings are held by more than one


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 8, 1), (16, 1, 1)])
def test_sizes_that_do_not_arrange_the_devices_are_an_error(sizes):
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
    batch = sharding.global_batch(host, device_mesh)
    assert batch["x"].sharding.shard_shape((8, 3)) == (2, 3)
    np.testing.assert_array_equal(batch["x"], host["x"])


def test_constrain_batch_pins_the_leading_axis_only_inside_a_device_mesh():
    x = np.ones((8, 3), np.float32)
    assert sharding.constrain_batch(x) is x
    device_mesh = sharding.make_device_mesh(4, 2, 1)
    with jax.set_mesh(device_mesh):
        constrained, odd = jax.jit(sharding.constrain_batch)((x, np.ones((3, 2), np.float32)))
    assert constrained.sharding.shard_shape(x.shape) == (1, 3)
    assert odd.shape == (3, 2)
