"""The output of `lrm evaluate`: the table that it prints, and a page with the images and scores of all objects, the worst first.

The page is one file without scripts. It needs no network, since its images are data URIs.
"""

import base64
import html
import io
from collections.abc import Iterable, Mapping

import numpy as np
from PIL import Image

from lrm_jax.evaluation.scores import baselines
from lrm_jax.images.png import to_uint8

NUM_PAIRS = 4  # of a target and its rendering, one above the other
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } th, td { padding: .2rem .7rem; text-align: right }
th { font-weight: 600 } th:first-child, td:first-child { text-align: left }
tr { border-bottom: 1px solid #ddd } .baseline td { color: #777 }
section { border-top: 1px solid #ccc; margin-top: 1.5rem } h3 { margin: .6rem 0 .2rem; overflow-wrap: anywhere }
img { max-width: 100%; border: 1px solid #ddd } dt { font-weight: 600 } dd { margin: 0 0 .4rem 1rem }
p { margin: .2rem 0; color: #555 } .cause { color: #a33 }
"""


def number(value: float | int | str | None) -> str:
    """A number as text; None is a dash."""
    if value is None:
        return "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def worst_first(objects: Mapping[str, Mapping[str, float | None]]) -> list[str]:
    """The uids by PSNR, lowest first."""
    return sorted(objects, key=lambda uid: objects[uid]["psnr"])


def table(summary: dict, worst: int = 5) -> str:
    """The table and its notes, as text for a terminal."""
    width = max(24, *(len(uid) for uid in summary["objects"]))
    rows = {
        "": summary["mean"],
        "mean": summary["mean"].values(),
        "median": summary["median"].values(),
        **{f"{name} (baseline)": x.values() for name, x in baselines(summary).items()},
        "objects": summary["count"].values(),
    }
    num_means = len(rows)
    ranked = worst_first(summary["objects"])[:worst]
    rows |= {uid: summary["objects"][uid].values() for uid in ranked}
    lines = [
        f"{label:<{width}}" + "".join(f"{number(x):>11}" for x in values)
        for label, values in rows.items()
    ]
    lines[num_means:num_means] = ["", f"the worst {len(ranked)}, by psnr"]
    baseline = summary["baseline"]
    notes = [
        "",
        *(f"{name}: {text}" for name, text in summary["protocol"].items() if isinstance(text, str)),
        f"baseline for images: {baseline['images']}; for surfaces: {baseline['surface'] or 'none'}",
        f"skipped, in whole or in part: {len(summary['skipped'])}",
    ]
    return "\n".join(lines + notes)


def strip(source: np.ndarray, target: np.ndarray, rendered: np.ndarray) -> bytes:
    """A JPEG with the source on the left, then NUM_PAIRS target views, each above its rendering.

    Args:
      source: uint8 [H H 4].
      target, rendered: [V S S 3] in [0, 1].
    """
    views = np.unique(np.linspace(0, len(target) - 1, NUM_PAIRS).astype(int))
    pairs = np.concatenate([target[views], rendered[views]], axis=1)  # [. 2S S 3]
    pairs = to_uint8(pairs)
    side = pairs.shape[1]
    white = Image.new("RGBA", source.shape[:2], "white")
    white.alpha_composite(Image.fromarray(source))
    left = white.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    sheet = Image.fromarray(np.concatenate([np.asarray(left), *pairs], axis=1))
    sheet.save(buffer, "jpeg", quality=90, subsampling=0)
    return buffer.getvalue()


def page(summary: Mapping, strips: Mapping[str, bytes]) -> bytes:
    """The page, as HTML.

    Args:
      summary: the content of `evaluation.json`.
      strips: by uid, the result of `strip`.
    """
    model, data, skipped = summary["model"], summary["data"], summary["skipped"]
    title = f"{model['path']} on {data['path']} ({data['split']})"
    names = list(summary["mean"])
    body = [
        f"<h1>lrm evaluate</h1><p>{_text(title)}; {len(strips)} of {data['objects']} objects</p>",
        "<table>",
        _row("th", ["", *names]),
        _row("td", ["mean", *summary["mean"].values()]),
        _row("td", ["median", *summary["median"].values()]),
        *(
            _row("td", [f"{name} (baseline)", *x.values()], " class=baseline")
            for name, x in baselines(summary).items()
        ),
        _row("td", ["objects", *summary["count"].values()]),
        "</table>",
        f"<details><summary>Protocol</summary>{_terms(summary['protocol'])}</details>",
    ]
    if skipped:
        head = f"<summary>Skipped, in whole or in part: {len(skipped)}</summary>"
        body.append(f"<details>{head}{_terms(skipped)}</details>")
    body.append(
        "<p>For each object: the source view, then target views above their renderings. The lowest PSNR comes first.</p>"
    )
    for uid in worst_first(summary["objects"]):
        body.append(_section(uid, summary["objects"][uid], strips[uid], skipped.get(uid)))
    head = f'<meta charset="utf-8"><title>{_text(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html><html lang=en><head>{head}</head><body>{''.join(body)}</body></html>".encode(
        errors="replace"
    )


def _section(uid: str, scores: Mapping, image: bytes, cause: str | None) -> str:
    values = " &nbsp; ".join(f"{name} {number(value)}" for name, value in scores.items())
    uri = f"data:image/jpeg;base64,{base64.b64encode(image).decode()}"
    note = f"<p class=cause>{_text(cause)}</p>" if cause else ""
    return (
        f'<section><h3>{_text(uid)}</h3><p>{values}</p>{note}<img alt="{_text(uid)}" src="{uri}">'
        "</section>\n"
    )


def _row(tag: str, cells: Iterable, attributes: str = "") -> str:
    inner = "".join(f"<{tag}>{_text(number(cell))}</{tag}>" for cell in cells)
    return f"<tr{attributes}>{inner}</tr>"


def _terms(terms: Mapping) -> str:
    """A list of names and texts. A text that is a mapping becomes a nested list."""
    inner = "".join(
        f"<dt>{_text(name)}</dt><dd>{_terms(text) if isinstance(text, Mapping) else _text(text)}</dd>"
        for name, text in terms.items()
    )
    return f"<dl>{inner}</dl>"


def _text(text: object) -> str:
    return html.escape(str(text))
