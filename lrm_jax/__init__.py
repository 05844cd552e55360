"""Feed-forward 3D reconstruction in JAX. Start at `lrm_jax.api`, then `lrm_jax.types` and `lrm_jax.models`."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrm_jax.api import Model, Scene, load
    from lrm_jax.images.camera_paths import orbit
    from lrm_jax.images.captures import posed_images, read_capture
    from lrm_jax.types import Cameras, InputError

__version__ = "0.2.0"
_FROM = {
    "Cameras": "types",
    "InputError": "types",
    "Model": "api",
    "Scene": "api",
    "load": "api",
    "orbit": "images.camera_paths",
    "posed_images": "images.captures",
    "read_capture": "images.captures",
}
__all__ = [
    "Cameras",
    "InputError",
    "Model",
    "Scene",
    "load",
    "orbit",
    "posed_images",
    "read_capture",
]


def __getattr__(name: str):
    """Imports the public names on first use: importing JAX takes seconds, and `lrm --help` must be fast."""
    if name not in __all__:
        raise AttributeError(f"module 'lrm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"lrm_jax.{_FROM[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
