"""Reading, decoding, painting and saving, against pixels written down by hand."""

import io
import itertools
import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageFile

from keras_fcn import images
from keras_fcn.images import (
    VOID,
    colorize,
    decode_segmentation,
    illustrate,
    legend,
    overlay,
    read_image,
    read_labels,
    save_image,
    save_labels,
)
from keras_fcn.labels import voc_colormap

LOSSLESS = {  # what makes Pillow write the pixels as they are
    "PNG": {},
    "TIFF": {},
    "WEBP": {"lossless": True},
    "BMP": {},
}


def noise(*shape, dtype=np.uint8, high=256):
    return np.random.default_rng(0).integers(high, size=shape, dtype=dtype)


def encoded(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def outcome(read, path):
    """What a reader gives, or the sentence it refuses with; a warning is an error.

    But for Pillow's own: of a picture that is sound enough, or that is large.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", module="PIL")
        try:
            return read(path)
        except ValueError as error:
            return str(error)


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file and gives its path."""

    def write(content, name="picture.bin"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


# Reading images


@pytest.mark.parametrize("format", LOSSLESS)
def test_paths_strings_pil_images_and_arrays_give_the_same_pixels(write, format):
    pixels = noise(5, 7, 3)
    path = write(encoded(Image.fromarray(pixels), format, **LOSSLESS[format]))
    for source in (path, str(path), Image.open(path), Image.fromarray(pixels), pixels):
        image = read_image(source)
        assert image.dtype == np.uint8
        np.testing.assert_array_equal(image, pixels)


def palette_image(*, transparency=None):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8))
    image.putpalette([10, 20, 30, 200, 100, 0, 7, 8, 9])
    if transparency is not None:
        image.info["transparency"] = transparency
    return image


def with_mode(mode, *pixels):
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


WHITE, BLACK = [255, 255, 255], [0, 0, 0]


@pytest.mark.parametrize(
    ("image", "format", "expected"),
    [
        (with_mode("L", 0, 7, 255), "PNG", [BLACK, [7, 7, 7], WHITE]),
        (with_mode("1", 0, 255, 0), "PNG", [BLACK, WHITE, BLACK]),
        (with_mode("1", 0, 255, 0), "TIFF", [BLACK, WHITE, BLACK]),
        (palette_image(), "PNG", [[10, 20, 30], [200, 100, 0], [7, 8, 9]]),
        (palette_image(), "GIF", [[10, 20, 30], [200, 100, 0], [7, 8, 9]]),
        (palette_image(), "BMP", [[10, 20, 30], [200, 100, 0], [7, 8, 9]]),
        (
            palette_image(transparency=b"\xff\x00\xff"),
            "PNG",
            [[10, 20, 30], WHITE, [7, 8, 9]],
        ),
        (palette_image(transparency=0), "GIF", [WHITE, [200, 100, 0], [7, 8, 9]]),
        (with_mode("LA", (9, 255), (9, 0)), "PNG", [[9, 9, 9], WHITE]),
        (
            with_mode("RGBA", (1, 2, 3, 255), (1, 2, 3, 0), (0, 100, 255, 51)),
            "PNG",
            [[1, 2, 3], WHITE, [204, 224, 255]],  # a fifth of it, four of white
        ),
        (
            with_mode("CMYK", (0, 0, 0, 0), (0, 0, 0, 255), (255, 0, 0, 0)),
            "TIFF",
            [WHITE, BLACK, [0, 255, 255]],
        ),
        (
            Image.fromarray(np.array([[0, 128, 129, 257, 65535]], np.uint16)),
            "PNG",
            [BLACK, BLACK, [1, 1, 1], [1, 1, 1], WHITE],  # value / 257
        ),
        (
            Image.fromarray(np.array([[0, 129, 65535]], ">u2")),
            "TIFF",
            [BLACK, [1, 1, 1], WHITE],
        ),
    ],
)
def test_every_mode_becomes_rgb_as_documented(write, image, format, expected):
    path = write(encoded(image, format))
    np.testing.assert_array_equal(outcome(read_image, path), [expected])


def test_what_is_transparent_in_sixteen_bits_is_laid_on_white(write):
    grey = Image.fromarray(np.array([[0, 257, 65535, 514]], np.uint16))
    path = write(encoded(grey, "PNG", transparency=257))
    expected = [[BLACK, WHITE, WHITE, [2, 2, 2]]]
    np.testing.assert_array_equal(outcome(read_image, path), expected)


