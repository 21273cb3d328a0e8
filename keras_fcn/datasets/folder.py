"""A folder of images and a folder of masks, checked.

A mask is a grey or palette image, of its image's name and size, that holds one label
per pixel. Before the first step every mask is read once: labels out of range stop
TensorFlow and PyTorch somewhere inside an epoch, and JAX not at all.
"""

import struct
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from keras_fcn import images
from keras_fcn.labels import LABEL_SETS, VOID, LabelSet, voc_colormap

MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".webp", ".gif", *MASK_SUFFIXES)

# What `inspect` counts.
OF_FILES = ("sizes", "image_modes", "mask_modes", "palettes")
OF_LABELS = ("pixels", "masks", "colors", "drawn")
MANY_COLORS = 1000  # no label map has more: counting them ends here
MANY_FAULTS = 10  # files at fault that are listed one by one

# What Pillow raises on a damaged header.
_DAMAGE = (OSError, ValueError, SyntaxError, struct.error, Image.DecompressionBombError)


def pairs(image_folder, mask_folder):
    """Finds each image's mask: the file of the same name but for the suffix.

    Args:
        image_folder: Folder of JPEG, PNG, WebP, TIFF, BMP or GIF images.
        mask_folder: Folder of PNG, TIFF or BMP masks.

    Returns:
        List of (image path, mask path), sorted by name. Hidden files are left out.

    Raises:
        FileNotFoundError: If a folder is missing or has no such file.
        ValueError: If an image has no mask, a mask no image, or if two files of a
            folder differ in their suffix only.
    """
    found, problems = _match(image_folder, mask_folder)
    if problems:
        raise ValueError(" ".join(problems))
    return found


def masks(folder):
    """Returns the paths of a folder's masks, sorted by name.

    Raises:
        FileNotFoundError: If the folder is missing or has none.
    """
    return _files(folder, MASK_SUFFIXES, "masks")


def check(pairs, num_classes, *, relabel=None):
    """Reads every mask once and makes sure that a model can be trained on it.

    Args:
        pairs: List of (image path, mask path).
        num_classes: Number of classes; labels are 0 to `num_classes - 1`, and 255.
        relabel: Labels to replace, `{in the file: to train on}`.

    Returns:
        The (height, width) of each pair.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a mask cannot be read, has another size than its image or
            holds other labels. All masks of other labels make one error.
    """
    sizes, _ = _read(pairs, num_classes, _relabel_table(relabel))
    return sizes


class Folder:
    """A source (see `batches`) of a folder's images and masks, checked at once.

    Args:
        pairs: List of (image path, mask path), as `pairs` gives.
        num_classes: Number of classes; labels are 0 to `num_classes - 1`, and 255.
        relabel: Labels to replace at reading, `{in the file: to return}`.
        label_set: A `LabelSet` with the classes' names and colours; nameless and in
            the colours of VOC if None.

    Attributes:
        ids: The images' names without suffix, in order.
        label_sets: `{"": label_set}`.
        label_counts: The pixels of each label as they were checked, (256,) int64: what
            `batches.label_counts` would read all masks again for.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a mask does not pass `check`.
    """

    def __init__(self, pairs, num_classes, *, relabel=None, label_set=None):
        self.pairs = list(pairs)
        self._table = _relabel_table(relabel)
        _, self.label_counts = _read(self.pairs, num_classes, self._table)
        self.ids = [Path(image).stem for image, _ in self.pairs]
        self.label_sets = {"": label_set or LabelSet((), voc_colormap())}

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        image, mask = self.pairs[index]
        picture, labels = images.read_image(image), self.labels(index)
        if picture.shape[:2] != labels.shape:  # changed since they were checked
            raise ValueError(_mismatch(image, picture.shape[:2], mask, labels.shape))
        return picture, labels

    def labels(self, index):
        """Reads the labels alone, (height, width) uint8."""
        return self._table[images.read_labels(self.pairs[index][1])]


