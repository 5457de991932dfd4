"""Images of every kind that users have, and files and arrays that are none."""

from __future__ import annotations

import io
import struct
import threading
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin

from asag_deploy.errors import ConfigError, ImageError
from asag_deploy.images.decoder_log import quiet_opencv
from asag_deploy.images.reading import as_rgb, decode_image, load, read_image
from support.image_writers import png, tiff


@pytest.fixture
def scene() -> NDArray[np.uint8]:
    """A smooth (40, 60, 3) RGB picture without symmetries, which JPEG keeps to within a few levels."""
    y, x = np.mgrid[0:40, 0:60]
    return np.stack([x * 4, y * 6, 255 - x * 2 - y], axis=-1).astype(np.uint8)


def test_png_is_read_exactly_as_rgb(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    Image.fromarray(scene).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, scene)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "bmp", "tif", "gif"])
def test_other_formats(tmp_path: Path, scene: NDArray[np.uint8], suffix: str) -> None:
    Image.fromarray(scene).save(tmp_path / f"a.{suffix}")
    image = read_image(tmp_path / f"a.{suffix}")
    assert image.shape == scene.shape
    assert np.abs(image.astype(int) - scene).mean() < 12  # GIF has 256 colours


def test_path_may_be_text_with_any_letters(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    Image.fromarray(scene).save(tmp_path / "Straße 猫.png")
    np.testing.assert_array_equal(read_image(str(tmp_path / "Straße 猫.png")), scene)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_grey(tmp_path: Path, scene: NDArray[np.uint8], suffix: str) -> None:
    Image.fromarray(scene).convert("L").save(tmp_path / f"g.{suffix}")
    image = read_image(tmp_path / f"g.{suffix}")
    assert image.shape == scene.shape
    np.testing.assert_array_equal(image[..., 0], image[..., 1])
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert image.std() > 10


def test_black_and_white_and_palette(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    Image.new("1", (9, 7), 1).save(tmp_path / "bits.png")
    assert (read_image(tmp_path / "bits.png") == 255).all()
    Image.new("P", (9, 7)).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").shape == (7, 9, 3)


@pytest.mark.parametrize("channels", [1, 3])
def test_16_bits_are_scaled(tmp_path: Path, channels: int) -> None:
    values = np.array([0, 257, 257 * 100, 257 * 200 + 128, 65535], dtype=np.uint16)
    image = np.repeat(values.reshape(1, -1, 1), channels, axis=2)
    cv2.imwrite(str(tmp_path / "deep.png"), image)
    read = read_image(tmp_path / "deep.png")
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read[0, :, 0], [0, 1, 100, 200, 255])


def test_cmyk_jpeg(tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), (200, 30, 40)).convert("CMYK").save(tmp_path / "print.jpg")
    image = read_image(tmp_path / "print.jpg")
    assert np.abs(image.astype(int) - (200, 30, 40)).max() <= 4