def test_an_image_of_no_pixels_is_refused():
    with pytest.raises(ValueError, match=r"shape \(7, 0, 3\); expected uint8 RGB"):
        read_image(Image.new("RGB", (0, 7)))


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpegs_of_every_colour_space_come_close_to_their_colours(write, mode):
    color = Image.new("RGB", (16, 16), (60, 60, 60)).convert(mode)
    image = read_image(write(encoded(color, "JPEG", quality=95)))
    np.testing.assert_allclose(image, np.full((16, 16, 3), 60), atol=2)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_pixels_without_a_known_range_are_refused(write, dtype):
    image = Image.fromarray(np.ones((2, 2), dtype))
    path = write(encoded(image, "TIFF"), "depth.tif")
    with pytest.raises(ValueError, match=r"depth\.tif.*32-bit.*uint8"):
        read_image(path)
    with pytest.raises(ValueError, match="PIL image.*32-bit"):
        read_image(image)


TURNS = {  # EXIF 2.32, 4.6.4 A: which side the stored first row and column are on
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored, 1),
}


def oriented(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


@pytest.mark.parametrize("orientation", TURNS)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_images_stand_upright_whatever_their_exif_orientation(
    write, format, orientation
):
    stored = noise(4, 6, 3)
    exif = oriented(orientation)
    content = encoded(Image.fromarray(stored), format, exif=exif, **LOSSLESS[format])
    path, upright = write(content), TURNS[orientation](stored)
    np.testing.assert_array_equal(read_image(path), upright)
    np.testing.assert_array_equal(read_image(Image.open(path)), upright)


def test_a_phone_jpeg_stands_upright(write):
    stored = np.zeros((16, 32, 3), np.uint8)
    stored[:, :16] = 255  # left becomes top
    path = write(encoded(Image.fromarray(stored), "JPEG", exif=oriented(6)))
    image = read_image(path)
    assert image.shape == (32, 16, 3)
    assert image[:8].min() > 200
    assert image[-8:].max() < 50


def test_exif_data_damaged_beside_the_orientation_do_no_harm(write):
    stored, exif = noise(4, 6, 3), oriented(6)
    exif[ExifTags.Base.Make] = "maker of cameras"
    maker, width = bytes.fromhex("010f0002"), bytes.fromhex("01000002")
    assert maker in exif.tobytes()
    damaged = exif.tobytes().replace(maker, width)  # an image width in words
    path = write(encoded(Image.fromarray(stored), "PNG", exif=damaged))
    np.testing.assert_array_equal(read_image(path), TURNS[6](stored))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_the_first_frame_is_read(write, format):
    first, second = Image.new("RGB", (9, 8), "red"), Image.new("RGB", (9, 8), "blue")
    options = {"save_all": True, "append_images": [second]}
    path = write(encoded(first, format, **options, **LOSSLESS.get(format, {})))
    assert Image.open(path).n_frames == 2
    image = read_image(path).astype(int)
    assert image.shape == (8, 9, 3)
    assert np.abs(image - [255, 0, 0]).max() < 3


@pytest.mark.parametrize(
    ("read", "format"),
    [(read_image, format) for format in (*LOSSLESS, "GIF", "JPEG")]
    + [(read_labels, format) for format in ("PNG", "TIFF", "BMP")],
)
def test_a_file_cut_anywhere_gives_all_its_pixels_or_a_sentence(write, read, format):
    image = Image.fromarray(noise(6, 8))
    content = encoded(image, format, **LOSSLESS.get(format, {}))
    whole = read(write(content))
    for length in range(0, len(content), 1 + len(content) // 300):
        result = outcome(read, write(content[:length], "cut.bin"))
        if isinstance(result, str):
            assert "cut.bin" in result
        else:
            np.testing.assert_array_equal(result, whole)


@pytest.mark.parametrize("format", [*LOSSLESS, "GIF", "JPEG"])
def test_half_a_file_is_never_an_image(write, format):
    content = encoded(Image.fromarray(noise(64, 64, 3)), format)
    path = write(content[: len(content) // 2], "half.bin")
    assert "half.bin" in outcome(read_image, path)


@pytest.mark.parametrize("read", [read_image, read_labels])
@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>"])
def test_what_is_no_image_is_refused_by_name(write, content, read):
    with pytest.raises(ValueError, match=r"saved\.png.*expected an image file"):
        read(write(content, "saved.png"))


@pytest.mark.parametrize("format", ["PPM", "TGA", "ICO", "PDF", "JPEG2000"])
def test_only_the_common_formats_are_opened(write, format):
    image = Image.fromarray(noise(16, 16, 3))
    with pytest.raises(ValueError, match=r"a\.png.*of another format.*PNG, JPEG"):
        read_image(write(encoded(image, format), "a.png"))


@pytest.mark.parametrize("read", [read_image, read_labels])
def test_missing_files_and_directories_are_named(tmp_path, read):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.png"):
        read(tmp_path / "nowhere.png")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder` is not a file"):
        read(tmp_path / "folder")


def resized(format, width, height):
    """The bytes of a small file whose header declares another size."""
    content = bytearray(encoded(Image.new("L", (8, 8)), format))
    if format == "PNG":
        content[16:24] = struct.pack(">II", width, height)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    elif format == "BMP":
        content[18:26] = struct.pack("<II", width, height)
    elif format == "GIF":
        content[6:10] = struct.pack("<HH", width, height)
    else:  # JPEG: length, precision, height, width follow the frame marker
        frame = content.index(b"\xff\xc0") + 5
        content[frame : frame + 4] = struct.pack(">HH", height, width)
    return bytes(content)


@pytest.mark.parametrize("read", [read_image, read_labels])
@pytest.mark.parametrize("format", ["PNG", "BMP", "GIF", "JPEG"])
@pytest.mark.parametrize(
    ("width", "height"), [(10_000, 5_001), (60_000, 1_500), (60_000, 60_000)]
)
def test_the_pixel_limit_is_judged_before_any_pixel_is_decoded(
    write, monkeypatch, read, format, width, height
):
    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    path = write(resized(format, width, height), "huge.png")
    sentence = outcome(read, path)
    assert "huge.png" in sentence
    assert "50,000,000 pixels" in sentence
    assert f"{width} x {height}" in sentence or f"{width * height} pixels" in sentence


def test_the_pixel_limit_itself_is_allowed(write, monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 12)
    assert read_image(write(encoded(Image.new("L", (3, 4)), "PNG"))).shape == (4, 3, 3)
    for source in (
        write(encoded(Image.new("L", (13, 1)), "PNG")),
        Image.new("L", (13, 1)),
    ):
        with pytest.raises(ValueError, match="13 x 1, above the limit of 12 pixels"):
            read_image(source)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_damaged_files_give_pixels_or_a_sentence(write, format):
    chance = random.Random(0)
    original = encoded(Image.fromarray(noise(12, 15, 3)), format)
    for _ in range(150):
        content = bytearray(original)
        for _ in range(chance.choice([1, 2, 4])):
            place = chance.randrange(len(content) if chance.random() < 0.5 else 64)
            content[place : place + chance.choice([1, 4])] = chance.randbytes(
                chance.choice([1, 4])
            )
        result = outcome(read_image, write(content, "damaged.bin"))
        assert "damaged.bin" in result if isinstance(result, str) else result.size


def test_what_is_warned_of_while_a_picture_is_read_is_not_lost(write, monkeypatch):
    path = write(encoded(Image.fromarray(noise(12, 15, 3)), "PNG"))
    opened = Image.open

    def warned(*given, **named):  # as another thread might
        warnings.warn("the sky is falling", RuntimeWarning, stacklevel=1)
        return opened(*given, **named)

    monkeypatch.setattr(Image, "open", warned)
    with pytest.warns(RuntimeWarning, match="sky is falling"):
        read_image(path)


def test_where_warnings_are_errors_what_pillow_warns_of_is_one_sentence(write):
    path = write(encoded(Image.fromarray(noise(12, 15, 3)), "PNG"))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setattr(
            Image, "open", lambda *_, **__: warnings.warn("odd", stacklevel=1)
        )
        with pytest.raises(ValueError, match="cannot be decoded .odd"):
            read_image(path)


def test_reading_in_many_threads_leaves_the_warning_filters_alone(write):
    path = write(encoded(Image.fromarray(noise(12, 15, 3)), "PNG"))
    before = list(warnings.filters)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read_image, [path] * 200))
    assert warnings.filters == before


def test_grey_arrays_get_three_channels():
    grey = noise(3, 4)
    np.testing.assert_array_equal(read_image(grey), np.dstack([grey, grey, grey]))


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 5, 3)), r"float64 of shape \(4, 5, 3\).*rint\(255 \* array"),
        (np.ones((4, 5, 3), np.float32), r"float32.*rint\(255 \* array"),
        (noise(4, 5, 3).astype("float32"), r"float32.*Take np.rint\(array\)"),
        (noise(4, 5, 3).astype("int64"), r"int64.*Take np.rint\(array\)"),
        (noise(4, 5).astype("uint16") * 257, r"uint16.*np.rint\(array / 257\)"),
        (np.full((4, 5), 70000), "Scale its numbers, 70000 to 70000, to 0-255"),
        (np.float32([[-1, 1]]), "Scale its numbers, -1.0 to 1.0, to 0-255"),
        (np.full((4, 5, 3), np.nan), "Scale its numbers, nan to nan"),
        (np.zeros((4, 5), bool), r"bool.*Take 255 \* array"),
        (noise(4, 5, 4), r"\(4, 5, 4\).*Take array\[..., :3\]"),
        (noise(4, 5, 1), r"\(4, 5, 1\).*Take array\[..., 0\]"),
        (noise(3, 4, 5), r"\(3, 4, 5\).*np.moveaxis"),
        (noise(2, 4, 5, 3), r"\(2, 4, 5, 3\).*one picture at a time.*images\[0\]"),
        (noise(4), "Pass one picture"),
        (noise(0, 5, 3), "Pass one picture"),
        ([], "Pass one picture"),
        (["a.png", "b.png"], "Pass one picture"),
        (None, "a NoneType.*Pass one picture"),
        (7, "a int.*Pass one picture"),
        (b"bytes", "a bytes.*Pass one picture"),
    ],
)
def test_other_arrays_are_refused_with_what_is_expected_and_what_to_do(array, words):
    with pytest.raises(ValueError, match=f"The image is .*{words}"):
        read_image(array)


@pytest.mark.parametrize(
    ("array", "advised"),
    [
        (noise(4, 5, 3) / 255, lambda array: np.rint(255 * array).astype("uint8")),
        (noise(4, 5, 3).astype("int64"), lambda array: np.rint(array).astype("uint8")),
        (
            noise(4, 5, 3).astype("uint16") * 257,
            lambda array: np.rint(array / 257).astype("uint8"),
        ),
    ],
)
def test_what_is_advised_gives_the_picture(array, advised):
    np.testing.assert_array_equal(read_image(advised(array)), noise(4, 5, 3))


def test_grey_multiplied_by_its_opacity_is_not_called_damaged():
    image = with_mode("LA", (200, 255), (0, 255)).convert("La")
    with pytest.raises(ValueError, match=r'mode La.*Pass image.convert\("LA"\)'):
        read_image(image)
    np.testing.assert_array_equal(
        read_image(image.convert("LA"))[0], [[200] * 3, [0] * 3]
    )


# Reading and saving labels


MASK = np.array([[0, 1, 15], [20, 254, 255]], np.uint8)


def indexed(labels):
    image = Image.fromarray(labels)
    image.putpalette(voc_colormap().tobytes())
    return image


@pytest.mark.parametrize(
    ("image", "format", "options"),
    [
        (indexed(MASK), "PNG", {}),
        (indexed(MASK), "PNG", {"transparency": bytes(256)}),
        (indexed(MASK), "TIFF", {}),
        (indexed(MASK), "BMP", {}),
        (Image.fromarray(MASK), "PNG", {}),
        (Image.fromarray(MASK), "TIFF", {}),
        (Image.fromarray(MASK), "BMP", {}),
        (Image.fromarray(MASK.astype(np.uint16)), "PNG", {}),
        (Image.fromarray(MASK.astype(">u2")), "TIFF", {}),
        (Image.fromarray(MASK.astype(np.int32)), "TIFF", {}),
    ],
)
def test_masks_keep_their_indices(write, image, format, options):
    labels = read_labels(write(encoded(image, format, **options)))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, MASK)


def test_masks_stand_upright_as_their_images_do(write):
    path = write(encoded(indexed(MASK), "PNG", exif=oriented(6)))
    np.testing.assert_array_equal(read_labels(path), TURNS[6](MASK))


@pytest.mark.parametrize("format", ["PNG", "TIFF", "BMP"])
def test_one_bit_masks_are_0_and_1(write, format):
    image = Image.fromarray(np.array([[0, 255, 255]], np.uint8)).convert("1")
    labels = read_labels(write(encoded(image, format)))
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, [[0, 1, 1]])


def chunk(kind, content):
    crc = zlib.crc32(kind + content)
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_grey_masks_are_the_values_in_the_file_whatever_their_bits(write, bits):
    labels = np.random.default_rng(0).integers(0, 2**bits, (5, 7)).astype(np.uint8)
    lines = [
        int("".join(f"{label:0{bits}b}" for label in line).ljust(64, "0"), 2)
        for line in labels.tolist()
    ]
    length = -(-7 * bits // 8)
    packed = b"".join(b"\0" + line.to_bytes(8, "big")[:length] for line in lines)
    header = struct.pack(">IIBBBBB", 7, 5, bits, 0, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(packed)), (b"IEND", b"")
    png = b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in chunks)
    np.testing.assert_array_equal(read_labels(write(png, "mask.png")), labels)


def tiff(lines, width, bits, white_is_zero, reversed_bits):
    """The smallest file of TIFF 6.0, sections 2 and 4: one strip, after the table."""
    if reversed_bits:  # FillOrder 2
        lines = [bytes(int(f"{x:08b}"[::-1], 2) for x in line) for line in lines]
    pixels = b"".join(lines)
    tags = {256: width, 257: len(lines), 258: bits, 259: 1, 262: 1 - white_is_zero}
    tags |= {266: 1 + reversed_bits, 277: 1, 278: len(lines), 279: len(pixels)}
    tags[273] = 8 + 2 + 12 * (len(tags) + 1) + 4
    rows = (struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    table = struct.pack("<H", len(tags)) + b"".join(rows) + bytes(4)
    return b"II*\0" + struct.pack("<I", 8) + table + pixels


@pytest.mark.parametrize("reversed_bits", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_of_tiff_only_masks_whose_0_is_black_are_read(bits, reversed_bits, write):
    labels = np.random.default_rng(0).integers(0, 2**bits, (5, 8)).astype(np.uint8)
    lines = [
        int("".join(f"{label:0{bits}b}" for label in line), 2).to_bytes(bits, "big")
        for line in labels.tolist()
    ]
    black = write(tiff(lines, 8, bits, False, reversed_bits), "black.tif")
    np.testing.assert_array_equal(read_labels(black), labels)
    white = write(tiff(lines, 8, bits, True, reversed_bits), "white.tif")
    with pytest.raises(ValueError, match=r"white\.tif` is a TIFF in which 0 is white"):
        read_labels(white)


def test_a_mask_without_pixels_is_damaged(write):
    header = struct.pack(">IIBBBBB", 7, 5, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match=r"mask\.png` cannot be decoded"):
        read_labels(write(png, "mask.png"))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "CMYK", "F"])
def test_masks_of_anything_but_indices_are_refused(write, mode):
    format = "TIFF" if mode in ("CMYK", "F") else "PNG"
    path = write(encoded(Image.new(mode, (2, 2)), format), "mask.png")
    with pytest.raises(ValueError, match=rf"mask\.png` holds {mode} pixels.*indices"):
        read_labels(path)


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_masks_in_formats_that_change_labels_are_refused(write, format):
    path = write(encoded(Image.fromarray(MASK), format), "mask.png")
    with pytest.raises(ValueError, match=rf"mask\.png` is a {format}.*as PNG"):
        read_labels(path)


@pytest.mark.parametrize(
    ("image", "values"),
    [
        (Image.fromarray(np.array([[3, 256]], np.uint16)), "3 to 256"),
        (Image.fromarray(np.array([[-1, 5]], np.int32)), "-1 to 5"),
    ],
)
def test_masks_with_values_that_are_no_labels_are_refused(write, image, values):
    path = write(encoded(image, "TIFF"), "mask.tif")
    with pytest.raises(ValueError, match=rf"mask\.tif.*{values}.*0 to 255"):
        read_labels(path)


@pytest.mark.parametrize("palette", [None, [(255, 0, 0)] * 256])
@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_saved_labels_read_back_and_look_as_painted(tmp_path, dtype, palette):
    labels = np.arange(256, dtype=dtype).reshape(8, 32)
    path = tmp_path / "labels.png"
    save_labels(path, labels, palette)
    image = Image.open(path)
    assert (image.format, image.mode) == ("PNG", "P")
    np.testing.assert_array_equal(read_labels(path), labels)
    np.testing.assert_array_equal(image.convert("RGB"), colorize(labels, palette))


@pytest.mark.parametrize("highest", [0, 1, 3, 15, 255])
def test_saved_labels_read_back_however_few_they_are(tmp_path, highest):
    labels = noise(7, 9, high=highest + 1)
    save_labels(tmp_path / "labels.png", labels)
    np.testing.assert_array_equal(read_labels(tmp_path / "labels.png"), labels)


@pytest.mark.parametrize(
    ("name", "labels", "sentence"),
    [
        ("a.png", np.array([[256]]), "up to 256 do not fit"),
        ("a.png", np.zeros((2, 2, 2), int), r"shape \(2, 2, 2\)"),
        ("a.png", np.zeros((0, 2), int), r"shape \(0, 2\)"),
        ("a.png", np.array([[-1]]), "negative"),
        ("a.png", np.array([[0.0]]), "float64"),
        ("a.jpg", MASK, r"a\.jpg.*PNG"),
    ],
)
def test_labels_that_do_not_fit_the_file_are_not_saved(
    tmp_path, name, labels, sentence
):
    with pytest.raises(ValueError, match=sentence):
        save_labels(tmp_path / name, labels)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".tiff", ".bmp"])
