"""Reads images and label masks, and turns label maps into pictures and files.

A label map is an integer array, (height, width), whose 255 is void. Only PNG, JPEG,
WebP, TIFF, BMP and GIF files are opened. Whatever is wrong with a file's content is a
`ValueError` that names it; a missing file or a full disk is an `OSError`.
"""

import contextlib
import io
import math
import os
import re
import struct
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageDraw, ImageFont, UnidentifiedImageError

from keras_fcn.files import write_bytes
from keras_fcn.labels import VOID, voc_colormap

MAX_PIXELS = 50_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF")
SUFFIXES = {  # of the formats that keep every colour, JPEG and WebP nearly so
    ".png": "PNG",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".webp": "WEBP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".bmp": "BMP",
}
VOID_COLOR = (224, 224, 192)


def read_image(source):
    """Reads an image as RGB, upright.

    The EXIF orientation of files and PIL images is applied. Of an animation or a
    document the first frame is read. Grey becomes three equal channels, 16-bit grey
    is scaled to 8 bits (value / 257, rounded), transparent pixels are laid on white,
    CMYK is converted. Colour profiles are ignored.

    Args:
        source: A path, a PIL image, or a uint8 array, (height, width, 3) RGB or
            (height, width) grey.

    Returns:
        (height, width, 3) uint8, RGB, 0-255.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another format, or larger than
            `MAX_PIXELS`; if its pixels are 32-bit integers or floats, which have no
            known range; if an array has another shape or dtype.
    """
    if isinstance(source, str | os.PathLike):
        return _to_rgb(_load(_open(source), source), source)
    if isinstance(source, Image.Image):
        _check_size(source, "the PIL image")
        return _to_rgb(_load(source, "the PIL image"), "the PIL image")
    return _check_array(np.asarray(source))


def read_labels(path):
    """Reads a label mask as it was written: no scaling, no colours, no interpolation.

    Palette images give their indices, grey ones the values in the file, whether of 1,
    2, 4, 8 or 16 bits.

    Args:
        path: A mask file with one label per pixel, PNG, TIFF or BMP.

    Returns:
        (height, width) uint8 labels.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, of another format, or larger than
            `MAX_PIXELS`; if it holds colours, transparency, floats or labels
            above 255; if it is a JPEG, WebP or GIF, which change labels, or a TIFF in
            which 0 is white.
    """
    image = _open(path)
    if image.format not in ("PNG", "TIFF", "BMP"):
        # JPEG and WebP blur labels; GIF encoders, Pillow's too, renumber the palette.
        raise ValueError(
            f"`{path}` is a {image.format} file, and such files do not keep labels. "
            "Export the mask anew from its source, as PNG."
        )
    raw_mode = _raw_mode(image)
    if re.search(r";\d?IR?$", raw_mode):
        raise ValueError(
            f"`{path}` is a TIFF in which 0 is white, so that its labels may be meant "
            "as they are stored or as they look. Export the mask anew as PNG."
        )
    image = _load(image, path)
    if image.mode not in ("P", "L", "1", "I") and not image.mode.startswith("I;16"):
        raise ValueError(
            f"`{path}` holds {image.mode} pixels, not one label index per pixel. "
            "Turn its colours into indices and save those with `save_labels`."
        )
    # Pillow multiplies greys of 2 and 4 bits, so that 255 is white.
    step = {"L;2": 85, "L;4": 17}.get(raw_mode.removesuffix("R"), 1)
    labels = np.array(image) // step
    if labels.min() < 0 or labels.max() > 255:
        raise ValueError(
            f"`{path}` holds the values {labels.min()} to {labels.max()}, but labels "
            "are 0 to 255. Number the classes from 0 and save them with `save_labels`."
        )
    return labels.astype(np.uint8)


