"""The commands that read pictures with labels: prepare, train, evaluate and others."""

import argparse
import contextlib
import datetime
import functools
import itertools
import math
import os
import pathlib
import sys
import warnings
from collections import Counter

import keras
import numpy as np

from keras_fcn import (
    batch_norm,
    callbacks,
    checkpoints,
    devices,
    evaluation,
    files,
    manifest,
    metrics,
    models,
    protocols,
    saving,
    training,
)
from keras_fcn import weights as weight_files
from keras_fcn.labels import LABEL_SETS, VOID, LabelSet, voc_colormap
from keras_fcn.progress import busy, reporting, track
from keras_fcn.snapshots import Snapshots, positions

# What `train` does where nobody says otherwise: `compile_modern`, for people's own
# data, and `compile_reference`, one whole picture a step.
MODERN = {
    "batch_size": 6,
    "crop": 256,
    "scale": (0.7, 2.0),
    "mirror": True,
    "color": 0.4,
    "balance": 0.5,
    "replacement": False,
    "epochs": 60,
    "learning_rate": 6e-4,
}
REFERENCE = {
    "batch_size": 1,
    "crop": 0,
    "scale": None,
    "mirror": False,
    "color": 0.0,
    "balance": 0.0,
    "replacement": True,
}
DATA_DIR = "where data sets are prepared ($TFDS_DATA_DIR, or ~/tensorflow_datasets)"
PRECISIONS = "float32", "mixed_bfloat16", "mixed_float16"
VALIDATION_MULTIPLE = 64  # pixels: JAX compiles anew for each size


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


def _within(kind, least, most=math.inf):
    """The argparse type of a number from `least` to `most`."""

    def read(text):
        value = kind(text)
        if not least <= value <= most:
            limit = "or more" if most == math.inf else f"to {most}"
            raise argparse.ArgumentTypeError(
                f"{text} was given; expected {least} {limit}"
            )
        return value

    read.__name__ = kind.__name__  # argparse says so of what is no number
    return read


_COUNT, _WHOLE = _within(int, 1), _within(int, 0)
_SHARE, _AMOUNT = _within(float, 0, 1), _within(float, 0)


def _dataset(token):
    """Splits "camvid/val" into a data set's name and its split, None if not said."""
    name, _, split = token.partition("/")
    return name, split or None


def _known(data):
    """The `catalog.Dataset` that DATA names; None for folders, or if there is none."""
    from keras_fcn.datasets import catalog

    return None if len(data) == 2 else catalog.DATASETS.get(_dataset(data[0])[0])


def source_of(data, options, *, label_sets=None, training=False, given="DATA"):
    """Opens what DATA means as a source (see `datasets.batches`).

    Args:
        data: A list of strings: two folders, or one data set.
        options: Of the command line: `relabel`, `data_dir`.
        label_sets: `{head: LabelSet}` that masks are checked against, the head "" for
            the only one; what they hold decides if None.
        training: Whether a data set that says no split is to be trained on.
        given: What the command line calls `data`, for errors.
    """
    from keras_fcn.datasets import catalog, folder

    if len(data) == 2:
        found = folder.pairs(*data)
        with busy(f"Checking {len(found)} masks"):
            return _folder(found, dict(options.relabel), label_sets)
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
    name, split = _dataset(data[0])
    if training and split is None and name in catalog.DATASETS:
        split = catalog.DATASETS[name].train
    return catalog.load(name, split, data_dir=options.data_dir)


def _folder(pairs, relabel, label_sets):
    from keras_fcn.datasets import batches, folder

    if label_sets:
        heads = {head: len(known.names) for head, known in label_sets.items()}
        classes = heads.get("", heads)
        return folder.Folder(
            pairs, classes, relabel=relabel, label_set=label_sets.get("")
        )
    source = folder.Folder(pairs, VOID, relabel=relabel)
    with busy("Looking which labels there are"):
        counts = batches.label_counts(source)
    highest = max((label for label in range(VOID) if counts[label]), default=0)
    source.label_sets = _nameless(highest + 1)
    return source


# prepare, check-data, upper-bound


def prepare(options):
    """Builds a data set from its archives."""
    from keras_fcn.datasets import catalog

    name, _ = _dataset(options.name)
    folder = catalog.prepare(
        name, data_dir=options.data_dir, manual_dir=options.manual_dir
    )
    print(f"{name} is in {folder}")


