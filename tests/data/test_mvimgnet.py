"""COLMAP's files, and photographs of objects whose world follows only from their cameras and masks."""

import struct
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from lrm_jax.data import mvimgnet, pipeline
from lrm_jax.images import colmap
from lrm_jax.types import InputError

WIDTH, HEIGHT, FOCAL = 60, 100, 70.0
NUM_VIEWS, RADIUS = 9, 0.8
FIELDS = dict(seed=0, num_target=3, source_size=48, target_size=48)


def rotation_of(axis, angle: float) -> np.ndarray:
    x, y, z = np.array(axis) / np.linalg.norm(axis)
    k = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * k + (1 - np.cos(angle)) * k @ k


# In COLMAP's world, the object has another place, orientation and size than in ours.
TURN, CENTRE, UNIT = rotation_of([1, 2, -0.5], 2.0), np.array([3.0, -1, 7]), 0.3
DOT = np.array([0.45, 0.3, 0.4])  # direction from the ball's centre to the dot, in our axes


def cameras() -> tuple[np.ndarray, np.ndarray]:
    """World-to-camera (rotation [V 3 3], translation [V 3]) in COLMAP's world, on a half circle around the ball."""
    rotations, translations = [], []
    for azimuth in np.linspace(-80, 80, NUM_VIEWS):
        a, e = np.radians([azimuth, 20])
        back = np.array([np.cos(e) * np.cos(a), np.cos(e) * np.sin(a), np.sin(e)])
        right = np.array([-np.sin(a), np.cos(a), 0])
        down = np.cross(-back, right)
        rotation = np.stack([right, down, -back]) @ TURN.T
        # A little off the axis, so that the object is not in the middle of the images.
        eye = CENTRE + UNIT * TURN @ (4 * back + 0.2 * right)
        rotations.append(rotation)
        translations.append(-rotation @ eye)
    return np.array(rotations), np.array(translations)


def quaternion(rotation: np.ndarray) -> np.ndarray:
    """(w, x, y, z), from the eigenvector of Bar-Itzhack's matrix."""
    (a, b, c), (d, e, f), (g, h, i) = rotation
    matrix = np.array(
        [
            [a + e + i, h - f, c - g, d - b],
            [h - f, a - e - i, b + d, c + g],
            [c - g, b + d, e - a - i, f + h],
            [d - b, c + g, f + h, i - a - e],
        ]
    )
    return np.linalg.eigh(matrix)[1][:, -1]


