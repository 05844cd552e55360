"""Renders 3D files into training pictures, on a CPU, without OpenGL: `render_objects.py IN OUT --views 32 --size 256`.

IN is a .glb, .gltf, .obj or .ply file, a .zip of them, or a folder of such files. Each object becomes a folder in OpenLRM's
layout (https://github.com/3DTopia/OpenLRM/blob/3108b69/openlrm/datasets/objaverse.py#L53-L70), which `lrm_jax.data.objects` reads:

    OUT/<uid>/rgba/000.png ...   sRGB with straight (not premultiplied) alpha
    OUT/<uid>/pose/000.npy ...   [3 4] float32 camera to world, Blender's camera axes (x right, y up, z backward)
    OUT/<uid>/intrinsics.npy     [3 2] float32 (fx, fy), (cx, cy), (width, height) in pixels
    OUT/render.json              the settings;  OUT/failures.json  what could not be rendered, and why

`<uid>` is `<zip or folder stem>-<file stem>`. The world has z up (the files are y-up, as glTF says), the object's bounding
box is centred on the origin, and the farthest vertex is at distance 1: the object fills the bounding sphere of radius 1.
The views with even numbers have an elevation in [5, 35] degrees, as photographs have; the odd ones in `--elevation`.
"""

import os

os.environ.setdefault(
    "JAX_PLATFORMS", "cpu"
)  # rays are made by lrm_jax.ops; no accelerator is worth waking for that

import argparse  # noqa: E402
import concurrent.futures  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import hashlib  # noqa: E402
import json  # noqa: E402
import multiprocessing  # noqa: E402
import shutil  # noqa: E402
import signal  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import zipfile  # noqa: E402
from pathlib import Path  # noqa: E402

import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import tqdm  # noqa: E402
import trimesh  # noqa: E402
from embreex import rtcore_scene  # noqa: E402
from embreex.mesh_construction import TriangleMesh  # noqa: E402
from PIL import Image  # noqa: E402

from lrm_jax.ops import cameras as cameras_lib  # noqa: E402
from lrm_jax.types import Cameras, InputError  # noqa: E402

SUFFIXES = (".glb", ".gltf", ".obj", ".ply")
PHOTO_ELEVATION = (5.0, 35.0)
SUPERSAMPLING = 2  # samples along each side of a pixel, where the picture has detail
DETAIL = 0.02  # change to the next pixel, in square roots of linear light and in coverage, that counts as detail
RAYS = 2**14  # at a time: the arrays stay in the cache, which makes it twice as fast
SUN = np.array([0.45, -0.55, 0.70], np.float32) / np.linalg.norm([0.45, -0.55, 0.70])
Y_UP_TO_Z_UP = np.array([[1, 0, 0], [0, 0, -1], [0, 1, 0]], np.float32)  # (x, y, z) -> (x, -z, y)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the pictures: a folder is only ever continued with the same ones."""

    views: int
    size: int
    distance: tuple[float, float]
    elevation: tuple[float, float]
    fov: float
    seed: int


@dataclasses.dataclass
class Triangles:
    """An object as M independent triangles: one gather by triangle number finds everything."""

    xyz: np.ndarray  # [M 3 3] float32 corners, z-up world
    facing: np.ndarray  # [M 3] float32, normal of the plane
    # Three of [M 9] float32: the value at the first corner, and the steps to the others, of the shading normal (3), texture
    # coordinates with (0, 0) at the lower left (2), and linear RGBA that multiplies the texture (4).
    attributes: tuple[np.ndarray, np.ndarray, np.ndarray]
    material: np.ndarray  # [M] number of the material
    textures: dict[int, np.ndarray]  # of those materials that have one: [h w 4] float32 linear RGBA
    cutout: np.ndarray  # [M] bool: rays pass where alpha is below one half


# -- loading