def check_data(options):
    """Says what may be wrong with a folder of images and one of masks."""
    from keras_fcn.datasets import folder

    with reporting("Reading") as show:
        report = folder.inspect(options.images, options.masks, progress=show)
    print(folder.summary(report))
    return 1 if report["warnings"] else 0


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
        with busy(f"Reading {len(masks)} masks"):
            pairs = [(mask, mask) for mask in masks]  # of themselves
            return _folder(pairs, dict(options.relabel), None)
    return source_of(options.data, options)


# evaluate


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
    source = source_of(options.data, options, label_sets=sets)
    with busy(f"Loading {options.checkpoint}"):
        model = models.load_checkpoint(path or options.checkpoint)
    looks = {"mirror": options.mirror, "scales": options.scales}
    path = path or checkpoints.locate(
        model, checkpoints.Checkpoint(entry, name=options.checkpoint)
    )
    written = options.json, options.picture
    _score(options.data, model, source, path, *written, looks)


def _score(data, model, source, weights, file, picture, looks):
    """Evaluates a net and prints its scores; keeps and draws the record if told to."""
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
    name, split = _dataset(data[0])
    protocol = protocols.find(name)
    if split in (None, catalog.DATASETS[name].evaluate):
        return protocol
    return protocol._replace(split=split, images=len(source), remark="")


# train


def add_training(command):
    """Adds what only `train` has to its parser."""
    add = command.add_argument
    add("--output", required=True, help="folder for the model, logs and pictures")
    add("--resume", action="store_true", help="go on where the output folder stops")
    add(
        "--validation",
        nargs="+",
        metavar="DATA",
        help="what to score each epoch: as DATA; a data set's own split if left out",
    )
    net = command.add_argument_group("the net")
    net.add_argument("--backbone", default="googlenet", choices=models.BACKBONES)
    net.add_argument("--stride", type=int, default=8, choices=models.STRIDES)
    net.add_argument("--labels", help="name of a label set, such as camvid")
    net.add_argument("--classes", nargs="+", metavar="NAME", help="names, in order")
    net.add_argument(
        "--init",
        nargs="+",
        default=[],
        metavar="NAME",
        help="checkpoint or .h5 file whose weights to start from, such as "
        "vgg16-imagenet; color=NAME hha=NAME for a net of two streams",
    )
    net.add_argument("--skip-scales", type=numbers, metavar="pool4=0.01,pool3=0.0001")
    net.add_argument(
        "--upsampling", default="bilinear", choices=("bilinear", "learned")
    )
    net.add_argument("--fix-trunk", action="store_true", help="train the scores alone")
    net.add_argument(
        "--batch-norm",
        action="store_true",
        help="normalise in training, and fold that into the convolutions at the end",
    )
    how = command.add_argument_group(
        "the recipe",
        "Numbers in brackets are those of the modern recipe and of the reference's.",
    )
    add = how.add_argument
    add("--recipe", default="modern", help="or the reference's, such as voc-fcn8s")
    add("--epochs", type=_COUNT, help="(60; as many updates as solve.py makes)")
    add("--batch-size", type=_COUNT, help="pictures (6; 1)")
    add("--crop", type=_WHOLE, help="pixels a side; 0: whole pictures (256; 0)")
    add("--scale", type=float, nargs=2, help="range of the zoom (0.7 2; none)")
    add("--mirror", action=argparse.BooleanOptionalAction, help="(yes; no)")
    add("--jitter", type=_WHOLE, default=0, help="pixels, for whole pictures (0; 0)")
    add("--color", type=_SHARE, help="change of brightness and the like (0.4; 0)")
    add("--tint", type=_SHARE, default=0.0, help="change of each primary colour (0; 0)")
    add("--blur", type=_AMOUNT, default=0.0, help="up to so many pixels (0; 0)")
    add("--noise", type=_AMOUNT, default=0.0, help="up to so many grey levels (0; 0)")
    add("--cutmix", type=_SHARE, default=0.0, help="share of mixed windows, 0-1 (0; 0)")
    add("--balance", type=_AMOUNT, help="0: none, 1: median frequency (0.5; 0)")
    add(
        "--adjust",
        type=_SHARE,
        default=0.0,
        help="share of what --balance added to the logits, to be taken out again from "
        "the trained net (0; 0)",
    )
    add("--jaccard", type=_AMOUNT, default=0.0, help="share of 1 - mean IU (0; none)")
    add("--keep", type=_SHARE, default=1.0, help="share of cells that count (1; 1)")
    add(
        "--replacement",
        action=argparse.BooleanOptionalAction,
        help="whether each picture is drawn from all (no; yes)",
    )
    add("--learning-rate", type=_AMOUNT, help="its peak (6e-4; its own)")
    add("--precision", default="float32", choices=PRECISIONS)
    add("--seed", type=_WHOLE, default=1)
    add("--devices", type=_COUNT, default=1, help="that share each batch (1)")


