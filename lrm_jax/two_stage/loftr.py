"""LoFTR (https://arxiv.org/abs/2104.00680): matches between images without detecting key points first.

A convolutional network gives coarse features (1/8) and fine ones (1/2). A transformer with linear attention makes the coarse
features of two images aware of each other; cells whose features are each other's best match are matches. A second small
transformer on 5 x 5 windows of the fine features then finds where in its window the second point lies.

Shapes are static: all cells are compared, and the fine stage runs on a fixed number of best matches, with a mask.

The published weights for One-2-3-45 are `indoor_ds_new.ckpt`. With them:

    params = from_torch(tensor_files.read("indoor_ds_new.ckpt")[0]["state_dict"])
    found = matches(params, images)
"""

import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, UInt8

from lrm_jax.models.parts import layers, norms, torch_layout
from lrm_jax.models.parts.feature_pyramid import conv_entries, convolution, upsampled
from lrm_jax.types import InputError

SIDE = 480  # pixels of the images that the network sees
OUTPUT_SIDE = 256  # of the images whose pixels `matches` counts in
COARSE, FINE = 8, 2  # pixels a cell of the two feature maps
WINDOW = 5  # cells of the fine map
TEMPERATURE = 0.1  # of the coarse softmax
THRESHOLD = 0.2  # of a match's confidence
BORDER = 2  # coarse cells at the edges that have no matches


class Candidates(NamedTuple):
    """The K best coarse matches of two images, in the order of the first image's cells."""

    i: Int[Array, "K"]  # cell of the first image, row-major
    j: Int[Array, "K"]  # cell of the second
    confidence: Float[Array, "K"]
    valid: Bool[Array, "K"]  # false: fewer than K cells have a match


# -- networks