def load_triangles(path: Path) -> Triangles:
    """Reads a 3D file: scene graph applied, y-up to z-up, bounding box centred, farthest vertex at distance 1.

    Raises:
      InputError: nothing to render in it. A broken file raises whatever trimesh does.
    """
    scene = trimesh.load_scene(path, process=False)
    parts = [p for p in scene.dump() if isinstance(p, trimesh.Trimesh) and len(p.faces)]
    if not parts:
        raise InputError("no triangles")
    pieces = [_corners(part, linear=path.suffix.lower() in (".glb", ".gltf")) for part in parts]
    xyz, normals, uv, rgba = (np.concatenate([piece[i] for piece in pieces]) for i in range(4))
    if not np.isfinite(xyz).all():
        raise InputError("vertices that are not finite")
    xyz, normals = xyz @ Y_UP_TO_Z_UP.T, normals @ Y_UP_TO_Z_UP.T
    xyz = xyz - (xyz.min((0, 1)) + xyz.max((0, 1))) / 2
    radius = np.linalg.norm(xyz, axis=-1).max()
    if radius == 0:
        raise InputError("all vertices are one point")
    xyz = (xyz / radius).astype(np.float32)
    first, second, third = np.nan_to_num(
        np.concatenate([normals, uv, rgba], axis=-1).astype(np.float32)
    ).swapaxes(0, 1)
    count = [len(part.faces) for part in parts]
    return Triangles(
        xyz=xyz,
        facing=np.cross(xyz[:, 1] - xyz[:, 0], xyz[:, 2] - xyz[:, 0]),
        attributes=tuple(np.ascontiguousarray(a) for a in (first, second - first, third - first)),
        material=np.repeat(np.arange(len(parts)), count),
        textures={i: piece[4] for i, piece in enumerate(pieces) if piece[4] is not None},
        cutout=np.repeat([piece[5] for piece in pieces], count),
    )


def _corners(part: trimesh.Trimesh, *, linear: bool) -> tuple:
    """(xyz, normals, uv, rgba) per corner, the texture and whether it cuts holes, of one part of a scene.

    Args:
      part: triangles with trimesh's visuals.
      linear: whether vertex colours are linear light (glTF) or sRGB (the habit of .ply and .obj).
    """
    faces, visual = part.faces, part.visual
    # trimesh makes smooth normals up on demand, which rounds a box off. Only those of the file are kept: the cache has them.
    if "vertex_normals" in part._cache:
        normals = part.vertex_normals[faces]
    else:
        normals = np.repeat(part.face_normals[:, None], 3, axis=1)
    uv, rgba = np.zeros((len(faces), 3, 2)), np.ones((len(faces), 3, 4))
    texture, cutout, colors = None, False, None
    if visual.kind == "texture":
        image, factor, cutout = _material(visual.material)
        colors = visual.vertex_attributes.get("color")
        if image is not None and visual.uv is not None:
            uv, texture = visual.uv[faces], _linear_rgba(np.asarray(image.convert("RGBA")))
        if factor is not None:
            rgba = rgba * (np.asarray(factor) / 255)
    elif visual.kind == "vertex":
        colors = visual.vertex_colors
    if visual.kind == "face":
        colors = np.repeat(visual.face_colors[:, None], 3, axis=1)
    elif colors is not None:
        colors = np.asarray(colors)[faces]
    if colors is not None:
        scaled = colors[..., :3] / (255 if colors.dtype == np.uint8 else 1)
        rgba[..., :3] *= scaled if linear else _srgb_to_linear(scaled)
    return part.vertices[faces], normals, uv, rgba, texture, cutout


def _material(material) -> tuple:
    """(base colour picture or None, 8-bit linear factor or None, whether alpha cuts holes) of a trimesh material."""
    if isinstance(material, trimesh.visual.material.SimpleMaterial):
        # An .obj's diffuse colour is often left at trimesh's grey; beside a texture it says nothing.
        return material.image, material.diffuse if material.image is None else None, False
    cutout = material.alphaMode in ("MASK", "BLEND")
    return material.baseColorTexture, material.baseColorFactor, cutout