def test_opacity_is_blended_onto_white(tmp_path: Path) -> None:
    pixels = np.array([[[200, 100, 0, 255], [200, 100, 0, 0], [200, 100, 0, 128]]], dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(tmp_path / "clear.png")
    image = read_image(tmp_path / "clear.png")
    np.testing.assert_array_equal(image, [[[200, 100, 0], [255, 255, 255], [227, 177, 127]]])


def test_grey_with_opacity(tmp_path: Path) -> None:
    Image.new("LA", (4, 4), (100, 0)).save(tmp_path / "la.png")
    assert (read_image(tmp_path / "la.png") == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "mode"),
    [("jpg", "RGB"), ("png", "RGB"), ("png", "RGBA"), ("tif", "RGB"), ("webp", "RGB"), ("avif", "RGB")],
)
def test_exif_orientation_is_applied(
    tmp_path: Path, scene: NDArray[np.uint8], orientation: int, suffix: str, mode: str
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"o.{suffix}"
    Image.fromarray(scene).convert(mode).save(path, exif=exif)
    with Image.open(path) as stored:
        upright = np.asarray(ImageOps.exif_transpose(stored).convert("RGB")).astype(int)
        unturned = np.asarray(stored.convert("RGB")).astype(int)
    image = read_image(path)
    assert image.shape == upright.shape
    assert np.abs(image - upright).max() <= 4
    if suffix not in ("tif", "avif"):  # Pillow turns these itself
        assert np.abs(read_image(path, upright=False) - unturned).max() <= 4
    assert read_image(path, upright=False).shape == scene.shape


@pytest.mark.parametrize("exif", [b"", b"II*\0", b"MM\0*\0\0\0\x08\xff\xff", b"Exif\0\0 nonsense"])
def test_damaged_exif_is_ignored(tmp_path: Path, scene: NDArray[np.uint8], exif: bytes) -> None:
    Image.fromarray(scene).save(tmp_path / "x.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), scene)


@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000)])
def test_extreme_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    Image.new("RGB", size, (9, 8, 7)).save(tmp_path / "x.png")
    image = read_image(tmp_path / "x.png")
    assert image.shape == (size[1], size[0], 3)
    assert (image == (9, 8, 7)).all()


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
@pytest.mark.parametrize("kept", [0.5, 0.97])
def test_truncated_file(tmp_path: Path, suffix: str, kept: float, capfd: pytest.CaptureFixture[str]) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"t.{suffix}"
    Image.fromarray(noise).save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError, match=r"t\.") as raised:
        read_image(path)
    assert str(path) in str(raised.value)
    assert "is truncated" in str(raised.value)
    assert capfd.readouterr() == ("", "")


def test_truncated_jpeg_with_a_whole_thumbnail(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    """The thumbnail's end marker must not pass for the image's."""
    Image.fromarray(scene).save(tmp_path / "thumbnail.jpg")
    thumbnail = b"Exif\0\0" + (tmp_path / "thumbnail.jpg").read_bytes()
    segment = b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2, "big") + thumbnail
    whole = (tmp_path / "thumbnail.jpg").read_bytes()
    path = tmp_path / "photo.jpg"
    path.write_bytes(whole[:2] + segment + whole[2:])
    assert read_image(path).shape == scene.shape
    path.write_bytes(whole[:2] + segment + whole[2:-2])
    with pytest.raises(ImageError, match="truncated"):
        read_image(path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    path = tmp_path / "trailer.jpg"
    Image.fromarray(scene).save(path)
    path.write_bytes(path.read_bytes() + b"maker's notes")
    assert read_image(path).shape == scene.shape


def test_progressive_jpeg(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    Image.fromarray(scene).save(tmp_path / "p.jpg", progressive=True)
    assert read_image(tmp_path / "p.jpg").shape == scene.shape


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is empty"),
        (b"hello", "is not an image"),
        (b"\xff\xd8\xff", "is truncated"),
        (b"\xff\xd8\x00\x00\x00\x00\x00", "is damaged"),
        (b"\x89PNG\r\n\x1a\n" + b"IEND", "is truncated"),
    ],
)
def test_files_that_are_no_images(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(content)
    with pytest.raises(ImageError, match=sentence) as raised:
        read_image(path)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_missing_file_folder_and_impossible_name(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nowhere\.png' does not exist"):
        read_image(tmp_path / "nowhere.png")
    with pytest.raises(ImageError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(ImageError, match="cannot be read"):
        read_image("a\0b.png")


def test_float_file_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(ImageError, match="float32"):
        read_image(tmp_path / "f.tif")


def test_rgb_array_is_not_copied(scene: NDArray[np.uint8]) -> None:
    assert np.shares_memory(as_rgb(scene, "rgb"), scene)


@pytest.mark.parametrize("view", ["plain", "mirrored", "strided"])
def test_bgr_array_is_turned(scene: NDArray[np.uint8], view: str) -> None:
    bgr = scene[..., ::-1]
    bgr = {"plain": np.ascontiguousarray(bgr), "mirrored": bgr[::-1], "strided": bgr[::2, ::3]}[view]
    before = bgr.copy()
    rgb = as_rgb(bgr, "bgr")
    assert rgb.flags.c_contiguous
    np.testing.assert_array_equal(rgb, before[..., ::-1])
    np.testing.assert_array_equal(bgr, before)


def test_strided_rgb_array_becomes_contiguous(scene: NDArray[np.uint8]) -> None:
    rgb = as_rgb(scene[:, ::-1], "rgb")
    assert rgb.flags.c_contiguous
    np.testing.assert_array_equal(rgb, scene[:, ::-1])


@pytest.mark.parametrize("order", ["bgr", "rgb"])
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 1)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_grey_array(order: Any, shape: tuple[int, ...], dtype: Any) -> None:
    top = int(np.iinfo(dtype).max)
    rgb = as_rgb(np.full(shape, top, dtype=dtype), order)
    assert rgb.shape == (5, 7, 3)
    assert (rgb == 255).all()


def test_array_with_opacity() -> None:
    pixel = np.array([[[10, 20, 30, 255], [10, 20, 30, 0]]], dtype=np.uint8)
    np.testing.assert_array_equal(as_rgb(pixel, "bgr"), [[[30, 20, 10], [255, 255, 255]]])
    np.testing.assert_array_equal(as_rgb(pixel, "rgb"), [[[10, 20, 30], [255, 255, 255]]])
    opaque = np.full((2, 2, 4), 255, dtype=np.uint16)
    assert as_rgb(opaque * 257, "rgb").shape == (2, 2, 3)


@pytest.mark.parametrize(
    ("array", "sentence"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), r"Detector\.forward"),
        (np.zeros((4, 4, 3), dtype=np.float64), "got float64"),
        (np.zeros((4, 4, 3), dtype=bool), "got bool"),
        (np.zeros((4, 4, 3), dtype=np.int64), "got int64"),
        (np.zeros((4, 4, 3), dtype=np.int8), "got int8"),
        (np.zeros((3, 40, 60), dtype=np.uint8), r"transpose\(1, 2, 0\)"),
        (np.zeros((1, 40, 60), dtype=np.uint8), "channels first"),
        (np.zeros((3, 40, 60), dtype=np.float32), "channels first"),
        (np.zeros((40, 60, 2), dtype=np.uint8), "1, 3 or 4 channels"),
        (np.zeros((2, 40, 60, 3), dtype=np.uint8), "pass a list"),
        (np.zeros((0, 60, 3), dtype=np.uint8), "empty"),
        (np.zeros((60, 0), dtype=np.uint8), "empty"),
        (np.zeros((60,), dtype=np.uint8), r"shape \(60,\)"),
        ([[1, 2, 3]], "got list"),
        (None, "got NoneType"),
    ],
)
def test_arrays_that_are_no_images(array: Any, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence) as raised:
        as_rgb(array, "bgr")
    assert "\n" not in str(raised.value)


