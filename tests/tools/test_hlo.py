"""The counts of tools/hlo.py for compiled programs, compared with closed forms, and for lines of real programs."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import hlo  # noqa: E402
import hlo_text  # noqa: E402

from lrm_jax.parallel import sharding  # noqa: E402


def count(function, *arguments, **jit):
    return hlo.count(jax.jit(function, **jit).lower(*arguments).compile().as_text())


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def test_products_in_nested_loops_count_as_often_as_they_run():
    def inner(x, w):
        return jax.lax.fori_loop(0, 3, lambda _, x: jnp.tanh(x @ w), x), None

    costs = count(lambda x, w: jax.lax.scan(inner, x, w)[0], shape(8, 64), shape(5, 64, 64))
    assert costs.flops == 5 * 3 * 2 * 8 * 64 * 64
    assert costs.loops_of_unknown_length == 0


def test_a_loop_without_a_readable_length_is_counted_once_and_reported():
    def function(x, w):
        return jax.lax.while_loop(lambda x: x.sum() < 1e3, lambda x: x @ w, x)

    costs = count(function, shape(8, 64), shape(64, 64))
    assert costs.flops == 2 * 8 * 64 * 64
    assert costs.loops_of_unknown_length == 1


def test_convolutions_count_the_taps_that_meet_the_image():
    costs = count(
        lambda x, w: jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
        shape(2, 6, 6, 4), shape(3, 3, 4, 8),
    )  # fmt: skip
    taps = (3 * 6 - 2) ** 2  # in each row of 6 pixels, 4 have three taps and 2 have two
    assert costs.flops == 2 * 2 * 8 * 4 * taps


@pytest.mark.parametrize(
    ("line", "left", "right", "product", "times"),
    [
        # Lines that libtpu 0.0.42 writes for a v4. T(...) is the tiling. The batch axes [16 scenes, 16 heads] are spatial axes here.
        (
            "bf16[16,16,64,3072]{3,2,1,0:T(8,128)(2,1)} convolution(%a, %b), window={size=16x16 stride=15x15 lhs_dilate=16x16}, dim_labels=0f1b_01oi->01bf",
            "bf16[16,1024,16,64]{3,2,1,0}", "bf16[16,16,3072,1024]{3,2,1,0}", (64, 3072, 1024), 16 * 16,
        ),
        (
            "bf16[16,3072,16,64]{1,3,2,0:T(8,128)(2,1)S(3)} convolution(%a, %b), window={size=1x16 pad=0_0x15_15 rhs_reversal=0x1}, dim_labels=0bf1_1oi0->0b1f",
            "bf16[16,3072,1024,1]{1,2,3,0}", "bf16[16,64,1024,1]{2,1,0,3}", (16 * 3072, 1024, 1024), 1,
        ),
    ],
)  # fmt: skip
def test_a_tpus_products_written_as_convolutions_are_counted_as_products(
    line, left, right, product, times
):
    text = (
        f"HloModule m\n\nENTRY %main (a: f32[], b: f32[]) -> f32[] {{\n  %a = {left} parameter(0)\n"
        f"  %b = {right} parameter(1)\n  ROOT %c = {line}\n}}\n"
    )
    assert hlo.count(text).products == {product: times}


def test_collectives_have_the_bytes_of_their_arrays():
    device_mesh = sharding.make_device_mesh(data=1, fsdp=8)
    rows, whole = (NamedSharding(device_mesh, PartitionSpec(*x)) for x in (("fsdp",), ()))
    batch, kernel = (
        jax.ShapeDtypeStruct(s, jnp.float32, sharding=rows) for s in ((64, 32), (32, 16))
    )

    def gradient(kernel, batch):
        return jax.grad(lambda k: jnp.tanh(batch @ k).sum())(kernel)

    gathered = count(gradient, kernel, batch, out_shardings=whole)
    gather, reduce = gathered.collectives["all-gather"], gathered.collectives["all-reduce"]
    assert (gather.count, gather.payload, gather.sent) == (1, 32 * 16 * 4, 32 * 16 * 4 * 7 / 8)
    assert (reduce.count, reduce.payload, reduce.sent) == (1, 32 * 16 * 4, 32 * 16 * 4 * 2 * 7 / 8)
    # Each of the 8 devices has an eighth of the batch.
    assert gathered.flops == 2 * (2 * 8 * 32 * 16)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("replica_groups=[2,4]<=[8], use_global_device_ids=true", 4),
        ("replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}", 2),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0'}, dimensions={0}", 8),
        ("replica_groups=mesh['axis_0'=8,'axis_1'=2] {'axis_0','axis_1'}, dimensions={0}", 16),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
    ],
)
def test_group_sizes_are_read_from_every_notation(written, size):
    assert len(hlo.group(written)) == size


def test_stacked_layers_are_read_once_and_not_once_per_layer():
    def layers(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    costs = count(layers, shape(8, 256), shape(16, 256, 256))
    weights = 16 * 256 * 256 * 4
    # A layer is copied out of the stack (read and written), then read by the product. The program has only few other, small arrays.
    assert weights <= costs.memory_bytes < 4 * weights


def test_arrays_that_stay_on_the_chip_are_told_apart():
    both = (
        "(f32[2,128]{1,0:T(2,128)S(1)}, /*index=1*/bf16[128]{0:T(256)(128)(2,1)}, pred[]{:T(128)})"
    )
    assert hlo_text.array_bytes(both) == 1024 + 256 + 1
    assert hlo_text.array_bytes(both, main_memory_only=True) == 256 + 1


# -- shortened lines of real programs


def program(*lines, computations=""):
    """A module with these lines in its entry computation."""
    body = "\n".join(f"  {line}" for line in lines)
    return f"HloModule m, is_scheduled=true\n\n{computations}\n\nENTRY %main (x: f32[]) -> f32[] {{\n{body}\n}}\n"


def test_attributes_may_span_several_lines():
    text = program(
        '%a = f32[8]{0} parameter(0), frontend_attributes={kernel_metadata={\n"note":"{}"\n}}, metadata={op_name="kept"}',
        "ROOT %b = f32[8]{0} negate(%a)",
    )
    entry, computations = hlo_text.parse(text)
    assert 'op_name="kept"' in computations[entry]["a"].attributes
    assert list(computations[entry]) == ["a", "b"]


@pytest.mark.parametrize(
    ("shape", "sizes", "size"),
    [
        ("f32[4096,64]{1,0:T(8,128)S(3)}", (1, 64), 8 * 128 * 4),  # a row of TPU tiles
        ("f32[4096,64]{0,1:T(8,128)}", (1, 64), 64 * 128 * 4),
        ("bf16[4096,256]{1,0:T(8,128)(2,1)}", (1, 256), 8 * 256 * 2),
        ("f32[32768,3]{0,1:T(4,128)}", (32768, 1), 4 * 32768 * 4),
        ("f32[8,64,16]{2,1,0}", (1, 1, 16), 16 * 4),
        ("s32[65536]{0:T(1024)}", (1,), 1024 * 4),
        ("pred[]{:T(128)}", (), 128),
    ],
)
def test_windows_take_whole_tiles(shape, sizes, size):
    assert hlo_text.window_bytes(shape, sizes) == size


def test_64_channels_take_as_much_of_a_tpus_memory_as_128():
    text = program(
        "%x = f32[1000,64]{1,0:T(8,128)} parameter(0)",
        "ROOT %y = f32[1000,64]{1,0:T(8,128)S(1)} negate(%x)",
    )
    assert hlo.count(text).memory_bytes == 1000 * 128 * 4


def test_products_in_fusions_within_fusions_are_counted():
    computations = """%inner (a: f32[8,16]) -> f32[8,8] {
  %a = f32[8,16]{1,0} parameter(0)
  ROOT %d = f32[8,8]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={1}
}