def inspect(image_folder, mask_folder, *, relabel=None, progress=None):
    """Looks for whatever may be wrong with a folder of images and one of masks.

    Every file is decoded. What is wrong with files is collected, not raised.

    Args:
        image_folder: Folder of images.
        mask_folder: Folder of masks.
        relabel: Labels to replace, `{in the file: to train on}`.
        progress: Called with the number of pairs done and that of all, after each.

    Returns:
        Dict of `pairs`, their number; of `sizes`, `image_modes`, `mask_modes` and
        `palettes`, each a `Counter` of files, by (height, width), by Pillow's mode and
        by the label set whose colours the palette has; of `pixels` and `masks`, the
        number of pixels of each label, as it is trained on, and of masks that hold it;
        of `colors`, the number of pixels of each (red, green, blue) in masks that hold
        colours instead of labels; of `drawn`, the number of masks by (label in the
        file, its colour in the palette); and of `warnings`, a list of sentences.

    Raises:
        FileNotFoundError: If a folder is missing or has no such file.
        ValueError: If `relabel` holds no labels.
    """
    table = _relabel_table(relabel)
    found, warnings = _match(image_folder, mask_folder)
    report = {"pairs": len(found)}
    report |= {name: Counter() for name in OF_FILES + OF_LABELS}
    faults = []
    for done, (image, mask) in enumerate(found, start=1):
        sizes = []
        for look, *where in ((_inspect_image, image), (_inspect_mask, mask, table)):
            try:
                sizes.append(look(report, *where))
            except (OSError, ValueError) as error:
                faults.append(str(error))
        if len(set(sizes)) == 2:
            faults.append(_mismatch(image, sizes[0], mask, sizes[1]))
        if progress:
            progress(done, len(found))
    if len(faults) > MANY_FAULTS:
        faults[MANY_FAULTS:] = [f"{len(faults) - MANY_FAULTS} more files are at fault."]
    warnings += faults
    for look in (_image_warnings, _color_warnings, _palette_warnings, _label_warnings):
        warnings += look(report)
    return report | {"warnings": warnings}


def summary(report):
    """Writes what `inspect` found as lines of text."""
    lines = [f"{report['pairs']} pairs of an image and a mask"]
    for name in OF_FILES:
        counted = [
            f"{' x '.join(map(str, key)) if name == 'sizes' else key} ({count})"
            for key, count in report[name].most_common()
        ]
        if counted:
            lines.append(f"{name.replace('_', ' ')}: {_some(counted)}")
    total = report["pixels"].total()
    if total:
        lines.append("label       pixels    share   masks")
    for label, pixels in sorted(report["pixels"].items()):
        void = "  void" if label == VOID else ""
        masks = report["masks"][label]
        lines.append(f"{label:5} {pixels:12,} {pixels / total:8.2%} {masks:7}{void}")
    lines += [f"warning: {warning}" for warning in report["warnings"]]
    return "\n".join(lines if report["warnings"] else [*lines, "nothing looks wrong"])


def _match(image_folder, mask_folder):
    """Pairs two folders' files; returns the pairs, and what keeps others from one."""
    problems, by_stem = [], []
    for folder, suffixes, kind in (
        (image_folder, IMAGE_SUFFIXES, "images"),
        (mask_folder, MASK_SUFFIXES, "masks"),
    ):
        files = _files(folder, suffixes, kind)
        by_stem.append({path.stem: path for path in files})
        count = Counter(path.stem for path in files)
        alike = [path.name for path in files if count[path.stem] > 1]
        if alike:
            problems.append(
                f"`{folder}` has {kind} that differ in their suffix only: "
                f"{_some(alike)}. Keep one of each."
            )
    for own, others, other, kind in (
        (by_stem[0], by_stem[1], mask_folder, "mask"),
        (by_stem[1], by_stem[0], image_folder, "image"),
    ):
        alone = [path.name for stem, path in own.items() if stem not in others]
        if alone:
            problems.append(
                f"{len(alone)} of {len(own)} files have no {kind} of their name in "
                f"`{other}`: {_some(alone)}. Add or rename it, or take them away."
            )
    pictures, masks = by_stem
    found = [(pictures[stem], masks[stem]) for stem in pictures if stem in masks]
    return found, problems


def _files(folder, suffixes, kind):
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"`{folder}` is no folder; expected one that holds {kind}. Check the path."
        )
    visible = [
        path
        for path in folder.iterdir()
        if not path.name.startswith(".") and not path.is_dir()
    ]
    files = [path for path in visible if path.suffix.lower() in suffixes]
    if not files:
        raise FileNotFoundError(
            f"`{folder}` holds no {kind}: none of its {len(visible)} files ends in "
            f"{', '.join(suffixes)}. Pass the folder that holds the files themselves."
        )
    return sorted(files, key=lambda path: path.name)