def decode_segmentation(logits):
    """Decodes a model's scores: the label of a pixel is its highest-scoring class.

    Args:
        logits: (height, width, classes) or (batch, height, width, classes), an array
            or tensor of any framework, or a dict of them, by head.

    Returns:
        The shape without classes, uint8 (uint16 beyond 256 classes); for a dict, a
        dict.

    Raises:
        ValueError: If the scores have another number of dimensions, are of one class,
            or are NaN somewhere.
    """
    if isinstance(logits, dict):
        return {head: decode_segmentation(scores) for head, scores in logits.items()}
    if hasattr(logits, "detach"):  # torch's: NumPy takes no gradient, GPU or bfloat16
        logits = logits.detach().cpu().float()
    scores = np.asarray(logits)
    if scores.ndim not in (3, 4):
        raise ValueError(
            f"The scores have shape {scores.shape}; expected (height, width, classes) "
            "or (batch, height, width, classes), as the model gives them."
        )
    if scores.shape[-1] < 2:
        raise ValueError(
            f"The scores are of {scores.shape[-1]} class; expected 2 or more, for one "
            "leaves nothing to decide. Build the net with num_classes=2, or compare "
            "its logit with a threshold."
        )
    if np.isnan(scores).any():  # argmax would take NaN for the highest
        share = np.isnan(scores).any(axis=-1).mean()
        raise ValueError(
            f"The scores are NaN at {share:.1%} of the pixels; expected numbers. Look "
            "for NaN in the image and in the weights; where both are sound, float16 "
            "overflows: build the net in float32 or mixed_bfloat16."
        )
    return scores.argmax(-1).astype(np.uint8 if scores.shape[-1] <= 256 else np.uint16)


def illustrate(image, labels, names=(), palette=None):
    """Lays the labels' colours over the image and adds a legend of those that occur.

    Args:
        image: Whatever `read_image` takes.
        labels: (height, width) integers, of the image's size.
        names: The class names, in output order; no legend without them.
        palette: (classes, 3) RGB, 0-255; by default the PASCAL VOC colour map.

    Returns:
        (height or more, width or more, 3) uint8, RGB.

    Raises:
        ValueError: As `overlay` and `legend` do.
    """
    picture = overlay(image, labels, palette)
    return legend(picture, names, palette, labels) if len(names) else picture


def colorize(labels, palette=None):
    """Paints every label in its colour.

    Args:
        labels: Integers of any shape; 255 is void.
        palette: (classes, 3) RGB, 0-255; by default the PASCAL VOC colour map.

    Returns:
        The labels' shape + (3,), uint8, RGB; void is VOC's (224, 224, 192).

    Raises:
        ValueError: If labels are no integers or negative, or if one has no colour.
    """
    labels = _check_labels(labels)
    return _color_table(labels, palette)[labels]


def overlay(image, labels, palette=None, alpha=0.5):
    """Lays the labels' colours over the image; void pixels stay as they are.

    Args:
        image: Whatever `read_image` takes.
        labels: (height, width) integers, of the image's size.
        palette: (classes, 3) RGB, 0-255; by default the PASCAL VOC colour map.
        alpha: Weight of the colours, 0 (the image alone) to 1 (the colours alone).

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        ValueError: If image and labels differ in size, a label has no colour, or
            `alpha` is not between 0 and 1.
    """
    image, labels = read_image(image), _check_labels(labels)
    if image.shape[:2] != labels.shape:
        raise ValueError(
            f"The image is {image.shape[:2]} but its labels are {labels.shape}, as "
            "(height, width). Pass the image that was segmented, at its own size."
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"`alpha` is {alpha}; expected a weight from 0 to 1.")
    colors = colorize(labels, palette)
    blend = np.float32(1 - alpha) * image + np.float32(alpha) * colors
    return np.where((labels == VOID)[..., None], image, np.rint(blend).astype(np.uint8))


def legend(picture, names, palette=None, labels=None):
    """Adds a legend on the right: a box in each class's colour, and its name.

    The text grows with the picture and is never below 14 pixels; the classes stand in
    three columns at most, and the canvas grows if the picture is too small for them.

    Args:
        picture: What to add it to; whatever `read_image` takes.
        names: The class names, in output order.
        palette: (classes, 3) RGB, 0-255; by default the PASCAL VOC colour map.
        labels: A label map; if given, only the classes in it are named.

    Returns:
        (height or more, more than width, 3) uint8, RGB: the picture in the upper left
        corner, on white. The picture alone if there is no class to name.

    Raises:
        ValueError: If a label has no name, or a class no colour.
    """
    picture = read_image(picture)
    classes = np.arange(len(names))
    if labels is not None:
        classes = np.setdiff1d(_check_labels(labels), [VOID])
    if not classes.size:
        return picture
    if classes[-1] >= len(names):
        raise ValueError(
            f"Label {classes[-1]} has no name: there are {len(names)} names. "
            "Pass the names of the label set that the labels are from."
        )
    colors = _color_table(classes, palette)
    height, width = picture.shape[:2]
    size = max(14, round(math.sqrt(height * width) / 35))
    line, margin = round(1.6 * size), size // 2
    fitting = (height - 2 * margin) // line
    rows = min(len(classes), max(fitting, math.ceil(len(classes) / 3)))
    columns = math.ceil(len(classes) / rows)
    font = ImageFont.load_default(size)
    column = math.ceil(3 * size + max(font.getlength(names[i]) for i in classes))
    canvas_size = width + size + columns * column, max(height, rows * line + 2 * margin)
    canvas = Image.new("RGB", canvas_size, "white")
    canvas.paste(Image.fromarray(picture))
    draw = ImageDraw.Draw(canvas)
    for i, index in enumerate(classes):
        x, top = width + size + i // rows * column, margin + i % rows * line
        box = (x, top, x + size, top + size)
        draw.rectangle(box, fill=tuple(colors[index]), outline="gray")
        middle = (x + 1.5 * size, top + size / 2)
        draw.text(middle, names[index], "black", font, anchor="lm")
    return np.array(canvas)


