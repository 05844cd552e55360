"""The model families, one per file, behind one interface.

A family is a linen module in `models/<name>.py` with these members. Rendering, training and evaluation use nothing else:

| member | signature | meaning |
| --- | --- | --- |
| `encode` | `(source: Views) -> scene` | any pytree with leading axis B: planes, latents, source tokens |
| `render` | `(scene, rays: Rays[B V H W], keys_B=None) -> Rendering[B V H W]` | premultiplied colour; a random key for each scene; deterministic without keys |
| `query` (optional) | `(scene, xyz[B Q 3]) -> (field[B Q], rgb[B Q 3])` | field grows inward; absent means "no surface" |
| `objective` (optional) | `(source: Views, target: Views, keys_B, step) -> dict of scalars` | terms of a loss that is not a rendering's (an eikonal term, a diffusion's noise error), named by the module's `TERMS`; `step` counts updates. The training step adds them under the config's weights, and writes back what norms put into the collection "statistics" |
| `__call__` | `(source: Views, rays: Rays) -> Rendering` | `render(encode(source), rays)`: for `init` |
| `prepare` (optional) | `(rgba: list of uint8[H W 4]) -> Views[B 1 H W]` | single-image families: the images as `encode` expects them, with the camera that the family assumes for them |
| `image_size` | class field | side of the source images in pixels |
| `dtype` | class field | of the products; in a training step, also of the losses' frozen networks |
| `foreground_ratio` (optional) | class field | with `prepare`: the fraction of the side that it scales the object to; absent or None means that it does not crop |
| `normalize` | class attribute, no field | families without `prepare`: the world of the source cameras, a `data.normalize`, that the published weights expect |
| `surface_level`, `radius` | class fields | with `query`: the field's value at the surface, and half the side of the cube around the origin that the field fills |
| `VARIANTS` | `dict[str, dict]` | field overrides of each published size, and `"tiny"` |
| `from_torch(state, model)` / `to_torch(params, model)` | dict of NumPy arrays <-> params | renames, transposes, (un)stacks only: exact inverses |

`VARIANTS`, `from_torch` and `to_torch` are at module level beside the class, which is `MODEL`. For `lrm convert` to read and
write the family's checkpoints, `references.py` also needs `entries(model)` (the checkpoint's names) and
`fields_from_torch(state)` there, and the family in its own tables. If a checkpoint comes with a config, it needs
`fields_from_config(config)` and `config_to_torch(model)` too. Call `encode`, `render` and `query` by
`model.apply({"params": params}, scene, rays, method="render")`.
"""

import importlib

from flax import linen as nn

FAMILIES = ("lrm", "triposr", "lvsm", "one2345", "zero123")


def build(name: str, variant: str, **overrides) -> nn.Module:
    """Builds the module of family `name` at size `variant`; `overrides` replace single fields.

    Raises:
      ValueError: unknown family, variant or field; the message lists the known ones.
    """
    module = family(name)
    if variant not in module.VARIANTS:
        raise ValueError(f"{name} has no variant {variant!r}; it has {', '.join(module.VARIANTS)}")
    fields = {**module.VARIANTS[variant], **overrides}
    if unknown := sorted(set(fields) - set(module.MODEL.__dataclass_fields__)):
        raise ValueError(f"{name} has no field {', '.join(unknown)}")
    return module.MODEL(**fields)


def family(name: str):
    """The Python module of a family. Raises ValueError for an unknown one."""
    if name not in FAMILIES:
        raise ValueError(f"no model family {name!r}; there are {', '.join(FAMILIES)}")
    return importlib.import_module(f"lrm_jax.models.{name}")


def name_of(model: nn.Module) -> str:
    """The family name of a module that `build` made."""
    return type(model).__module__.rsplit(".", 1)[-1]


def objective_terms(model: nn.Module) -> tuple[str, ...]:
    """The names of the terms of a model's `objective`; none if it has no such method."""
    return getattr(family(name_of(model)), "TERMS", ())