def _header(path):
    """Reads an image's kind, such as "RGB" or "L JPEG", and upright (height, width)."""
    try:
        with Image.open(path, formats=images.FORMATS) as image:
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) > 4
            lies &= image.format != "TIFF"  # whose size Pillow turns by itself
            size = image.size if lies else image.size[::-1]
            lossy = " JPEG" if image.format in ("JPEG", "MPO") else ""
            return image.mode + lossy, size
    except _DAMAGE:
        images.read_image(path)  # raises, and says what is wrong
        raise


def _read(pairs, num_classes, table):
    """Reads and checks all masks; returns their sizes, and the pixels of each label."""
    if not pairs:
        raise ValueError("There are no pairs; expected one image and mask at least.")
    if isinstance(num_classes, dict):
        raise ValueError(
            f"The net has the heads {', '.join(num_classes)}; expected a net of one, "
            "as a folder holds one mask per image. Use keras_fcn.evaluate with "
            "keras.Model(model.inputs, model.output[head])."
        )
    valid = (table < num_classes) | (table == VOID)
    sizes, wrong, counts = [], {}, np.zeros(256, np.int64)
    for image, mask in pairs:
        labels, (_, size) = images.read_labels(mask), _header(image)
        if labels.shape != size:
            raise ValueError(_mismatch(image, size, mask, labels.shape))
        sizes.append(size)
        histogram = _histogram(labels)
        counts += _relabeled(histogram, table)
        stray = np.flatnonzero(~valid & (histogram > 0))
        if stray.size:
            wrong[mask] = stray.tolist()
    if wrong:
        raise ValueError(_stray_labels(wrong, num_classes))
    return sizes, counts


def _histogram(labels):
    return np.bincount(labels.ravel(), minlength=256)


def _relabeled(histogram, table):
    """Returns the pixels of each label after replacing, from those before."""
    counts = np.zeros_like(histogram)
    np.add.at(counts, table, histogram)
    return counts


def _relabel_table(relabel):
    """Makes a table of 256 labels from the labels to be replaced."""
    relabel = relabel or {}
    strange = [
        label for pair in relabel.items() for label in pair if label not in range(256)
    ]
    if strange:
        raise ValueError(
            f"`relabel` is {relabel}, but {strange[0]} is no label; expected integers "
            "from 0 to 255, such as {11: 255} if label 11 marks unlabelled pixels."
        )
    table = np.arange(256, dtype=np.uint8)
    table[list(relabel)] = list(relabel.values())
    return table


def _some(names):
    names = [str(name) for name in names]
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _mismatch(image, size, mask, labels_size):
    return (
        f"`{mask}` is {labels_size[0]} x {labels_size[1]}, but its image `{image}` is "
        f"{size[0]} x {size[1]} (height x width). Export it at the image's size."
    )


def _stray_labels(wrong, num_classes):
    """Says which masks hold labels that are none; `wrong` is {mask: labels}."""
    mask, labels = next(iter(wrong.items()))
    others = f" (and {len(wrong) - 1} more masks such labels)" if len(wrong) > 1 else ""
    every = set().union(*wrong.values())
    remedy = "`inspect`, or `keras-fcn check-data`, shows what the masks hold."
    if len(every) == 1:
        remedy = (
            f"Pass `relabel={{{labels[0]}: {VOID}}}` (`--relabel {labels[0]}={VOID}`) "
            "if it marks unlabelled pixels."
        )
    return (
        f"`{mask}` holds label {_some(labels)}{others}; expected 0 to "
        f"{num_classes - 1}, or {VOID} for void. {remedy}"
    )


def _inspect_image(report, path):
    size = images.read_image(path).shape[:2]
    mode, _ = _header(path)
    report["sizes"][size] += 1
    report["image_modes"][mode] += 1
    return size


def _inspect_mask(report, path, table):
    mode, size = _header(path)
    report["mask_modes"][mode] += 1
    if mode in ("RGB", "RGBA"):
        if len(report["colors"]) < MANY_COLORS:
            report["colors"].update(_colors(images.read_image(path)))
        return size
    histogram = _histogram(images.read_labels(path))
    counts = _relabeled(histogram, table)
    labels = np.flatnonzero(counts).tolist()
    report["pixels"].update({label: int(counts[label]) for label in labels})
    report["masks"].update(labels)
    if mode == "P":
        labels = np.flatnonzero(histogram).tolist()
        with Image.open(path, formats=images.FORMATS) as mask:
            flat = mask.getpalette()
        drawn = {i: tuple(flat[3 * i : 3 * i + 3]) for i in labels if i != VOID}
        report["drawn"].update(drawn.items())
        report["palettes"][_palette_name(drawn)] += 1
    return size


