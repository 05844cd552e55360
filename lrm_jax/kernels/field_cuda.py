"""The field of projected planes on GPUs: lookups and all layers in one Pallas (Triton) kernel, and its gradient in another.

A program of the forward kernel takes a tile of points through lookups and layers on the chip. The backward kernel computes the
activations of a tile again. So neither writes an array of points x width to memory.

The gradient of a plane is, for each tile and each window of 8 x 16 cells that its points lie in, one product: the transposed
bilinear weights [cells points] times the gradient of the features [points width]. It is added to memory once per cell that the
tile touches, instead of once per point and corner. Neighbouring points lie in few windows, mostly in one. The gradient of a layer
is a sum per program, and XLA adds the programs' sums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
from jaxtyping import Array, Float

from lrm_jax.kernels.field_plain import gradient_of_points

ROWS, COLUMNS = 8, 16  # of a window
MAX_PROGRAMS = 132  # of the backward kernel: one for each multiprocessor of an H100


class Options(NamedTuple):
    """What is known when a kernel is compiled."""

    axes: tuple  # of the planes
    activation: str
    precise: bool  # the products are of float32
    interpret: bool
    shape: tuple  # planes, height, width and channels of the padded planes
    tile: int  # points that a program works on at a time


def can(projected_PhwF: Float[Array, "P h w F"]) -> bool:
    """Whether a tile of points fits on the chip."""
    return projected_PhwF.shape[-1] <= 128


def field_by_triton(
    projected_PhwF: Float[Array, "P h w F"],
    layers: list,
    xyz_Q3: Float[Array, "Q 3"],
    axes: tuple,
    activation: str,
    interpret: bool = False,
) -> Float[Array, "Q 4"]:
    """See `field.field`. Only the gradient with respect to `xyz_Q3` is that of the plain form.

    `interpret`: runs on any platform, slowly.
    """
    F = projected_PhwF.shape[-1]
    width = max(16, pl.next_power_of_2(F))  # of every array in a kernel
    # Zeros around the planes are what lies outside. Zeros in the width stay zeros in every layer.
    planes_PyxF = jnp.pad(projected_PhwF, ((0, 0), (1, 1), (1, 1), (0, width - F)))
    kernels_LFF = jnp.stack([_padded(kernel, (width, width)) for kernel, _ in layers[1:]])
    biases_LF = jnp.stack([_padded(bias, (width,)) for _, bias in layers])
    # A tile that is wider, or longer, would not fit in the registers.
    tile = 128 if width <= 64 else 64
    precise = projected_PhwF.dtype == jnp.float32
    options = Options(axes, activation, precise, interpret, planes_PyxF.shape, tile)
    return _field(options, planes_PyxF, kernels_LFF, biases_LF, xyz_Q3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _field(options: Options, planes_PyxF, kernels_LFF, biases_LF, xyz_Q3):
    Q = xyz_Q3.shape[0]
    programs = pl.cdiv(Q, options.tile)
    points = programs * options.tile
    raw_Q4 = pl.pallas_call(
        functools.partial(_forward_kernel, options),
        out_shape=jax.ShapeDtypeStruct((points, 4), jnp.float32),
        name="field_forward",
        **_run(options, programs),
    )(*_operands(options, planes_PyxF, kernels_LFF, biases_LF, xyz_Q3, points))
    return raw_Q4[:Q]


def _field_forward(options, planes_PyxF, kernels_LFF, biases_LF, xyz_Q3):
    arguments = [x.value for x in (planes_PyxF, kernels_LFF, biases_LF, xyz_Q3)]
    return _field(options, *arguments), (*arguments, () if xyz_Q3.perturbed else None)


def _field_backward(options, residuals, grad_Q4):
    *arguments, xyz_Q3, points_move = residuals
    planes_PyxF, kernels_LFF, biases_LF = arguments
    num_tiles = pl.cdiv(xyz_Q3.shape[0], options.tile)
    tiles = pl.cdiv(num_tiles, MAX_PROGRAMS)  # of a program
    programs = pl.cdiv(num_tiles, tiles)
    points = programs * tiles * options.tile
    P, y, x, width = options.shape
    # Windows may reach over the last row and column.
    zeros = jnp.zeros((P, y + ROWS, x + COLUMNS, width), jnp.float32)
    operands = (
        *_operands(options, *arguments, xyz_Q3, points), _padded(grad_Q4, (points, 4)), zeros.reshape(-1, width)
    )  # fmt: skip
    inputs = jax.ShapeDtypeStruct((programs, len(kernels_LFF), options.tile, width), planes_PyxF.dtype)  # fmt: skip
    sums = [
        jax.ShapeDtypeStruct((programs, *x.shape), jnp.float32) for x in (kernels_LFF, biases_LF)
    ]
    planes_grad, kernels_grad, biases_grad, _ = pl.pallas_call(
        functools.partial(_backward_kernel, options, tiles),
        out_shape=(jax.ShapeDtypeStruct(operands[-1].shape, jnp.float32), *sums, inputs),
        input_output_aliases={len(operands) - 1: 0},
        name="field_backward",
        **_run(options, programs),
    )(*operands)
    planes_grad = planes_grad.reshape(zeros.shape)[:, :y, :x].astype(planes_PyxF.dtype)
    xyz_grad = None
    if points_move is not None:
        *hidden, last = zip([None, *kernels_LFF], biases_LF, strict=True)
        layers = [*hidden, (last[0][:, :4], last[1][:4])]
        xyz_grad = gradient_of_points(
            planes_PyxF[:, 1:-1, 1:-1], layers, xyz_Q3, options.axes, options.activation, grad_Q4
        )
    return planes_grad, kernels_grad.sum(0), biases_grad.sum(0), xyz_grad


_field.defvjp(_field_forward, _field_backward, symbolic_zeros=True)


def _run(options, programs):
    """Arguments of a call: a kernel gets all arrays as a whole, and takes its part."""
    return dict(
        grid=(programs,),
        interpret=options.interpret,
        compiler_params=None if options.interpret else triton.CompilerParams(num_warps=8, num_stages=1),
    )  # fmt: skip


def _operands(options, planes_PyxF, kernels_LFF, biases_LF, xyz_Q3, points):
    """Planes as rows of cells, kernels in the planes' dtype, biases, and the points' coordinates in each plane.

    Points at 0 fill up the last tiles.
    """
    rows_ZF = planes_PyxF.reshape(-1, planes_PyxF.shape[-1])
    xy_ZQ = _padded(xyz_Q3, (points, 3)).T[jnp.array(options.axes).reshape(-1)]
    return rows_ZF, kernels_LFF.astype(planes_PyxF.dtype), biases_LF, xy_ZQ


def _padded(x, shape):
    return jnp.pad(x, [(0, wanted - size) for size, wanted in zip(x.shape, shape, strict=True)])


# -- kernels


def _forward_kernel(options, planes_ref, kernels_ref, biases_ref, xy_ref, raw_ref):
    points_Q = pl.program_id(0) * options.tile + jnp.arange(options.tile)
    x_QF = _features(options, planes_ref, xy_ref, points_Q) + biases_ref[0][None]
    x_QF = jax.lax.fori_loop(
        0, kernels_ref.shape[0], lambda i, x_QF: _layer(options, kernels_ref, biases_ref, i, x_QF), x_QF
    )  # fmt: skip
    outputs, mask = _outputs(options, points_Q)
    triton.store(raw_ref.at[outputs], x_QF, mask=mask)


def _backward_kernel(
    options, tiles, planes_ref, kernels_ref, biases_ref, xy_ref, grad_ref, _, planes_out, kernels_out, biases_out, inputs_ref
):  # fmt: skip
    """`inputs_ref` [programs layers Q F] is where a program keeps the inputs of a tile's layers."""
    program, depth, width, dtype = pl.program_id(0), *kernels_ref.shape[:2], kernels_ref.dtype

    def clear(i, nothing):
        kernels_out[program, i] = jnp.zeros((width, width), jnp.float32)
        biases_out[program, i] = jnp.zeros((width,), jnp.float32)
        return nothing

    jax.lax.fori_loop(0, depth, clear, ())
    biases_out[program, depth] = jnp.zeros((width,), jnp.float32)

    def one_tile(t, nothing):
        points_Q = (program * tiles + t) * options.tile + jnp.arange(options.tile)

        def forward(i, x_QF):
            inputs_ref[program, i] = x_QF.astype(dtype)
            return _layer(options, kernels_ref, biases_ref, i, x_QF)

        x_QF = _features(options, planes_ref, xy_ref, points_Q) + biases_ref[0][None]
        x_QF = jax.lax.fori_loop(0, depth - 1, forward, x_QF)
        inputs_ref[program, depth - 1] = x_QF.astype(dtype)
        _wait(options)

        outputs, mask = _outputs(options, points_Q)
        grad_QF = triton.load(grad_ref.at[outputs], mask=mask, other=0.0)
        counts_Q = jnp.max(jnp.abs(grad_QF), axis=1) > 0

        def backward(i, grad_QF):
            layer = depth - 1 - i
            biases_out[program, layer + 1] += jnp.sum(grad_QF, axis=0)
            grad_QF = grad_QF.astype(dtype)
            active_QF, slope_QF = _activation(options, inputs_ref[program, layer])
            kernels_out[program, layer] += _dot(active_QF.astype(dtype).T, grad_QF)
            return _dot(grad_QF, kernels_ref[layer].T) * slope_QF

        grad_QF = jax.lax.fori_loop(0, depth, backward, grad_QF)
        biases_out[program, 0] += jnp.sum(grad_QF, axis=0)
        grad_QF = grad_QF.astype(dtype)

        def add(plane, nothing):
            _add_to_plane(options, xy_ref, points_Q, plane, counts_Q, grad_QF, planes_out)
            return nothing

        jax.lax.fori_loop(0, options.shape[0], add, ())
        _wait(options)
        return nothing

    jax.lax.fori_loop(0, tiles, one_tile, ())


