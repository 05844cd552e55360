"""Contact sheets: an image with a labelled row for each kind of view. Depth and normals as images."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from lrm_jax.images.png import png, to_uint8


def depth_images(depth: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Grey images of depth on white, near is bright and far is dark, with one scale for all views.

    Args:
      depth: [V H W] distance along the ray; used only where alpha > 0.5.
      alpha: [V H W] in [0, 1].

    Returns:
      uint8 [V H W 3].
    """
    seen = (alpha > 0.5) & np.isfinite(depth)
    if not seen.any():
        return np.full((*depth.shape, 3), 255, np.uint8)
    near, far = np.percentile(depth[seen], [1, 99])
    grey = 0.9 - 0.8 * np.clip((depth - near) / max(far - near, 1e-6), 0, 1)
    return to_uint8(np.where(seen, grey, 1.0)[..., None].repeat(3, -1))


def normal_images(
    depth: np.ndarray, alpha: np.ndarray, origins: np.ndarray, dirs: np.ndarray
) -> np.ndarray:
    """Images of the surface normal, from finite differences of depth: world xyz in [-1, 1] as RGB, on white.

    Args:
      depth: [V H W] distance along the ray; used only where alpha > 0.5.
      alpha: [V H W] in [0, 1].
      origins, dirs: [V H W 3] the rays, with unit directions.

    Returns:
      uint8 [V H W 3].
    """
    seen = (alpha > 0.5) & np.isfinite(depth)
    points = origins + np.where(seen, depth, np.nan)[..., None] * dirs
    down, right = np.gradient(points, axis=(1, 2))
    # Image rows go down and columns right: right x down would point away from the camera.
    normals = np.cross(down, right)
    length = np.linalg.norm(normals, axis=-1, keepdims=True)
    valid = np.isfinite(length) & (length > 0)
    unit = np.divide(normals, length, out=np.ones_like(normals), where=valid)
    return to_uint8(np.where(valid, unit * 0.5 + 0.5, 1.0))


def contact_sheet(
    source: np.ndarray, rows: dict[str, np.ndarray], columns: list[str], title: str = ""
) -> bytes:
    """One PNG: the source image on the left, and beside it a labelled row of small images for each entry of `rows`.

    Args:
      source: uint8 [H W 3], any size.
      rows: label -> uint8 [V H W 3].
      columns: V labels.
      title: above the source image.
    """
    height, width = next(iter(rows.values())).shape[1:3]
    margin, text = 8, 22
    left = width + 2 * margin
    sheet = Image.new(
        "RGB",
        (left + len(columns) * (width + margin), text + len(rows) * (height + text) + margin),
        "white",
    )
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=14)
    fitted = ImageOps.contain(Image.fromarray(source), (width, height))
    sheet.paste(fitted, (margin + (width - fitted.width) // 2, 2 * text))
    draw.text((margin, text), title[: width // 8], fill="black", font=font)
    for j, label in enumerate(columns):
        draw.text((left + j * (width + margin), 2), label, fill="black", font=font)
    for i, (label, images) in enumerate(rows.items()):
        top = text + i * (height + text)
        draw.text((left, top), label, fill="gray", font=font)
        for j, image in enumerate(images):
            sheet.paste(Image.fromarray(image), (left + j * (width + margin), top + text))
    return png(np.asarray(sheet))