def save_labels(path, labels, palette=None):
    """Writes labels as an indexed PNG: any viewer shows colours, the file holds labels.

    Args:
        path: The file, ending in `.png`; replaced only once the new one is whole.
        labels: (height, width) integers, 0-255; 255 is void.
        palette: (classes, 3) RGB, 0-255; by default the PASCAL VOC colour map.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the path has another suffix, the labels are no such map, or a
            label has no colour.
    """
    labels = _check_labels(labels)
    if labels.ndim != 2 or not labels.size or labels.max() > 255:
        raise ValueError(
            f"`{path}`: labels of shape {labels.shape} up to {labels.max(initial=0)} "
            "do not fit an indexed PNG; expected (height, width), 0 to 255."
        )
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"`{path}`: labels are saved as PNG, so end the name in .png.")
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(_color_table(labels, palette)[:256].tobytes())
    _write(path, image, "PNG")


def save_image(path, rgb):
    """Writes a picture, in the format of the path's suffix.

    Args:
        path: The file, ending in `.png`, `.jpg`, `.jpeg`, `.webp`, `.tif`, `.tiff` or
            `.bmp`; replaced only once the new one is whole.
        rgb: (height, width, 3) uint8, RGB.

    Raises:
        OSError: If the file cannot be written.
        ValueError: If the suffix is another, or `rgb` is no such array.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(
            f"`{path}` has a suffix that no picture is saved under; "
            f"use one of {', '.join(SUFFIXES)}."
        )
    _write(path, Image.fromarray(_check_array(np.asarray(rgb))), SUFFIXES[suffix])


# ImageOps.exif_transpose does the same, and rewrites the EXIF data: where those are
# damaged, it fails on pixels that are not.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow's readers raise on damaged files.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    TypeError,
    IndexError,
    EOFError,
    struct.error,
    Warning,  # where whoever called has made them errors
)


@contextlib.contextmanager
def _decoding(name):
    """Makes one `ValueError` of all that Pillow raises on damaged files."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"`{name}` is above the limit of {MAX_PIXELS:,} pixels ({error}). "
            "Scale it down or cut it into tiles."
        ) from None
    except UnidentifiedImageError:
        raise ValueError(
            f"`{name}` is empty, damaged or of another format; "
            f"expected an image file, one of {', '.join(FORMATS)}."
        ) from None
    except _DAMAGE as error:
        raise ValueError(
            f"`{name}` cannot be decoded ({error}): it is cut short or damaged. "
            "Fetch or export it again."
        ) from None


def _open(path):
    """Opens an image file: its header is read and judged, no pixel decoded."""
    file = Path(path)
    if file.exists() and not file.is_file():
        raise ValueError(f"`{path}` is not a file; expected an image file.")
    content = io.BytesIO(file.read_bytes())
    with _decoding(path):
        image = Image.open(content, formats=FORMATS)
    _check_size(image, path)
    return image


def _check_size(image, name):
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise ValueError(
            f"`{name}` is {width} x {height}, above the limit of {MAX_PIXELS:,} "
            "pixels. Scale it down or cut it into tiles."
        )


def described(item):
    """Says in an error what came in place of a picture, labels or a pair of them.

    Args:
        item: Anything; arrays and tensors are told by type and shape.
    """
    if hasattr(item, "shape"):
        return f"{item.dtype} of shape {tuple(item.shape)}"
    if isinstance(item, dict):
        return f"a dict of {', '.join(map(str, item))}"
    parts = f" of {len(item)}" if isinstance(item, tuple | list) else ""
    return f"a {type(item).__name__}{parts}"


