"""What a net says of one picture, and how well it does on many."""

import keras
import numpy as np

from keras_fcn.images import decode_segmentation, read_image
from keras_fcn.labels import VOID
from keras_fcn.metrics import confusion_matrix, scores


def segment(model, image, *, mirror=False, scales=(1,)):
    """Segments one picture of any size.

    With `mirror` or several `scales` the net looks that many times, and the mean of its
    class probabilities decides.

    Args:
        model: A net with preprocessing and one output, such as
            `keras_fcn.FCN8s("googlenet", weights="camvid")`.
        image: A path (EXIF rotation is applied), a PIL image, or a uint8 array
            (height, width, 3), RGB, or (height, width), grey.
        mirror: Whether to look at the mirror image, too.
        scales: Factors of the picture's size to look at it at.

    Returns:
        (height, width) uint8 labels; for a net of several heads, a dict of them.

    Raises:
        ValueError: If the image cannot be read, or if the model has no preprocessing.
        FileNotFoundError: If there is no such file.
    """
    shapes = [tuple(tensor.shape[1:]) for tensor in model.inputs]
    names = [layer.name for layer in model.layers]
    if shapes != [(None, None, 3)] or "preprocess" not in names:
        raise ValueError(
            f"{model.name} takes {shapes}, with layers {', '.join(names[:3])} ...; "
            "expected a net from RGB pictures whose first layer is `preprocess`. Build "
            "it with include_preprocessing=True, or call model.predict yourself."
        )
    picture = read_image(image)
    labels = _labels(model, picture[None].astype("float32"), mirror, scales)
    if isinstance(labels, dict):
        return {head: x[0] for head, x in labels.items()}
    return labels[0]


def evaluate(model, batches, *, mirror=False, scales=(1,), progress=None):
    """Scores a net on a data set, with one confusion matrix for the whole of it.

    Args:
        model: A net with one output.
        batches: An iterable of (images, labels): (batch, height, width, 3) RGB 0-255
            and (batch, height, width) integers, or with a last axis of 1, 255 for
            void. A `keras.utils.PyDataset` is read once.
        mirror: As in `segment`.
        scales: As in `segment`.
        progress: Called with the number of batches done, after each.

    Returns:
        The dict of `keras_fcn.metrics.scores`, with `confusion_matrix` as lists and
        `images`, their number.

    Raises:
        ValueError: If there are no batches, if a label is neither a class nor void, or
            if the model has several outputs.
    """
    if isinstance(model.output, dict | list | tuple):
        raise ValueError(
            f"{model.name} has several heads; expected one output. Evaluate each by "
            "itself, as keras.Model(model.inputs, model.output[head])."
        )
    classes = model.output.shape[-1]
    matrix, images = np.zeros((classes, classes), "int64"), 0
    for done, (pictures, labels) in enumerate(_once(batches), start=1):
        truth = keras.ops.convert_to_numpy(labels)
        stray = truth[(truth != VOID) & ((truth < 0) | (truth >= classes))]
        if stray.size:
            raise ValueError(
                f"Batch {done - 1} holds labels {np.unique(stray)[:5].tolist()}; "
                f"expected 0 to {classes - 1}, or {VOID} for void."
            )
        prediction = _labels(model, pictures, mirror, scales)
        if truth.ndim == prediction.ndim + 1:
            truth = truth.squeeze(axis=-1)
        matrix += confusion_matrix(truth, prediction, classes)
        images += len(truth)
        if progress:
            progress(done)
    if not images:
        raise ValueError("There are no batches to evaluate; expected one at least.")
    return {
        **scores(matrix),
        "confusion_matrix": matrix.tolist(),
        "images": images,
    }


def _labels(model, pictures, mirror, scales):
    """Labels of a batch, (batch, height, width), or a dict of them."""
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales={scales} was given; expected factors above 0.")
    if not mirror and tuple(scales) == (1,):
        return decode_segmentation(model.predict_on_batch(pictures))
    pictures = keras.ops.convert_to_numpy(pictures)  # PyTorch cannot step backwards
    size, looks = pictures.shape[1:3], []
    for scale in scales:
        scaled = _resize(pictures, [max(1, round(scale * length)) for length in size])
        for step in (1, -1) if mirror else (1,):
            logits = model.predict_on_batch(scaled[:, :, ::step])
            looks.append(
                keras.tree.map_structure(
                    # Only now at full size, and one after the other: they are large.
                    lambda x, step=step: _resize(_softmax(x)[:, :, ::step], size),
                    logits,
                )
            )
    return decode_segmentation(keras.tree.map_structure(lambda *x: sum(x), *looks))


def _resize(array, size):
    if tuple(array.shape[1:3]) == tuple(size):
        return array
    resized = keras.ops.image.resize(
        np.ascontiguousarray(array), size, antialias=True, data_format="channels_last"
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
    cells = np.full((rows * factor, columns * factor), VOID, np.uint8)
    cells[:height, :width] = labels
    cells = cells.reshape(rows, factor, columns, factor)
    votes = [(cells == label).sum(axis=(1, 3)) for label in range(num_classes)]
    most = np.argmax(votes, axis=0).astype(np.uint8)
    return most.repeat(factor, axis=0).repeat(factor, axis=1)[:height, :width]


def _once(batches):
    # Python's own loop over an object with __getitem__ ends at an IndexError, which
    # a PyDataset need not raise.
    if isinstance(batches, keras.utils.PyDataset):
        return (batches[i] for i in range(len(batches)))
    return batches
