"""The field of projected planes on TPUs: lookups and MLP in one Pallas kernel, without gathers or scatters.

The points of a tile lie in few cells of a plane. So the lookup of a tile is a product of these cells with the bilinear weights of the
points, and its gradient is the transposed product, which is added to the plane's gradient once per tile. A window has 8 x 16 cells.
A tile whose points lie in more cells loops over windows. Planes, their gradient and the activations of a tile stay on the chip.

Points are along lanes. Channels and cells are along sublanes. Two columns of a plane, 64 channels each, share a row of 128 lanes. In
the MLP, the halves of a tile share the rows of a product: its kernels have two equal blocks on the diagonal, as a matrix unit has at
least 128 rows and columns.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from lrm_jax.kernels import field_plain

WIDTH = 64  # of the MLP at most; a narrower one is padded
TILE = 1024  # points
ROWS, PAIRS = 8, 8  # of a window of 128 cells; two columns make a pair
RAW = "raw field"  # the name of the result, for policies of rematerialisation: the gradient needs no activations
# Bytes of planes in float32: a core of a v4 has 16 MiB for them, their gradient and a tile's activations.
_LARGEST = 4 * 2**20
_OUT = 8  # rows of the result, of which 4 are used: those of a register


def field_by_windows(
    projected_PhwF: Float[Array, "P h w F"],
    layers: list,
    xyz_Q3: Float[Array, "Q 3"],
    axes: tuple[tuple[int, int], ...],
    activation: str,
    interpret: bool = False,
) -> Float[Array, "Q 4"]:
    """See `field.field`. Wide MLPs and large planes take the plain form. `interpret`: runs on any platform, slowly."""
    P, h, w, F = projected_PhwF.shape
    if F > WIDTH or 4 * P * h * w * WIDTH > _LARGEST:
        return field_plain.field_by_xla(projected_PhwF, layers, xyz_Q3, axes, activation)
    return _field(axes, activation, interpret, projected_PhwF, layers, xyz_Q3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _field(axes, activation, interpret, projected_PhwF, layers, xyz_Q3):
    return _forward(axes, activation, interpret, projected_PhwF, layers, xyz_Q3)


def _field_forward(axes, activation, interpret, *traced):
    perturbed = traced[-1].perturbed
    arguments = jax.tree.map(lambda x: x.value, traced, is_leaf=lambda x: hasattr(x, "value"))
    # The structure of the residuals says whether the points need a gradient.
    residuals = arguments, () if perturbed else None
    return _forward(axes, activation, interpret, *arguments), residuals


def _field_backward(axes, activation, interpret, residuals, grad_Q4):
    (projected_PhwF, layers, xyz_Q3), moves = residuals
    of_points = None
    if moves is not None:
        of_points = field_plain.gradient_of_points(
            projected_PhwF, layers, xyz_Q3, axes, activation, grad_Q4
        )
    grads = _backward(axes, activation, interpret, projected_PhwF, layers, xyz_Q3, grad_Q4)
    return *grads, of_points


_field.defvjp(_field_forward, _field_backward, symbolic_zeros=True)


# -- what goes into the kernels and comes out


def _forward(axes, activation, interpret, projected_PhwF, layers, xyz_Q3):
    Q, dtype = xyz_Q3.shape[0], projected_PhwF.dtype
    windows, xyz_3Q, sizes = _tiles(projected_PhwF, xyz_Q3, axes)
    kernel = functools.partial(_forward_kernel, axes, sizes, activation, dtype)
    inputs = (windows, xyz_3Q, _pairs_of_columns(projected_PhwF), *_mlp(layers, dtype))
    out_8Q = _call(
        "field_forward",
        kernel,
        inputs,
        out_shape=jax.ShapeDtypeStruct((_OUT, xyz_3Q.shape[1]), jnp.float32),
        scratch_shapes=[pltpu.VMEM((WIDTH, TILE), jnp.float32)],
        interpret=interpret,
    )
    return checkpoint_name(out_8Q[:4, :Q], RAW).T


def _backward(axes, activation, interpret, projected_PhwF, layers, xyz_Q3, grad_Q4):
    """Gradients of the planes and of the layers."""
    _, h, w, F = projected_PhwF.shape
    dtype = projected_PhwF.dtype
    windows, xyz_3Q, sizes = _tiles(projected_PhwF, xyz_Q3, axes)
    grad_8Q = jnp.pad(grad_Q4.T, ((0, _OUT - 4), (0, xyz_3Q.shape[1] - grad_Q4.shape[0])))
    first_bias, kernels, biases = _mlp(layers, dtype)
    planes = _pairs_of_columns(projected_PhwF)
    kernel = functools.partial(_backward_kernel, axes, sizes, activation, dtype)
    inputs = (windows, xyz_3Q, grad_8Q, planes, first_bias, kernels, biases, kernels.mT)
    grad_planes, grad_first, grad_kernels, grad_biases = _call(
        "field_backward",
        kernel,
        inputs,
        out_shape=[
            jax.ShapeDtypeStruct(shape, jnp.float32)
            for shape in (planes.shape, (WIDTH, 128), kernels.shape, kernels.shape)
        ],
        scratch_shapes=[
            pltpu.VMEM((WIDTH, TILE), jnp.float32),
            pltpu.VMEM((kernels.shape[0], 2 * WIDTH, TILE // 2), dtype),
        ],
        interpret=interpret,
    )
    grad_planes = grad_planes.reshape(*grad_planes.shape[:2], -1, WIDTH)[:, :h, :w, :F]
    grad_first = jnp.sum(grad_first, axis=-1)[:F]
    kernel_0, bias_0 = layers[0]
    grads = [(jnp.zeros_like(kernel_0), grad_first.astype(bias_0.dtype))]
    blocks_GF = grad_kernels[:, :WIDTH, :WIDTH] + grad_kernels[:, WIDTH:, WIDTH:]
    sums_G = jnp.sum(grad_biases[:, :WIDTH] + grad_biases[:, WIDTH:], axis=-1)
    for (kernel, bias), block_GF, sum_G in zip(layers[1:], blocks_GF, sums_G, strict=True):
        inputs, outputs = kernel.shape
        grads.append((block_GF.T[:inputs, :outputs].astype(kernel.dtype), sum_G[:outputs].astype(bias.dtype)))  # fmt: skip
    return grad_planes.astype(dtype), grads


def _call(name, kernel, inputs, out_shape, scratch_shapes, interpret):
    """Runs a kernel for each tile. Windows and arrays [... T*TILE] are cut into tiles; all others are whole, and stay on the chip."""
    windows, xyz_3Q = inputs[:2]

    def spec(x):
        if x.shape[-1] == xyz_3Q.shape[1]:
            return pl.BlockSpec((x.shape[0], TILE), lambda t: (0, t))
        # One buffer: with two, the planes and their gradient would not fit on a v4.
        return pl.BlockSpec(x.shape, lambda t: (0,) * len(x.shape), pipeline_mode=pl.Buffered(1))

    per_tile = pl.BlockSpec((1, *windows.shape[1:]), lambda t: (t, 0, 0), memory_space=pltpu.SMEM)
    return pl.pallas_call(
        kernel,
        grid=(windows.shape[0],),
        in_specs=[per_tile, *map(spec, inputs[1:])],
        out_specs=jax.tree.map(spec, out_shape),
        out_shape=out_shape,
        scratch_shapes=scratch_shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        interpret=interpret,
        name=name,
    )(*inputs)


def _tiles(projected_PhwF, xyz_Q3, axes):
    """The windows of each tile, see `_extent` [T 1 4P]; the points [3 T*TILE], padded with points that miss; the planes' sizes."""
    _, h, w, _ = projected_PhwF.shape
    xyz_3Q = jnp.pad(xyz_Q3.T, ((0, 0), (0, -xyz_Q3.shape[0] % TILE)), constant_values=1e3)
    xyz_3Tt = xyz_3Q.reshape(3, -1, TILE)
    windows = []
    for a, b in axes:
        x, y = _cells(xyz_3Tt[a], w), _cells(xyz_3Tt[b], h)
        touches = (x > -1) & (x < w) & (y > -1) & (y < h)
        windows += [*_extent(y, touches, h, 1, ROWS), *_extent(x, touches, w, 2, PAIRS)]
    return jnp.stack(windows, axis=-1)[:, None], xyz_3Q, (h, w)


