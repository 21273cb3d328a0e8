"""One confusion matrix, and the four scores of the paper (section 5)."""

import keras
import numpy as np
from keras import ops

from keras_fcn.labels import VOID

SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou")
_LOW = 20  # bits that a metric's low counts keep


def confusion_matrix(truth, prediction, num_classes, void=VOID):
    """Counts pixels by true and predicted class.

    Args:
        truth: Integer labels of any shape; `void` and others outside 0 to
            `num_classes - 1` do not count.
        prediction: Integer labels of the same shape, 0 to `num_classes - 1` where
            the truth counts.
        num_classes: Rows and columns.
        void: The label to ignore.

    Returns:
        (num_classes, num_classes) int64, rows true, columns predicted.

    Raises:
        ValueError: If the shapes differ or a prediction is out of range.
    """
    truth, prediction = np.asarray(truth), np.asarray(prediction)
    if truth.shape != prediction.shape:
        raise ValueError(
            f"The truth has shape {truth.shape} and the prediction {prediction.shape}; "
            "expected the same."
        )
    counts = (truth != void) & (truth >= 0) & (truth < num_classes)
    truth, prediction = (
        truth[counts].astype("int64"),
        prediction[counts].astype("int64"),
    )
    if prediction.size and not 0 <= prediction.min() <= prediction.max() < num_classes:
        raise ValueError(
            f"A prediction holds labels {prediction.min()} to {prediction.max()}; "
            f"expected 0 to {num_classes - 1}."
        )
    matrix = np.bincount(truth * num_classes + prediction, minlength=num_classes**2)
    return matrix.reshape(num_classes, num_classes)


def scores(matrix, classes=None):
    """Computes the paper's scores from a confusion matrix (section 5).

    A mean leaves out the classes for which it is 0/0: for accuracy those absent from
    the truth, for IU those absent from truth and prediction (score.py). So a class that
    the truth does not have costs nothing until one pixel is taken for it, and from then
    on has IU 0.

    Args:
        matrix: (classes, classes) counts, rows true, columns predicted.
        classes: Indices of those that enter `mean_accuracy` and `mean_iou`, such as
            `present(matrix)`; all if None. Pixels of the others count as ever, as
            misses or as false alarms, and in the two other scores.

    Returns:
        A dict of floats, 0 to 1: `pixel_accuracy`, `mean_accuracy`, `mean_iou`,
        `fw_iou`; and of lists `iou` and `accuracy`, one number per class, NaN where
        it is 0/0. All are NaN for an empty matrix.

    Raises:
        ValueError: If `classes` names one that the matrix does not have.
    """
    matrix = np.asarray(matrix, "float64")
    classes = np.arange(len(matrix)) if classes is None else np.asarray(classes, int)
    if classes.size and not 0 <= classes.min() <= classes.max() < len(matrix):
        raise ValueError(
            f"The means of classes {classes.min()} to {classes.max()} were asked for; "
            f"expected 0 to {len(matrix) - 1}, those of the matrix."
        )
    hits, truth, found = np.diag(matrix), matrix.sum(axis=1), matrix.sum(axis=0)
    with np.errstate(invalid="ignore"):
        accuracy = hits / truth
        iou = hits / (truth + found - hits)
        share = truth / truth.sum()
        return {
            "pixel_accuracy": float(hits.sum() / truth.sum()),
            "mean_accuracy": _mean(accuracy[classes]),
            "mean_iou": _mean(iou[classes]),
            "fw_iou": float((share[truth > 0] * iou[truth > 0]).sum())
            if truth.any()
            else float("nan"),
            "iou": iou.tolist(),
            "accuracy": accuracy.tolist(),
        }


def present(matrix):
    """Returns the classes that the truth has, as a list of indices.

    Args:
        matrix: (classes, classes) counts, rows true, columns predicted.
    """
    return np.flatnonzero(np.sum(matrix, axis=1)).tolist()


def _mean(values):
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def without_channel(labels, logits):
    """Returns labels without their last axis, if they have as many as the logits.

    Args:
        labels: (batch, height, width), or (batch, height, width, 1).
        logits: (batch, height, width, classes).

    Returns:
        (batch, height, width), the labels.

    Raises:
        ValueError: If that axis is not 1 long, as that of one-hot labels, or if they
            are of another size.
    """
    if len(labels.shape) == len(logits.shape):
        if labels.shape[-1] not in (1, None):
            raise ValueError(
                f"Labels of shape {tuple(labels.shape)} were given; expected integers, "
                "(batch, height, width). Of one-hot labels take the argmax."
            )
        labels = ops.squeeze(labels, axis=-1)
    given, expected = tuple(labels.shape), tuple(logits.shape[:-1])
    known = [(a, b) for a, b in zip(given, expected, strict=False) if a and b]
    if len(given) != len(expected) or any(a != b for a, b in known):
        raise ValueError(
            f"Labels of shape {given} were given for logits of {expected}; expected "
            "one label for each pixel: resize the masks to their pictures."
        )
    return labels


