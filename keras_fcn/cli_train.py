"""The command `train`: from labelled pictures to a net, its scores and its curves."""

import argparse
import contextlib
import datetime
import itertools
import math
import pathlib
from collections import Counter

import keras

from keras_fcn import (
    batch_norm,
    callbacks,
    cli_data,
    devices,
    files,
    manifest,
    models,
    protocols,
    saving,
    training,
)
from keras_fcn import weights as weight_files
from keras_fcn.labels import LABEL_SETS, LabelSet, voc_colormap
from keras_fcn.progress import busy
from keras_fcn.snapshots import Snapshots, positions

# What is done where nobody says otherwise: `compile_modern`, for people's own data, and
# `compile_reference`, one whole picture a step.
MODERN = {
    "backbone": "googlenet",
    "stride": 8,
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
VALIDATION_MULTIPLE = 64  # pixels: JAX compiles anew for each size


# what is asked of it


def _number(kind, fits, expected):
    """The argparse type of a number that `fits`, which `expected` says in words."""

    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} was given; expected {expected}")
        return value

    read.__name__ = kind.__name__  # argparse says so of what is no number
    return read


_COUNT = _number(int, lambda x: x >= 1, "1 or more")
_WHOLE = _number(int, lambda x: x >= 0, "0 or more")
_SEED = _number(int, lambda x: 0 <= x < 2**32, f"0 to {2**32 - 1}")
_SHARE = _number(float, lambda x: 0 <= x <= 1, "0 to 1")
_AMOUNT = _number(float, lambda x: 0 <= x < math.inf, "0 or more, and finite")
_POSITIVE = _number(float, lambda x: 0 < x < math.inf, "a finite number above 0")


def add_train(commands):
    """Adds the command `train`."""
    command = commands.add_parser("train", help="train a net on labelled pictures")
    cli_data.add_data(command)
    _add_net(command)
    _add_recipe(command)
    add = command.add_argument
    add("--output", required=True, help="folder for the model, logs and pictures")
    add("--resume", action="store_true", help="go on where the output folder stops")
    add(
        "--validation",
        nargs="+",
        metavar="DATA",
        help="what to score each epoch: as DATA; a data set's own split if left out",
    )
    command.set_defaults(run=train)


def _add_net(command):
    net = command.add_argument_group("the net")
    net.add_argument(
        "--backbone", choices=models.BACKBONES, help="(googlenet, or as --recipe says)"
    )
    net.add_argument(
        "--stride", type=int, choices=models.STRIDES, help="(8, or as --recipe says)"
    )
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
    net.add_argument(
        "--skips",
        nargs="+",
        metavar="NAME",
        help="features to skip from, finest first, such as conv2 inception_3b "
        "inception_4e (those of --init, or the first of each stride)",
    )
    net.add_argument(
        "--skip-scales",
        type=cli_data.numbers,
        metavar="pool4=0.01,pool3=0.0001",
        help="(none, or as --recipe says)",
    )
    net.add_argument(
        "--upsampling", default="bilinear", choices=("bilinear", "learned")
    )
    net.add_argument("--fix-trunk", action="store_true", help="train the scores alone")
    net.add_argument(
        "--batch-norm",
        action="store_true",
        help="normalise in training, and fold that into the convolutions at the end",
    )


def _add_recipe(command):
    how = command.add_argument_group(
        "the recipe",
        "Numbers in brackets are those of the modern recipe and of the reference's.",
    )
    add = how.add_argument
    add("--recipe", default="modern", help="or the reference's, such as voc-fcn8s")
    add("--epochs", type=_COUNT, help="(60; as many updates as solve.py makes)")
    add("--batch-size", type=_COUNT, help="pictures (6; 1)")
    add("--crop", type=_WHOLE, help="pixels a side; 0: whole pictures (256; 0)")
    add("--scale", type=_POSITIVE, nargs=2, help="range of the zoom (0.7 2; none)")
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
    add("--learning-rate", type=_POSITIVE, help="its peak (6e-4; its own)")
    add("--precision", default="float32", choices=cli_data.PRECISIONS)
    add("--seed", type=_SEED, default=1)
    add("--devices", type=_COUNT, default=1, help="that share each batch (1)")


