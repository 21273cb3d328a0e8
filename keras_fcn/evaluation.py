"""What a net says of one picture, and how well it does on many."""

import math
import warnings

import keras
import numpy as np

from keras_fcn.images import decode_segmentation, described, read_image
from keras_fcn.labels import VOID
from keras_fcn.metrics import confusion_matrix, scores
from keras_fcn.weights import check_functional

COLOR, COLOR_AND_DEPTH = 3, 4  # channels
NEARLY_ALL = 0.999  # of the pixels


def segment(model, image, *, mirror=False, scales=(1,)):
    """Segments one picture of any size.

    With `mirror` or several `scales` the net looks that many times, and the mean of its
    class probabilities decides.

    Args:
        model: A net with preprocessing, such as
            `keras_fcn.FCN8s("googlenet", weights="camvid")`.
        image: A path (EXIF rotation is applied), a PIL image, or a uint8 array
            (height, width, 3), RGB, or (height, width), grey. For a net of several
            streams a dict of them, such as `{"color": "1.png", "hha": "1-hha.png"}`,
            all of one size. For a net from colour and depth an array
            (height, width, 4): RGB 0-255, and millimetres, 0 where they are unknown.
        mirror: Whether to look at the mirror image, too.
        scales: Factors of the picture's size to look at it at, in a sequence or an
            array. Where a depth is unknown, other sizes blend that 0 with what is
            around it: fill such holes first.

    Returns:
        (height, width) uint8 labels, of the picture's size (uint16 beyond 256
        classes); for a net of several heads, a dict of them.

    Raises:
        ValueError: If the image cannot be read or is not what the model takes; if the
            model is not functional, has no preprocessing or gives no score for each
            pixel, as a classifier; if its scores are NaN or of one class; or if the
            scales are no numbers above 0.
        OSError: If there is no such file, or if it may not be read.
    """
    inputs = _inputs(model)
    shapes = [tuple(tensor.shape[1:]) for tensor in inputs.values()]
    names = [layer.name for layer in model.layers]
    first = {f"preprocess{stream}" for stream in inputs}
    pictures = {(None, None, COLOR), (None, None, COLOR_AND_DEPTH)}
    if not set(shapes) <= pictures or not first <= set(names):
        raise ValueError(
            f"{model.name} takes {shapes}, with layers {', '.join(names[:3])} ...; "
            "expected a net from RGB pictures whose first layer is `preprocess`. Build "
            "it with include_preprocessing=True, or call model.predict yourself."
        )
    given = _by_name(image)
    _check_names(given, inputs, f"The image for {model.name}")
    given = {
        stream: _read(given[stream], tensor.shape[-1])[None]
        for stream, tensor in inputs.items()
    }
    pictures = given.get("", given)
    _check_sizes(pictures, inputs, f"The image for {model.name}")
    labels = _labels(model, pictures, mirror, scales)
    if isinstance(labels, dict):
        return {head: x[0] for head, x in labels.items()}
    return labels[0]


def evaluate(model, batches, *, mirror=False, scales=(1,), progress=None):
    """Scores a net on a data set, with one confusion matrix for the whole of it.

    Warns if the net finds one class nearly everywhere, and the truth several.

    Args:
        model: A net with one output, or with a dict of them, one for each head.
        batches: An iterable of (images, labels): (batch, height, width, 3) RGB 0-255
            and (batch, height, width) integers, or with a last axis of 1, 255 for
            void. Images are what the net takes, such as a dict by stream, or four
            channels with depth; labels of several heads are a dict by head. A
            `keras.utils.PyDataset` is read once.
        mirror: As in `segment`.
        scales: As in `segment`.
        progress: Called with the number of batches done, after each.

    Returns:
        The dict of `keras_fcn.metrics.scores`, with `confusion_matrix` as lists and
        `images`, their number. For a net of several heads, `{head: such a dict}`.

    Raises:
        ValueError: If there are no batches, if one is no pair, if a label is neither a
            class nor void, if images or labels are not those of the model's inputs and
            heads, if a number of an image is not finite or a score NaN, if scores are
            not as large as the image, or of 1 class or more than 255, or if the scales
            are no numbers above 0.
    """
    inputs, classes = _inputs(model), num_classes(model)
    matrices = {head: np.zeros((n, n), "int64") for head, n in classes.items()}
    images = 0
    for done, batch in enumerate(_once(batches), start=1):
        pictures, labels = _pair(batch, done - 1)
        _check_names(_by_name(pictures), inputs, f"The images of batch {done - 1}")
        _check_sizes(pictures, inputs, f"The images of batch {done - 1}")
        _check_finite(pictures, f"The images of batch {done - 1}")
        truths = _truths(labels, classes, done - 1)
        predictions = _by_name(_labels(model, pictures, mirror, scales))
        for head, truth in truths.items():
            found = predictions[head]  # by its name: Keras sorts the heads
            matrices[head] += confusion_matrix(truth, found, classes[head])
        images += len(truth)
        if progress:
            progress(done)
    if not images:
        raise ValueError("There are no batches to evaluate; expected one at least.")
    results = {}
    for head, matrix in matrices.items():
        _warn_of_one_class(matrix, f"{model.name} {head}".strip())
        results[head] = {
            **scores(matrix),
            "confusion_matrix": matrix.tolist(),
            "images": images,
        }
    return results.get("", results)