@keras.saving.register_keras_serializable("keras_fcn")
class SegmentationScores(keras.metrics.Metric):
    """Follows one of the paper's scores in `fit` and `evaluate`.

    Counts are kept as two int32 numbers a cell, of 2^20 pixels and of single ones, so
    that they neither round (float32 stops at 2^24) nor overflow (int32 at 2^31).

    A NaN among the logits of a pixel that counts makes the score NaN, as it is an error
    in `keras_fcn.evaluate`: a backend's argmax would be class 0, or that of the NaN.

    Args:
        num_classes: Classes of the logits.
        score: One of `SCORES`.
        void: The label to ignore.
        name: Of the metric; the score's if None.

    Raises:
        ValueError: If there is no such score.
    """

    def __init__(self, num_classes, score="mean_iou", void=VOID, name=None, **kwargs):
        super().__init__(name=name or score, **kwargs)  # Keras' own dtype
        if score not in SCORES:
            raise ValueError(
                f"score={score!r} was given; expected one of {', '.join(SCORES)}."
            )
        self.num_classes, self.score, self.void = num_classes, score, void
        self._direction = "up"  # as Keras' own say it, for mode="auto" of callbacks
        shape = (num_classes, num_classes)
        self.ones = self.add_variable(shape, "zeros", dtype="int32", name="ones")
        self.millions = self.add_variable(
            shape, "zeros", dtype="int32", name="millions"
        )
        self.undecided = self.add_variable((), "zeros", dtype="int32", name="undecided")

    def update_state(self, y_true, y_pred, sample_weight=None):
        """Counts a batch.

        Args:
            y_true: (batch, height, width) labels, or with a last axis of 1.
            y_pred: (batch, height, width, num_classes) logits.
            sample_weight: Not supported, for counts have none.

        Raises:
            ValueError: If there are sample weights, other classes, or labels of another
                shape, such as one-hot ones.
        """
        if sample_weight is not None:
            raise ValueError(
                "SegmentationScores was given sample weights; expected none: mark the "
                f"pixels that are not to count with the label {self.void}."
            )
        y_true, y_pred = ops.convert_to_tensor(y_true), ops.convert_to_tensor(y_pred)
        n = self.num_classes
        if y_pred.shape[-1] != n:
            raise ValueError(
                f"SegmentationScores of {n} classes was given logits of "
                f"{y_pred.shape[-1]}; expected one per class: pass num_classes="
                f"{y_pred.shape[-1]}."
            )
        truth = ops.cast(without_channel(y_true, y_pred), "int32")
        prediction = ops.cast(ops.argmax(y_pred, axis=-1), "int32")
        counts = (truth != self.void) & (truth >= 0) & (truth < n)
        undecided = counts & ops.any(ops.isnan(y_pred), axis=-1)
        self.undecided.assign(self.undecided + ops.cast(ops.any(undecided), "int32"))
        place = ops.where(counts, truth * n + prediction, n * n)
        place = ops.reshape(place, (-1,))
        totals = ops.segment_sum(ops.ones_like(place), place, num_segments=n * n + 1)
        low = self.ones + ops.reshape(totals[:-1], (n, n))
        self.ones.assign(low % 2**_LOW)
        self.millions.assign(self.millions + low // 2**_LOW)

    def matrix(self):
        """Returns the confusion matrix so far, (num_classes, num_classes) int64, NumPy.

        Where a logit is NaN, what is counted as predicted is the backend's choice.
        """
        # Copies, for TensorFlow has one on each of several devices.
        copies = [ops.copy(v.value) for v in (self.millions, self.ones)]
        high, low = map(ops.convert_to_numpy, copies)
        return high.astype("int64") * 2**_LOW + low

    def result(self):
        """Returns the score so far, a scalar tensor, 0 to 1.

        It is NaN before the first pixel, and if there was a NaN among the logits.
        """
        return ops.where(self.undecided > 0, float("nan"), self._score())

    def _score(self):
        high, low = ops.cast(self.millions, "float32"), ops.cast(self.ones, "float32")
        matrix = high * 2.0**_LOW + low
        hits = ops.diagonal(matrix)
        truth, found = ops.sum(matrix, axis=1), ops.sum(matrix, axis=0)
        total = ops.sum(truth)
        if self.score == "pixel_accuracy":
            return ops.sum(hits) / total
        wanted = truth if self.score == "mean_accuracy" else truth + found - hits
        ratio = ops.where(wanted > 0, hits / ops.maximum(wanted, 1), 0)
        if self.score == "fw_iou":
            return ops.sum(truth * ratio) / total
        return ops.sum(ratio) / ops.sum(ops.cast(wanted > 0, "float32"))

    def get_config(self):
        """Returns what rebuilds the metric."""
        names = ("num_classes", "score", "void")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}