def test_saved_images_read_back(tmp_path, suffix):
    pixels = noise(6, 5, 3)
    save_image(tmp_path / f"a{suffix}", pixels)
    np.testing.assert_array_equal(read_image(tmp_path / f"a{suffix}"), pixels)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_images_read_back_nearly(tmp_path, suffix):
    pixels = np.full((16, 16, 3), (40, 120, 200), np.uint8)
    save_image(tmp_path / f"a{suffix}", pixels)
    error = read_image(tmp_path / f"a{suffix}").astype(int) - pixels
    assert np.abs(error).max() <= 3
    grey = noise(64, 64)  # the hardest there is
    save_image(tmp_path / f"b{suffix}", grey)
    error = read_image(tmp_path / f"b{suffix}").astype(int) - grey[..., None]
    assert np.abs(error).max() < 10


@pytest.mark.parametrize("name", ["a.gif", "a.pdf", "a"])
def test_pictures_are_saved_under_known_suffixes_only(tmp_path, name):
    with pytest.raises(ValueError, match=rf"{name}`.*\.png"):
        save_image(tmp_path / name, noise(2, 2, 3))


def test_float_pictures_are_not_saved(tmp_path):
    with pytest.raises(ValueError, match="float64.*expected uint8"):
        save_image(tmp_path / "a.png", np.zeros((2, 2, 3)))


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path, monkeypatch, step
):
    path = tmp_path / "labels.png"
    save_labels(path, MASK)

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="No space"):
        save_labels(path, MASK * 0)
    assert list(tmp_path.iterdir()) == [path]
    np.testing.assert_array_equal(read_labels(path), MASK)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.*a\.png"):
        save_image(tmp_path / "nowhere" / "a.png", noise(2, 2, 3))