def _cells(x, size):
    """Positions in units of cells, from the centre of the first."""
    return (x + 1) * 0.5 * size - 0.5


def _extent(x_Tt, touches_Tt, size, cells, window):
    """The first unit of `cells` cells, and the number of windows along an axis, for each tile. 0 windows: all points miss."""
    low_T = jnp.floor(jnp.min(x_Tt, axis=-1, initial=size, where=touches_Tt))
    high_T = jnp.floor(jnp.max(x_Tt, axis=-1, initial=-1, where=touches_Tt)) + 1
    first = jnp.clip(low_T, 0, size - 1).astype(jnp.int32) // cells
    last = jnp.clip(high_T, 0, size - 1).astype(jnp.int32) // cells
    number = jnp.where(low_T < high_T, (last - first) // window + 1, 0)
    whole = -(-size // (cells * window)) * window  # units of the padded plane
    return jnp.minimum(first, whole - number * window), number


def _pairs_of_columns(projected_PhwF):
    """[P H W/2 128] in float32, in which registers can be read from any row; padded with zeros to whole windows."""
    P, h, w, F = projected_PhwF.shape
    padding = ((0, 0), (0, -h % ROWS), (0, -w % (2 * PAIRS)), (0, WIDTH - F))
    padded = jnp.pad(projected_PhwF, padding)
    return padded.reshape(P, padded.shape[1], -1, 2 * WIDTH).astype(jnp.float32)


def _mlp(layers, dtype):
    """The first bias [64 1]; of the other layers, kernels (out, in) with two equal blocks [L 128 128], and biases [L 128 1]."""
    (_, first_F), *rest = layers

    def padded(x):
        return jnp.pad(x, [(0, WIDTH - size) for size in x.shape])

    kernels = [jnp.kron(jnp.eye(2), padded(kernel_FG).T) for kernel_FG, _ in rest]
    biases = [jnp.tile(padded(bias_G), 2)[:, None] for _, bias_G in rest]
    return padded(first_F)[:, None], jnp.stack(kernels).astype(dtype), jnp.stack(biases)


# -- the kernels, which see one tile


def _forward_kernel(axes, sizes, activation, dtype, *refs):
    windows, xyz, planes, first_bias, kernels, biases, out, x_ref = refs
    _look_up(x_ref, windows, xyz, planes, first_bias, axes, sizes, dtype)

    def layer(i, x):
        return _dot(kernels[i], _activate(activation, dtype, x).astype(dtype)) + biases[i]

    x = jax.lax.fori_loop(0, kernels.shape[0], layer, _halves(x_ref[...]), unroll=_unroll(dtype))
    out[:, : TILE // 2], out[:, TILE // 2 :] = x[:_OUT], x[WIDTH : WIDTH + _OUT]


def _backward_kernel(axes, sizes, activation, dtype, *refs):
    windows, xyz, grad_out, planes, first_bias, kernels, biases, transposed, *results, x_ref, inputs = refs  # fmt: skip
    grad_planes, grad_first, grad_kernels, grad_biases = results

    @pl.when(pl.program_id(0) == 0)
    def _():
        for result in results:
            result[...] = jnp.zeros(result.shape, result.dtype)

    _look_up(x_ref, windows, xyz, planes, first_bias, axes, sizes, dtype)
    last = kernels.shape[0] - 1
    activate = functools.partial(_activate, activation, dtype)

    def layer(i, x):
        inputs[i] = x.astype(dtype)
        return _dot(kernels[i], activate(x).astype(dtype)) + biases[i]

    def layer_backward(k, grad):
        i = last - k
        activated, pull = jax.vjp(activate, inputs[i].astype(jnp.float32))
        grad_biases[i] += _sum_lanes(grad)
        grad_kernels[i] += _dot(grad.astype(dtype), activated.astype(dtype), transposed=True)
        return pull(_dot(transposed[i], grad.astype(dtype)))[0]

    inputs[last] = jax.lax.fori_loop(
        0, last, layer, _halves(x_ref[...]), unroll=_unroll(dtype)
    ).astype(dtype)
    grad = _halves(jnp.pad(grad_out[...], ((0, WIDTH - _OUT), (0, 0))))
    grad = jax.lax.fori_loop(0, last + 1, layer_backward, grad, unroll=_unroll(dtype))
    grad = jnp.concatenate([grad[:WIDTH], grad[WIDTH:]], axis=1)
    grad_first[...] += _sum_lanes(grad)
    grad = grad.astype(dtype)

    def add(p, window, weights):
        cells = _dot(weights.astype(dtype), grad, transposed=True)
        of_pairs = jnp.concatenate(jnp.split(cells, 2), axis=1)
        grad_planes[(p, *window)] += of_pairs.reshape(ROWS, PAIRS, 2 * WIDTH)

    _for_windows(add, windows, xyz, axes, sizes)


def _look_up(x_ref, windows, xyz, planes, first_bias, axes, sizes, dtype):
    """Writes the features [64 TILE] and their bias to `x_ref`."""
    x_ref[...] = jnp.broadcast_to(first_bias[...], x_ref.shape)

    def add(p, window, weights):
        of_pairs = planes[(p, *window)].reshape(ROWS * PAIRS, 2 * WIDTH).T
        cells = jnp.concatenate(jnp.split(of_pairs, 2), axis=1)
        x_ref[...] += _dot(cells.astype(dtype), weights.astype(dtype))

    _for_windows(add, windows, xyz, axes, sizes)


def _for_windows(do, windows, xyz, axes, sizes):
    """`do(plane, window of rows and pairs, weights [128 TILE])` for all windows; weights first of even columns, then of odd ones."""
    units_R = jax.lax.broadcasted_iota(jnp.int32, (ROWS, 1), 0).astype(jnp.float32)
    units_C = jax.lax.broadcasted_iota(jnp.int32, (PAIRS, 1), 0).astype(jnp.float32)
    for p, (a, b) in enumerate(axes):
        row = _cells(xyz[b : b + 1], sizes[0])
        column = _cells(xyz[a : a + 1], sizes[1])
        first_row, num_rows, first_pair, num_pairs = (windows[0, 0, 4 * p + k] for k in range(4))

        def one(i, _, p=p, row=row, column=column, first_row=first_row, first_pair=first_pair, num_pairs=num_pairs):  # fmt: skip
            at_row = first_row + jax.lax.div(i, num_pairs) * ROWS
            at_pair = first_pair + jax.lax.rem(i, num_pairs) * PAIRS
            rows = _hat(row - at_row.astype(jnp.float32) - units_R)
            columns = column - 2 * at_pair.astype(jnp.float32) - 2 * units_C
            even, odd = ((rows[:, None] * _hat(x)[None]) for x in (columns, columns - 1))
            weights = jnp.stack([even, odd]).reshape(2 * ROWS * PAIRS, TILE)
            do(p, (pl.ds(at_row, ROWS), pl.ds(at_pair, PAIRS)), weights)

        jax.lax.fori_loop(0, num_rows * num_pairs, one, None)


def _hat(x):
    """The weight of a cell at a distance of x cells."""
    return jnp.maximum(0.0, 1.0 - jnp.abs(x))


def _unroll(dtype):
    """Layers that overlap take 20 % fewer cycles, backward. In float32, what does not fit in registers would then not fit on a v4."""
    return dtype != jnp.float32


def _activate(activation, dtype, x):
    if activation == "silu" and dtype != jnp.float32:
        # A third of the instructions, and exact enough for 16 bits.
        return 0.5 * x * (1.0 + jnp.tanh(0.5 * x))
    return getattr(jax.nn, activation)(x)


def _halves(x_Ft):
    """Puts the second half of the points below the first."""
    return jnp.concatenate([x_Ft[:, : TILE // 2], x_Ft[:, TILE // 2 :]], axis=0)


def _sum_lanes(x_Ft):
    """Sums to [F 128]: what remains is summed once, outside."""
    return sum(x_Ft[:, i : i + 128] for i in range(0, x_Ft.shape[1], 128))


def _dot(a, b, transposed=False):
    """a @ b, or a @ b.T, in float32."""
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (1 if transposed else 0,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