%outer (b: f32[8,16]) -> f32[8,8] {
  %b = f32[8,16]{1,0} parameter(0)
  ROOT %f = f32[8,8]{1,0} fusion(%b), kind=kLoop, calls=%inner
}"""
    text = program(
        "%x = f32[8,16]{1,0} parameter(0)",
        "ROOT %y = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%outer",
        computations=computations,
    )
    assert hlo.count(text).products == {(8, 8, 16): 1}


REDUCED = """%all-reduce-scatter (input: bf16[96,32]) -> bf16[32,32] {
  %input = bf16[96,32]{1,0:T(8,128)(2,1)S(3)} parameter(0)
  %zero = bf16[] constant(0)
  %pad = bf16[128,32]{1,0:T(8,128)(2,1)} pad(%input, %zero), padding=0_32x0_0
  %all-reduce.50 = bf16[128,32]{1,0:T(8,128)(2,1)} all-reduce(%pad), channel_id=78, replica_groups={{0,1,2,3}}, to_apply=%add
  %partition-id.19 = u32[] partition-id()
  ROOT %slice = bf16[32,32]{1,0:T(8,128)(2,1)S(3)} dynamic-slice(%all-reduce.50, %partition-id.19, %zero), dynamic_slice_sizes={32,32}
}"""


def test_a_collective_in_a_fusion_is_found_and_is_a_reduce_scatter_if_each_device_keeps_its_part():
    """In the text of libtpu 0.0.52 for a v4."""
    text = program(
        "%x = bf16[96,32]{1,0:T(8,128)(2,1)S(3)} parameter(0)",
        "ROOT %fusion.2 = bf16[32,32]{1,0:T(8,128)(2,1)S(3)} fusion(%x), kind=kCustom, calls=%all-reduce-scatter",
        computations=REDUCED,
    )
    (found,) = hlo.count(text).collectives.items()
    payload = 128 * 32 * 2
    assert found == ("reduce-scatter", hlo.Traffic(1, payload, payload * 3 / 4, 1, payload * 3 / 4))
    whole = text.replace("ROOT %slice", "%slice").replace("dynamic-slice(", "negate(")
    assert list(hlo.count(whole).collectives) == ["all-reduce"]


GATHERED = """%wrapped (p: bf16[4,32]) -> bf16[32,32] {
  %p = bf16[4,32]{1,0} parameter(0)
  ROOT %all-gather.1 = bf16[32,32]{1,0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
}"""
PAIRS = {
    "pair": (
        "%start = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}",
        "%done = bf16[32,32]{1,0} all-gather-done(%start)",
    ),
    "async": (
        "%start = ((bf16[4,32]{1,0}), bf16[32,32]{1,0}, u32[]) async-start(%x), calls=%wrapped",
        "%done = bf16[32,32]{1,0} async-done(%start)",
    ),
}
PRODUCT = (
    "%product = bf16[32,32]{1,0} dot(%w, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
)
OTHER = "%product = bf16[32,32]{1,0} add(%w, %w)"


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize(
    ("between", "after", "exposed"),
    [(PRODUCT, "", 0), ("", PRODUCT, 1), (OTHER, "", 1)],
    ids=["product between", "product after", "no product"],
)
def test_a_collective_is_hidden_if_a_product_runs_before_it_ends(kind, between, after, exposed):
    start, done = PAIRS[kind]
    lines = ["%x = bf16[4,32]{1,0} parameter(0)", "%w = bf16[32,32]{1,0} parameter(1)"]
    lines += [start, between, done, after, "ROOT %out = (bf16[32,32]{1,0}) tuple(%done)"]
    traffic = hlo.count(program(*filter(None, lines), computations=GATHERED)).collectives["all-gather"]  # fmt: skip
    payload = 32 * 32 * 2
    assert (traffic.count, traffic.payload, traffic.sent) == (1, payload, payload * 7 / 8)
    assert (traffic.exposed_count, traffic.exposed_sent) == (exposed, exposed * payload * 7 / 8)


def test_a_collective_that_starts_and_ends_in_fusions_is_hidden_by_the_product_between():
    computations = """%begin (p: bf16[4,32]) -> (bf16[4,32], bf16[32,32]) {
  %p = bf16[4,32]{1,0} parameter(0)
  ROOT %s = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) all-gather-start(%p), replica_groups=[1,8]<=[8], dimensions={0}
}