def test_saved_files_have_the_permissions_of_any_new_file(tmp_path):
    save_labels(tmp_path / "a.png", MASK)
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "plain").stat().st_mode


# Decoding and painting


@pytest.mark.parametrize("shape", [(4, 5), (2, 4, 5)])
@pytest.mark.parametrize(
    ("classes", "dtype"), [(2, "uint8"), (256, "uint8"), (257, "uint16")]
)
def test_the_highest_score_is_the_label(shape, classes, dtype):
    labels = noise(*shape, dtype=np.int64, high=classes)
    labels.flat[0] = classes - 1
    logits = np.where(np.arange(classes) == labels[..., None], 2.5, -7)
    decoded = decode_segmentation(logits)
    assert decoded.dtype == dtype
    np.testing.assert_array_equal(decoded, labels)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_decoded_even_with_a_gradient(dtype):
    logits = keras.Variable([[[1.0, 3.0, 2.0], [4.0, 0.0, 1.0]]], dtype=dtype).value
    np.testing.assert_array_equal(decode_segmentation(logits), [[1, 0]])


def test_every_head_is_decoded():
    heads = {"sem": np.eye(3)[None], "geo": -np.eye(2)[None]}
    decoded = decode_segmentation(heads)
    assert list(decoded) == ["sem", "geo"]
    np.testing.assert_array_equal(decoded["sem"], [[0, 1, 2]])
    np.testing.assert_array_equal(decoded["geo"], [[1, 0]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_scores_that_are_not_numbers_are_no_label(dtype):
    scores = np.zeros((2, 5, 3))
    scores[0, 1, 2] = scores[1, 3, 0] = np.nan
    with pytest.raises(ValueError, match=r"NaN at 20.0% of the pixels"):
        decode_segmentation(keras.Variable(scores, dtype=dtype).value)


def test_infinite_scores_are_labels_all_the_same():
    scores = np.array([[[-np.inf, 0], [np.inf, 0]]])
    np.testing.assert_array_equal(decode_segmentation(scores), [[1, 0]])


@pytest.mark.parametrize("shape", [(3,), (4, 5), (1, 2, 4, 5, 3)])
def test_scores_of_another_rank_are_refused(shape):
    with pytest.raises(ValueError, match=r"height, width, classes"):
        decode_segmentation(np.zeros(shape))


def test_the_scores_of_one_class_leave_nothing_to_decide():
    one = np.zeros((4, 5, 1))
    for scores in (one, one[None], {"sem": np.zeros((4, 5, 2)), "geo": one}):
        with pytest.raises(ValueError, match="one leaves nothing to decide.*threshold"):
            decode_segmentation(scores)


def test_labels_are_painted_in_the_colours_of_voc():
    expected = {0: (0, 0, 0), 1: (128, 0, 0), 15: (192, 128, 128), 255: (224, 224, 192)}
    painted = colorize(np.array([list(expected)]))
    assert painted.dtype == np.uint8
    np.testing.assert_array_equal(painted, [list(expected.values())])


def test_the_default_palette_is_the_voc_colormap():
    np.testing.assert_array_equal(colorize(np.arange(256)), voc_colormap())


def test_void_has_a_colour_in_every_palette():
    palette = [(1, 2, 3), (4, 5, 6)]
    painted = colorize(np.array([[1, VOID, 0]]), palette)
    np.testing.assert_array_equal(painted, [[(4, 5, 6), (224, 224, 192), (1, 2, 3)]])
    void = np.full((2, 2), VOID, np.uint8)
    np.testing.assert_array_equal(colorize(void, palette)[0, 0], (224, 224, 192))


def test_more_than_256_classes_are_painted_too():
    palette = np.stack([np.arange(300) % 256, np.arange(300) // 256], -1)
    palette = np.insert(palette, 2, 9, axis=1)
    painted = colorize(np.array([[299, VOID]], np.uint16), palette)
    np.testing.assert_array_equal(painted, [[(43, 1, 9), (224, 224, 192)]])


@pytest.mark.parametrize("label", [2, 254, 256])
def test_a_label_without_a_colour_is_refused(label):
    with pytest.raises(ValueError, match=f"Label {label} has no colour.*2 entries"):
        colorize(np.array([[0, label, VOID]]), [(1, 2, 3), (4, 5, 6)])


@pytest.mark.parametrize("labels", [[[0.5]], [[-1]], [[True]], [["a"]]])
def test_what_is_no_label_is_not_painted(labels):
    with pytest.raises(ValueError, match="expected integers from 0"):
        colorize(np.array(labels))


@pytest.mark.parametrize(
    "palette", [[(0.5, 0.5, 0.5)], [(0, 0, 256)], [(0, 0, -1)], [(0, 0, 0, 0)], 7, []]
)
def test_what_is_no_palette_is_refused(palette):
    with pytest.raises(ValueError, match="palette"):
        colorize(np.array([[0]]), palette)


def test_an_overlay_mixes_colours_in_and_leaves_void_alone():
    image = np.array([[(100, 200, 50), (100, 200, 50)]], np.uint8)
    mixed = overlay(image, np.array([[1, VOID]]), alpha=0.25)
    assert mixed.dtype == np.uint8
    np.testing.assert_array_equal(mixed, [[(107, 150, 38), (100, 200, 50)]])


def test_alpha_goes_from_the_image_alone_to_the_colours_alone():
    image, labels = noise(4, 5, 3), noise(4, 5, high=21)
    np.testing.assert_array_equal(overlay(image, labels, alpha=0), image)
    np.testing.assert_array_equal(overlay(image, labels, alpha=1), colorize(labels))
    ends = np.stack([image, colorize(labels)]).astype(float)
    assert np.abs(overlay(image, labels) - ends.mean(0)).max() <= 0.5


def test_an_overlay_leaves_its_inputs_as_they_were():
    image, labels = noise(4, 5, 3), noise(4, 5)
    before = image.copy(), labels.copy()
    overlay(image, labels)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(labels, before[1])


@pytest.mark.parametrize("shape", [(5, 4), (1, 4, 5), (4,)])
def test_an_overlay_of_another_size_is_refused(shape):
    with pytest.raises(ValueError, match=r"\(4, 5\).*height, width"):
        overlay(noise(4, 5, 3), np.zeros(shape, int))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan"), 128])
def test_weights_outside_0_to_1_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        overlay(noise(4, 5, 3), np.zeros((4, 5), int), alpha=alpha)


# The legend

COLORS = np.stack([np.arange(60) + 100, np.arange(60), 200 - np.arange(60)], axis=1)


def boxes(picture):
    """Pixels painted in each of the colours."""
    base = np.array([256**2, 256, 1])
    painted = picture @ base
    return np.array([(painted == color).sum() for color in COLORS @ base])


@pytest.mark.parametrize("count", [1, 3, 21, 60])
@pytest.mark.parametrize("size", [(1, 1), (20, 30), (500, 334), (40, 900), (900, 40)])
def test_a_legend_shows_every_class_whole_and_the_picture_untouched(size, count):
    picture = np.full((*size, 3), 255, np.uint8)
    picture[0, 0] = picture[-1, -1] = (0, 255, 0)
    names = ["W" * (1 + 5 * (i % 7)) for i in range(count)]
    result = legend(picture, names, COLORS[:count])
    assert result.dtype == np.uint8
    np.testing.assert_array_equal(result[: size[0], : size[1]], picture)
    areas = boxes(result)[:count]
    assert areas.min() == areas.max() >= 12**2
    assert (result[:, -1] == 255).all()  # the longest name ends before the edge
    assert (result[-1, size[1] :] == 255).all()
    assert (result[:, size[1] :].max(-1) < 60).sum() > 10 * count  # letters' ink


def test_a_legend_grows_with_its_picture():
    small, large = (
        boxes(legend(np.full((side, side, 3), 255, np.uint8), ["a"], COLORS))[0]
        for side in (300, 1800)
    )
    assert large > 9 * small


def test_a_legend_has_three_columns_at_most():
    result = legend(np.zeros((1, 1, 3), np.uint8), ["a"] * 60, COLORS)
    left_edges = [(result == color).all(-1).any(0).argmax() for color in COLORS]
    assert len(set(left_edges)) == 3


def test_a_legend_names_only_the_classes_that_are_there():
    for there in ([2, 7], [0, 3]):
        labels = np.array([there, [VOID, there[0]]])
        result = legend(np.zeros((2, 2, 3), np.uint8), ["name"] * 10, COLORS, labels)
        assert np.flatnonzero(boxes(result)).tolist() == there


def test_the_boxes_of_a_legend_stand_apart():
    result = legend(np.full((400, 50, 3), 255, np.uint8), ["W"] * 12, COLORS)
    rows = [np.flatnonzero((result == color).all(-1).any(1)) for color in COLORS[:12]]
    gaps = [below.min() - above.max() for above, below in itertools.pairwise(rows)]
    assert min(gaps) > np.ptp(rows[0]) / 2  # one column: half a box between them


def test_a_legend_gives_each_class_its_own_name():
    picture, labels = np.zeros((2, 2, 3), np.uint8), np.array([[1, 3]])
    known, others = ["?", "WWWW", "?", "i"], ["a", "WWWW", "bb", "i"]
    expected = legend(picture, others, COLORS, labels)
    np.testing.assert_array_equal(legend(picture, known, COLORS, labels), expected)
    swapped = legend(picture, ["?", "i", "?", "WWWW"], COLORS, labels)
    assert swapped.shape != expected.shape or (swapped != expected).any()


def test_an_illustration_is_an_overlay_with_a_legend_of_what_is_in_it():
    picture, labels = noise(30, 40, 3), np.zeros((30, 40), np.uint8)
    labels[10:], names = 2, ["a", "bb", "ccc"]
    palette = COLORS[7:10]
    expected = legend(overlay(picture, labels, palette), names, palette, labels)
    found = illustrate(picture, labels, names, palette)
    np.testing.assert_array_equal(found, expected)


def test_a_picture_without_classes_gets_no_legend():
    picture, void = noise(4, 5, 3), np.full((4, 5), VOID)
    np.testing.assert_array_equal(legend(picture, ["a"], labels=void), picture)


def test_a_legend_refuses_labels_without_a_name_or_a_colour():
    picture = noise(1, 2, 3)
    with pytest.raises(ValueError, match="Label 2 has no name: there are 2 names"):
        legend(picture, ["a", "b"], labels=np.array([[0, 2]]))
    with pytest.raises(ValueError, match="Label 1 has no colour"):
        legend(picture, ["a", "b"], [(1, 2, 3)])
