"""An HTML page that shows a mesh."""

import base64
import html
import re
from pathlib import Path


def viewer_html(glb: bytes, name: str, distance: float, fov_y_deg: float) -> bytes:
    """A page that shows a `.glb` without a network: users can rotate, pan, zoom and download it.

    It is our own page (assets/viewer.html), not `trimesh.viewer.notebook.scene_to_html`, which
    shows glTF's linear colours as if they were sRGB, almost black, and includes 700 kB of three.js.

    Args:
      glb: one primitive with float POSITION, NORMAL, and COLOR_0 or TEXCOORD_0 and an image;
        uint32 indices.
      name: plain text, the page's title; the download is called `<name>.glb`.
      distance: of the camera from the origin when the page opens. It is in front of the object,
        at glTF's +z, where the input image was taken.
      fov_y_deg: full vertical field of view of that camera.
    """
    values = {
        "NAME": html.escape(name),
        "DISTANCE": repr(float(distance)),
        "FOV_Y_DEG": repr(float(fov_y_deg)),
        "GLB": base64.b64encode(glb).decode(),
    }
    page = (Path(__file__).parents[1] / "assets" / "viewer.html").read_text(encoding="utf-8")
    page = re.sub(r"\$([A-Z_]+)", lambda match: values[match[1]], page)
    return page.encode(errors="replace")  # a file name need not be UTF-8