def _wait(options):
    """Until all threads have written: others may read it."""
    if not options.interpret:
        triton.debug_barrier()


def _features(options, planes_ref, xy_ref, points_Q):
    """The sum of the bilinear lookups in all planes, in float32."""
    P, y, x, width = options.shape
    channels_F = jnp.arange(width)

    def add(plane, total_QF):
        (column_Q, fx_Q, _), (row_Q, fy_Q, _) = _corners(options, xy_ref, points_Q, plane)
        for down, weight_y in ((0, 1 - fy_Q), (1, fy_Q)):
            for right, weight_x in ((0, 1 - fx_Q), (1, fx_Q)):
                cell_Q = (plane * y + row_Q + down) * x + column_Q + right
                rows_QF = planes_ref[cell_Q[:, None], channels_F[None]].astype(jnp.float32)
                total_QF += (weight_x * weight_y)[:, None] * rows_QF
        return total_QF

    return jax.lax.fori_loop(0, P, add, jnp.zeros((options.tile, width), jnp.float32))


def _corners(options, xy_ref, points_Q, plane):
    """Along a plane's width, then its height: the lower cell, the fraction of the way to the next, whether any of them counts."""
    for axis, size in enumerate(options.shape[2:0:-1]):
        position_Q = (xy_ref[2 * plane + axis, points_Q] + 1) * 0.5 * (size - 2) + 0.5
        inside_Q = (position_Q > 0) & (position_Q < size - 1)
        position_Q = jnp.clip(position_Q, 0.0, size - 1.0)
        low_Q = jnp.minimum(jnp.floor(position_Q), size - 2.0)
        yield low_Q.astype(jnp.int32), position_Q - low_Q, inside_Q


