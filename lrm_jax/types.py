"""The types that modules exchange: plain pytrees of arrays, and the one error that commands show to users.

Dimension key, used in names, signatures and comments everywhere:

    B scenes  V views  H W pixels  h w feature grid  P planes (3)  C channels  L tokens  M context tokens
    D token width  F MLP width  N heads  K width per head  R rays  S samples on a ray (S+1 edges)
    Q query points  X Y Z voxels

World: right-handed, z up, the object around the origin. Camera: OpenCV (x right, y down, z forward).
"""

from typing import Any

import flax.struct
import jax


class InputError(ValueError):
    """Bad input to a command: shown as one line with the cause and the remedy, exit code 2, no traceback."""


@flax.struct.dataclass
class Cameras:
    """Pinhole cameras."""

    c2w: jax.Array  # [*B 4 4] camera to world, OpenCV axes, world units
    # [*B 4] focal lengths and principal point as fractions of width, height, width, height
    fxfycxcy: jax.Array


@flax.struct.dataclass
class Rays:
    """Half-lines in the world."""

    origins: jax.Array  # [*B 3] world units
    dirs: jax.Array  # [*B 3] unit length


@flax.struct.dataclass
class Views:
    """Images and their cameras."""

    rgb: jax.Array  # [B V H W 3] sRGB in [0, 1]; straight (not premultiplied) if alpha is given
    cameras: Cameras  # [B V]
    # [B V H W] in [0, 1]; None: the image already has its background
    alpha: jax.Array | None = None


@flax.struct.dataclass
class Batch:
    """One training batch: given views and views to predict, of the same scenes."""

    source: Views
    target: Views


@flax.struct.dataclass
class Rendering:
    """What each ray sees."""

    # [*B 3] sRGB, premultiplied: composite on a background with rgb + (1 - alpha) * background
    rgb: jax.Array
    alpha: jax.Array | None = None  # [*B] in [0, 1]; None: the family draws the background itself
    # [*B] expected distance along the ray, world units; undefined where alpha is 0
    depth: jax.Array | None = None


@flax.struct.dataclass
class TrainState:
    """Everything that a training step changes, and the random key."""

    step: jax.Array  # [] int32, number of updates made
    params: Any
    ema_params: Any  # running mean of params, which is evaluated and exported
    opt_state: Any
    key: jax.Array  # the run's key; each step folds its number into it