def test_unknown_channel_order() -> None:
    with pytest.raises(ConfigError, match="'gbr'"):
        as_rgb(np.zeros((4, 4, 3), dtype=np.uint8), "gbr")  # type: ignore[arg-type]


def test_load_takes_paths_and_arrays(tmp_path: Path, scene: NDArray[np.uint8]) -> None:
    Image.fromarray(scene).save(tmp_path / "a.png")
    np.testing.assert_array_equal(load(tmp_path / "a.png", "bgr"), scene)
    np.testing.assert_array_equal(load(str(tmp_path / "a.png"), "rgb"), scene)
    np.testing.assert_array_equal(load(scene[..., ::-1], "bgr"), scene)


def test_quiet_opencv_restores_the_log_level_across_threads() -> None:
    log = getattr(cv2.utils, "logging", cv2)  # as OpenCV 5 and 4 have it
    before = log.getLogLevel()
    assert before != 0
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with quiet_opencv():
            inside.set()
            leave.wait(5)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(5)
    with quiet_opencv():
        assert log.getLogLevel() == 0
    assert log.getLogLevel() == 0
    leave.set()
    thread.join()
    assert log.getLogLevel() == before


def _exif(orientation: int, order: str, kind: int) -> bytes:
    """EXIF that states an orientation as a SHORT (3) or a LONG (4)."""
    entry = struct.pack(f"{order}HHI", 0x0112, kind, 1) + struct.pack(f"{order}{'HH' if kind == 3 else 'I'}",
        *((orientation, 0) if kind == 3 else (orientation,)))  # fmt: skip
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}IH", 8, 1) + entry + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [3, 4])
@pytest.mark.parametrize("before", [b"", b"\xff" * 3, b"\xff\xe1\x00\x20http://ns.adobe.com/xap/1.0/\0\0"])
def test_orientation_wherever_a_jpeg_states_it(
    scene: NDArray[np.uint8], order: str, kind: int, before: bytes
) -> None:
    stream = io.BytesIO()
    Image.fromarray(scene).save(stream, format="JPEG", quality=98)
    plain = stream.getvalue()
    content = b"Exif\0\0" + _exif(6, order, kind)
    segment = b"\xff\xe1" + (len(content) + 2).to_bytes(2, "big") + content
    turned = decode_image(plain[:2] + before + segment + plain[2:], "turned.jpg")
    np.testing.assert_array_equal(turned, np.rot90(decode_image(plain, "plain.jpg"), -1))


