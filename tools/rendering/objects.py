"""Renders one object, from its file to its folder."""

import errno
import shutil
from pathlib import Path

import numpy as np

from lrm_jax.types import InputError
from rendering import cycles, embree
from rendering.output import save_cameras, save_view, unfinished
from rendering.protocols import Settings, choose_cameras, choose_lighting
from rendering.sources import opened
from rendering.surfaces import load_triangles, random_points


def _is_written(path: Path, out: Path, uid: str) -> bool:
    """Whether a path belongs to the output of an object, or is a folder that contains it."""
    path, out = path.absolute(), out.absolute()
    written = out.is_relative_to(path)
    return written or any(path.is_relative_to(x) for x in (unfinished(out, uid), out / uid))


def is_finished(out: Path, uid: str) -> bool:
    """Whether nothing is left to do. Folders from versions before points.npy lack only that file."""
    try:
        return (out / uid / "points.npy").exists()
    except OSError:  # the name is too long, and `write_object` reports it
        return False


def write_object(
    uid: str,
    path: Path,
    member: str | None,
    out: Path,
    settings: Settings,
    blender: cycles.Blender | None = None,
) -> str | None:
    """Renders one file into OUT/<uid>, completely or not at all. Returns the cause of a failure, or None.

    Args:
      uid: name of the object.
      path, member: the file, or the .zip and the file in it.
      out: the folder of all objects.
      settings: how to render it.
      blender: the Blender to use if `settings.backend` is "cycles".

    Raises:
      OSError: `out` cannot be written to.
    """
    folder = unfinished(out, uid)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(parents=True)
        with opened(path, member) as file:
            triangles = load_triangles(file, settings.box, file_normals=settings.file_normals)
            np.save(folder / "points.npy", random_points(triangles, uid))
            if (out / uid).exists():
                (folder / "points.npy").rename(out / uid / "points.npy")
                return None
            cameras, lighting = choose_cameras(settings, uid), choose_lighting(settings, uid)
            if settings.backend == "cycles":
                views = cycles.render(
                    file, triangles, cameras, lighting, settings, blender, folder / ".blender"
                )
            else:
                views = embree.render(triangles, cameras, lighting, settings)
            seen = False
            for index, view in enumerate(views):
                save_view(folder, index, view)
                seen = seen or view.rgba[..., 3].any()
        if not seen:
            return "nothing is visible in any view"
        save_cameras(folder, cameras, settings.size)
        shutil.rmtree(folder / ".blender", ignore_errors=True)
        folder.rename(out / uid)
    except OSError as error:
        if (
            error.errno == errno.ENOSPC
            or error.errno != errno.ENAMETOOLONG
            and error.filename
            and _is_written(Path(error.filename), out, uid)
        ):
            raise  # the disk is at fault, not this object, so the others would fail too
        return cause_of(error)
    except Exception as error:  # 3D files can be broken in more ways than can be listed
        return cause_of(error)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return None


def cause_of(error: Exception) -> str:
    """One line about what went wrong."""
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"