def _raw_mode(image):
    """Returns how an opened image stores its pixels, such as "L;2": Pillow's name."""
    for part in image.tile:
        return part.args if isinstance(part.args, str) else part.args[0]
    return image.mode


def _load(image, name):
    """Decodes an opened image and turns it upright."""
    with _decoding(name):
        image.load()
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
        return image if turn is None else image.transpose(turn)


def _to_rgb(image, name):
    if image.mode == "La":  # which no file has
        raise ValueError(
            f"{name} is of mode La, grey that was multiplied by its opacity, which "
            'Pillow turns into LA alone. Pass image.convert("LA").'
        )
    if image.mode in ("I", "F"):
        raise ValueError(
            f"`{name}` holds 32-bit pixels (mode {image.mode}), whose range is "
            "unknown. Scale them to 0-255 and pass them as uint8."
        )
    if image.mode.startswith("I;16"):
        grey = np.asarray(image)
        white = grey == image.info.get("transparency", -1)
        return _check_array(np.where(white, 255, np.rint(grey / 257)).astype(np.uint8))
    with _decoding(name):
        if image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        return _check_array(np.array(image.convert("RGB")))


def _check_array(array):
    if array.dtype == np.uint8 and array.size and array.ndim == 2:
        return np.stack([array] * 3, axis=-1)
    if array.dtype != np.uint8 or not array.size or array.shape[2:] != (3,):
        found = f"{array.dtype} of shape {array.shape}"
        if not array.ndim:
            found = f"a {type(array.item()).__name__}"
        raise ValueError(
            f"The image is {found}; expected uint8 RGB, 0-255, of shape "
            f"(height, width, 3), or grey without the 3. {_remedy(array)}"
        )
    return array


def _remedy(array):
    """Says how what is no picture, such as floats or a batch, becomes one."""
    if not array.size or array.dtype.kind not in "biuf" or array.ndim not in (2, 3, 4):
        return "Pass one picture: a path, a PIL image or such an array."
    if array.ndim == 4:
        return "Pass one picture at a time, such as images[0]."
    channels = array.shape[2:]
    if channels == (1,):
        return "Take array[..., 0]."
    if channels == (4,):
        return "Take array[..., :3], or Image.fromarray(array) if it is RGBA."
    if channels not in ((), (3,)):
        return (
            "Move channels to the end with np.moveaxis, and take red, green and blue."
        )
    low, high = array.min(), array.max()
    if array.dtype.kind == "b":
        return 'Take 255 * array.astype("uint8").'
    if array.dtype.kind == "f" and 0 <= low <= high <= 1:
        return 'Take np.rint(255 * array).astype("uint8").'
    if 0 <= low <= high <= 255:
        return 'Take np.rint(array).astype("uint8").'
    if array.dtype.kind in "iu" and 0 <= low <= high <= 65535:
        return 'Of 16 bits take np.rint(array / 257).astype("uint8").'
    return f"Scale its numbers, {low} to {high}, to 0-255."


def _check_labels(labels):
    labels = np.asarray(labels)
    if labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(
            f"The labels are {labels.dtype}, maybe negative; expected integers from 0. "
            "`decode_segmentation` turns a model's scores into labels."
        )
    return labels


def _color_table(labels, palette):
    """The colours of all labels up to 255 or beyond, void's among them."""
    palette = voc_colormap() if palette is None else np.asarray(palette)
    in_range = palette.dtype.kind in "iu" and np.isin(palette, range(256)).all()
    if palette.ndim != 2 or palette.shape[1] != 3 or not in_range:
        raise ValueError(
            f"The palette is {palette.dtype} of shape {palette.shape}; expected "
            "integers from 0 to 255, of shape (classes, 3), such as "
            'keras_fcn.labels.LABEL_SETS["camvid"].palette.'
        )
    highest = labels.max(initial=0, where=labels != VOID)
    if highest >= len(palette):
        raise ValueError(
            f"Label {highest} has no colour: the palette has {len(palette)} entries. "
            "Pass the palette of the label set that the labels are from."
        )
    table = np.zeros((max(256, len(palette)), 3), np.uint8)
    table[: len(palette)] = palette
    table[VOID] = VOID_COLOR
    return table


def _write(path, image, format):
    content = io.BytesIO()
    image.save(content, format, quality=95)
    write_bytes(path, content.getbuffer())
