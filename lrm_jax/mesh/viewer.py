"""A page that shows a mesh."""

import base64
import html
import re
from pathlib import Path


def viewer_html(glb: bytes, name: str, distance: float, fov_y_deg: float) -> bytes:
    """One page that shows a `.glb` and needs no network: to turn, move, zoom and download.

    Our own page (assets/viewer.html) and not `trimesh.viewer.notebook.scene_to_html`: that one
    shows glTF's linear colours as if they were sRGB, almost black, and carries 700 kB of three.js.

    Args:
      glb: one primitive with float POSITION, NORMAL, and COLOR_0 or TEXCOORD_0 and an image;
        uint32 indices.
      name: plain text, the page's title; the download is called `<name>.glb`.
      distance: of the camera from the origin when the page opens, in front of the object: at
        glTF's +z, where the input image was taken.
      fov_y_deg: its full vertical field of view.
    """
    values = {
        "NAME": html.escape(name),
        "DISTANCE": repr(float(distance)),
        "FOV_Y_DEG": repr(float(fov_y_deg)),
        "GLB": base64.b64encode(glb).decode(),
    }
    page = (Path(__file__).parents[1] / "assets" / "viewer.html").read_text(encoding="utf-8")
    page = re.sub(r"\$([A-Z_]+)", lambda match: values[match[1]], page)
    return page.encode(errors="replace")  # a file's name need not be UTF-8
