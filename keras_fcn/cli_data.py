"""What commands ask of their options, and those that read labels but train nothing."""

import argparse
import contextlib
import functools
import os
import pathlib
import sys
import warnings
from collections import Counter

import numpy as np

from keras_fcn import checkpoints, evaluation, manifest, metrics, models, protocols
from keras_fcn.labels import VOID, LabelSet, voc_colormap
from keras_fcn.progress import busy, reporting, track

DEMO_CHECKPOINT = "googlenet-4s-camvid"
DATA_DIR = "where data sets are prepared ($TFDS_DATA_DIR, or ~/tensorflow_datasets)"
PRECISIONS = "float32", "mixed_bfloat16", "mixed_float16"
# What says that there is no more memory: TensorFlow's class, and words in an error of
# PyTorch's (on a CPU, on Windows, on a GPU) and of JAX's.
TENSORFLOW_MEMORY = "ResourceExhaustedError"
OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "RESOURCE_EXHAUSTED",
)


@contextlib.contextmanager
def warnings_in_a_sentence():
    """Says each warning of this package in one, and passes on those of all others."""
    with warnings.catch_warnings():
        warnings.filterwarnings("always", module=r"keras_fcn\b")
        warnings.filterwarnings("ignore", module=r"PIL\b")  # what is sound enough
        warnings.showwarning = functools.partial(_warn, warnings.showwarning)
        yield


def _warn(others, message, category, filename, *place):
    if issubclass(category, UserWarning) and "keras_fcn" in filename:
        print(f"keras-fcn: warning: {message}", file=sys.stderr)
    else:
        others(message, category, filename, *place)


def add_data(command):
    """Adds the positional argument DATA, and what goes with it, to a parser."""
    command.add_argument(
        "data",
        nargs="+",
        metavar="DATA",
        help="a folder of images and a folder of masks (grey or palette PNG); or a "
        "data set that `keras-fcn prepare` has prepared, such as camvid or camvid/val",
    )
    command.add_argument("--data-dir", help=DATA_DIR)
    add_relabel(command)


def add_relabel(command):
    """Adds `--relabel` to a command's `argparse.ArgumentParser`."""
    command.add_argument(
        "--relabel",
        type=_relabelling,
        nargs="+",
        default=[],
        metavar="FROM=TO",
        help="labels of masks to replace at reading, such as 11=255 for void",
    )


def _relabelling(text):
    before, separator, after = text.partition("=")
    if not (separator and before.isdigit() and after.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form 11=255")
    return int(before), int(after)


def numbers(text, number=float):
    """Reads name=number,name=number as a dict, for argparse."""
    try:
        pairs = [item.split("=") for item in text.split(",")]
        found = {name: number(value) for name, value in pairs}
        if len(found) < len(pairs) or not np.isfinite([*found.values()]).all():
            raise ValueError
        return found
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form name=number,name=number, each name once"
        ) from None


def add_checkpoint(command):
    """Adds `--checkpoint` to a command's parser."""
    command.add_argument(
        "--checkpoint",
        default=DEMO_CHECKPOINT,
        help="a name that `keras-fcn list` prints, an .h5 file, or hf://owner/repo "
        "(%(default)s)",
    )


def add_looks(command):
    """Adds `--mirror` and `--scales` to a command's parser."""
    command.add_argument(
        "--mirror", action="store_true", help="look at the mirror image, too"
    )
    command.add_argument(
        "--scales",
        type=float,
        nargs="+",
        default=(1,),
        metavar="FACTOR",
        help="sizes to look at, such as 0.75 1 1.5: slower, a little better (1)",
    )


# what is to be read, and written


def path_of(name):
    """Returns the path that `--checkpoint` or `--init` means, or None for a name.

    Args:
        name: As `checkpoints.path_of` takes it.

    Raises:
        ValueError: If it is the folder of a training, or the file is not as expected.
        OSError: If it cannot be fetched.
    """
    file = pathlib.Path(name, "model.h5")
    if name not in manifest.list_checkpoints() and file.is_file():
        raise ValueError(
            f"{name} is a folder; expected a checkpoint's name or file. Name the file, "
            f"{file}."
        )
    return checkpoints.path_of(name)


