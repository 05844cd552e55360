"""Image preparation, compared with TripoSR's and OpenLRM's, and image files of every kind."""

import io
import logging
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from lrm_jax.images import cutout, load, recentre
from lrm_jax.ops import resize
from lrm_jax.types import InputError


@pytest.fixture(scope="module")
def golden(goldens):
    return load_file(goldens / "images.safetensors")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (12, 16, 4), dtype=np.uint8)


def test_recentered_foreground_is_triposrs_to_the_bit(golden):
    ours = recentre.recenter_foreground(golden["in.rgba"], 0.85)
    expected = np.round(golden["out.triposr_foreground_rgba"] * 255).astype(np.uint8)
    np.testing.assert_array_equal(ours, expected)


def test_composite_is_triposrs_to_the_bit(golden):
    ours = cutout.composite(recentre.recenter_foreground(golden["in.rgba"], 0.85), 0.5)
    np.testing.assert_array_equal(ours, golden["out.triposr_grey_u8"])


@pytest.mark.parametrize("size", [32, 96])
def test_antialiased_bilinear_is_torchs(golden, size):
    grey = golden["out.triposr_grey_u8"].astype(np.float32) / 255
    ours = resize.resize_bilinear(grey, size)
    np.testing.assert_allclose(ours, golden[f"out.triposr_{size}"], atol=1e-5)


def test_antialiased_bilinear_of_a_batch_is_torchs(goldens):
    golden = load_file(goldens / "triposr_tiny.safetensors")
    batch = np.stack([golden["in.image0"], golden["in.image1"]])
    ours = resize.resize_bilinear(batch, 80)
    np.testing.assert_allclose(ours, golden["out.preprocessed"], atol=1e-5)


@pytest.mark.parametrize("size", [28, 98])
def test_bicubic_is_openlrms(golden, size):
    white = cutout.blend(golden["in.rgba"], 1.0)
    ours = resize.resize_bicubic(white, size)
    np.testing.assert_allclose(ours, golden[f"out.openlrm_{size}"], atol=1e-5)
    assert ours.max() <= 1 and ours.min() >= 0


def test_bicubic_keeps_corners_and_constants(image):
    rgb = image[..., :3].astype(np.float32) / 255
    ours = resize.resize_bicubic(rgb, 7)
    np.testing.assert_allclose(ours[::6, ::6], rgb[::11, ::15], atol=1e-6)
    np.testing.assert_allclose(resize.resize_bicubic(np.full((1, 5, 3), 0.3), 4), 0.3, atol=1e-6)


@pytest.mark.parametrize("box", [(0, 12, 0, 16), (3, 4, 2, 3), (0, 12, 5, 6), (11, 12, 15, 16)])
def test_recentering_finds_a_foreground_of_any_shape(box):
    rgba = np.zeros((12, 16, 4), np.uint8)
    rgba[box[0] : box[1], box[2] : box[3]] = 200
    square = recentre.recenter_foreground(rgba, 0.85)
    assert square.shape[0] == square.shape[1] and (square == 200).any()


def test_recentering_nothing_is_an_error():
    with pytest.raises(InputError, match="transparent everywhere: "):
        recentre.recenter_foreground(np.zeros((8, 8, 4), np.uint8), 0.85)
    with pytest.raises(InputError, match="too long"):
        recentre.recenter_foreground(np.full((2, 60_000, 4), 255, np.uint8), 0.85)


def test_has_alpha_needs_a_pixel_that_is_not_opaque(image):
    image[..., 3] = 255
    assert not load.has_alpha(image)
    image[3, 4, 3] = 254
    assert load.has_alpha(image)


def test_a_background_of_one_colour_is_keyed_out_but_not_the_same_colour_inside():
    rgba = np.full((20, 20, 4), 255, np.uint8)
    rgba[..., :3] -= np.random.default_rng(2).integers(0, 8, (20, 20, 1), dtype=np.uint8)  # JPEG
    rgba[5:15, 5:15, :3] = [200, 40, 40]
    rgba[9:11, 9:11, :3] = 255
    keyed = cutout.key_out_background(rgba)
    expected = np.zeros((20, 20))
    expected[5:15, 5:15] = 255
    np.testing.assert_array_equal(keyed[..., 3], expected)
    np.testing.assert_array_equal(keyed[..., :3], rgba[..., :3])