def one_by_one(source):
    """Serves the pictures of a source at their own size, for `evaluate`.

    No padding: it would change what the net says near the border.

    Args:
        source: A sequence of (inputs, labels): (height, width, channels), or a dict of
            such by stream, and (height, width), or a dict of such by head.

    Yields:
        The same as batches of one, inputs as float32.
    """
    for i in range(len(source)):
        inputs, labels = source[i]
        yield (
            keras.tree.map_structure(lambda x: np.float32(x)[None], inputs),
            keras.tree.map_structure(lambda x: np.asarray(x)[None], labels),
        )


def num_classes(model):
    """Returns `{head: classes}` of a net, with the head "" for its only output.

    Args:
        model: A net with one output, or with a dict of them.

    Raises:
        ValueError: If it has several outputs without names, or more than 255 classes.
    """
    if isinstance(model.output, list | tuple):
        raise ValueError(
            f"{model.name} has outputs without names; expected one output, or a dict. "
            "Build it as keras.Model(inputs, {head: output})."
        )
    classes = {head: x.shape[-1] for head, x in _by_name(model.output).items()}
    for head, n in classes.items():
        if n > VOID:
            raise ValueError(
                f"{model.name} has {n} classes{head and f' of {head}'}; expected "
                f"{VOID} at most, as the label {VOID} is void. Label with "
                "keras_fcn.segment, and count with metrics.confusion_matrix(void=-1)."
            )
    return classes


def _inputs(model):
    """The inputs of a model by stream, "" for a single one."""
    check_functional(model)
    if isinstance(model.input, dict):
        return model.input
    if len(model.inputs) > 1:
        raise ValueError(
            f"{model.name} has inputs without names; expected one input, or a dict. "
            "Build it as keras.Model({stream: input}, outputs)."
        )
    return {"": model.inputs[0]}


def _by_name(item):
    return item if isinstance(item, dict) else {"": item}


def _pair(batch, number):
    """The images and the labels of a batch, if it is a pair of them."""
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        raise ValueError(
            f"Batch {number} is {described(batch)}; expected (images, labels). Give a "
            "list of such tuples, of arrays [(images, labels)]; leave sample weights "
            f"out, and give pixels that are not to count the label {VOID}."
        )
    for array in _by_name(batch[0]).values():
        if not hasattr(array, "shape"):
            raise ValueError(
                f"The images of batch {number} are {described(array)}; expected an "
                "array or a tensor. Make one with np.array."
            )
    return batch


def _check_names(given, wanted, where):
    if given.keys() != wanted.keys():
        given, wanted = (
            "one without a name"
            if "" in names
            else f"a dict of {', '.join(map(str, names))}"
            for names in (given, wanted)
        )
        raise ValueError(f"{where}: {given} was given; expected {wanted}.")


def _check_sizes(pictures, inputs, where):
    shapes = {stream: tuple(x.shape) for stream, x in _by_name(pictures).items()}
    channels = {stream: tensor.shape[-1] for stream, tensor in inputs.items()}
    one_size = len({shape[:3] for shape in shapes.values()}) == 1
    if not one_size or any(shapes[s][3:] != (n,) for s, n in channels.items()):
        shapes, channels = (x.get("", x) for x in (shapes, channels))
        raise ValueError(
            f"{where}: shape {shapes} was given; expected (batch, height, width, "
            f"{channels}), of one size."
        )


def _check_finite(pictures, where):
    for stream, picture in _by_name(pictures).items():
        array = keras.ops.convert_to_numpy(picture)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ValueError(
                f"{where}{stream and f', {stream}'} hold numbers that are not finite; "
                "expected RGB 0-255, and depth with 0 where it is unknown."
            )


def _read(image, channels):
    """Reads a picture as float32, (height, width, channels)."""
    if channels == COLOR:
        return np.float32(read_image(image))
    array = np.asarray(image)
    is_number = array.dtype.kind in "uif" and array.size and np.isfinite(array).all()
    if not is_number or array.ndim != 3 or array.shape[-1] != channels:
        raise ValueError(
            f"The image is {array.dtype} of shape {array.shape}; expected finite "
            f"numbers of shape (height, width, {channels}): RGB 0-255, and depth in "
            "millimetres."
        )
    return array.astype("float32")