%carry (q: bf16[32,32], s: (bf16[4,32], bf16[32,32])) -> (bf16[32,32], (bf16[4,32], bf16[32,32])) {
  %q = bf16[32,32]{1,0} parameter(0)
  %s = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) parameter(1)
  %d = bf16[32,32]{1,0} dot(%q, %q), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (bf16[32,32]{1,0}, (bf16[4,32]{1,0}, bf16[32,32]{1,0})) tuple(%d, %s)
}

%end (s: (bf16[4,32], bf16[32,32])) -> bf16[32,32] {
  %s = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) parameter(0)
  ROOT %e = bf16[32,32]{1,0} all-gather-done(%s)
}"""
    lines = [
        "%x = bf16[4,32]{1,0} parameter(0)",
        "%w = bf16[32,32]{1,0} parameter(1)",
        "%b = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) fusion(%x), kind=kCustom, calls=%begin",
        "%c = (bf16[32,32]{1,0}, (bf16[4,32]{1,0}, bf16[32,32]{1,0})) fusion(%w, %b), kind=kCustom, calls=%carry",
        "%g = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) get-tuple-element(%c), index=1",
        "ROOT %e = bf16[32,32]{1,0} fusion(%g), kind=kCustom, calls=%end",
    ]
    traffic = hlo.count(program(*lines, computations=computations)).collectives["all-gather"]
    assert (traffic.count, traffic.exposed_count) == (1, 0)
    del lines[3]
    lines[3] = "%g = (bf16[4,32]{1,0}, bf16[32,32]{1,0}) bitcast(%b)"
    traffic = hlo.count(program(*lines, computations=computations)).collectives["all-gather"]
    assert (traffic.count, traffic.exposed_count) == (1, 1)


def test_traffic_between_hosts_is_separate_from_traffic_within():
    def sent(groups):
        text = program(
            "%x = f32[100]{0} parameter(0)",
            f"ROOT %r = f32[100]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add",
        )
        return dict(hlo.count(text, hosts=[0, 0, 0, 0, 1, 1, 1, 1]).links)

    assert sent("[2,4]<=[8]") == {0: 400 * 2 * 3 / 4}
    assert sent("[4,2]<=[2,4]T(1,0)") == {1: 400 * 2 * 1 / 2}  # one device per host
    assert sent("{{0,1,2,3,4,5,6,7}}") == {4: 400 * 2 * 7 / 8}
    assert sent("mesh['a'=2,'b'=4] {'b'}") == {0: 400 * 2 * 3 / 4}
    assert sent("mesh['a'=2,'b'=4] {'a'}") == {1: 400 * 2 * 1 / 2}


LOOKED_UP = """%lookup (planes: f32[4096,64], places: s32[65536]) -> f32[65536,64] {
  %planes = f32[4096,64]{1,0:T(8,128)S(3)} parameter(0)
  %places = s32[65536]{0:T(1024)S(3)} parameter(1)
  %gather.48 = f32[65536,64]{1,0:T(8,128)} gather(%planes, %places), offset_dims={1}, collapsed_slice_dims={0}, start_index_map={0}, index_vector_dim=1, slice_sizes={1,64}
  ROOT %reshape = f32[65536,64]{1,0:T(8,128)S(3)} reshape(%gather.48)
}