def test_a_background_of_many_colours_is_not_keyed_out(image):
    assert cutout.key_out_background(image) is None


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
def test_lossless_files_keep_every_pixel(tmp_path, image, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(image).save(
        path, **({"lossless": True, "exact": True} if suffix == "webp" else {})
    )
    np.testing.assert_array_equal(load.load_image(path), image)


def test_bmp_without_alpha_is_opaque(tmp_path, image):
    Image.fromarray(image[..., :3]).save(tmp_path / "a.bmp")
    ours = load.load_image(tmp_path / "a.bmp")
    np.testing.assert_array_equal(ours[..., :3], image[..., :3])
    assert (ours[..., 3] == 255).all()


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 255, 256], [30000, 65534, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    ours = load.load_image(tmp_path / "a.png")
    np.testing.assert_array_equal(ours[..., 0], [[0, 0, 1], [117, 255, 255]])
    assert (ours[..., 3] == 255).all()


def test_sixteen_bit_colour_is_scaled(tmp_path):
    values = np.array([[[0, 30000, 65535, 40000]]], ">u2")
    header = struct.pack(">IIBBBBB", 1, 1, 16, 6, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" + values.tobytes())), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        for name, body in parts
    )
    (tmp_path / "a.png").write_bytes(data)
    np.testing.assert_array_equal(load.load_image(tmp_path / "a.png"), [[[0, 117, 255, 156]]])


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P", "PA", "CMYK", "YCbCr"])
def test_every_colour_mode_gives_the_colours(tmp_path, mode):
    grey = np.full((8, 8), 255, np.uint8)
    grey[:4] = 0
    suffix = "jpg" if mode in ("CMYK", "YCbCr") else "tiff" if mode == "PA" else "png"
    Image.fromarray(grey).convert("L" if mode == "L" else "RGB").convert(mode).save(
        tmp_path / f"a.{suffix}"
    )
    ours = load.load_image(tmp_path / f"a.{suffix}")
    assert ours.shape == (8, 8, 4) and ours.dtype == np.uint8
    np.testing.assert_allclose(ours[..., :3], np.stack([grey] * 3, -1), atol=3)  # JPEG
    assert (ours[..., 3] == 255).all()


def test_palette_transparency_becomes_alpha(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    image.putpixel((2, 1), 0)
    image.save(tmp_path / "a.png", transparency=0)
    ours = load.load_image(tmp_path / "a.png")
    assert (ours[1, 2] == [255, 0, 0, 0]).all() and (ours[0, 0] == [0, 255, 0, 255]).all()


def test_exif_orientation_is_applied(tmp_path):
    rgb = np.zeros((16, 32, 3), np.uint8)
    rgb[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the stored image
    Image.fromarray(rgb).save(tmp_path / "a.jpg", exif=exif, quality=95)
    ours = load.load_image(tmp_path / "a.jpg")
    assert ours.shape[:2] == (32, 16)
    assert ours[:12, ..., 0].min() > 240 and ours[20:, ..., 0].max() < 15


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation_is_used_and_noted(tmp_path, caplog, suffix):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    extra = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **extra)
    with caplog.at_level(logging.WARNING):
        ours = load.load_image(tmp_path / f"a.{suffix}")
    assert (ours[..., :3] == [255, 0, 0]).all()
    assert "2 frames: the first is used" in caplog.text


def png(width: int, height: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (width, height)).save(buffer, "png")
    return buffer.getvalue()


def noise(suffix: str) -> bytes:
    buffer = io.BytesIO()
    rgb = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(rgb).save(buffer, suffix)
    return buffer.getvalue()


BAD_FILES = {
    "empty.png": (b"", "empty file"),
    "text.png": (b"this is no image", "not an image"),
    "truncated.png": (noise("png")[:5000], "damaged or cut short"),
    "truncated.jpg": (noise("jpeg")[:2000], "damaged or cut short"),
    "truncated.webp": (noise("webp")[:2000], "damaged or cut short"),
    "corrupt.png": (
        noise("png")[:100] + b"\xff" * 2000 + noise("png")[2100:],
        "damaged or cut short",
    ),
    "header_only.png": (noise("png")[:30], "damaged or cut short|not an image"),
    "bomb.png": (png(20000, 6000), "megapixels: scale it down"),
    "large_bomb.png": (png(30000, 20000), "megapixels: scale it down"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_with_the_name_and_a_remedy(tmp_path, name):
    data, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message) as caught:
        load.load_image(tmp_path / name)
    text = str(caught.value)
    assert name in text and "\n" not in text and ": " in text


def test_missing_files_folders_and_32_bit_images_are_errors(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        load.load_image(tmp_path / "nothing.png")
    with pytest.raises(InputError, match="is a folder"):
        load.load_image(tmp_path)
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="32-bit"):
        load.load_image(tmp_path / "a.tiff")