def _truths(labels, classes, batch):
    """Labels of a batch by head, (batch, height, width), checked."""
    given, truths = _by_name(labels), {}
    _check_names(given, classes, f"The labels of batch {batch}")
    for head, n in classes.items():
        truth = keras.ops.convert_to_numpy(given[head])
        is_class = (truth >= 0) & (truth < n) & (truth == np.trunc(truth))
        stray = truth[(truth != VOID) & ~is_class]
        if stray.size:
            raise ValueError(
                f"Batch {batch} holds labels {np.unique(stray)[:5].tolist()}"
                f"{head and f' for {head}'}; expected 0 to {n - 1}, or {VOID} for void."
            )
        truths[head] = truth.squeeze(-1) if truth.shape[3:] == (1,) else truth
    return truths


def _warn_of_one_class(matrix, name):
    truth, found, all_pixels = matrix.sum(axis=1), matrix.sum(axis=0), matrix.sum()
    if truth.max() < NEARLY_ALL * all_pixels <= found.max():
        label = found.argmax()
        warnings.warn(
            f"{name} finds class {label} in {found[label] / all_pixels:.1%} of all "
            f"pixels, where {truth[label] / all_pixels:.1%} are of it. Either its "
            "weights were not loaded, or its training failed (a lower learning rate "
            "may help), or its labels are not those of the data.",
            stacklevel=3,  # who called `evaluate`
        )


def _labels(model, pictures, mirror, scales):
    """Labels of a batch, (batch, height, width), or a dict of them."""
    scales = _factors(scales)
    if not mirror and scales == [1]:
        return decode_segmentation(_scores(model, pictures))
    each = keras.tree.map_structure  # stream, or head
    pictures = each(keras.ops.convert_to_numpy, pictures)  # Torch steps forwards only
    size, looks = next(iter(_by_name(pictures).values())).shape[1:3], []
    for scale in scales:
        scaled_size = [max(1, round(scale * length)) for length in size]
        scaled = each(lambda x, size=scaled_size: _resize(x, size), pictures)
        for step in (1, -1) if mirror else (1,):
            seen = each(lambda x, step=step: x[:, :, ::step], scaled)
            logits = _scores(model, seen)
            looks.append(
                each(
                    # Only now at full size, and one after the other: they are large.
                    lambda x, step=step: _resize(_softmax(x)[:, :, ::step], size),
                    logits,
                )
            )
    return decode_segmentation(each(lambda *x: sum(x), *looks))


def _factors(scales):
    """The scales as a list of numbers, checked."""
    factors = np.asarray(scales)
    if (
        factors.ndim != 1
        or not factors.size
        or factors.dtype.kind not in "uif"
        or not all(0 < factor < math.inf for factor in factors)
    ):
        raise ValueError(
            f"scales={scales!r} was given; expected factors above 0, in a sequence "
            "such as (1, 0.75)."
        )
    return factors.tolist()


def _scores(model, pictures):
    """The logits of a batch, which are to be as large as its pictures."""
    logits = model.predict_on_batch(pictures)
    size = tuple(keras.tree.flatten(pictures)[0].shape[1:3])
    for found in keras.tree.flatten(logits):
        if tuple(found.shape[1:3]) != size:
            raise ValueError(
                f"{model.name} gives {tuple(found.shape[1:3])} scores for pictures of "
                f"{size} pixels; expected as many. It may be a classifier: call "
                "model.predict for its heatmaps."
            )
    return logits


def _resize(array, size):
    if tuple(array.shape[1:3]) == tuple(size):
        return array
    resized = keras.ops.image.resize(
        np.ascontiguousarray(array, "float32"),
        size,
        antialias=True,
        data_format="channels_last",
    )
    return keras.ops.convert_to_numpy(resized)


def _softmax(logits):
    logits = np.float32(keras.ops.convert_to_numpy(logits))
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def coarsen(labels, factor, num_classes):
    """Down- and upsamples a label map: each cell gets its most frequent label.

    What a net would answer that is right but for its stride, as in the experiment on
    upper bounds (Long et al., 2015, arXiv appendix A).

    Args:
        labels: (height, width) integers, 255 for void, which does not vote.
        factor: Pixels per cell, along each side.
        num_classes: Labels are 0 to `num_classes - 1`.

    Returns:
        (height, width) uint8; cells of nothing but void are 0.
    """
    height, width = labels.shape
    rows, columns = -(-height // factor), -(-width // factor)
    cells = np.arange(height)[:, None] // factor * columns + np.arange(width) // factor
    counts = labels < num_classes
    places = cells[counts] * num_classes + labels[counts].astype(int)
    votes = np.bincount(places, minlength=rows * columns * num_classes)
    most = votes.reshape(rows, columns, num_classes).argmax(axis=-1).astype(np.uint8)
    return most.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]


def _once(batches):
    # Python's own loop over an object with __getitem__ ends at an IndexError, which
    # a PyDataset need not raise.
    if isinstance(batches, keras.utils.PyDataset):
        return (batches[i] for i in range(len(batches)))
    try:
        return iter(batches)
    except TypeError:
        raise ValueError(
            f"The batches are {described(batches)}; expected an iterable of "
            "(images, labels), such as a list or a keras.utils.PyDataset."
        ) from None