def _colors(image):
    """Counts the pixels of each (red, green, blue)."""
    codes, counts = np.unique(
        image @ np.array([1 << 16, 1 << 8, 1]), return_counts=True
    )
    colors = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)
    return dict(zip(map(tuple, colors.tolist()), counts.tolist(), strict=True))


def _palette_name(drawn):
    """Names the label set that gives labels these colours, `{label: color}`."""
    for name, label_set in LABEL_SETS.items():
        colors = dict(enumerate(map(tuple, label_set.palette.tolist())))
        if drawn.items() <= colors.items():
            return name
    return "other"


def _image_warnings(report):
    modes = report["image_modes"]
    grey = [mode for mode in modes if mode[0] in "1LI"]
    if grey:
        yield (
            f"{sum(modes[mode] for mode in grey)} of {modes.total()} images are grey "
            f"({_some(grey)}): they become three equal channels of 8 bits. A model "
            "trained on them expects grey pictures."
        )


def _color_warnings(report):
    colors = report["colors"]
    if not colors:
        return
    known = [
        name
        for name, label_set in LABEL_SETS.items()
        if {*colors} <= {images.VOID_COLOR, *map(tuple, label_set.palette.tolist())}
    ]
    if len(colors) > 256:
        remedy = (
            "So many come from JPEG, from resizing, or from pictures that are no "
            "masks. Export them anew."
        )
    elif all(red == green == blue for red, green, blue in colors):
        remedy = 'All are greys: save one channel, `Image.convert("L")`.'
    elif known:
        remedy = (
            f'They are those of `LABEL_SETS["{known[0]}"].palette`: look up each '
            "pixel's index there and save it with `save_labels`."
        )
    else:
        remedy = "Give each an index and save the indices with `save_labels`."
    yield (
        f"Masks hold colours instead of labels, {len(colors)} different ones: "
        f"{_some(color for color, _ in colors.most_common())}. {remedy}"
    )


def _palette_warnings(report):
    count = Counter(label for label, _ in report["drawn"])
    torn = [label for label in sorted(count) if count[label] > 1]
    if torn:
        yield (
            f"In different masks these labels have different colours: {_some(torn)}. "
            "An index that was given mask by mask means another class in each. Make "
            "all masks with one palette."
        )


def _label_warnings(report):
    classes = sorted(set(report["pixels"]) - {VOID})
    if not report["pixels"]:
        return
    if not classes:
        yield f"All masks are void: they hold nothing but {VOID}."
    elif classes == [0] and VOID in report["pixels"]:
        yield (
            f"Masks hold 0 and {VOID} only: black and white, but {VOID} is void and "
            "would not be learnt. "
            f"Pass `relabel={{{VOID}: 1}}` (`--relabel {VOID}=1`), with 2 classes."
        )
    elif baked := _baked_palette(classes):
        yield (
            f"Labels {_some(classes)} are the greys of the {baked} palette: a program "
            "that does not know palettes has turned the masks to grey. Make them anew "
            "from the originals, keeping the indices."
        )
    elif classes[0] == 1:
        yield (
            "Labels start at 1, and class 0 would stay empty. Number them from 0, or "
            "pass `relabel={1: 0, 2: 1, ...}` (`--relabel 1=0 2=1 ...`)."
        )
    elif gaps := sorted(set(range(classes[-1])) - set(classes)):
        yield (
            f"No mask holds label {_some(gaps)}, but some hold {classes[-1]}. Make "
            "sure that these are classes, only rare."
        )


def _baked_palette(classes):
    """Names the label set of whose colours the labels are the greys, if of any."""
    for name, label_set in LABEL_SETS.items():
        colors = np.uint8([[*label_set.palette, images.VOID_COLOR]])
        greys = np.asarray(Image.fromarray(colors).convert("L"))
        if classes[-1] >= greys.size and np.isin(classes, greys).all():
            return name
    return None