def fetch(name, entry, *, trust_first_download=False):
    """Returns the path of a checkpoint's file, which is fetched if it is not here yet.

    Args:
        name: Of the checkpoint in the manifest.
        entry: Of it, from there.
        trust_first_download: As in `models.load_checkpoint`.

    Raises:
        ValueError: If the content is another than expected.
        OSError: If it cannot be had.
    """
    model = models.skeleton(entry)
    checkpoint = checkpoints.Checkpoint(entry, None, name, trust_first_download)
    return checkpoints.locate(model, checkpoint)


def check_file(path, *suffixes):
    """Raises `ValueError` for what would else be said when all is computed, and lost.

    Args:
        path: Of a file to write.
        suffixes: Of its name, such as ".png", one of which is expected; any if none.
    """
    path = pathlib.Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(
            f"{path} cannot be written; expected a file's name in a folder that exists."
        )
    _check_access(path.resolve().parent, path)
    if suffixes and path.suffix.lower() not in suffixes:
        raise ValueError(
            f"{path}: expected a name that ends in {' or '.join(suffixes)}."
        )


def check_folder(path):
    """Raises `ValueError` if `--output` cannot be a folder, or become one.

    Args:
        path: Of the folder.
    """
    if not path:
        raise ValueError(
            "--output is empty; expected a folder. Was a shell variable not set?"
        )
    path = pathlib.Path(path)
    first = next(place for place in (path, *path.parents) if place.exists())
    if not first.is_dir():
        inside = "" if first == path else f"in {first}, which is "
        raise ValueError(
            f"--output {path} is {inside}a file; expected a folder, or a new one."
        )
    _check_access(first, f"--output {path}")


def _check_access(folder, what):
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(
            f"{what} cannot be written, as nothing may be in {folder}; expected a "
            "folder of yours. Name another, or change its permissions."
        )


@contextlib.contextmanager
def in_memory(refusal):
    """Raises an exception for what a backend raises where there is no more memory.

    Args:
        refusal: The exception, which says what is too large.
    """
    try:
        yield
    except Exception as error:
        if not _lacks_memory(error):
            raise
        raise refusal from error


def _lacks_memory(error):
    """Whether an error says so, or what it was made of: Keras may lose the words."""
    if error is None:
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == TENSORFLOW_MEMORY:
        return True
    said = isinstance(error, RuntimeError) and any(
        x in str(error) for x in OUT_OF_MEMORY
    )
    return said or _lacks_memory(error.__context__)


# what DATA means


def name_and_split(token):
    """Splits "camvid/val" into a data set's name and its split, None if not said."""
    name, _, split = token.partition("/")
    return name, split or None


def dataset_of(data):
    """The `catalog.Dataset` that DATA names; None for folders, or if there is none."""
    from keras_fcn.datasets import catalog

    return None if len(data) == 2 else catalog.DATASETS.get(name_and_split(data[0])[0])


def source_of(data, options, label_sets=None):
    """Opens what DATA means as a source; the arguments are those of `opener`."""
    return opener(data, options)(label_sets)


def opener(data, options, *, training=False, given="DATA"):
    """Finds what DATA means, and returns what opens it as a source.

    What is missing or misspelled is an error here, before anything is read.

    Args:
        data: A list of strings: two folders, or one data set.
        options: Of the command line: `relabel`, `data_dir`.
        training: Whether a data set that says no split is to be trained on.
        given: What the command line calls `data`, for errors.

    Returns:
        A function that returns a source (see `datasets.batches`), for which it reads
        all masks of a folder. Its argument is `{head: LabelSet}`, the head "" for the
        only one, that masks are checked against, or None if what they hold decides.
    """
    from keras_fcn.datasets import catalog, folder

    if len(data) == 2:
        pairs, relabel = folder.pairs(*data), _relabel(options)
        return lambda label_sets: _folder(pairs, relabel, label_sets)
    if len(data) != 1 or pathlib.Path(data[0]).is_dir():
        raise ValueError(
            f"{given} is {' '.join(data)}; expected a folder of images and a folder of "
            f"masks, or one data set of {', '.join(catalog.DATASETS)}."
        )
    if options.relabel:
        raise ValueError(
            f"--relabel was given for {given} {data[0]}, whose labels are those that "
            "nets are trained on; leave it out."
        )
    name, split = name_and_split(data[0])
    if training and split is None and name in catalog.DATASETS:
        split = catalog.DATASETS[name].train
    source = catalog.load(name, split, data_dir=options.data_dir)
    return lambda label_sets: source