class Block(nn.Module):
    """A basic block of a residual network (https://arxiv.org/abs/1512.03385, fig. 2)."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x_BVHWC):
        y = _conv(self.features, 3, "conv1", self.stride)(x_BVHWC)
        y = _conv(self.features, 3, "conv2")(nn.relu(_norm("norm1", y)))
        if self.stride > 1:
            x_BVHWC = _conv(self.features, 1, "shortcut", self.stride)(x_BVHWC)
            x_BVHWC = _norm("shortcut_norm", x_BVHWC)
        return nn.relu(x_BVHWC + _norm("norm2", y))


class Backbone(nn.Module):
    """Coarse and fine features: a residual network whose maps are joined from coarse to fine."""

    widths: tuple[int, int, int]  # channels at 1/2, 1/4 and 1/8

    @nn.compact
    def __call__(
        self, grey_BVHW1: Float[Array, "B V H W 1"]
    ) -> tuple[Float[Array, "B V H/8 W/8 C"], Float[Array, "B V H/2 W/2 C2"]]:
        x = nn.relu(_norm("norm", _conv(self.widths[0], 7, "conv", 2)(grey_BVHW1)))
        scales = []
        for scale, width in enumerate(self.widths, 1):
            x = Block(width, 1 if scale == 1 else 2, name=f"layer{scale}_0")(x)
            x = Block(width, 1, name=f"layer{scale}_1")(x)
            scales.append(x)
        coarse = x = _conv(self.widths[2], 1, "lateral3")(scales[2])
        for scale in (2, 1):
            wide = self.widths[scale]
            x = upsampled(x, 2) + _conv(wide, 1, f"lateral{scale}")(scales[scale - 1])
            x = nn.leaky_relu(_norm(f"join{scale}_norm", _conv(wide, 3, f"join{scale}_0")(x)), 0.01)
            x = _conv(self.widths[scale - 1], 3, f"join{scale}_1")(x)
        return coarse, x


def _conv(features, side, name, stride=1):
    return convolution(features, side, stride, False, "float32", name)


def _norm(name, x):
    """By the statistics of training."""
    return norms.BatchNorm(name=name)(x, of_scene=False)


class TransformerLayer(nn.Module):
    """Adds to `x` what an MLP makes of it and of a message from `context`, by linear attention (LoFTR, fig. 3)."""

    num_heads: int

    @nn.compact
    def __call__(
        self, x_BLD: Float[Array, "B L D"], context_BMD: Float[Array, "B M D"]
    ) -> Float[Array, "B L D"]:
        B, _, D = x_BLD.shape

        def project(name, y_BMD):
            y_BMD = nn.Dense(D, use_bias=False, name=name)(y_BMD)
            return y_BMD.reshape(B, -1, self.num_heads, D // self.num_heads)

        message_BLNK = linear_attention(
            project("q", x_BLD), project("k", context_BMD), project("v", context_BMD)
        )
        message = nn.Dense(D, use_bias=False, name="merge")(message_BLNK.reshape(x_BLD.shape))
        message = layers.layer_norm(1e-5, "norm1")(message)
        y = jnp.concatenate([x_BLD, message], axis=-1)
        y = nn.relu(nn.Dense(2 * D, use_bias=False, name="fc1")(y))
        return x_BLD + layers.layer_norm(1e-5, "norm2")(nn.Dense(D, use_bias=False, name="fc2")(y))


class TransformerPair(nn.Module):
    """Self-attention in each image, then cross-attention between them; both images share the weights."""

    num_heads: int

    @nn.compact
    def __call__(self, images):
        x_BLD, y_BMD = images
        attend = TransformerLayer(self.num_heads, name="self_attention")
        x_BLD, y_BMD = attend(x_BLD, x_BLD), attend(y_BMD, y_BMD)
        attend = TransformerLayer(self.num_heads, name="cross_attention")
        x_BLD = attend(x_BLD, y_BMD)
        # Parity: one after the other: the second image sees what the first has just learnt from it.
        y_BMD = attend(y_BMD, x_BLD)
        return (x_BLD, y_BMD), None


class LoFTR(nn.Module):
    """The network; the defaults are those of `indoor_ds_new.ckpt`."""

    widths: tuple[int, int, int] = (128, 196, 256)  # channels at 1/2, 1/4 and 1/8
    num_heads: int = 8
    num_coarse: int = 4  # pairs of self- and cross-attention on the coarse features
    num_fine: int = 1  # pairs on the windows
    max_matches: int = 1000  # at most one a cell is possible

    def setup(self):
        fine = self.widths[0]
        self.backbone = Backbone(self.widths)
        self.coarse = layers.stack(
            TransformerPair, self.num_coarse, "none", num_heads=self.num_heads
        )
        self.fine = layers.stack(TransformerPair, self.num_fine, "none", num_heads=self.num_heads)
        self.context = nn.Dense(fine)
        self.merge = nn.Dense(fine)

    def __call__(
        self, grey: Float[Array, "2 H W"]
    ) -> tuple[Candidates, Float[Array, "K 2"], Float[Array, "K 2"]]:
        """The matches of two images."""
        coarse_VhwC, fine_VhwC = self.features(grey)
        return self.match((coarse_VhwC[0], coarse_VhwC[1]), (fine_VhwC[0], fine_VhwC[1]))

    def features(
        self, grey: Float[Array, "V H W"]
    ) -> tuple[Float[Array, "V H/8 W/8 C"], Float[Array, "V H/2 W/2 C2"]]:
        """Coarse and fine features of images in [0, 1], whose sides are multiples of 8."""
        coarse, fine = self.backbone(grey[None, ..., None])
        return coarse[0], fine[0]

    def match(
        self, coarse: tuple, fine: tuple
    ) -> tuple[Candidates, Float[Array, "K 2"], Float[Array, "K 2"]]:
        """Matches two images by their features [h w C].

        Returns:
          The matches, and where each lies in the first and in the second image: x, y in pixels of the images given to `features`.
        """
        shapes = [x.shape[:2] for x in coarse]
        x_LD, y_MD = self.relate(coarse)
        found = best_matches(confidences(x_LD, y_MD), *shapes, self.max_matches)
        x_KWD, y_KWD = self.relate_windows(
            self.windows(fine[0], x_LD, found.i, shapes[0][1]),
            self.windows(fine[1], y_MD, found.j, shapes[1][1]),
        )
        # Parity: points start at the corners of their cells, not at the centres, and the first image's stay there.
        xy0_K2, xy1_K2 = corners(found.i, shapes[0][1]), corners(found.j, shapes[1][1])
        return found, xy0_K2, xy1_K2 + offsets(x_KWD, y_KWD)

    def relate(self, coarse: tuple) -> tuple[Float[Array, "L C"], Float[Array, "M C"]]:
        """The coarse features [h w C] of two images that know of each other."""
        tokens = [(x + position_code(*x.shape)).reshape(1, -1, x.shape[-1]) for x in coarse]
        (x_BLD, y_BMD), _ = self.coarse(tuple(tokens))
        return x_BLD[0], y_BMD[0]

    def windows(
        self,
        fine_hwC: Float[Array, "h w C"],
        coarse_LD: Float[Array, "L D"],
        cells: Int[Array, "K"],
        columns: int,
    ) -> Float[Array, "K 25 C"]:
        """The fine features around the cells, with the coarse feature of each."""
        stride, margin = COARSE // FINE, WINDOW // 2
        padded = jnp.pad(fine_hwC, ((margin, margin), (margin, margin), (0, 0)))
        steps = jnp.arange(WINDOW)
        rows_K5 = (cells // columns * stride)[:, None] + steps[None]
        columns_K5 = (cells % columns * stride)[:, None] + steps[None]
        fine_K55C = padded[rows_K5[:, :, None], columns_K5[:, None, :]]
        fine_KWC = fine_K55C.reshape(cells.shape[0], WINDOW**2, -1)
        context_KWC = jnp.broadcast_to(self.context(coarse_LD[cells])[:, None], fine_KWC.shape)
        return self.merge(jnp.concatenate([fine_KWC, context_KWC], axis=-1))

    def relate_windows(self, x_KWD, y_KWD):
        """The windows' features that know of each other."""
        (x_KWD, y_KWD), _ = self.fine((x_KWD, y_KWD))
        return x_KWD, y_KWD