def write_sparse(folder: Path, model: int = 0, params=(FOCAL, WIDTH / 2, HEIGHT / 2)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    camera = struct.pack("<Q", 1) + struct.pack("<iiQQ", 7, model, WIDTH, HEIGHT)
    (folder / "cameras.bin").write_bytes(camera + struct.pack(f"<{len(params)}d", *params))
    images = struct.pack("<Q", NUM_VIEWS)
    for view, (rotation, translation) in reversed(list(enumerate(zip(*cameras(), strict=True)))):
        images += struct.pack("<i7di", view, *quaternion(rotation), *translation, 7)
        images += f"{view:03d}.png\0".encode() + struct.pack("<Q", 2) + bytes(48)
    (folder / "images.bin").write_bytes(images)


def write_object(root: Path, uid: str) -> None:
    """Writes a grey ball with a red dot on a noisy background, and its masks. The images are PNGs, so that the dot stays sharp."""
    write_sparse(root / uid / "sparse" / "0")
    (root / uid / "images").mkdir()
    (root / "masks" / uid).mkdir(parents=True)
    rows, columns = np.indices((HEIGHT, WIDTH)) + 0.5
    rays = np.stack([(columns - WIDTH / 2) / FOCAL, (rows - HEIGHT / 2) / FOCAL, 0 * rows + 1], -1)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    dot = CENTRE + UNIT * RADIUS * TURN @ (DOT / np.linalg.norm(DOT))
    for view, (rotation, translation) in enumerate(zip(*cameras(), strict=True)):
        ball, at = rotation @ CENTRE + translation, rotation @ dot + translation
        along = rays @ ball
        mask = ball @ ball - along**2 < (UNIT * RADIUS) ** 2
        rgb = np.random.default_rng(view).integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
        rgb[mask] = 90
        u, v = at[:2] / at[2] * FOCAL + [WIDTH / 2, HEIGHT / 2]
        rgb[(np.hypot(columns - u, rows - v) < 1.3) & mask] = [255, 0, 0]
        Image.fromarray(rgb).save(root / uid / "images" / f"{view:03d}.png")
        Image.fromarray(mask).save(root / "masks" / uid / f"{view:03d}.png.png")


@pytest.fixture
def root(tmp_path) -> Path:
    for uid in ("12/aaaa", "12/bbbb", "7/cccc"):
        write_object(tmp_path, uid)
    return tmp_path


def make(root: Path, split: str = "all", **fields):
    return mvimgnet.make(root, split=split, **{**FIELDS, **fields})


def test_colmap_cameras_project_as_colmap_does(tmp_path):
    write_sparse(tmp_path)
    read = colmap.read(tmp_path)
    assert read.names == tuple(f"{view:03d}.png" for view in range(NUM_VIEWS))
    point = np.random.default_rng(0).normal(size=3)
    rotations, translations = cameras()
    wanted = rotations @ point + translations
    homogeneous = np.linalg.inv(read.c2w) @ [*point, 1]
    np.testing.assert_allclose(homogeneous[:, :3], wanted, atol=1e-12)
    np.testing.assert_allclose(
        read.fxfycxcy, np.tile([FOCAL / WIDTH, FOCAL / HEIGHT, 0.5, 0.5], (NUM_VIEWS, 1))
    )
    text = tmp_path / "text"
    text.mkdir()
    (text / "cameras.txt").write_text(
        f"# comment\n7 SIMPLE_PINHOLE {WIDTH} {HEIGHT} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n"
    )
    lines = ["# comment"]
    for view, (rotation, translation) in enumerate(zip(*cameras(), strict=True)):
        pose = " ".join(map(repr, map(float, [*quaternion(rotation), *translation])))
        lines += [f"{view} {pose} 7 {view:03d}.png", "1.0 2.0 -1" if view % 2 else ""]
    (text / "images.txt").write_text("\n".join(lines) + "\n")
    same = colmap.read(text)
    assert same.names == read.names
    np.testing.assert_allclose(same.c2w, read.c2w, atol=1e-12)
    np.testing.assert_array_equal(same.sizes, read.sizes)


def test_lenses_are_pinholes_or_refused(tmp_path):
    centre = (WIDTH / 2, HEIGHT / 2)
    for model, params in (
        (1, (70, 75, *centre)),
        (2, (70, *centre, 0.01)),
        (3, (70, *centre, 0, 0)),
    ):
        write_sparse(tmp_path, model, params)
        assert colmap.read(tmp_path).fxfycxcy[0, 0] == 70 / WIDTH
    # The corner is at r^2 = (30^2 + 50^2) / 70^2, so its y moves by 50 k r^2 = 6.9 pixels.
    write_sparse(tmp_path, 2, (70, *centre, 0.2))
    with pytest.raises(InputError, match="SIMPLE_RADIAL lens moves the corners by 7 pixels"):
        colmap.read(tmp_path)
    write_sparse(tmp_path, 5, (70, 70, *centre, 0.1, 0, 0, 0))
    with pytest.raises(InputError, match="OPENCV_FISHEYE lens is not a pinhole"):
        colmap.read(tmp_path)


@pytest.mark.parametrize("normalize", ["azimuth", "source", None])
def test_the_object_is_a_unit_ball_and_the_dot_is_where_its_cameras_see_it(root, normalize):
    source = make(root, normalize=normalize, foreground_ratio=None, num_target=7)
    assert source.names == ("12/aaaa", "12/bbbb", "7/cccc")
    batch = source.elements[0]
    views = batch.target
    f, c = views.cameras.fxfycxcy[:, :2], views.cameras.fxfycxcy[:, 2:]
    c2w = views.cameras.c2w
    red = (views.rgb[..., 0] > 180) & (views.rgb[..., 1] < 60) & (views.alpha > 127)
    seen = red.any((1, 2))
    assert seen.sum() >= 4  # it is only on one side of the ball
    uv = np.array([np.argwhere(view).mean(0)[::-1] + 0.5 for view in red[seen]]) / 48
    # The point where the rays to the dot meet.
    dirs = np.concatenate([(uv - c[seen]) / f[seen], np.ones((seen.sum(), 1))], axis=1)
    dirs = np.einsum("vij,vj->vi", c2w[seen, :3, :3], dirs)
    dirs /= np.linalg.norm(dirs, axis=1, keepdims=True)
    across = np.eye(3) - dirs[:, :, None] * dirs[:, None, :]
    eyes = c2w[seen, :3, 3]
    dot = np.linalg.solve(across.sum(0), np.einsum("vij,vj->i", across, eyes))
    misses = np.linalg.norm(np.einsum("vij,vj->vi", across, dot - eyes), axis=1)
    pixel = 4 / RADIUS / FOCAL  # a pixel of the photographs, at the object
    assert misses.max() < pixel
    # The dot is on the surface of the unit ball. Masks on whole pixels give the radius to about one pixel.
    assert abs(np.linalg.norm(dot) - 1) < 1.5 * pixel
    # The ball has the outline of the unit sphere, which covers this much of every crop.
    share = (views.alpha > 127).mean((1, 2))
    np.testing.assert_allclose(share, np.pi / 4 / mvimgnet.MARGIN**2, rtol=0.1)
    np.testing.assert_allclose(np.linalg.det(c2w[:, :3, :3]), 1, rtol=1e-5)
    np.testing.assert_allclose(views.cameras.fxfycxcy[:, 2:], 0.5)
    aim = np.einsum("vij,vi->vj", c2w[:, :3, :3], -c2w[:, :3, 3])  # the origin, in each camera
    np.testing.assert_allclose(aim[:, :2], 0, atol=2e-6)  # float32
    if normalize != "source":  # up is up, except for the tilt from an off-centre object
        np.testing.assert_allclose(c2w[:, 2, 0], 0, atol=2e-6)  # upright
        wanted = DOT[2] / np.linalg.norm(DOT)
        assert abs(dot[2] - wanted) < 1.5 * pixel
        elevation = np.degrees(np.arcsin(c2w[:, 2, 3] / np.linalg.norm(c2w[:, :3, 3], axis=1)))
        np.testing.assert_allclose(elevation, 20, atol=1)


def test_objects_that_cannot_be_used_are_named(root, capsys):
    (root / "12/aaaa/images/004.png").unlink()
    data = root / "7/cccc/sparse/0/images.bin"
    data.write_bytes(data.read_bytes()[:-30])
    source = make(root)
    with pytest.raises(InputError, match="12/aaaa: images/004.png is missing"):
        source.elements[0]
    with pytest.raises(InputError, match="7/cccc: images.bin"):
        source.elements[2]
    _, batch = next(pipeline.open_batches(source, 3, prefetch=0))
    jax.tree.map(lambda x: np.testing.assert_array_equal(x[0], x[1]), batch)
    error = capsys.readouterr().err
    assert error.count("bad record") == 2 and "12/aaaa" in error
    (root / "masks/12/bbbb/004.png.png").unlink()
    mvimgnet._read_object.cache_clear()
    with pytest.raises(InputError, match="none of 3 records in a row can be used"):
        next(pipeline.open_batches(make(root), 3, prefetch=0))


def test_a_bad_reconstruction_is_one_line(root):
    path = root / "12/aaaa/sparse/0/cameras.bin"
    camera = path.read_bytes()
    for content, cause in (
        (b"", r"cameras.bin cannot be read \(error\)"),
        (camera[:-3], r"cameras.bin cannot be read"),
        (
            camera[:12] + struct.pack("<i", 99) + camera[16:],
            r"cameras.bin cannot be read \(KeyError\)",
        ),
        (camera[:-24] + struct.pack("<3d", np.nan, 0, 0), "has parameters"),
        (
            camera[:8] + struct.pack("<i", 3) + camera[12:],
            "taken with camera 7, which cameras.bin lacks",
        ),
    ):
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"12/aaaa: .*{cause}"):
            make(root).elements[0]
    path.unlink()
    with pytest.raises(InputError, match="cameras.txt is missing"):
        make(root).elements[0]
    with pytest.raises(InputError, match="no such folder"):
        make(root / "nowhere")
    (root / "empty").mkdir()
    with pytest.raises(InputError, match="no object"):
        make(root / "empty")