def _relabel(options):
    """What --relabel says, as a dict."""
    counts = Counter(before for before, _ in options.relabel)
    if twice := [str(label) for label, count in counts.items() if count > 1]:
        raise ValueError(
            f"--relabel replaces {', '.join(twice)} twice; expected each label once."
        )
    return dict(options.relabel)


def _folder(pairs, relabel, label_sets):
    from keras_fcn.datasets import folder

    heads = {head: len(known.names) for head, known in (label_sets or {}).items()}
    classes = heads.get("", heads) or VOID
    named = label_sets and label_sets.get("")
    with busy(f"Checking {len(pairs)} masks"):
        source = folder.Folder(pairs, classes, relabel=relabel, label_set=named)
    if not label_sets:
        found = np.flatnonzero(source.label_counts[:VOID])
        source.label_sets = _nameless(1 + int(max(found, default=0)))
    return source


# prepare, check-data, upper-bound


def add_prepare(commands):
    """Adds the command `prepare`."""
    command = commands.add_parser("prepare", help="build a data set of the paper's")
    command.add_argument("name", help="such as voc2011, or camvid")
    command.add_argument("--data-dir", help=DATA_DIR)
    command.add_argument("--manual-dir", help="folder of archives that you have")
    command.set_defaults(run=prepare)


def prepare(options):
    """Builds a data set from its archives."""
    from keras_fcn.datasets import catalog

    name, _ = name_and_split(options.name)
    folder = catalog.prepare(
        name, data_dir=options.data_dir, manual_dir=options.manual_dir
    )
    print(f"{name} is in {folder}")


def add_check_data(commands):
    """Adds the command `check-data`."""
    command = commands.add_parser("check-data", help="what may be wrong with a folder")
    command.add_argument("images", help="folder of images")
    command.add_argument("masks", help="folder of masks: grey or palette PNG")
    add_relabel(command)
    command.set_defaults(run=check_data)


def check_data(options):
    """Says what may be wrong with a folder of images and one of masks."""
    from keras_fcn.datasets import folder

    folders, relabel = (options.images, options.masks), _relabel(options)
    with reporting("Reading") as show:
        report = folder.inspect(*folders, relabel=relabel, progress=show)
    print(folder.summary(report))
    return 1 if report["warnings"] else 0


def add_upper_bound(commands):
    """Adds the command `upper-bound`."""
    command = commands.add_parser(
        "upper-bound", help="what a stride costs: labels against themselves, coarser"
    )
    add_data(command)
    command.add_argument(
        "--factors",
        type=int,
        nargs="+",
        default=(128, 64, 32, 16, 8, 4),
        help="pixels along each side of a cell (128 64 32 16 8 4)",
    )
    command.set_defaults(run=upper_bound)


def upper_bound(options):
    """Scores labels against themselves, coarser."""
    if min(options.factors) < 1:
        raise ValueError(
            f"--factors {' '.join(map(str, options.factors))} was given; expected each "
            "factor to be 1 pixel or more."
        )
    source = _labels(options)
    [known] = source.label_sets.values() if len(source.label_sets) == 1 else [None]
    if known is None:
        raise ValueError(
            f"{options.data[0]} has the heads {', '.join(source.label_sets)}; expected "
            "labels of one."
        )
    classes = len(known.names)
    matrices = {factor: np.zeros((classes, classes), int) for factor in options.factors}
    for i in track(range(len(source)), "Coarsening"):
        truth = source.labels(i)
        for factor, matrix in matrices.items():
            coarse = evaluation.coarsen(truth, factor, classes)
            matrix += metrics.confusion_matrix(truth, coarse, classes)
    print(
        "factor  pixel accuracy  mean accuracy  mean IU  f.w. IU "
        f"({len(source)} label maps)"
    )
    for factor, matrix in matrices.items():
        found = metrics.scores(matrix)
        numbers = [100 * found[name] for name in metrics.SCORES]
        print("{:6} {:15.1f} {:14.1f} {:8.1f} {:8.1f}".format(factor, *numbers))