# how it runs


def train(options):
    """Trains a net, on one device or several."""
    if options.batch_norm and options.devices > 1:
        raise ValueError(
            f"--batch-norm was given with --devices {options.devices}, each of which "
            "would normalise its own part of a batch; leave one of them out."
        )
    cli_data.check_folder(options.output)
    _check_apart(options)
    _check_resume(pathlib.Path(options.output) / "state", options.resume)
    devices.run(_train, options.devices, options)


def _check_apart(options):
    given = [
        data for data in (options.data, options.validation or []) if len(data) == 2
    ]
    folders = {pathlib.Path(folder).resolve() for data in given for folder in data}
    if pathlib.Path(options.output).resolve() in folders:
        raise ValueError(
            f"--output {options.output} is a folder of the data, where the pictures "
            "that a training writes would be taken for more; expected another one."
        )


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


@cli_data.warnings_in_a_sentence()  # in processes that `main` has not begun, too
def _train(options):
    keras.utils.set_random_seed(options.seed)
    keras.config.set_dtype_policy(options.precision)
    recipe = _recipe(options.recipe)
    _fill_in(options, recipe)
    devices.share(options.batch_size)
    known = _label_sets(options)
    _check_loss(options, recipe)
    _check_net(options)
    _check_windows(options)
    found = _find(options)
    first = devices.is_first()  # of the processes of this training
    with _alone(options.output) if first else contextlib.nullcontext():
        _train_alone(options, recipe, found, known)


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


def _train_alone(options, recipe, found, known):
    """All that a training does, in order, once its options have been judged."""
    source, validation = _open(found, known)
    model = _net(options, source)
    batches = _batches(options, source)
    _start(model, options, recipe, batches)
    weights = _class_weights(source, options.balance)
    epochs = options.epochs or math.ceil(recipe.steps / len(batches))
    _compile(model, options, recipe, weights, epochs * len(batches))
    _fit(model, options, batches, validation, epochs)
    if devices.is_first():
        _write(model, options, source.label_sets, weights, validation)


# what is judged before any data are read


def _recipe(name):
    """The reference's recipe of a name, or None for the modern one."""
    return None if name == "modern" else training.find_recipe(name)


def _fill_in(options, recipe):
    """Gives what was not said on the command line the recipe's values."""
    if recipe:
        own = ("backbone", "stride", "skip_scales", "learning_rate")
        known = {**REFERENCE, **{name: getattr(recipe, name) for name in own}}
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


def _has_color(data):
    """Whether the pictures of DATA are RGB, or have a stream that is."""
    known = cli_data.dataset_of(data)
    return not known or known.inputs == "image" or isinstance(known.inputs, dict)


def _check_loss(options, recipe):
    """Judges what is asked of the loss, and of what is taken out of it again."""
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


def _check_windows(options):
    """Judges what is cut out of the pictures, and how those are changed."""
    if 0 < options.crop < options.stride:
        raise ValueError(
            f"--crop {options.crop} is less than --stride {options.stride}, one cell "
            "of the net; expected windows of many, such as 256, or 0 for whole "
            "pictures."
        )
    if options.scale and options.scale[0] > options.scale[1]:
        lowest, highest = options.scale
        raise ValueError(
            f"--scale {lowest:g} {highest:g} was given; expected the lowest factor "
            "first, then the highest."
        )
    _batches(options, [None])  # raises where they make no sense


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
    if options.classes and len(options.classes) == 1:
        raise ValueError(
            f"--classes names {options.classes[0]} alone; expected 2 classes or more, "
            "for of one there is nothing to learn."
        )
    if options.labels:
        return {"": LABEL_SETS[options.labels]}
    if options.classes:
        names = tuple(options.classes)
        return {"": LabelSet(names, voc_colormap(len(names)))}
    return None


