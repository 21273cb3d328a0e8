"""Batches of a source for `model.fit`: one stream on TensorFlow, JAX and PyTorch.

A *source* is a sequence: `source[i]` is a picture and its labels, `source.labels(i)`
the labels alone, `source.ids[i]` a name, `source.label_sets` what the labels mean, by
head. `folder.Folder` and `catalog.load` make them. A picture is (height, width, 3)
uint8, RGB; (height, width, 4) float32, RGB and depth in millimetres; or a dict of
such by stream. Labels are (height, width) uint8, 255 for void, or a dict by head; other
integers and bool will do. All of an item are of one height and width.

`Batches` checks each item, but not that its labels are classes, for it does not know
how many there are: `Folder` does, and `training.WeightedCrossentropy` is NaN, or an
error, where a label is none.
"""

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
from keras import tree
from PIL import Image, ImageFilter

from keras_fcn.images import described
from keras_fcn.labels import VOID

# Around a picture that does not fill its window: the mean that the VOC nets subtract
# (RGB) and that of the colour-depth net (mm), so that padding becomes the zeros with
# which convolutions pad.
MEAN_COLOR = (123, 117, 104)
MEAN_DEPTH = 2550  # exp(7.844)

CACHED = 2 * 2**30  # bytes of decoded pictures that are kept in memory, where asked
LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's grey
# The least and the most that arguments of `Batches` may be.
_RANGES = {
    "batch_size": (1, math.inf),
    "crop": (1, math.inf),
    "multiple": (1, math.inf),
    "jitter": (0, math.inf),
    "tint": (0, 1),
    "blur": (0, math.inf),
    "noise": (0, math.inf),
    "cutmix": (0, 1),
    "cell": (1, math.inf),
    "seed": (0, math.inf),
    "workers": (1, math.inf),
}


def label_counts(source, head=""):
    """Counts the pixels of each label, as class weights are made of.

    Args:
        source: As above.
        head: Whose labels, where there are several.

    Returns:
        (256,) int64; the last one is void's.

    Raises:
        ValueError: If labels are none, as in `Batches`, are not 0 to 255, or have no
            such head.
    """
    counts = np.zeros(256, np.int64)
    for i in range(len(source)):
        place, heads = f"source.labels({i})", _by_name(source.labels(i))
        if head not in heads:
            known = ", ".join(map(repr, heads))
            raise ValueError(
                f"{place} has the heads {known}, and head={head!r} was given; expected "
                "one of them, '' for the only one."
            )
        labels = heads[head]
        _check_labels(labels, place)
        if labels.min() < 0 or labels.max() > 255:
            raise ValueError(
                f"{place} holds the values {labels.min()} to {labels.max()}; expected "
                f"classes from 0, and {VOID} for void."
            )
        counts += np.bincount(labels.astype(np.uint8).ravel(), minlength=256)
    return counts