def _layer(options, kernels_ref, biases_ref, i, x_QF):
    active_QF, _ = _activation(options, x_QF)
    return _dot(active_QF.astype(kernels_ref.dtype), kernels_ref[i]) + biases_ref[i + 1][None]


def _activation(options, x_QF):
    """The activation and its slope, in float32."""
    x_QF = x_QF.astype(jnp.float32)
    if options.activation == "relu":
        return jnp.maximum(x_QF, 0.0), jnp.where(x_QF > 0, 1.0, 0.0)
    if options.precise or options.interpret:
        gate_QF = jax.nn.sigmoid(x_QF)
    else:  # one special function instead of two; its error, 5e-4, is less than bfloat16's
        gate_QF = 0.5 + 0.5 * triton.approx_tanh(0.5 * x_QF)
    active_QF = x_QF * gate_QF
    return active_QF, gate_QF + active_QF * (1 - gate_QF)


def _add_to_plane(options, xy_ref, points_Q, plane, counts_Q, grad_QF, planes_out):
    """Adds the gradient of a tile's features to a plane, window by window. Only points that count decide where windows are."""
    _, y, x, width = options.shape
    (column_Q, fx_Q, inside_x_Q), (row_Q, fy_Q, inside_y_Q) = _corners(options, xy_ref, points_Q, plane)  # fmt: skip
    counts_Q = counts_Q & inside_x_Q & inside_y_Q
    first_row, last_row = _range(row_Q, counts_Q)
    first_column, last_column = _range(column_Q, counts_Q)
    down = jnp.where(last_row < 0, 0, (last_row + 1 - first_row) // ROWS + 1)
    across = (last_column + 1 - first_column) // COLUMNS + 1
    cell_N = jnp.arange(ROWS * COLUMNS)

    def window(i, nothing):
        row_N = first_row + i // across * ROWS + cell_N // COLUMNS
        column_N = first_column + i % across * COLUMNS + cell_N % COLUMNS
        weight_NQ = _weight(row_N, row_Q, fy_Q) * _weight(column_N, column_Q, fx_Q)
        weight_NQ = jnp.where(counts_Q[None], weight_NQ, 0.0)
        block_NF = _dot(weight_NQ.astype(grad_QF.dtype), grad_QF)
        cell_in_memory_N = (plane * (y + ROWS) + row_N) * (x + COLUMNS) + column_N
        touched_N = jnp.max(weight_NQ, axis=1) > 0
        # Interpret mode knows no masks, and adding zeros is the same.
        mask = None if options.interpret else jnp.broadcast_to(touched_N[:, None], block_NF.shape)
        triton.atomic_add(
            planes_out, (cell_in_memory_N[:, None], jnp.arange(width)[None]), block_NF, mask=mask
        )
        return nothing

    jax.lax.fori_loop(0, down * across, window, ())


def _range(cell_Q, counts_Q):
    """The least and the greatest of the cells that count; the greatest is -1 if none does."""
    low = jnp.min(jnp.where(counts_Q, cell_Q, jnp.int32(2**20)))
    return low, jnp.max(jnp.where(counts_Q, cell_Q, jnp.int32(-1)))


def _weight(cell_N, low_Q, fraction_Q):
    """Bilinear weights [N Q] along one axis of cells, for points between the cells `low_Q` and `low_Q` + 1."""
    distance_NQ = cell_N[:, None] - low_Q[None]
    low_NQ = jnp.where(distance_NQ == 0, 1 - fraction_Q[None], 0.0)
    return jnp.where(distance_NQ == 1, fraction_Q[None], low_NQ)


def _outputs(options, points_Q):
    """Where the four outputs of points are, as an index, and which columns of an array [Q F] they are, as a mask."""
    columns_F = jnp.arange(options.shape[-1])
    mask = jnp.broadcast_to((columns_F < 4)[None], (options.tile, options.shape[-1]))
    return (points_Q[:, None], columns_F[None]), mask


def _dot(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