# -- pure functions


def linear_attention(
    q_BLNK: Float[Array, "B L N K"],
    k_BMNK: Float[Array, "B M N K"],
    v_BMNK: Float[Array, "B M N K"],
) -> Float[Array, "B L N K"]:
    """Attention with the similarity (elu(q) + 1) . (elu(k) + 1) (https://arxiv.org/abs/2006.16236, eq. 5 and 7).

    The reference divides the values by their number and multiplies the result by it, which cancels out.
    """
    q_BLNK, k_BMNK = jax.nn.elu(q_BLNK) + 1, jax.nn.elu(k_BMNK) + 1
    sums_BNKC = jnp.einsum("bmnk,bmnc->bnkc", k_BMNK, v_BMNK)
    weight_BLN = jnp.einsum("blnk,bnk->bln", q_BLNK, k_BMNK.sum(1))
    return jnp.einsum("blnk,bnkc->blnc", q_BLNK, sums_BNKC) / (weight_BLN + 1e-6)[..., None]


def position_code(
    height: int, width: int, channels: int
) -> Float[np.ndarray, "height width channels"]:
    """Sine and cosine of x, then of y, for each of `channels / 4` frequencies (LoFTR's supplementary material).

    Parity: positions count from 1.
    """
    frequency = np.exp(-2 * np.arange(channels // 4) * np.log(1e4) / (channels // 2))
    x = (np.arange(width) + 1)[None, :, None] * frequency
    y = (np.arange(height) + 1)[:, None, None] * frequency
    parts = np.broadcast_arrays(np.sin(x), np.cos(x), np.sin(y), np.cos(y))
    return np.stack(parts, axis=-1).reshape(height, width, channels).astype(np.float32)


def confidences(x_LD: Float[Array, "L D"], y_MD: Float[Array, "M D"]) -> Float[Array, "L M"]:
    """The probability that two cells match: softmax over the rows times softmax over the columns (LoFTR, eq. 2)."""
    scores_LM = jnp.einsum("ld,md->lm", x_LD, y_MD) / (x_LD.shape[-1] * TEMPERATURE)
    return jax.nn.softmax(scores_LM, axis=0) * jax.nn.softmax(scores_LM, axis=1)


def best_matches(
    confidence_LM: Float[Array, "L M"],
    shape0: tuple[int, int],
    shape1: tuple[int, int],
    max_matches: int,
) -> Candidates:
    """Cells that are each other's best, confident, and away from the edges of both images: the `max_matches` most confident.

    Args:
      shape0: rows and columns of the first image's cells.
      shape1: the same of the second.
    """
    best_L, partner_L = confidence_LM.max(1), confidence_LM.argmax(1)
    mutual_L = best_L == confidence_LM.max(0)[partner_L]
    inside_L = jnp.asarray(_inside(shape0)) & jnp.asarray(_inside(shape1))[partner_L]
    score_L = jnp.where(mutual_L & inside_L & (best_L > THRESHOLD), best_L, 0.0)
    _, i = jax.lax.top_k(score_L, min(max_matches, score_L.shape[0]))
    i = jnp.sort(i)
    return Candidates(i, partner_L[i], best_L[i], score_L[i] > 0)


def _inside(shape) -> np.ndarray:
    inside = np.zeros(shape, bool)
    inside[BORDER:-BORDER, BORDER:-BORDER] = True
    return inside.reshape(-1)


def corners(cells: Int[Array, "K"], columns: int) -> Float[Array, "K 2"]:
    """x, y of the cells' first pixels."""
    return jnp.stack([cells % columns, cells // columns], axis=-1).astype(jnp.float32) * COARSE


def offsets(x_KWD: Float[Array, "K W D"], y_KWD: Float[Array, "K W D"]) -> Float[Array, "K 2"]:
    """How far the match of the first window's centre is from the second one's, x, y in pixels (LoFTR, section 3.4)."""
    scores_KW = jnp.einsum("kd,kwd->kw", x_KWD[:, WINDOW**2 // 2], y_KWD) / x_KWD.shape[-1] ** 0.5
    steps = np.arange(WINDOW, dtype=np.float32) - WINDOW // 2
    xy_W2 = np.stack(np.meshgrid(steps, steps), axis=-1).reshape(-1, 2)
    return jax.nn.softmax(scores_KW, axis=-1) @ xy_W2 * FINE


# -- images


MODEL = LoFTR()


def matches(
    params: dict, images: np.ndarray, model: LoFTR = MODEL
) -> dict[tuple[int, int], Float[np.ndarray, "M 5"]]:
    """The matches of each pair of images i < j.

    Args:
      params: from `from_torch`.
      images: uint8 [V S S 3], sRGB, resized to 480 pixels a side for the network.

    Returns:
      For (i, j), rows of x, y in image i, x, y in image j, in pixels of images with 256 pixels a side, and the confidence in
      (0.2, 1]. Each cell of 8 pixels of the resized image i is in one row at most.

    Raises:
      InputError: the images are not square ones of bytes.
    """
    if (
        images.dtype != np.uint8
        or images.ndim != 4
        or images.shape[1:] != (images.shape[1],) * 2 + (3,)
    ):
        raise InputError(
            f"images {images.dtype} {list(images.shape)} cannot be matched: give uint8 [V S S 3], square images on one background"
        )
    pairs = list(itertools.combinations(range(len(images)), 2))
    grey = np.stack([resized(grey_bytes(image), SIDE) for image in images]) / np.float32(255)
    found, xy0, xy1 = jax.device_get(_match_pairs(model, params, grey, np.array(pairs)))
    scale = OUTPUT_SIDE / SIDE
    # The network counts pixels from the first one's centre, `elevation` from the corner of the image.
    rows = np.concatenate(
        [(xy0 + 0.5) * scale, (xy1 + 0.5) * scale, found.confidence[..., None]], axis=-1
    )
    return {pair: rows[n][found.valid[n]] for n, pair in enumerate(pairs)}


@functools.partial(jax.jit, static_argnums=0)
def _match_pairs(model, params, grey, pairs):
    """One pair at a time: its matrix of confidences has 52 MB."""
    apply = functools.partial(model.apply, {"params": params})
    # Full float32 also on GPUs and TPUs: the softmax multiplies differences of scores by 1 / TEMPERATURE.
    with jax.default_matmul_precision("highest"):
        coarse, fine = apply(grey, method="features")

        def match(pair):
            i, j = pair
            return apply((coarse[i], coarse[j]), (fine[i], fine[j]), method="match")

        return jax.lax.map(match, pairs)


def grey_bytes(rgb: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """Luma by the weights of ITU-R BT.601, rounded.

    OpenCV's conversion, whose fixed-point numbers round one colour in 800 the other way.
    """
    return ((rgb.astype(np.int32) @ np.array([299, 587, 114]) + 500) // 1000).astype(np.uint8)


def resized(grey: UInt8[np.ndarray, "H W"], side: int) -> Float[np.ndarray, "side side"]:
    """Bilinear, pixel centres at +0.5, no low-pass filter, rounded to whole numbers.

    OpenCV's INTER_LINEAR on bytes, whose fixed-point numbers give results that differ by at most 1.
    """
    rows, columns = (_linear_weights(size, side) for size in grey.shape)
    return np.rint(rows @ grey.astype(np.float32) @ columns.T)


def _linear_weights(size_in, size_out):
    position = (np.arange(size_out) + 0.5) * size_in / size_out - 0.5
    distance = np.abs(np.arange(size_in) - position.clip(0, size_in - 1)[:, None])
    return np.maximum(1 - distance, 0).astype(np.float32)


# -- names of the reference


def entries(model: LoFTR = MODEL) -> list[torch_layout.Entry]:
    """How the checkpoint's tensors are our parameters. The table of positions is not stored."""
    table = _backbone_entries("matcher.backbone", "backbone")
    for kind, depth in (("coarse", model.num_coarse), ("fine", model.num_fine)):
        for layer in range(depth):
            for half, name in enumerate(("self_attention", "cross_attention")):
                torch = f"matcher.loftr_{kind}.layers.{2 * layer + half}"
                table += _layer_entries(torch, f"{kind}.{name}", layer)
    table += torch_layout.linear("matcher.fine_preprocess.down_proj", "context")
    return table + torch_layout.linear("matcher.fine_preprocess.merge_feat", "merge")


def _backbone_entries(torch, ours):
    def conv(theirs, name):
        return conv_entries(f"{torch}.{theirs}", f"{ours}.{name}", bias=False)

    def norm(theirs, name):
        return norms.entries(f"{torch}.{theirs}", f"{ours}.{name}")

    table = conv("conv1", "conv") + norm("bn1", "norm") + conv("layer3_outconv", "lateral3")
    for scale in (1, 2, 3):
        for number in (0, 1):
            theirs, name = f"layer{scale}.{number}", f"layer{scale}_{number}"
            for n in (1, 2):
                table += conv(f"{theirs}.conv{n}", f"{name}.conv{n}")
                table += norm(f"{theirs}.bn{n}", f"{name}.norm{n}")
            if scale > 1 and number == 0:
                table += conv(f"{theirs}.downsample.0", f"{name}.shortcut")
                table += norm(f"{theirs}.downsample.1", f"{name}.shortcut_norm")
    for scale in (1, 2):
        theirs = f"layer{scale}_outconv"
        table += conv(theirs, f"lateral{scale}") + conv(f"{theirs}2.0", f"join{scale}_0")
        table += norm(f"{theirs}2.1", f"join{scale}_norm") + conv(f"{theirs}2.3", f"join{scale}_1")
    return table


def _layer_entries(torch, ours, layer):
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "merge": "merge", "mlp.0": "fc1", "mlp.2": "fc2"}  # fmt: skip
    table = []
    for theirs, name in names.items():
        table += torch_layout.linear(f"{torch}.{theirs}", f"{ours}.{name}", layer=layer, bias=False)
    for norm in ("norm1", "norm2"):
        table += torch_layout.norm(f"{torch}.{norm}", f"{ours}.{norm}", layer)
    return table


def from_torch(state: dict[str, np.ndarray], model: LoFTR = MODEL) -> dict:
    """Parameters of a LoFTR checkpoint's state dict, whose names start with "matcher." or do not.

    Raises:
      InputError: tensors are missing, extra or mis-shaped.
    """
    state = {f"matcher.{name.removeprefix('matcher.')}": value for name, value in state.items()}
    wanted = torch_layout.torch_shapes(entries(model), param_shapes(model))
    wrong = sorted(state.keys() ^ wanted.keys())
    wrong += sorted(k for k in state.keys() & wanted.keys() if state[k].shape != wanted[k])
    if wrong:
        raise InputError(
            f"not the weights of this LoFTR: {len(wrong)} tensors are missing, extra or mis-shaped, such as {wrong[0]}: "
            "use the unchanged indoor_ds_new.ckpt"
        )
    state = {name: np.asarray(value, np.float32) for name, value in state.items()}
    return torch_layout.from_torch(entries(model), state)


def to_torch(params: dict, model: LoFTR = MODEL) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`, names with "matcher.". Counts of batches are integers."""
    state = torch_layout.to_torch(entries(model), params)
    counts = (name for name in state if name.endswith("num_batches_tracked"))
    return state | {name: np.asarray(state[name], np.int64) for name in counts}


def param_shapes(model: LoFTR = MODEL) -> dict:
    """The parameter tree, as ShapeDtypeStructs."""
    grey = jax.ShapeDtypeStruct((2, 64, 64), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), grey)["params"]