def numbers(text, number=float):
    """Reads name=number,name=number as a dict, for argparse."""
    try:
        return {
            name: number(value)
            for name, value in (item.split("=") for item in text.split(","))
        }
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form name=number,name=number"
        ) from None


def train(options):
    """Trains a net, on one device or several."""
    if options.batch_norm and options.devices > 1:
        raise ValueError(
            f"--batch-norm was given with --devices {options.devices}, each of which "
            "would normalise its own part of a batch; leave one of them out."
        )
    check_folder(options.output)
    _check_resume(pathlib.Path(options.output) / "state", options.resume)
    devices.run(_train, options.devices, options)


def _check_resume(state, resume):
    exists = bool(positions(state))
    if resume and not exists:
        raise FileNotFoundError(
            f"{state} holds no state of a training to go on with. Leave out --resume, "
            "or name the --output folder of that training."
        )
    if exists and not resume:
        raise ValueError(
            f"{state} is the state of an earlier training; expected a new folder. Pass "
            "--resume to go on with it, or another --output."
        )


@warnings_in_a_sentence()  # in processes that `main` has not begun, too
def _train(options):
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(options.precision)
    recipe = _recipe(options.recipe)
    _fill_in(options, recipe)
    devices.share(options.batch_size)
    known = _label_sets(options)
    _check_net(options)
    _batches(options, [None])  # raises where the changes to pictures make no sense
    first = devices.is_first()  # of the processes of this training
    with _alone(options.output) if first else contextlib.nullcontext():
        _train_alone(options, recipe, known)


@contextlib.contextmanager
def _alone(output):
    """Makes the output folder, and refuses what another training writes to."""
    output = pathlib.Path(output)
    made = not output.exists()
    output.mkdir(parents=True, exist_ok=True)
    lock = output / ".lock"
    refusal = (
        f"Another keras-fcn train writes to {output}; expected a folder that none "
        "does. Wait for it, or name another --output."
    )
    with files.claimed(lock, refusal):
        try:
            yield
        finally:
            if made and list(output.iterdir()) == [lock]:  # nothing came of it
                with contextlib.suppress(OSError):  # Windows keeps what is open
                    lock.unlink()
                    output.rmdir()


def _train_alone(options, recipe, known):
    from keras_fcn.datasets.batches import Batches

    output = pathlib.Path(options.output)
    source = source_of(options.data, options, label_sets=known, training=True)
    data, validation = _validation_of(options), None
    if data:
        validation = source_of(
            data, options, label_sets=source.label_sets, given="--validation"
        )
        _check_alike(source, validation)
    with busy(f"Building {options.backbone}-{options.stride}s"):
        model = _net(options, source)
    batches = _batches(options, source)
    if options.batch_norm and options.init:
        with busy("Fitting the normalisation to a batch"):
            batch_norm.fit_batch_norm(model, batches.batch(0, 0)[0])
    epochs = options.epochs or math.ceil(recipe.steps / len(batches))
    if options.fix_trunk:
        training.fix_trunk(model)
    weights = _class_weights(source, options.balance)
    _compile(model, options, recipe, weights, epochs * len(batches))
    output.mkdir(parents=True, exist_ok=True)
    snapshots = Snapshots(output / "state", batches)
    shown = _shown(output, epochs, batches, validation, snapshots)
    validated = validation and Batches(
        validation, multiple=VALIDATION_MULTIPLE, shuffle=False
    )
    stretches = snapshots.stretches(model, epochs)
    begin = next(stretches)  # which refuses a state of another net
    if devices.is_first():
        _note_command(output / "command.sh", options.typed, options.resume)
    for first, last in itertools.chain([begin], stretches):
        if recipe:  # not the snapshot's, should another one be asked for
            model.optimizer.learning_rate = options.learning_rate
        devices.distribute(model)
        with _reading(batches, validated):
            model.fit(
                devices.fill(batches),
                initial_epoch=first,
                epochs=last,
                shuffle=False,
                verbose=0,
                validation_data=validated and devices.fill(validated),
                callbacks=[callbacks.Averages(), callbacks.Divergence(batches), *shown],
            )
        devices.wait()  # until the first process has written its snapshot
    if devices.is_first():
        if options.batch_norm:
            model = batch_norm.fold_batch_norm(model)
        if options.adjust:
            training.adjust_logits(model, weights, options.adjust)
        facts = {"labels": _labels_fact(source.label_sets)}
        saving.save_checkpoint(model, output / "model.h5", facts=facts)
        callbacks.curves(output / "log.csv", output / "curves.png")
        print(f"Wrote {output / 'model.h5'}, and curves.png beside it")
        if validation:
            written = output / "scores.json", output / "confusion.png"
            _score(data, model, validation, output / "model.h5", *written, {})


