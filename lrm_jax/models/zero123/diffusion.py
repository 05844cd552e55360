"""The diffusion process: its schedule, and sampling by DDIM (https://arxiv.org/abs/2010.02502)."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lrm_jax.types import InputError

TRAINED_STEPS = 1000
LATENT_SCALE = 0.18215  # of the autoencoder's latents, for unit variance


class Steps(NamedTuple):
    """The steps of sampling, in the order in which they are made: from noise to image."""

    t: np.ndarray  # [S] int32
    alpha: np.ndarray  # [S] float32, the share of the image's variance at t
    alpha_next: np.ndarray  # [S] after the step
    sigma: np.ndarray  # [S] deviation of the noise that a step adds


def betas() -> np.ndarray:
    """The variance of the noise that each step of training adds, [1000] float64: linear in its square root."""
    return np.linspace(0.00085**0.5, 0.0120**0.5, TRAINED_STEPS) ** 2


def alphas() -> np.ndarray:
    """The share of the image's variance at each step of training, [1000] float64."""
    return np.cumprod(1 - betas())


def sampling_steps(count: int, eta: float) -> Steps:
    """About `count` steps, evenly spread: 49 for 50, 76 for 75.

    Args:
      count: from 2 to 500.
      eta: 0: no noise is added (DDIM); 1: as much as in DDPM.

    Raises:
      InputError: `count` is out of range.
    """
    if not 2 <= count <= TRAINED_STEPS // 2:
        raise InputError(f"{count} steps: sampling takes from 2 to {TRAINED_STEPS // 2}")
    # Parity: the noisiest step is left out, but sampling still starts from pure noise.
    t = (np.arange(0, TRAINED_STEPS, TRAINED_STEPS // count) + 1)[:-1]
    every = alphas().astype(np.float32).astype(np.float64)
    # Parity: the last step ends at the share of step 0.
    alpha, alpha_next = every[t], every[np.concatenate([[0], t[:-1]])]
    sigma = eta * np.sqrt((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next))
    numbers = (x[::-1].astype(np.float32) for x in (alpha, alpha_next, sigma))
    return Steps(t[::-1].astype(np.int32), *numbers)


def sample(
    module: nn.Module,
    predict: Callable[
        [nn.Module, Float[Array, "B h w C"], Int[Array, ""]], Float[Array, "B h w C"]
    ],
    noise: Callable[[Int[Array, ""]], Float[Array, "B h w C"]],
    x_BhwC: Float[Array, "B h w C"],
    steps: Steps,
) -> tuple[Float[Array, "B h w C"], tuple[Float[Array, "S B h w C"], Float[Array, "S B h w C"]]]:
    """Removes noise step by step (equation 12).

    Args:
      predict: from (module, noisy images, t) to the noise in them.
      noise: the standard normal noise that step number i = 0, 1, ... adds.
      x_BhwC: the noise to start from.

    Returns:
      The images; and after each step, these and the images that it predicted.
    """

    def step(module, x, inputs):
        i, t, alpha, alpha_next, sigma = inputs
        error = predict(module, x, t)
        image = (x - jnp.sqrt(1 - alpha) * error) / jnp.sqrt(alpha)
        towards = jnp.sqrt(jnp.maximum(1 - alpha_next - sigma**2, 0.0)) * error
        x = jnp.sqrt(alpha_next) * image + towards + sigma * noise(i)
        return x, (x, image)

    inputs = (jnp.arange(len(steps.t)), *map(jnp.asarray, steps))
    scan = nn.scan(step, variable_broadcast="params", split_rngs={"params": False})
    return scan(module, x_BhwC, inputs)


def with_noise(
    image: Float[Array, "B h w C"], noise: Float[Array, "B h w C"], t_B: Int[Array, "B"]
) -> Float[Array, "B h w C"]:
    """Images after t steps of the process (https://arxiv.org/abs/2006.11239, equation 4)."""
    alpha_B = jnp.asarray(alphas(), jnp.float32)[t_B][:, None, None, None]
    return jnp.sqrt(alpha_B) * image + jnp.sqrt(1 - alpha_B) * noise


def constants() -> dict[str, np.ndarray]:
    """The schedule's constants as released files hold them, from the names and equations of DDPM (https://arxiv.org/abs/2006.11239)."""
    added, share = betas(), alphas()
    before = np.append(1.0, share[:-1])
    variance = added * (1 - before) / (1 - share)
    values = {
        "betas": added,
        "alphas_cumprod": share,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(share),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - share),
        "log_one_minus_alphas_cumprod": np.log(1 - share),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / share),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / share - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": added * np.sqrt(before) / (1 - share),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - added) / (1 - share),
    }
    return {name: value.astype(np.float32) for name, value in values.items()}