%region (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%scattered (planes.1: f32[4096,64], places.1: s32[65536], values: f32[65536,64]) -> f32[4096,64] {
  %planes.1 = f32[4096,64]{1,0:T(8,128)} parameter(0)
  %places.1 = s32[65536]{0:T(1024)S(3)} parameter(1)
  %values = f32[65536,64]{1,0:T(8,128)} parameter(2)
  ROOT %scatter = f32[4096,64]{1,0:T(8,128)} scatter(%planes.1, %places.1, %values), update_window_dims={1}, inserted_window_dims={0}, scatter_dims_to_operand_dims={0}, index_vector_dim=1, to_apply=%region
}"""


def test_gathers_and_scatters_are_lookups_of_whole_tiles_and_not_memory_traffic():
    """In the text of libtpu 0.0.52 for a v4. S(3) is memory on the chip."""
    text = program(
        "%planes.2 = f32[4096,64]{1,0:T(8,128)} parameter(0)",
        "%places.2 = s32[65536]{0:T(1024)S(3)} parameter(1)",
        "%found = f32[65536,64]{1,0:T(8,128)S(3)} fusion(%planes.2, %places.2), kind=kCustom, calls=%lookup",
        "ROOT %added = f32[4096,64]{1,0:T(8,128)} fusion(%planes.2, %places.2, %found), kind=kCustom, calls=%scattered",
        computations=LOOKED_UP,
    )
    costs = hlo.count(text)
    assert costs.lookups == {
        hlo.Lookup("gather", "f32", 256.0, 4096.0): 65536,
        hlo.Lookup("scatter-add", "f32", 256.0, 4096.0): 65536,
    }
    assert costs.memory_bytes == 0
    assert costs.calls == {"scatter-add of f32": hlo.Calls(1, 1)}


@pytest.mark.parametrize(
    ("change", "lookup", "calls"),
    [
        (("", ""), "scatter-add", {"scatter-add of bf16": hlo.Calls(1, 1)}),
        (("to_apply", "unique_indices=true, to_apply"), "scatter", {}),
        (("ROOT %c = bf16[] add(%a, %b)", ""), "scatter", {}),  # only the value
    ],
    ids=["adding", "unique", "storing"],
)
def test_only_scatters_that_combine_are_counted_by_type(change, lookup, calls):
    """XLA's text for the gradient of a lookup on a GPU, with 8 scenes and 64 x 64 cells of 16 channels."""
    b = "%b" if change[0] != "ROOT %c = bf16[] add(%a, %b)" else "ROOT %b"
    computations = f"""%region (a: bf16[], b: bf16[]) -> bf16[] {{
  %a = bf16[] parameter(0)
  {b} = bf16[] parameter(1)
  ROOT %c = bf16[] add(%a, %b)
}}"""
    text = program(
        "%p = bf16[8,64,16]{2,1,0} parameter(0)",
        "%places = s32[1000,2]{1,0} parameter(1)",
        "%values = bf16[1000,1,1,16]{3,2,1,0} parameter(2)",
        "ROOT %s = bf16[8,64,16]{2,1,0} scatter(%p, %places, %values), update_window_dims={1,2,3}, inserted_window_dims={}, scatter_dims_to_operand_dims={0,1}, index_vector_dim=1, to_apply=%region",
        computations=computations,
    ).replace(*change, 1)
    costs = hlo.count(text)
    assert costs.lookups == {hlo.Lookup(lookup, "bf16", 32.0, 32.0): 1000}
    assert costs.calls == calls


ATTENTION = """custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax", backend_config={"operation_queue_id": "0", "cudnn_fmha_backend_config": {"algorithm": {"tuning_knobs": {"17": "1"}}, "fmha_scale": 0.25, "intermediate_tensor_shape": {"element_type": "BF16", "dimensions": ["8", "2", "48", "96"], "tuple_shapes": []}, "mask_type": "NO_MASK"}}"""


@pytest.mark.parametrize(
    ("call", "kind", "products"),
    [
        (ATTENTION, "forward", 2),
        (ATTENTION.replace("Softmax", "SoftmaxBackward"), "backward", 5),
    ],
)
def test_cudnns_attention_is_counted_by_kind_with_its_products(call, kind, products):
    """XLA's text for an H100, with 8 sequences, 2 heads of 16, 48 queries and 96 keys."""
    text = program(
        "%q = bf16[8,48,2,16]{3,2,1,0} parameter(0)",
        "%k = bf16[8,96,2,16]{3,2,1,0} parameter(1)",
        f"ROOT %a = (bf16[8,2,48,16]{{3,1,2,0}}, f32[8,2,48]{{2,1,0}}, u8[0]{{0}}) {call}",
    )
    costs = hlo.count(text)
    assert costs.flops == products * 2 * 8 * 2 * 48 * 96 * 16
    assert costs.calls == {f"cuDNN attention {kind}": hlo.Calls(1, 1)}


@pytest.mark.parametrize(
    ("name", "operands", "result"),
    [
        ("Forward", ("image", "kernel"), "bf16[4,6,6,16]"),
        ("BackwardInput", ("out", "kernel"), "bf16[4,6,6,8]"),
        ("BackwardFilter", ("image", "out"), "bf16[16,3,3,8]"),
    ],
)
def test_cudnns_convolutions_count_as_the_forward_one(name, operands, result):
    """XLA's text for an H100, where the labels are those of the forward convolution."""
    text = program(
        "%image = bf16[4,6,6,8]{3,2,1,0} parameter(0)",
        "%kernel = bf16[16,3,3,8]{3,2,1,0} parameter(1)",
        "%out = bf16[4,6,6,16]{3,2,1,0} parameter(2)",
        f"ROOT %c = ({result}{{3,2,1,0}}, u8[0]{{0}}) custom-call(%{operands[0]}, %{operands[1]}), window={{size=3x3 pad=1_1x1_1}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$conv{name}", backend_config={{"operation_queue_id":"0"}}',
    )
    assert hlo.count(text).flops == 2 * 4 * 16 * 8 * (3 * 6 - 2) ** 2


def test_cublas_products_are_counted():
    text = program(
        "%a = bf16[8,16]{1,0} parameter(0)",
        "%b = bf16[16,32]{1,0} parameter(1)",
        'ROOT %c = (bf16[8,32]{1,0}, s8[0]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],"rhs_batch_dimensions":[]}}}',
    )
    assert hlo.count(text).products == {(8, 32, 16): 1}


KERNEL = """ROOT %mine.1 = bf16[1024,64]{1,0} custom-call(%x, %w), custom_call_target="TARGET", metadata={op_name="jit(f)/mine/pallas_call"}, backend_config=CONFIG"""


@pytest.mark.parametrize(
    ("target", "config"),
    [
        ("tpu_custom_call", '{"custom_call_config":{"body":"..."}}'),
        ("__gpu$xla.gpu.triton", '{grid_x = 8 : i32, name = "mine"}'),
    ],
)
def test_a_kernel_counts_as_traced_or_by_its_estimate_and_is_refused_otherwise(target, config):
    def count(config, kernels):
        lines = (
            "%x = bf16[1024,64]{1,0} parameter(0)",
            "%w = bf16[64,64]{1,0} parameter(1)",
            KERNEL.replace("TARGET", target).replace("CONFIG", config),
        )
        return hlo.count(program(*lines), kernels)

    shapes = ((1024, 64), (64, 64), (1024, 64))
    noted = '{"custom_call_config":{"body":"...","cost_estimate":{"flops":"1000","bytes_accessed":"64"}}}'
    assert count(noted, {}).flops == 1000
    once = (2 * 1024 * 64 + 64 * 64) * 2
    assert count(noted, {}).memory_bytes == once  # its estimate is less than its arrays hold
    assert count(noted.replace('"64"', f'"{3 * once}"'), {}).memory_bytes == 3 * once
    # Only the traced products count, not the estimate as well.
    assert count(noted, {shapes: {(128, 64, 64): 8}}).flops == 2 * 1024 * 64 * 64
    assert count(config, {shapes: {(128, 64, 64): 8}}).products == {(128, 64, 64): 8}
    for kernels in ({}, {shapes: {}}, {((8, 64), *shapes[1:]): {(128, 64, 64): 8}}):
        with pytest.raises(
            hlo.UnknownCost, match="mine.1 .*/mine/pallas_call.*neither a cost estimate"
        ):
            count(config, kernels)


def test_an_asynchronous_fusion_counts_once():
    computations = """%body (p: f32[5,8,8], n: s32[]) -> f32[1,8,8] {
  %p = f32[5,8,8]{2,1,0} parameter(0)
  %n = s32[] parameter(1)
  ROOT %d = f32[1,8,8]{2,1,0} dynamic-slice(%p, %n, %n, %n), dynamic_slice_sizes={1,8,8}
}"""
    text = program(
        "%x = f32[5,8,8]{2,1,0} parameter(0)",
        "%i = s32[]{:S(1)} parameter(1)",
        "%s = ((f32[5,8,8]{2,1,0}, s32[]), f32[1,8,8]{2,1,0}, u32[]) fusion-start(%x, %i), kind=kLoop, calls=%body",
        "ROOT %e = f32[1,8,8]{2,1,0} fusion-done(%s)",
        computations=computations,
    )
    assert hlo.count(text).memory_bytes == 2 * 8 * 8 * 4