def _labels(options):
    """The source of a command that needs labels alone, be they without images."""
    from keras_fcn.datasets import folder

    if len(options.data) == 1 and pathlib.Path(options.data[0]).is_dir():
        masks = folder.masks(options.data[0])
        pairs = [(mask, mask) for mask in masks]  # of themselves
        return _folder(pairs, _relabel(options), None)
    return source_of(options.data, options)


# evaluate


def add_evaluate(commands):
    """Adds the command `evaluate`."""
    command = commands.add_parser("evaluate", help="score a net on labelled pictures")
    add_data(command)
    add_checkpoint(command)
    add_looks(command)
    command.add_argument("--json", help="file to write the record to")
    command.add_argument(
        "--picture", metavar="PNG", help="file to draw which class is taken for which"
    )
    command.set_defaults(run=evaluate)


def check_labels_pictures(entry, name):
    """Checks that a checkpoint's net takes pictures and says what each pixel is.

    Args:
        entry: Of the checkpoint, as in the manifest.
        name: Of it, for the error.

    Raises:
        ValueError: If it is a classifier, or takes what is centred already.
    """
    wrong = {
        "a classifier": entry["model"].get("builder") == "classifier",
        "without preprocessing": not entry["model"].get("include_preprocessing", True),
    }
    for what, is_so in wrong.items():
        if is_so:
            raise ValueError(
                f"The net of {name} is {what}; expected one that labels the pixels of "
                "pictures as they are. In a script, model.predict asks any net."
            )


def evaluate(options):
    """Scores a checkpoint, by the protocol of its data."""
    if options.json is not None:
        check_file(options.json)
    if options.picture is not None:
        check_file(options.picture, ".png")
    path = path_of(options.checkpoint)
    entry = models.checkpoint_entry(path or options.checkpoint)
    check_labels_pictures(entry, options.checkpoint)
    sets = manifest.label_sets(entry) or _nameless(manifest.num_classes(entry))
    source = source_of(options.data, options, sets)
    with busy(f"Loading {options.checkpoint}"):
        model = models.load_checkpoint(path or options.checkpoint)
    looks = {"mirror": options.mirror, "scales": options.scales}
    path = path or checkpoints.locate(
        model, checkpoints.Checkpoint(entry, name=options.checkpoint)
    )
    written = options.json, options.picture
    score(options.data, model, source, path, *written, looks)


def score(data, model, source, weights, file, picture, looks):
    """Evaluates a net and prints its scores; keeps and draws the record if told to.

    Args:
        data: What the command line says of `source`.
        model: The net.
        source: To evaluate it on.
        weights: Path of its weights.
        file: To write the record to, or None.
        picture: A PNG to draw which class is taken for which, or None.
        looks: A dict of `mirror` and `scales` as of `segment`; may be empty.
    """
    with reporting("Evaluating") as report:
        record = protocols.evaluate(
            _protocol(data, source),
            model,
            source,
            weights=weights,
            progress=lambda done: report(done, len(source)),
            **looks,
        )
    print(protocols.summary(record))
    if file:
        protocols.write(file, record)
    if picture:
        protocols.draw(record, picture)


def _nameless(classes):
    """`{head: LabelSet}` of classes that have no names, from `manifest.num_classes`."""
    heads = classes if isinstance(classes, dict) else {"": classes}
    return {
        head: LabelSet(tuple(f"class {i}" for i in range(n)), voc_colormap(n))
        for head, n in heads.items()
    }


def _protocol(data, source):
    """The protocol of a data set's own, or the plain one for a folder."""
    from keras_fcn.datasets import catalog

    if len(data) == 2:
        heads = dict.fromkeys(source.label_sets, protocols.Head())
        return protocols.Protocol(data[0], "", len(source), source="", heads=heads)
    name, split = name_and_split(data[0])
    protocol = protocols.find(name)
    if split in (None, catalog.DATASETS[name].evaluate):
        return protocol
    return protocol._replace(split=split, images=len(source), remark="")