def _check_net(options):
    """Judges what is asked of the net as far as that takes no data."""
    known = cli_data.dataset_of(options.data)
    streams = _streams(options.data)
    if options.adjust and known and len(known.labels) > 1:
        raise ValueError(
            "--adjust means nothing for a net of several heads; leave it out."
        )
    if options.fix_trunk and not options.init:
        raise ValueError(
            "--fix-trunk was given without --init; expected a checkpoint whose trunk "
            "is to stay, as one of random numbers says little of a picture. Pass "
            "--init, or leave --fix-trunk out."
        )
    single = ("skips", "skip_scales", "batch_norm", "adjust")
    for name in single if streams else ():
        if getattr(options, name):
            name = name.replace("_", "-")
            raise ValueError(f"--{name} means nothing for a net of two streams.")
    for start in options.init:
        net = _check_start(start, streams, options)
        if not streams and options.skips is None:
            options.skips = net.get("skips")
    if options.skips or options.skip_scales:
        names = ("backbone", "stride", "skips", "skip_scales")
        asked = {name: getattr(options, name) for name in names}
        models.skeleton({"model": asked})


def _check_start(start, streams, options):
    """Judges a checkpoint to start from, fetches it if need be; returns its `model`."""
    stream, name = _stream_and_name(start, streams)
    path = cli_data.path_of(name)
    entry = models.checkpoint_entry(path or name)
    net = entry["model"]
    if net["backbone"] != options.backbone:
        raise _unfit(start, options)
    fused = net.get("builder") == "late_fusion"
    if fused and not streams:
        raise ValueError(
            f"--init {start} is of two streams; expected a checkpoint of one, as the "
            "net for these data has."
        )
    if fused and stream:
        raise ValueError(
            f"--init {start} names one stream of a checkpoint of two, whose weights "
            f"bear the names of both; expected {name} alone."
        )
    if streams and not fused and not stream:
        raise ValueError(
            f"--init {start} is of one stream; expected to be told which it is for: "
            f"{' or '.join(f'{each}={start}' for each in streams)}."
        )
    if not path:
        cli_data.fetch(name, entry)
    return net


def _unfit(start, options):
    return ValueError(
        f"--init {start} has no trunk that fits {options.backbone}-{options.stride}s; "
        f"expected a checkpoint of {options.backbone}. Pass the --backbone that it is "
        "of, or leave --init out."
    )


def _streams(data):
    """The names of the streams that a net for DATA has; none if it has but one."""
    known = cli_data.dataset_of(data)
    return list(known.inputs) if known and isinstance(known.inputs, dict) else []


def _stream_and_name(start, streams):
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


def _find(options):
    """Finds what to train on and what to validate on, or None, and reads neither."""
    data = _validation_of(options)
    return (
        cli_data.opener(options.data, options, training=True),
        data and cli_data.opener(data, options, given="--validation"),
    )


def _validation_of(options):
    """What to validate on: DATA, or None."""
    known = cli_data.dataset_of(options.data)
    if options.validation or not known:
        return options.validation
    name, _ = cli_data.name_and_split(options.data[0])
    return None if known.train == known.evaluate else [f"{name}/{known.evaluate}"]


# each step of it


def _open(found, known):
    """The sources of what `_find` found, of which all masks of folders are read."""
    open_data, open_validation = found
    source = open_data(known)
    if not open_validation:
        return source, None
    validation = open_validation(source.label_sets)
    _check_alike(source, validation)
    return source, validation


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


def _net(options, source):
    classes = {head: len(known.names) for head, known in source.label_sets.items()}
    classes = classes.get("", classes)
    pictures, _ = source[0]
    name, stride, upsampling = options.backbone, options.stride, options.upsampling
    with busy(f"Building {name}-{stride}s"):
        if isinstance(pictures, dict):
            return models.late_fusion(name, stride, classes, upsampling=upsampling)
        return models.fcn(
            name,
            stride,
            classes,
            upsampling=upsampling,
            skips=options.skips,
            skip_scales=options.skip_scales,
            input_channels=pictures.shape[-1],
            preprocessing=_preprocessing(options.data),
            batch_norm=options.batch_norm,
        )


def _preprocessing(data):
    """What the reference's net for a data set is fed; None for what `fcn` does."""
    known = cli_data.dataset_of(data)
    return known and known.net and manifest.checkpoint_info(known.net)["input"]


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