def _srgb_to_linear(srgb: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, both in [0, 1]."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _linear_rgba(image: np.ndarray) -> np.ndarray:
    table = _srgb_to_linear(np.arange(256) / 255).astype(np.float32)
    return np.concatenate([table[image[..., :3]], image[..., 3:].astype(np.float32) / 255], axis=-1)


@functools.cache
def _srgb_table() -> np.ndarray:
    """uint8 sRGB of linear light in steps of 1/65535: fine enough that the darkest 8-bit steps are right."""
    linear = np.arange(65536) / 65535
    srgb = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return np.round(srgb * 255).astype(np.uint8)


# -- rendering


def render_view(
    triangles: Triangles,
    scene: rtcore_scene.EmbreeScene,
    c2w: np.ndarray,
    dirs: np.ndarray,
    window: tuple[slice, slice],
) -> np.ndarray:
    """One picture, uint8[H W 4] with straight alpha.

    One ray through each pixel's centre, then SUPERSAMPLING^2 through those that differ from a neighbour
    (adaptive sampling as in https://doi.org/10.1145/358876.358882, section 3: edges and fine texture cost more than planes).

    Args:
      triangles: the object.
      scene: the same triangles, for embree.
      c2w: [4 4] OpenCV axes.
      dirs: [H W 1+n*n 3] directions in the camera's frame, through the centres of the pixels and of their n*n parts.
      window: rows and columns of pixels outside of which nothing can be seen.
    """
    turn = c2w[:3, :3].T
    seen = dirs[window]
    color = _trace(triangles, scene, c2w[:3, 3], seen[..., 0, :].reshape(-1, 3) @ turn)
    color = color.reshape(*seen.shape[:2], 4)
    detailed = _has_detail(color)
    samples = _trace(triangles, scene, c2w[:3, 3], seen[detailed][:, 1:].reshape(-1, 3) @ turn)
    color[detailed] = samples.reshape(-1, SUPERSAMPLING**2, 4).mean(1)
    picture = np.zeros((*dirs.shape[:2], 4), np.uint8)
    covered = color[..., 3] > 0
    straight = color[covered, :3] / color[covered, 3:]
    inside = picture[window]
    inside[covered, :3] = _srgb_table()[(straight.clip(0, 1) * 65535 + 0.5).astype(np.uint16)]
    inside[..., 3] = np.round(color[..., 3] * 255)
    return picture


def _has_detail(color: np.ndarray) -> np.ndarray:
    """[H W] whether pixels of color[H W 4] differ from the one above, below, left or right."""
    value = np.sqrt(np.pad(color, ((1, 1), (1, 1), (0, 0)), mode="edge"))
    down = (np.abs(np.diff(value[:, 1:-1], axis=0)) > DETAIL).any(-1)
    across = (np.abs(np.diff(value[1:-1], axis=1)) > DETAIL).any(-1)
    return down[1:] | down[:-1] | across[:, 1:] | across[:, :-1]


def _trace(
    triangles: Triangles, scene: rtcore_scene.EmbreeScene, eye: np.ndarray, dirs: np.ndarray
) -> np.ndarray:
    """[R 4] premultiplied linear colour and coverage along the rays from `eye` towards dirs[R 3]."""
    parts = [dirs[i : i + RAYS] for i in range(0, len(dirs), RAYS)]
    found = [_trace_part(triangles, scene, eye, part) for part in parts]
    return np.concatenate([np.zeros((0, 4), np.float32), *found])


def _trace_part(
    triangles: Triangles, scene: rtcore_scene.EmbreeScene, eye: np.ndarray, dirs: np.ndarray
) -> np.ndarray:
    found = np.zeros((len(dirs), 4), np.float32)
    rays = np.arange(len(dirs))
    origins = np.broadcast_to(eye.astype(np.float32), dirs.shape)
    while len(rays):
        hits = scene.run(np.ascontiguousarray(origins), dirs[rays], output=1)
        hit = np.flatnonzero(hits["primID"] >= 0)
        rays, ids = rays[hit], hits["primID"][hit]
        rgba = _shade(triangles, ids, hits["u"][hit], hits["v"][hit], dirs[rays])
        hole = triangles.cutout[ids] & (rgba[:, 3] < 0.5)
        rgba[:, 3] = 1
        found[rays] = np.where(hole[:, None], 0, rgba) if hole.any() else rgba
        # Through a hole: on from just behind it.
        rays, depth = rays[hole], hits["tfar"][hit[hole]] + 1e-4
        origins = origins[hit[hole]] + depth[:, None] * dirs[rays]
    return found


def _shade(triangles: Triangles, ids: np.ndarray, u: np.ndarray, v: np.ndarray, dirs: np.ndarray):
    """[R 4] linear colour and the material's alpha where rays meet triangles `ids` at barycentric (u, v); two-sided."""
    corner, along_u, along_v = triangles.attributes
    attributes = corner[ids] + along_u[ids] * u[:, None] + along_v[ids] * v[:, None]
    normal, uv, rgba = np.split(attributes, [3, 5], axis=1)
    if triangles.textures:
        material = triangles.material[ids]
        for index, texture in triangles.textures.items():
            its = np.flatnonzero(material == index)
            rgba[its] *= sample_texture(texture, uv[its])
    # The side that is seen is the geometry's matter: a smooth normal may lean past the silhouette.
    facing = triangles.facing[ids]
    side = np.copysign(
        1, np.einsum("rc,rc->r", facing, normal) * -np.einsum("rc,rc->r", facing, dirs)
    )
    normal *= (side / np.sqrt(np.einsum("rc,rc->r", normal, normal) + 1e-12))[:, None]
    # Irradiance of a sky that is brighter above, and of a sun, both fixed in the world; white facing up comes out at 1.
    light = 0.50 + 0.15 * normal[:, 2] + 0.50 * np.maximum(normal @ SUN, 0)
    rgba[:, :3] *= light[:, None]
    return rgba


def sample_texture(texture: np.ndarray, uv: np.ndarray) -> np.ndarray:
    """Bilinear lookup in texture[h w 4] at uv[R 2], (0, 0) at the lower left corner, repeated outside [0, 1]."""
    height, width = texture.shape[:2]
    x, y = uv[:, 0] * width - 0.5, (1 - uv[:, 1]) * height - 0.5
    left, top = np.floor(x), np.floor(y)
    right_part, bottom_part = (x - left)[:, None], (y - top)[:, None]
    columns = [(left.astype(np.int64) + i) % width for i in range(2)]
    rows = [(top.astype(np.int64) + i) % height * width for i in range(2)]
    texels = texture.reshape(-1, 4)
    above, below = (
        texels[row + columns[0]] * (1 - right_part) + texels[row + columns[1]] * right_part
        for row in rows
    )
    return above * (1 - bottom_part) + below * bottom_part


# -- objects


def choose_cameras(settings: Settings, uid: str) -> Cameras:
    """The cameras of an object, NumPy Cameras[V]: a function of the seed and the uid alone, so that resuming changes nothing."""
    rng = np.random.default_rng([settings.seed, *hashlib.sha256(uid.encode()).digest()])
    azimuth, elevation = np.zeros(settings.views), np.zeros(settings.views)
    for half, band in (
        (slice(0, None, 2), PHOTO_ELEVATION),
        (slice(1, None, 2), settings.elevation),
    ):
        count = len(azimuth[half])
        azimuth[half] = (np.arange(count) + rng.uniform(size=count)) / max(count, 1) * 2 * np.pi
        elevation[half] = np.radians(rng.uniform(*band, count))
    distance = rng.uniform(*settings.distance, settings.views)
    outward = np.stack(
        [
            np.cos(elevation) * np.cos(azimuth),
            np.cos(elevation) * np.sin(azimuth),
            np.sin(elevation),
        ],
        -1,
    )
    eye = jnp.asarray(distance[:, None] * outward, jnp.float32)
    intrinsics = np.tile(np.asarray(cameras_lib.field_of_view(settings.fov)), (settings.views, 1))
    return Cameras(
        c2w=np.asarray(cameras_lib.look_at(eye, jnp.zeros_like(eye))), fxfycxcy=intrinsics
    )


def windows(cameras: Cameras, triangles: Triangles, size: int) -> list[tuple[slice, slice]]:
    """For each of Cameras[V], the rows and columns of a size x size picture that can show the object: its box, projected."""
    low, high = triangles.xyz.min((0, 1)), triangles.xyz.max((0, 1))
    corners = np.stack(np.meshgrid(*zip(low, high, strict=True)), axis=-1).reshape(1, 8, 3)
    corners = np.repeat(corners.astype(np.float32), len(cameras.c2w), axis=0)
    uv, z = cameras_lib.project(
        Cameras(jnp.asarray(cameras.c2w), jnp.asarray(cameras.fxfycxcy)), jnp.asarray(corners)
    )
    uv, near = (
        np.asarray(uv),
        np.asarray(z).min(1) < 0.05,
    )  # a corner beside the camera: look everywhere
    start = np.where(near[:, None], 0, np.floor(uv.min(1) * size)).clip(0, size).astype(int)
    stop = np.where(near[:, None], size, np.ceil(uv.max(1) * size)).clip(0, size).astype(int)
    return [(slice(a[1], b[1]), slice(a[0], b[0])) for a, b in zip(start, stop, strict=True)]


@functools.lru_cache(maxsize=2)
def _sample_dirs(settings: Settings) -> np.ndarray:
    """[H W 1+n*n 3] directions through the pixels' centres and their n*n parts, in the camera's frame: all views have them."""
    camera = Cameras(c2w=jnp.eye(4), fxfycxcy=cameras_lib.field_of_view(settings.fov))
    size, n = settings.size, SUPERSAMPLING
    centres = np.asarray(cameras_lib.pixel_rays(camera, size, size).dirs)[:, :, None]
    parts = np.asarray(cameras_lib.pixel_rays(camera, size * n, size * n).dirs)
    parts = parts.reshape(size, n, size, n, 3).swapaxes(1, 2).reshape(size, size, n * n, 3)
    return np.concatenate([centres, parts], axis=2)


def render_object(triangles: Triangles, cameras: Cameras, settings: Settings) -> list[np.ndarray]:
    """The pictures of an object from Cameras[V]: uint8[size size 4] each."""
    scene = rtcore_scene.EmbreeScene(robust=True)  # rays never slip through between two triangles
    TriangleMesh(
        scene,
        triangles.xyz.reshape(-1, 3),
        np.arange(triangles.xyz.size // 3, dtype=np.int32).reshape(-1, 3),
    )
    return [
        render_view(triangles, scene, c2w, _sample_dirs(settings), window)
        for c2w, window in zip(cameras.c2w, windows(cameras, triangles, settings.size), strict=True)
    ]


def write_object(
    uid: str, path: Path, member: str | None, out: Path, settings: Settings
) -> str | None:
    """Renders one file into OUT/<uid>, whole or not at all. Returns the cause of a failure, or None."""
    unfinished = _unfinished(out, uid)
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        for folder in ("rgba", "pose"):
            (unfinished / folder).mkdir(parents=True)
        triangles = _open(path, member)
        cameras = choose_cameras(settings, uid)
        pictures = render_object(triangles, cameras, settings)
        if not any(picture[..., 3].any() for picture in pictures):
            return "nothing to be seen in any view"
        poses = np.asarray(cameras_lib.opencv_to_opengl(jnp.asarray(cameras.c2w)))[:, :3]
        for view, (picture, pose) in enumerate(zip(pictures, poses, strict=True)):
            Image.fromarray(picture).save(unfinished / "rgba" / f"{view:03d}.png", compress_level=3)
            np.save(unfinished / "pose" / f"{view:03d}.npy", pose)
        intrinsics = np.concatenate([cameras.fxfycxcy[0], [1, 1]]).reshape(3, 2) * settings.size
        np.save(unfinished / "intrinsics.npy", intrinsics.astype(np.float32))
        unfinished.rename(out / uid)
    except OSError as error:
        if error.filename is not None and str(out) in str(error.filename) or error.errno == 28:
            raise  # the disk is at fault, not this object: the others would fail too
        return _cause(error)
    except Exception as error:  # 3D files are broken in more ways than can be listed
        return _cause(error)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return None


def _cause(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0][:160]
    return text if isinstance(error, InputError) else f"{type(error).__name__}: {text}"


def _open(path: Path, member: str | None) -> Triangles:
    if member is None:
        return load_triangles(path)
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        if Path(member).suffix.lower() in (".gltf", ".obj"):
            archive.extractall(folder)  # these refer to other files
        return load_triangles(Path(archive.extract(member, folder)))


# -- command


def find_objects(source: Path) -> dict[str, tuple[Path, str | None]]:
    """uid -> (file, member if the file is a .zip), sorted. Files with the same uid: the first one counts.

    Raises:
      InputError: nothing there.
    """
    if not source.exists():
        raise InputError(f"{source}: no such file or folder")
    files = sorted(p for p in source.rglob("*") if p.is_file()) if source.is_dir() else [source]
    found = {}
    for path in files:
        if path.suffix.lower() == ".zip":
            for member in _members(path):
                name = Path(member).with_suffix("").as_posix()
                found.setdefault(f"{path.stem}-{name}".replace("/", "-"), (path, member))
        elif path.suffix.lower() in SUFFIXES:
            folder = source if source.is_dir() else path.parent.absolute()
            name = (
                path.relative_to(folder).with_suffix("").as_posix()
                if source.is_dir()
                else path.stem
            )
            found.setdefault(f"{folder.absolute().name}-{name}".replace("/", "-"), (path, None))
    if not found:
        raise InputError(f"{source}: no {', '.join(SUFFIXES)} or .zip with such files in it")
    return dict(sorted(found.items()))


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            names = sorted(archive.namelist())
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(
            f"{path}: cannot be read as a .zip ({_cause(error)}): remove it or download it again"
        ) from None
    hidden = ("__MACOSX/", "/.", "/._")
    return [
        n
        for n in names
        if Path(n).suffix.lower() in SUFFIXES and not any(h in f"/{n}" for h in hidden)
    ]


def prepare_folder(out: Path, settings: Settings) -> None:
    """Makes OUT and writes its settings, or finds them there already. Raises InputError if they are others."""
    wanted, path = json.loads(json.dumps(dataclasses.asdict(settings))), out / "render.json"
    try:
        out.mkdir(parents=True, exist_ok=True)
        there = json.loads(path.read_text()) if path.exists() else None
        if there is None:
            path.write_text(json.dumps(wanted, indent=1) + "\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: cannot be used as the output folder ({_cause(error)})") from None
    if there is not None and there != wanted:
        other = ", ".join(
            f"{k} {there.get(k)} (now {v})" for k, v in wanted.items() if there.get(k) != v
        )
        raise InputError(
            f"{out}: was rendered with other settings: {other}: choose another folder, or the same settings"
        )


def render_all(
    source: Path, out: Path, settings: Settings, workers: int, limit: int | None
) -> dict[str, str]:
    """Renders what is not there yet. Returns uid -> cause of those that could not be."""
    objects = dict(list(find_objects(source).items())[:limit])
    prepare_folder(out, settings)
    missing = {uid: where for uid, where in objects.items() if not (out / uid).exists()}
    print(
        f"{len(objects)} objects, {len(objects) - len(missing)} of them rendered already",
        file=sys.stderr,
    )
    bar = tqdm.tqdm(total=len(missing), unit="object", disable=not missing)
    failures = {}
    for uid, cause in run_in_processes(write_object, missing, out, settings, workers):
        bar.update()
        if cause:
            failures[uid] = cause
    bar.close()
    (out / "failures.json").write_text(json.dumps(dict(sorted(failures.items())), indent=1) + "\n")
    return failures


def run_in_processes(
    function, objects: dict[str, tuple], out: Path, settings: Settings, workers: int
):
    """Yields (uid, function(uid, *where, out, settings)) for the items uid -> where of `objects`, in any order.

    A file that brings its process down (C libraries read them) fails alone: the objects that were under way then, by their
    unfinished folders, are tried again one by one.
    """
    # jax has threads, which do not survive a fork. Ctrl-C is the parent's to handle.
    context, quiet = multiprocessing.get_context("spawn"), (signal.SIGINT, signal.SIG_IGN)
    batches = [dict(objects)]
    while batches:
        batch = batches.pop()
        with concurrent.futures.ProcessPoolExecutor(
            min(workers, len(batch) or 1), context, signal.signal, quiet
        ) as pool:
            jobs = {
                pool.submit(function, uid, *where, out, settings): uid
                for uid, where in batch.items()
            }
            try:
                for job in concurrent.futures.as_completed(jobs):
                    result = job.result()
                    del batch[jobs[job]]
                    yield jobs[job], result
                continue
            except concurrent.futures.BrokenExecutor:
                pass  # outside, where the pool is shut down
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        suspects = {uid: where for uid, where in batch.items() if _unfinished(out, uid).exists()}
        if not suspects:
            raise OSError(
                "a process ended before it began its work: is there enough memory for the workers?"
            )
        for uid in suspects:
            shutil.rmtree(_unfinished(out, uid), ignore_errors=True)
        if len(suspects) == 1:
            yield (
                next(iter(suspects)),
                "its process crashed, or the system ended it for want of memory",
            )
        else:
            batches += [{uid: where} for uid, where in suspects.items()]
        if rest := {uid: where for uid, where in batch.items() if uid not in suspects}:
            batches.append(rest)


def _unfinished(out: Path, uid: str) -> Path:
    return out / f".{uid}.unfinished"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="IN", help="a 3D file, a .zip, or a folder")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="output folder; what is there already is kept"
    )
    parser.add_argument("--views", type=int, default=32, help="pictures of each object")
    parser.add_argument("--size", type=int, default=256, help="side of a picture in pixels")
    parser.add_argument(
        "--distance",
        type=float,
        nargs=2,
        default=(3.0, 3.0),
        metavar=("LO", "HI"),
        help="of the cameras; the object's radius is 1",
    )
    parser.add_argument(
        "--elevation",
        type=float,
        nargs=2,
        default=(-30.0, 75.0),
        metavar=("LO", "HI"),
        help="degrees, of the odd views",
    )
    parser.add_argument(
        "--fov", type=float, default=40.0, help="full vertical field of view in degrees"
    )
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="only the first N objects")
    args = parser.parse_args(argv)
    for name in ("views", "size", "workers") + (("limit",) if args.limit is not None else ()):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: must be at least 1")
    if not 1 < args.distance[0] <= args.distance[1]:
        parser.error(
            f"--distance {args.distance[0]} {args.distance[1]}: needs 1 < LO <= HI: the object's radius is 1"
        )
    if not -90 <= args.elevation[0] <= args.elevation[1] <= 90:
        parser.error(
            f"--elevation {args.elevation[0]} {args.elevation[1]}: needs -90 <= LO <= HI <= 90"
        )
    if not 0 < args.fov < 170:
        parser.error(f"--fov {args.fov}: must be between 0 and 170 degrees")
    if args.seed < 0:
        parser.error(f"--seed {args.seed}: must not be negative")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    settings = Settings(
        args.views, args.size, tuple(args.distance), tuple(args.elevation), args.fov, args.seed
    )
    try:
        failures = render_all(args.source, args.out, settings, args.workers, args.limit)
    except InputError as error:
        print(f"render_objects: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "render_objects: interrupted: what is rendered is kept, run again to go on",
            file=sys.stderr,
        )
        return 130
    except OSError as error:
        print(
            f"render_objects: stopped: {_cause(error)}: what is rendered is kept, run again to go on",
            file=sys.stderr,
        )
        return 2
    causes = {}
    for uid, cause in failures.items():
        causes.setdefault(cause, []).append(uid)
    for cause, uids in sorted(causes.items(), key=lambda item: -len(item[1])):
        print(
            f"skipped {len(uids)}: {cause}: {', '.join(uids[:3])}{' ...' if len(uids) > 3 else ''}",
            file=sys.stderr,
        )
    print(
        f"wrote {args.out}"
        + (f"; {len(failures)} failed, see {args.out / 'failures.json'}" if failures else "")
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