def _note_command(path, typed, resume):
    """Writes what was typed, when and with which versions; below it, to resume."""
    before = path.read_bytes() if resume and path.exists() else b""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    known = ", ".join(f"{name} {value}" for name, value in protocols.versions().items())
    files.write_bytes(path, before + f"# {now}; {known}\n{typed}\n".encode())


def _compile(model, options, recipe, weights, steps):
    rate = options.learning_rate
    if recipe is None:
        training.compile_modern(
            model,
            steps,
            learning_rate=rate,
            class_weights=weights,
            jaccard=options.jaccard,
            averaging=None if options.batch_norm else 0.1,
        )
    else:
        recipe = recipe._replace(learning_rate=rate)
        training.compile_reference(model, recipe, class_weights=weights)


def _recipe(name):
    """The reference's recipe of a name, or None for the modern one."""
    return None if name == "modern" else training.find_recipe(name)


def _fill_in(options, recipe):
    """Gives what was not said on the command line the recipe's values."""
    if recipe:
        known = {**REFERENCE, "learning_rate": recipe.learning_rate}
    else:
        known = MODERN
    if options.crop == 0:
        known = {**known, "scale": None}
    if not _has_color(options.data):
        known = {**known, "color": 0.0}
        if options.color or options.tint or options.blur or options.noise:
            raise ValueError(
                "--color, --tint, --blur or --noise was given for "
                f"{options.data[0]}, whose pictures are not RGB; leave it out."
            )
    for name, value in known.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if recipe and options.jaccard:
        raise ValueError(
            f"--jaccard was given with --recipe {options.recipe}, whose loss is the "
            "reference's; leave one of them out."
        )
    if options.adjust and not options.balance:
        raise ValueError(
            "--adjust takes out what --balance added, which is 0; leave it out."
        )
    if options.adjust and options.upsampling == "learned":
        raise ValueError(
            "--adjust was given with --upsampling learned, which would scale what is "
            "taken out; leave one of them out."
        )


def _label_sets(options):
    """What --labels or --classes say of the labels: `{"": LabelSet}`, or None."""
    if options.labels and options.classes:
        raise ValueError("Both --labels and --classes were given; expected one.")
    if options.labels and options.labels not in LABEL_SETS:
        raise ValueError(
            f"--labels {options.labels} is no label set; expected one of "
            f"{', '.join(LABEL_SETS)}. Name classes of your own with --classes."
        )
    if (options.labels or options.classes) and len(options.data) == 1:
        raise ValueError(
            f"--labels or --classes was given for {options.data[0]}, whose classes are "
            "known; leave it out."
        )
    if twice := [n for n, count in Counter(options.classes).items() if count > 1]:
        raise ValueError(
            f"--classes names {', '.join(twice)} twice; expected each class once, in "
            "the order of their labels."
        )
    if options.labels:
        return {"": LABEL_SETS[options.labels]}
    if options.classes:
        names = tuple(options.classes)
        return {"": LabelSet(names, voc_colormap(len(names)))}
    return None


def _labels_fact(label_sets):
    """What a checkpoint says of its labels, in the manifest's field."""
    known = {id(label_set): name for name, label_set in LABEL_SETS.items()}
    facts = {
        head: known.get(id(x), {"names": list(x.names), "palette": x.palette.tolist()})
        for head, x in label_sets.items()
    }
    return facts.get("", facts)


def _has_color(data):
    """Whether the pictures of DATA are RGB, or have a stream that is."""
    known = _known(data)
    return not known or known.inputs == "image" or isinstance(known.inputs, dict)


def _check_alike(source, validation):
    wanted, found = (
        {head: len(known.names) for head, known in each.label_sets.items()}
        for each in (source, validation)
    )
    if found != wanted:
        raise ValueError(
            f"The validation data have {found.get('', found)} classes; expected "
            f"{wanted.get('', wanted)}, as those that are trained on."
        )


@contextlib.contextmanager
def _reading(*served):
    """Raises what kept `Batches` from being read as it is: TensorFlow wraps it."""
    try:
        yield
    except Exception as error:
        fault = next((each.fault for each in served if each and each.fault), error)
        if fault is error:
            raise
        raise fault from error