def _start(model, options, recipe, batches):
    """Copies what a net is to start from, and freezes what is to stay so."""
    if recipe and not options.init:
        print(f"From random numbers; the reference starts from {recipe.start} (--init)")
    if options.skips:
        print(f"Skips from {', '.join(options.skips)}")
    streams = _streams(options.data)
    for start in options.init:
        stream, name = _stream_and_name(start, streams)
        with busy(f"Loading {name}"):
            given = models.load_checkpoint(name)
            stayed = weight_files.transplant(given, model, stream)
            del given  # as large as the net itself
        fitting = weight_files.shapes(model).keys() - set(stayed)
        # Biases of as many scores fit those of any net.
        if all(name.startswith(("score_", "upscore")) for name in fitting):
            raise _unfit(start, options)
        # What normalises is set by the first batch, below.
        stayed = [weight for weight in stayed if "_bn/" not in weight]
        print(f"From {start}, {_kept(stayed)}")
    if options.batch_norm and options.init:
        with (
            busy("Fitting the normalisation to a batch"),
            cli_data.in_memory(_too_much(options)),
        ):
            batch_norm.fit_batch_norm(model, batches.batch(0, 0)[0])
    if options.fix_trunk:
        training.fix_trunk(model)


def _kept(stayed):
    return f"all but {', '.join(stayed)}" if stayed else "all weights"


def _class_weights(source, power):
    if not power:
        return None
    found = {}
    for head, known in source.label_sets.items():
        counts = _label_counts(source, head)[: len(known.names)]
        found[head] = training.balanced_weights(counts, power)
    return found.get("", found)


def _label_counts(source, head):
    from keras_fcn.datasets import batches, folder

    if isinstance(source, folder.Folder):
        return source.label_counts  # of when they were checked
    with busy("Counting labels"):
        return batches.label_counts(source, head)


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


def _fit(model, options, batches, validation, epochs):
    """Trains a compiled net to the end, from its newest snapshot if there is one."""
    from keras_fcn.datasets.batches import Batches

    output = pathlib.Path(options.output)
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
        if options.recipe != "modern":  # whose rate is a schedule
            # Not the snapshot's, should another one be asked for.
            model.optimizer.learning_rate = options.learning_rate
        devices.distribute(model)
        with cli_data.in_memory(_too_much(options)), _reading(batches, validated):
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


def _note_command(path, typed, resume):
    """Writes what was typed, when and with which versions; below it, to resume."""
    before = path.read_bytes() if resume and path.exists() else b""
    now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    known = ", ".join(f"{name} {value}" for name, value in protocols.versions().items())
    files.write_bytes(path, before + f"# {now}; {known}\n{typed}\n".encode())


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


def _too_much(options):
    sides = f"--crop {options.crop}" if options.crop else "whole pictures"
    return ValueError(
        f"A training with --batch-size {options.batch_size} and {sides} does not fit "
        "into memory; expected less. Lower --batch-size, set --crop to smaller "
        "windows, or take a net of fewer parameters."
    )


def _write(model, options, label_sets, weights, validation):
    """Writes the trained net as it is to be used, its curves and its scores."""
    output = pathlib.Path(options.output)
    net = output / "model.h5"
    if options.batch_norm:
        model = batch_norm.fold_batch_norm(model)
    if options.adjust:
        training.adjust_logits(model, weights, options.adjust)
    saving.save_checkpoint(model, net, facts={"labels": _labels_fact(label_sets)})
    callbacks.curves(output / "log.csv", output / "curves.png")
    print(f"Wrote {net}, and curves.png beside it")
    if validation:
        written = output / "scores.json", output / "confusion.png"
        cli_data.score(options.data, model, validation, net, *written, {})


def _labels_fact(label_sets):
    """What a checkpoint says of its labels, in the manifest's field."""
    known = {id(label_set): name for name, label_set in LABEL_SETS.items()}
    facts = {
        head: known.get(id(x), {"names": list(x.names), "palette": x.palette.tolist()})
        for head, x in label_sets.items()
    }
    return facts.get("", facts)
