"""The model families, one a file, behind one contract.

A family is a linen module in `models/<name>.py` with these members; rendering, training and evaluation use nothing else:

| member | signature | meaning |
| --- | --- | --- |
| `encode` | `(source: Views) -> scene` | any pytree with leading axis B: planes, latents, source tokens |
| `render` | `(scene, rays: Rays[B V H W], key=None) -> Rendering[B V H W]` | premultiplied colour; without a key deterministic |
| `query` (optional) | `(scene, xyz[B Q 3]) -> (field[B Q], rgb[B Q 3])` | field grows inward; absent means "no surface" |
| `__call__` | `(source: Views, rays: Rays) -> Rendering` | `render(encode(source), rays)`: for `init` |
| `prepare` (optional) | `(rgba: list of uint8[H W 4]) -> Views[B 1 H W]` | single-image families: images as `encode` wants them, with the camera that the family takes them to be seen from |
| `image_size` | class field | side of the source images in pixels |
| `foreground_ratio` (optional) | class field | with `prepare`: the share of the side that it makes the object fill; absent or None means that it does not crop |
| `surface_level`, `radius` | class fields | with `query`: the field's value at the surface, and half the side of the cube around the origin that it fills |
| `VARIANTS` | `dict[str, dict]` | field overrides of each published size, and `"tiny"` |
| `from_torch(state, model)` / `to_torch(params, model)` | dict of NumPy arrays <-> params | renames, transposes, (un)stacks only: exact inverses |

`VARIANTS`, `from_torch` and `to_torch` stand at module level beside the class, which is `MODEL`. For `lrm convert` to recognise
a checkpoint and write one, `references.py` also wants there `entries(model)` (the checkpoint's names), `fields_from_torch(state)` and,
where a config lies beside it, `fields_from_config(config)` and `config_to_torch(model)`, and has the family in its tables. `encode`, `render` and `query` are reached by
`model.apply({"params": params}, scene, rays, method="render")`.
"""

import importlib

from flax import linen as nn

FAMILIES = ("lrm", "triposr", "lvsm")


def build(name: str, variant: str, **overrides) -> nn.Module:
    """Builds the module of family `name` at size `variant`, with single fields overridden.

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
    """The family's name of a module that `build` made."""
    return type(model).__module__.rsplit(".", 1)[-1]