def test_orientation_behind_the_pixels_of_a_png(scene: NDArray[np.uint8]) -> None:
    content = b"eXIf" + _exif(8, ">", 3)
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    data = png(scene, 8, 2)
    end = data.rfind(b"IEND") - 4
    np.testing.assert_array_equal(decode_image(data[:end] + chunk + data[end:], "a.png"), np.rot90(scene))


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(scene: NDArray[np.uint8], orientation: int, deep: bool) -> None:
    samples = scene.astype(np.uint16) * 257 if deep else scene
    plain = tiff(samples, 2, tags={274: [orientation]})
    picture = Image.fromarray(scene)
    picture.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(picture))
    np.testing.assert_array_equal(decode_image(plain, "a.tif"), upright)
    np.testing.assert_array_equal(decode_image(plain, "a.tif", upright=False), scene)


_XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description%s '
    b'xmlns:tiff="http://ns.adobe.com/tiff/1.0/">%s</rdf:Description></rdf:RDF></x:xmpmeta>'
)
_AS_ATTRIBUTE = _XMP % (b' tiff:Orientation="6"', b"")
_AS_ELEMENT = _XMP % (b"", b"<tiff:Orientation>6</tiff:Orientation>")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("xmp", [_AS_ATTRIBUTE, _AS_ELEMENT])
@pytest.mark.parametrize("stated", [None, 1, 8])
def test_orientation_in_xmp_counts_where_exif_states_none(
    tmp_path: Path, scene: NDArray[np.uint8], suffix: str, xmp: bytes, stated: int | None
) -> None:
    exif = Image.Exif()
    exif[0x010F] = "a maker"
    if stated is not None:
        exif[0x0112] = stated
    picture = Image.fromarray(scene)
    if suffix == "png":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", xmp.decode(), zip=stated is None)
        picture.save(tmp_path / "o.png", exif=exif, pnginfo=info)
    elif suffix == "tif":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags.tagtype[700], tags[700] = 1, xmp
        if stated is not None:
            tags[0x0112] = stated
        picture.save(tmp_path / "o.tif", tiffinfo=tags)
    else:
        picture.save(tmp_path / f"o.{suffix}", exif=exif, xmp=xmp)
    found = read_image(tmp_path / f"o.{suffix}")
    with Image.open(tmp_path / f"o.{suffix}") as stored:
        expected = np.asarray(ImageOps.exif_transpose(stored)).astype(int)
    assert found.shape == expected.shape == (scene if stated == 1 else np.rot90(scene)).shape
    assert np.abs(found - expected).max() <= 4


@pytest.mark.parametrize("packed", [False, True])
def test_orientation_that_a_png_holds_as_text(scene: NDArray[np.uint8], packed: bool) -> None:
    """As ImageMagick and others wrote it before PNG had a place for it."""
    exif = b"Exif\0\0" + _exif(6, "<", 3)
    info = PngImagePlugin.PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(exif):8}\n{exif.hex()}\n", zip=packed)
    stream = io.BytesIO()
    Image.fromarray(scene).save(stream, format="PNG", pnginfo=info)
    np.testing.assert_array_equal(decode_image(stream.getvalue(), "o.png"), np.rot90(scene, -1))
