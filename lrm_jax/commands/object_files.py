"""The files of a reconstructed object: meshes, contact sheet, viewer page and video."""

import jax
import numpy as np

from lrm_jax import api
from lrm_jax.images import camera_paths, captures, cutout, sheets, video
from lrm_jax.images.png import to_uint8
from lrm_jax.mesh import formats, viewer
from lrm_jax.mesh.surface import moved
from lrm_jax.ops import cameras as ops_cameras
from lrm_jax.ops.compositing import blend

COMPILES = "; compiles first, later images are faster"


def files_of(
    name: str, scene: api.Scene, args, stages, inputs: np.ndarray | None = None
) -> dict[str, bytes]:
    """All files of one object: name -> content.

    Args:
      inputs: uint8 [V S S 3], the posed images that it was made from; None for a single image.
    """
    frames = args.frames if args.video else args.views
    path = scene.cameras(camera_paths.orbit(frames, elevation=args.elevation))
    on_sheet = np.arange(args.views) * frames // args.views
    white, kept = [], []
    with stages("render", f" {frames} views of {name}", COMPILES):
        for i, rendering in enumerate(scene.renderings(path, args.size)):
            white.append(to_uint8(blend(rendering, 1.0).rgb))
            kept += [rendering] * int((on_sheet == i).sum())
    with stages("mesh", f" of {name}, {args.resolution}^3 grid", COMPILES):
        mesh = scene.surface(args.resolution, args.level, args.texture, args.faces, args.dense)
    with stages("files"):
        files = {}
        for kind in args.formats:
            files |= formats.write(mesh, kind)
        if inputs is None:
            glb = files.get("mesh.glb") or formats.to_glb(mesh)
        else:  # the world of a capture need not be upright, nor around the object
            glb = formats.to_glb(moved(mesh, scene.facing))
        rows = {} if inputs is None else input_row(inputs, args.views)
        if scene.views is not None:
            drawn = [x[..., :3] for x in scene.views.images[: min(8, args.views)]]
            rows["drawn from the image"] = np.stack([captures.crop(x, args.size)[0] for x in drawn])
        rows |= view_rows(path, on_sheet, white, kept)
        columns = [f"{360 * i / len(white):.0f}°" for i in on_sheet]
        image = cutout.composite(scene.image, 1.0)
        files["contact_sheet.png"] = sheets.contact_sheet(image, rows, columns, name)
        front = ops_cameras.orbit_of(scene.upright_camera)
        files["viewer.html"] = viewer.viewer_html(glb, name, front["distance"], front["fov_y_deg"])
        if args.video:
            files["turntable.mp4"] = video.turntable(np.stack(white))
    return files


def input_row(inputs: np.ndarray, num_views: int) -> dict[str, np.ndarray]:
    """A row of the contact sheet: as many of the posed images [V S S 3] as fit, evenly spread."""
    shown = np.linspace(0, len(inputs) - 1, min(num_views, len(inputs))).round().astype(int)
    return {f"input: {len(shown)} of {len(inputs)} images": inputs[shown]}


def view_rows(path, on_sheet, white, kept) -> dict[str, np.ndarray]:
    """Rows of the contact sheet: the colour, depth and normals of each view on it."""
    alpha, depth = (np.stack([getattr(x, key) for x in kept]) for key in ("alpha", "depth"))
    some = jax.tree.map(lambda x: np.asarray(x)[on_sheet], path)
    rays = jax.tree.map(np.asarray, ops_cameras.pixel_rays(some, *alpha.shape[1:]))
    return {
        "view": np.stack([white[i] for i in on_sheet]),
        "depth (near is bright)": sheets.depth_images(depth, alpha),
        "normal (xyz as rgb)": sheets.normal_images(depth, alpha, rays.origins, rays.dirs),
    }