class Batches(keras.utils.PyDataset):
    """Serves the pictures of a source and their labels as batches.

    Without `crop` they are whole pictures, in the upper left corner of the largest one
    of the batch. So `Batches(source)` is what the reference was trained on but for its
    order: pictures one by one, as they are. JAX compiles anew for each size: with
    `multiple=128` there are few. With `crop` a batch holds windows of that size at
    random places. Where a window reaches beyond the picture the image is `MEAN_COLOR`
    (and `MEAN_DEPTH`), the label void.

    The order is drawn from `(seed, epoch)`, the changes to a picture from
    `(seed, epoch, its place in the source)`: whichever thread reads it, a batch is a
    function of the seed, the epoch and its index. Keras must therefore leave the order
    alone:

    ```python
    source = Folder(pairs("images", "masks"), num_classes=11)
    batches = Batches(source, batch_size=8, crop=(256, 256))
    model.fit(batches, epochs=100, shuffle=False)
    ```

    A run that ended before batch 30 of epoch 7 goes on as if it had not:

    ```python
    batches.seek(7, batch=30)
    model.fit(batches, initial_epoch=7, epochs=8, shuffle=False)
    batches.seek(8)
    model.fit(batches, initial_epoch=8, epochs=100, shuffle=False)
    ```

    Args:
        source: A sequence of (picture, labels), as above.
        batch_size: Pictures per batch; the last batch of an epoch may have fewer.
        crop: (height, width) of the windows, or `None` for whole pictures.
        multiple: What the sides of whole pictures are filled up to a multiple of.
        scale: (lowest, highest) factor of a picture's size, drawn so that halving is
            as likely as doubling. Needs `crop`.
        mirror: Whether every second picture is mirrored, left to right.
        jitter: Most pixels by which a whole picture is moved along each side, such as
            32 (Long et al., 2015, section 4.3). Windows are at random places anyway.
        color: Most that brightness, contrast and saturation change, such as
            `(0.3, 0.3, 0.3)`: each is multiplied by 0.7 to 1.3. RGB alone; of a dict,
            the stream "color".
        tint: Most that red, green and blue change, each by itself: the light's colour.
        blur: Largest standard deviation, in pixels, of the Gaussian with which every
            second picture is blurred. As `color`, as are the others; uint8 alone.
        noise: Largest standard deviation, in grey levels, of the noise that is added.
        cutmix: Share of the windows of which a rectangle is another picture's, labels
            and all (Yun et al., 2019, "CutMix"): a twentieth to two fifths of the
            window, its shape stretched by up to 1.65 either way. Needs `crop`.
        keep: Share of the final cells whose loss counts, each drawn by itself: the
            patchwise training of Long et al., 2015, section 4.3. See `sample_cells`.
        cell: Pixels along each side of a final cell, for `keep`: the net's stride.
        shuffle: Whether the pictures change places in every epoch.
        replacement: Whether each picture is drawn from all of them, as the reference
            does, so that an epoch holds some twice and others not.
        seed: Integer from 0.
        workers: Threads that read ahead of the training.
        cache: Whether to keep the decoded pictures in memory, up to `CACHED` bytes.
        shard: (rank, count) for one of several processes that share each batch: this
            one reads every count-th picture of it. A batch that does not divide is cut.

    Attributes:
        fault: What kept a batch from being read, as it was raised: out of `fit` comes
            another error on TensorFlow. None if nothing has.

    Raises:
        ValueError: If an argument makes no sense.
    """

    def __init__(
        self,
        source,
        *,
        batch_size=1,
        crop=None,
        multiple=1,
        scale=None,
        mirror=False,
        jitter=0,
        color=None,
        tint=0.0,
        blur=0.0,
        noise=0.0,
        cutmix=0.0,
        keep=1.0,
        cell=32,
        shuffle=True,
        replacement=False,
        seed=0,
        workers=2,
        cache=False,
        shard=(0, 1),
    ):
        # Keras' own workers are not used: what they read while `fit` looks at a first
        # batch, JAX and PyTorch train on later, in the wrong epoch (Keras 3.15).
        super().__init__()
        if crop is not None and np.shape(crop) != (2,):
            raise ValueError(f"`crop` is {crop}; expected (height, width), or None.")
        _check_ranges(
            batch_size=batch_size,
            crop=min(crop) if crop else 1,
            multiple=multiple,
            jitter=jitter,
            tint=tint,
            blur=blur,
            noise=noise,
            cutmix=cutmix,
            cell=cell,
            seed=seed,
            workers=workers,
        )
        if scale is not None and not (
            crop and np.shape(scale) == (2,) and 0 < scale[0] <= scale[1]
        ):
            raise ValueError(
                f"`scale` is {scale} and `crop` {crop}; expected (lowest, highest) "
                "factors above 0, and the size of a window to cut out: pass both."
            )
        if color is not None and not (
            np.shape(color) == (3,) and 0 <= min(color) <= max(color) <= 1
        ):
            raise ValueError(
                f"`color` is {color}; expected the changes of brightness, contrast and "
                "saturation, each 0 to 1, such as (0.3, 0.3, 0.3)."
            )
        if cutmix and not crop:
            raise ValueError(
                f"`cutmix` is {cutmix} and `crop` {crop}; expected the size of a "
                "window to cut out, too: pass both."
            )
        if jitter and crop:
            raise ValueError(
                f"`jitter` is {jitter} and `crop` {crop}; expected one of them, as "
                "windows are at random places anyway."
            )
        if not 0 < keep <= 1:
            raise ValueError(f"`keep` is {keep}; expected a share above 0, at most 1.")
        rank, count = shard
        if not 0 <= rank < count <= batch_size:
            raise ValueError(
                f"`shard` is {shard} of batches of {batch_size}; expected a rank below "
                "the count, and no more processes than pictures in a batch."
            )
        if not len(source):
            raise ValueError("The source is empty; expected one picture at least.")
        self.source, self.batch_size, self.shard = source, batch_size, shard
        self.crop, self.multiple = crop, multiple
        self.scale, self.mirror, self.jitter, self.color = scale, mirror, jitter, color
        self.tint, self.blur, self.noise = tint, blur, noise
        self.cutmix = cutmix
        self.keep, self.cell = keep, cell
        self.shuffle, self.replacement, self.seed = shuffle, replacement, seed
        self._decoded, self._room = {}, CACHED if cache else 0
        self._pool, self._ahead = ThreadPoolExecutor(workers), workers
        self._pending, self._lock = {}, threading.Lock()
        self._within, self._looks, self.fault = False, 0, None
        self.seek(0)

    def seek(self, epoch, batch=0):
        """Goes to an epoch, and to the batch of it that is now called 0.

        An epoch that is entered halfway is as much shorter, and does not lead on to the
        next one: `seek` that after it.

        Args:
            epoch: Number of the epoch, from 0.
            batch: Number of the batch in the whole epoch, from 0.
        """
        self.epoch, self.first = epoch, batch
        self._asked = self._previous = 0

    def __len__(self):
        return self._count() - self.first

    def _count(self):
        """The batches of a whole epoch."""
        # A last batch of fewer pictures than processes would leave some with none.
        whole, rest = divmod(len(self.source), self.batch_size)
        return whole + (rest >= self.shard[1])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    @property
    def num_batches(self):
        """The number of batches, for Keras, which may then look at the first two."""
        self._looks = 2
        return len(self)

    def __getitem__(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no batch {index}: there are {len(self)}.")
        if self._within:
            self._follow(index)
        self._looks -= 1
        count = self._count()
        place = self.epoch * count + self.first + index
        wanted = [divmod(place + i, count) for i in range(1 + self._ahead)]
        with self._lock:
            self._pending = {
                key: self._pending.get(key) or self._pool.submit(self.batch, *key)
                for key in wanted
            }
            reading = self._pending[wanted[0]]
        try:
            batch = reading.result()
        except Exception as error:
            self.fault = error
            raise
        if index == 1 and self._looks == 0 and not (self._within or self.crop):
            # Keras on TensorFlow looks at two batches before the first epoch: sides in
            # which these agree must agree in all others.
            return tree.map_structure(_extended, batch)
        return batch

    def on_epoch_begin(self):
        """Notes that Keras begins a pass, be it only to look at the first batch."""
        self._within = True

    def on_epoch_end(self):
        """Goes to the next epoch if all batches of this one have been asked for.

        Keras calls this before the first epoch, too, and on JAX and PyTorch after a
        look at the first batch: where that is the only one, the look counts as a pass.
        """
        self._within, self._looks = False, 0
        if self._asked >= len(self) and not self.first:
            self.seek(self.epoch + 1)

    def order(self, epoch):
        """Returns the places in the source, in the order in which an epoch has them.

        Args:
            epoch: Number of the epoch, from 0.

        Returns:
            (pictures,) int64, each of them once, but with `replacement`.
        """
        length = len(self.source)
        rng = np.random.default_rng((self.seed, epoch))
        if self.replacement:
            return rng.integers(length, size=length)
        return rng.permutation(length) if self.shuffle else np.arange(length)

    def batch(self, epoch, index):
        """Reads a batch of any epoch.

        Args:
            epoch: Number of the epoch, from 0.
            index: Number of the batch in the whole epoch, from 0.

        Returns:
            Pictures, (batch, height, width, channels) float32, and labels,
            (batch, height, width) int32, or dicts of them.

        Raises:
            IndexError: If the epoch has no such batch.
            ValueError: If an item of the source is no picture and its labels, or if its
                colours are to be changed and it has none.
            Exception: Whatever else the source raises.
        """
        if not 0 <= index < self._count():
            raise IndexError(f"There is no batch {index}: there are {self._count()}.")
        start, (rank, processes) = index * self.batch_size, self.shard
        chosen = self.order(epoch)[start : start + self.batch_size].tolist()
        if processes > 1:
            chosen = chosen[: len(chosen) // processes * processes][rank::processes]
        read = [self._read(i) for i in chosen]
        size = self.crop or [
            math.ceil(max(lengths) / self.multiple) * self.multiple
            for lengths in zip(*(_shape(labels) for _, labels in read), strict=True)
        ]
        samples = [
            self._sample((epoch, start + rank + i * processes, place), size, pair)
            for i, (place, pair) in enumerate(zip(chosen, read, strict=True))
        ]
        return tree.map_structure(lambda *arrays: np.stack(arrays), *samples)

    def _sample(self, at, size, pair):
        """Returns a picture and its labels as an epoch has them."""
        epoch, turn, place = at
        # 1 + place: to NumPy (seed, epoch, 0) is (seed, epoch), which draws the order.
        key = (self.seed, epoch, 1 + place)
        # Drawn twice in an epoch, a picture is to be changed in two ways.
        rng = np.random.default_rng((*key, 1 + turn) if self.replacement else key)
        sample = self._change(rng, size, *pair)
        if self.cutmix and rng.random() < self.cutmix:
            other = self._read(int(rng.integers(len(self.source))))
            part = _random_rectangle(rng, size)
            _paste(self._change(rng, size, *other), sample, part)
        return sample

    def _change(self, rng, size, pictures, labels):
        """Scales, cuts, recolours and mirrors a picture and its labels."""
        shape = _shape(labels)
        factor = math.exp(rng.uniform(*np.log(self.scale))) if self.scale else 1
        scaled = [max(1, round(factor * length)) for length in shape]
        corner = (0, 0)
        if self.crop:
            corner = _random_corner(rng, scaled, self.crop)
        elif self.jitter:
            corner = rng.integers(-self.jitter, self.jitter, 2, endpoint=True)
        pictures, labels, inside = cut(pictures, labels, scaled, corner, size)
        for change, amount in (
            (_blurred, self.blur),
            (_recolored, self.color),
            (_tinted, self.tint),
            (_noisy, self.noise),
        ):
            if amount:
                pictures = _changed(change, pictures, amount, rng)
        step = -1 if self.mirror and rng.random() < 0.5 else 1
        pictures, labels = (
            tree.map_structure(lambda x: _laid(x, inside, size)[:, ::step], part)
            for part in (pictures, labels)
        )
        if self.keep < 1:
            labels = sample_cells(labels, self.keep, self.cell, rng)
        return pictures, labels

    def _follow(self, index):
        """Counts a batch of the pass, and makes sure that Keras keeps to the order."""
        if index not in (0, self._previous + 1):
            raise ValueError(
                f"Batch {index} was asked for after batch {self._previous}; expected "
                f"batch 0 or {self._previous + 1}. Pass `shuffle=False` to `fit`, for "
                "the order is drawn here, anew every epoch, and no `steps_per_epoch`, "
                "for an epoch has all batches. To look at a batch meanwhile, call "
                "`batch(epoch, index)`."
            )
        self._asked, self._previous = self._asked + 1, index

    def _read(self, index):
        if index in self._decoded:
            return self._decoded[index]
        read = _checked(self.source[index], f"source[{index}]")
        size = sum(array.nbytes for array in tree.flatten(read))
        with self._lock:
            if index not in self._decoded and size <= self._room:
                self._decoded[index] = read
                self._room -= size
        return read


def _check_ranges(**values):
    for name, value in values.items():
        least, most = _RANGES[name]
        if not least <= value <= most:
            limit = "or more" if most == math.inf else f"to {most}"
            raise ValueError(f"`{name}` is {value}; expected {least} {limit}.")


def _checked(item, place):
    """Returns an item of a source if it is a picture and its labels."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise ValueError(
            f"{place} is {described(item)}; expected (picture, labels). Return a "
            "tuple of the two."
        )
    pictures, labels = map(_by_name, item)
    for name, picture in pictures.items():
        _check_picture(picture, f"{place}{name and f', {name}'}")
    for name, each in labels.items():
        _check_labels(each, f"{place}{name and f', {name}'}")
    sizes = {array.shape[:2] for array in (*pictures.values(), *labels.values())}
    if len(sizes) > 1:
        found = ", ".join(
            f"{kind}{name and f' {name}'} {array.shape[0]} x {array.shape[1]}"
            for kind, arrays in (("picture", pictures), ("labels", labels))
            for name, array in arrays.items()
        )
        raise ValueError(
            f"{place} has sizes that differ (height x width): {found}; expected one. "
            "Resize labels with Image.Resampling.NEAREST, or read both at one size."
        )
    return item


def _check_picture(picture, place):
    is_picture = (
        isinstance(picture, np.ndarray)
        and picture.size
        and picture.ndim == 3
        and (
            (picture.dtype == np.uint8 and picture.shape[-1] == 3)
            or (picture.dtype in (np.float32, np.float64) and picture.shape[-1] <= 4)
        )
    )
    if not is_picture:
        raise ValueError(
            f"{place}: the picture is {described(picture)}; expected a NumPy array, "
            "(height, width, 3) uint8, or (height, width, 1 to 4) float32. Make one "
            "with keras_fcn.images.read_image of a path, a PIL image or grey, with "
            'astype("float32") of other numbers.'
        )


def _check_labels(labels, place):
    is_labels = (
        isinstance(labels, np.ndarray)
        and labels.size
        and labels.ndim == 2
        and labels.dtype.kind in "uib"
    )
    if not is_labels:
        raise ValueError(
            f"{place}: the labels are {described(labels)}; expected a NumPy array, "
            f"(height, width), of integers, {VOID} for void. {_remedy(labels)}"
        )


def _remedy(labels):
    """Says how labels of another kind become labels."""
    if not isinstance(labels, np.ndarray) or not labels.size:
        return "Make one with np.array, or with keras_fcn.images.read_labels of a path."
    if labels.ndim == 2:
        return 'Number the classes from 0, and pass labels.astype("uint8").'
    if labels.shape[2:] == (1,):
        return "Take labels[..., 0]."
    return "Of one-hot labels take argmax(-1); give each colour an index."


def _by_name(item):
    return item if isinstance(item, dict) else {"": item}


def cut(pictures, labels, scaled, corner, size):
    """Scales a picture and cuts a window out of it, pictures and labels alike.

    Where n pixels are scaled to m cells, the centre of cell `i` is `(i + 1/2) n / m`
    pixels from the edge. Its colour is interpolated around that point, and averaged
    over the cell if the picture shrinks; its label is that of the pixel on which the
    point lies: neither is shifted against the other, and labels are never mixed.

    Args:
        pictures: (height, width, channels), or a dict of such.
        labels: (height, width), or a dict of such.
        scaled: (height, width) of the whole picture once scaled, in cells.
        corner: (row, column) of the window's upper left cell on the scaled picture;
            negative where the window begins outside.
        size: (height, width) of the window, in cells.

    Returns:
        The pictures and the labels of that part of the window that lies on the picture,
        and the part: two slices of the window.
    """
    box, pixels, inside = [], [], []
    for length, cells, start, extent in zip(
        _shape(labels), scaled, corner, size, strict=True
    ):
        first = min(max(start, 0), cells)
        last = max(min(start + extent, cells), first)
        box.append((first * length / cells, last * length / cells))
        pixels.append(((np.arange(first, last) + 0.5) * length / cells).astype(int))
        inside.append(slice(first - start, last - start))
    rows, columns = pixels
    return (
        tree.map_structure(
            lambda x: _zoomed(x, box, (len(rows), len(columns))), pictures
        ),
        tree.map_structure(lambda x: x[rows[:, None], columns], labels),
        tuple(inside),
    )


def sample_cells(labels, keep, cell, rng):
    """Makes a random choice of final cells void: patchwise training as loss sampling.

    Each cell of `cell` by `cell` pixels is kept with probability `keep`, by itself. The
    summed loss over what is left, divided by `keep`, is an unbiased estimate of that
    over all; batches 1 / `keep` times as large have as many cells as before (Long et
    al., 2015, section 4.3).

    Args:
        labels: (height, width) integers, or a dict of such, which share the choice.
        keep: Probability, above 0.
        cell: Pixels along each side.
        rng: A `numpy.random.Generator`.

    Returns:
        The labels, 255 where they are not to count.
    """
    cells = [math.ceil(length / cell) for length in _shape(labels)]
    kept = rng.random(cells) < keep
    kept = kept.repeat(cell, axis=0).repeat(cell, axis=1)
    height, width = _shape(labels)
    return tree.map_structure(
        lambda x: np.where(kept[:height, :width], x, np.asarray(VOID, x.dtype)), labels
    )


def _shape(labels):
    """The (height, width) of labels, be they one map or a dict of them."""
    return tree.flatten(labels)[0].shape


def _zoomed(picture, box, size):
    (top, bottom), (left, right) = box
    box, size = (left, top, right, bottom), size[::-1]
    if 0 in size:  # the window lies beside the picture
        return np.zeros((*size[::-1], picture.shape[-1]), picture.dtype)
    if picture.dtype == np.uint8:
        image = Image.fromarray(picture)
        return np.asarray(image.resize(size, Image.Resampling.BICUBIC, box))
    planes = [
        Image.fromarray(plane).resize(size, Image.Resampling.BILINEAR, box)
        for plane in np.ascontiguousarray(picture.transpose(2, 0, 1))
    ]
    return np.stack(planes, axis=-1)


def _laid(array, inside, size):
    """Lays a part of a window, of a picture or of labels, into the window."""
    if array.ndim == 2:
        canvas = np.full(size, VOID, np.int32)
    else:
        mean = np.float32([*MEAN_COLOR, MEAN_DEPTH][: array.shape[-1]])
        canvas = np.tile(mean, (*size, 1))
    canvas[inside] = array
    return canvas


def _extended(array):
    """A batch with a row and a column more, which do not count."""
    edges = [(0, 0), (0, 1), (0, 1), (0, 0)][: array.ndim]
    if array.ndim == 3:
        return np.pad(array, edges, constant_values=VOID)
    return np.pad(array, edges, mode="edge")


def _random_corner(rng, scaled, size):
    """Draws a window on the picture or, where that is smaller, around it."""
    spare = [cells - extent for cells, extent in zip(scaled, size, strict=True)]
    return [rng.integers(min(0, n), max(0, n), endpoint=True) for n in spare]


def _random_rectangle(rng, size):
    """Draws a part of a window, by its area and its shape: two slices."""
    side = math.sqrt(rng.uniform(0.05, 0.4))
    stretch = math.exp(rng.uniform(-0.25, 0.25))
    extents = [
        max(1, min(n, round(n * part)))
        for n, part in zip(size, (side * stretch, side / stretch), strict=True)
    ]
    starts = _random_corner(rng, size, extents)
    return tuple(slice(a, a + n) for a, n in zip(starts, extents, strict=True))


def _paste(source, target, part):
    """Replaces a part of a window and its labels, in place."""

    def replace(old, new):
        old[part] = new[part]

    tree.map_structure(replace, target, source)


def _changed(change, pictures, amount, rng):
    """Changes what is colour of a picture, or of a dict of them."""
    if isinstance(pictures, dict):
        color = _changed(change, pictures["color"], amount, rng)
        return {**pictures, "color": color}
    if pictures.shape[-1] != 3:
        raise ValueError(
            f"`color`, `tint`, `blur` or `noise` was given for a picture of "
            f"{pictures.shape[-1]} channels; expected RGB, as depth has no colour: "
            "leave it out."
        )
    # Jitter may move a small picture out of its window altogether.
    return change(pictures, amount, rng) if pictures.size else pictures


def _blurred(image, most, rng):
    """Blurs every second uint8 picture with a Gaussian."""
    if image.dtype != np.uint8:  # Pillow blurs no other
        raise ValueError(
            f"`blur` was given for a picture of {image.dtype}; expected uint8: leave "
            'it out, or serve the picture as np.rint(picture).astype("uint8").'
        )
    blurs, deviation = rng.random() < 0.5, most * rng.random()
    if not blurs:
        return image
    blur = ImageFilter.GaussianBlur(deviation)
    return np.asarray(Image.fromarray(image).filter(blur))


def _recolored(image, most, rng):
    """Multiplies the brightness, the distance to mean grey and that to grey itself."""
    brightness, contrast, saturation = rng.uniform(-1, 1, 3) * most + 1
    mix = saturation * np.eye(3) + (1 - saturation) * LUMA[:, None]
    changed = np.float32(image) @ np.float32(brightness * contrast * mix)
    grey = brightness * (1 - contrast) * image.mean()
    return np.clip(changed + np.float32(grey), 0, 255)


def _tinted(image, most, rng):
    """Multiplies each channel."""
    return np.clip(image * np.float32(1 + rng.uniform(-most, most, 3)), 0, 255)


def _noisy(image, most, rng):
    """Adds noise to each number of a picture by itself."""
    noise = rng.standard_normal(image.shape, np.float32)
    return np.clip(image + np.float32(most * rng.random()) * noise, 0, 255)