def _validation_of(options):
    """What to validate on: DATA, or None."""
    known = _known(options.data)
    if options.validation or not known:
        return options.validation
    name, _ = _dataset(options.data[0])
    return None if known.train == known.evaluate else [f"{name}/{known.evaluate}"]


def _check_net(options):
    """Judges what is asked of the net as far as that takes no data."""
    known = _known(options.data)
    streams = list(known.inputs) if known and isinstance(known.inputs, dict) else []
    if options.adjust and known and len(known.labels) > 1:
        raise ValueError(
            "--adjust means nothing for a net of several heads; leave it out."
        )
    for name in ("skip_scales", "batch_norm", "adjust") if streams else ():
        if getattr(options, name):
            name = name.replace("_", "-")
            raise ValueError(f"--{name} means nothing for a net of two streams.")
    for start in options.init:
        _, name = _start(start, streams)
        models.checkpoint_entry(path_of(name) or name)
    if options.skip_scales:
        names = ("backbone", "stride", "skip_scales")
        with keras.StatelessScope(initialize_variables=False):  # shapes alone
            models.build({"model": {name: getattr(options, name) for name in names}})


def _start(start, streams):
    """Splits `--init color=NAME` into the stream, "" if there is but one, and NAME."""
    stream, named, name = start.partition("=")
    if stream in streams:
        return stream, name
    if named and not pathlib.Path(start).exists():
        raise ValueError(
            f"--init {start} names the stream {stream}; expected "
            f"{' or '.join(streams) or 'no stream, for the net has but one'}."
        )
    return "", start


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


def _net(options, source):
    classes = {head: len(known.names) for head, known in source.label_sets.items()}
    classes = classes.get("", classes)
    pictures, _ = source[0]
    if isinstance(pictures, dict):
        model = models.late_fusion(
            options.backbone,
            options.stride,
            classes,
            upsampling=options.upsampling,
        )
    else:
        model = models.fcn(
            options.backbone,
            options.stride,
            classes,
            upsampling=options.upsampling,
            skip_scales=options.skip_scales,
            input_channels=pictures.shape[-1],
            preprocessing=_preprocessing(options.data),
            batch_norm=options.batch_norm,
        )
    streams = list(pictures) if isinstance(pictures, dict) else []
    for start in options.init:
        stream, name = _start(start, streams)
        stayed = weight_files.transplant(models.load_checkpoint(name), model, stream)
        fitting = weight_files.shapes(model).keys() - set(stayed)
        # Biases of as many scores fit those of any net.
        if all(name.startswith(("score_", "upscore")) for name in fitting):
            raise ValueError(
                f"--init {start} has no trunk that fits {options.backbone}-"
                f"{options.stride}s; expected a checkpoint of {options.backbone}. "
                "Pass the --backbone that it is of, or leave --init out."
            )
        # What normalises is set by the first batch, in `_train`.
        stayed = [weight for weight in stayed if "_bn/" not in weight]
        print(f"From {start}, all but {', '.join(stayed) or 'nothing'}")
    return model


def _preprocessing(data):
    """What the reference's net for a data set is fed; None for what `fcn` does."""
    known = _known(data)
    return known and known.net and manifest.checkpoint_info(known.net)["input"]


def _class_weights(source, power):
    from keras_fcn.datasets.batches import label_counts

    if not power:
        return None
    found = {}
    for head, known in source.label_sets.items():
        with busy("Counting labels"):
            counts = label_counts(source, head)[: len(known.names)]
        found[head] = training.balanced_weights(counts, power)
    return found.get("", found)


def _batches(options, source):
    from keras_fcn.datasets.batches import Batches

    return Batches(
        source,
        batch_size=options.batch_size,
        crop=(options.crop, options.crop) if options.crop else None,
        scale=options.scale,
        mirror=options.mirror,
        jitter=options.jitter,
        color=(options.color,) * 3 if options.color else None,
        tint=options.tint,
        blur=options.blur,
        noise=options.noise,
        cutmix=options.cutmix,
        keep=options.keep,
        cell=options.stride,
        replacement=options.replacement,
        seed=options.seed,
        cache=True,
        shard=devices.shard(),
    )


def _shown(output, epochs, batches, validation, snapshots):
    """The callbacks that write files and show progress: those of the first process."""
    if not devices.is_first():
        return []
    board = callbacks.TensorBoard(output / "tensorboard")
    overlays = []
    if validation:
        folder = output / "overlays"
        overlays = [callbacks.Overlays(validation, folder, board=board)]
    return [
        callbacks.Log(output / "log.csv"),
        board,
        *overlays,
        snapshots,
        callbacks.ProgressBar(epochs=epochs, batches=batches),
    ]
