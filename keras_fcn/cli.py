"""The command `keras-fcn`: what the package does, for people who want pictures."""

import argparse
import inspect
import os
import pathlib
import shlex
import sys

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text  # which takes "[" for what it is

from keras_fcn import (
    checkpoints,
    cli_data,
    cli_train,
    exporting,
    files,
    hdf5,
    images,
    labels,
    manifest,
    models,
    progress,
    protocols,
    summary,
    weights,
)
from keras_fcn.cli_data import numbers
from keras_fcn.evaluation import segment
from keras_fcn.progress import busy, track

UNCUT = 10_000  # columns: a terminal wraps longer lines than its own, and cuts none
CLOSED_PIPE = 128 + 13  # the exit status that a shell gives to SIGPIPE


class _Console(Console):
    def on_broken_pipe(self):
        raise  # to `main`: rich would end the process, with status 1


def main(arguments=None):
    """Runs a command.

    Args:
        arguments: A list of strings; those of the process if None.

    Returns:
        The exit status: 0; 1 where `check-data` warns; 2 after an error, which is said
        in one sentence; 130 after Ctrl-C.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    _spell_out()
    parsed = _parser().parse_args(arguments)
    parsed.typed = shlex.join(["keras-fcn", *arguments])
    try:
        with cli_data.warnings_in_a_sentence():
            status = parsed.run(parsed) or 0
            print(end="", flush=True)
            return status
    except KeyboardInterrupt:
        print("keras-fcn: stopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        _let_go()
        return CLOSED_PIPE
    except (OSError, ValueError) as error:
        message = str(error)
    print(f"keras-fcn: error: {message}", file=sys.stderr)
    return 2


def _spell_out():
    """Has names that a stream cannot encode written with backslashes."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict":  # others do without an error
            stream.reconfigure(errors="backslashreplace")


def _let_go():
    """Drops what is and will be printed, as nobody reads it (Python's docs, signal)."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _parser():
    parser = argparse.ArgumentParser(
        prog="keras-fcn", description="Fully convolutional networks for segmentation."
    )
    known = ", ".join(f"{name} {value}" for name, value in protocols.versions().items())
    parser.add_argument("--version", action="version", version=known)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (  # in the order in which --help lists them
        _add_list,
        _add_show,
        _add_predict,
        _add_fetch,
        cli_data.add_evaluate,
        cli_data.add_upper_bound,
        cli_train.add_train,
        cli_data.add_prepare,
        _add_convert,
        _add_export,
        cli_data.add_check_data,
    ):
        add(commands)
    return parser


def _add_list(commands):
    command = commands.add_parser("list", help="the checkpoints that exist")
    command.add_argument("--backbone", choices=models.BACKBONES)
    command.set_defaults(run=_list)


def _list(options):
    table = Table("checkpoint", "parameters", "classes", "mean IU", "on", box=None)
    for name in manifest.list_checkpoints(options.backbone):
        entry = manifest.checkpoint_info(name)
        known = {
            kind: entry[kind]
            for kind in ("measured", "published")
            if entry.get(kind, {}).get("mean_iou") is not None
        }
        kind, score = next(iter(known.items()), ("", {}))
        table.add_row(
            name,
            f"{entry['parameters'] / 1e6:.1f} M",
            _classes_text(manifest.num_classes(entry)),
            f"{score['mean_iou']:.1f}" if score else "",
            f"{score['split']} ({kind})" if score else "",
        )
    _print(table)


def _print(table):
    _Console(width=UNCUT).print(table)


def _classes_text(classes):
    """Writes a number of classes, or `{head: classes}`, as `--num-classes` takes it."""
    if isinstance(classes, dict):
        return ",".join(f"{head}={number}" for head, number in classes.items())
    return str(classes)


def _add_show(commands):
    command = commands.add_parser(
        "show", help="a net's layers, grids, receptive field and cost"
    )
    command.add_argument(
        "net", help="such as alexnet-32s, vgg16-8s, a checkpoint's name or an .h5 file"
    )
    command.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=(500, 500),
        metavar=("HEIGHT", "WIDTH"),
        help="of a picture, to count operations for (500 500)",
    )
    command.set_defaults(run=_show)


def _show(options):
    model = _net(options.net)
    rows = summary.summarize(model, *options.size)
    table = Table(box=None)
    for column in ("layer", "kind"):
        table.add_column(column, no_wrap=True)
    columns = ("height", "width", "channels", "stride", "start", "field")
    for column in (*columns, "parameters", "multiply-adds"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        sizes = (*row.shape, *row.grid, row.field)
        counts = (row.parameters, row.multiply_adds)
        table.add_row(
            row.name,
            row.kind,
            *(f"{size:g}" for size in sizes),
            *(f"{count:,}" if count else "" for count in counts),
        )
    _print(table)
    totals = summary.totals(rows)
    print(f"""
{model.name} at {options.size[0]} x {options.size[1]} pixels
convolution layers {totals["conv_layers"]} (on the longest way, as the paper counts)
parameters         {totals["parameters"]:,} ({totals["parameters"] / 1e6:.0f} M)
receptive field    {totals["receptive_field"]} pixels
max stride         {totals["max_stride"]} pixels
multiply-adds      {totals["multiply_adds"]:,}""")
    if "googlenet" in model.name and "classifier" not in model.name:
        wide = totals["receptive_field"] + 6 * totals["max_stride"]
        print(
            f"The paper's Table 1 says {wide}: that is with the 7 x 7 average pooling "
            "of the classifier, which it says was discarded."
        )


def _net(name):
    """Builds `vgg16-8s`, or what a checkpoint is for, without weights."""
    path = cli_data.path_of(name)
    if path or name in manifest.list_checkpoints():
        return models.skeleton(models.checkpoint_entry(path or name))
    backbone, _, stride = name.partition("-")
    strides = {f"{stride}s": stride for stride in models.STRIDES}
    if backbone not in models.BACKBONES or stride not in strides:
        raise ValueError(
            f"{name!r} is no net; expected a backbone and a stride such as vgg16-8s, "
            "a name that `keras-fcn list` prints, or an .h5 file."
        )
    entry = {"model": {"backbone": backbone, "stride": strides[stride]}}
    return models.skeleton(entry)


def _add_fetch(commands):
    command = commands.add_parser("fetch", help="download a checkpoint, and verify it")
    command.add_argument("names", nargs="+", help="names that `keras-fcn list` prints")
    command.add_argument(
        "--trust-first-download",
        action="store_true",
        help="accept a file of which nobody has published a hash; its hash is kept",
    )
    command.set_defaults(run=_fetch)


def _fetch(options):
    for name in options.names:
        path = checkpoints.path_of(name)
        if not path:
            entry = manifest.checkpoint_info(name)
            trust = options.trust_first_download
            path = cli_data.fetch(name, entry, trust_first_download=trust)
        found = files.measure(path)
        print(f"{name}: {path}, {found['bytes']:,} bytes, sha256 {found['sha256']}")


def _add_predict(commands):
    command = commands.add_parser("predict", help="segment pictures")
    command.add_argument("inputs", nargs="+", help="image files, and folders of them")
    cli_data.add_checkpoint(command)
    cli_data.add_looks(command)
    command.add_argument("--output", default="segmented", help="folder (%(default)s)")
    command.set_defaults(run=_predict)


def _predict(options):
    cli_data.check_folder(options.output)
    jobs = _jobs(options.inputs, pathlib.Path(options.output))
    checkpoint = cli_data.path_of(options.checkpoint) or options.checkpoint
    entry = models.checkpoint_entry(checkpoint)
    cli_data.check_labels_pictures(entry, options.checkpoint)
    sets = manifest.label_sets(entry)
    classes = manifest.num_classes(entry)
    _check_beside(jobs, list(classes) if isinstance(classes, dict) else [""])
    with busy(f"Loading {options.checkpoint}"):
        model = models.load_checkpoint(checkpoint)
    looks = {"mirror": options.mirror, "scales": options.scales}
    skipped, read = [], True
    for source, target in track(jobs, "Segmenting"):
        try:
            lines = _segment_file(source, target, model, sets, looks)
        except _SkippedError as error:
            skipped.append(str(error))  # said at the end, after all that can be done
        else:
            read = _say(lines) and read
    if len(skipped) < len(jobs):
        read = _say(f"Wrote labels, colours and overlays to {options.output}") and read
    if skipped:
        raise ValueError("\n".join(skipped))
    return 0 if read else CLOSED_PIPE


def _say(text):
    """Prints at once, and returns whether there is somebody to read it."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        _let_go()
        return False
    return True


class _SkippedError(Exception):
    """A picture is left out: why, in a sentence."""


def _too_large(picture):
    return _SkippedError(
        f"{picture} does not fit into memory; expected a smaller picture. Make it "
        "smaller, look at fewer or smaller --scales, or take a net of fewer parameters."
    )


def _segment_file(source, target, model, sets, looks):
    """Writes what a net finds in a picture; returns a line on each of its heads.

    Raises:
        _SkippedError: If the picture cannot be read, or does not fit into memory.
    """
    try:
        with cli_data.in_memory(_too_large(f"`{source}`")):
            picture = images.read_image(source)
    except (OSError, ValueError) as error:
        raise _SkippedError(str(error)) from error
    height, width, _ = picture.shape
    lines = []
    what = f"`{source}`, {height} x {width} pixels (height x width),"
    with cli_data.in_memory(_too_large(what)):
        result = segment(model, picture, **looks)
        heads = result if isinstance(result, dict) else {"": result}
        for head, found in heads.items():
            known = sets.get(head) or labels.LabelSet((), labels.voc_colormap())
            _write_pictures(target, head, picture, found, known)
            lines.append(f"{source}: {_shares(found, known.names)}")
    return "\n".join(lines)


def _check_beside(jobs, heads):
    """Raises `ValueError` if a file that lies beside the pictures is to be replaced."""
    folders = {source.resolve().parent for source, _ in jobs}
    for source, target in jobs:
        for path in (path for head in heads for path in _written(target, head)):
            if path.exists() and path.resolve().parent in folders:
                raise ValueError(
                    f"{path} exists, where pictures lie, and what {source} shows would "
                    "replace it; expected no such file there. Name another --output, "
                    "or move it away."
                )


def _written(target, head):
    """Names the files of labels, colours and overlay that a picture becomes."""
    stem = f"{target.name}-{head}" if head else target.name
    kinds = ("labels", "color", "overlay")
    return [target.with_name(f"{stem}-{kind}.png") for kind in kinds]


def _write_pictures(target, head, picture, found, known):
    target.parent.mkdir(parents=True, exist_ok=True)
    in_labels, in_color, over = _written(target, head)
    color = images.colorize(found, known.palette)
    overlay = images.illustrate(picture, found, known.names, known.palette)
    images.save_labels(in_labels, found, known.palette)
    images.save_image(in_color, color)
    images.save_image(over, overlay)


def _shares(found, names):
    values, counts = np.unique(found, return_counts=True)
    order = np.argsort(-counts)
    shares = [
        f"{names[value] if value < len(names) else value} {count / found.size:.0%}"
        for value, count in zip(values[order], counts[order], strict=True)
        if count / found.size >= 0.005
    ]
    return ", ".join(shares)


def _jobs(inputs, output):
    """Lists (image file, output path without suffix), each of them once."""
    from keras_fcn.datasets.folder import IMAGE_SUFFIXES

    if "" in inputs:
        raise ValueError(
            "An input is empty; expected image files, and folders of them. Was a shell "
            "variable not set?"
        )
    jobs = []
    for item in map(pathlib.Path, inputs):
        if item.is_dir():
            _check_apart(item, output)
            found = [
                path
                for path in sorted(item.rglob("*"))
                if path.suffix.lower() in IMAGE_SUFFIXES
                and not path.is_dir()
                and not path.name.startswith(".")
                and output.resolve() not in path.resolve().parents
            ]
            if not found:
                raise FileNotFoundError(
                    f"{item} holds no image; expected files that end in "
                    f"{', '.join(IMAGE_SUFFIXES)}."
                )
            jobs += [
                (path, output / path.relative_to(item).with_suffix(""))
                for path in found
            ]
        elif item.is_file():
            jobs.append((item, output / item.stem))
        else:
            raise FileNotFoundError(
                f"{item} is neither a file nor a folder; expected image files, and "
                "folders of them. Check the path."
            )
    taken = {}
    for source, target in jobs:
        if target in taken and taken[target] != source:
            raise ValueError(
                f"{taken[target]} and {source} would be written to the same {target}; "
                "segment them into different --output folders."
            )
        taken[target] = source
    return [(source, target) for target, source in taken.items()]


def _check_apart(folder, output):
    """Raises `ValueError` where all pictures of a folder would be taken for results."""
    inside, outside = folder.resolve(), output.resolve()
    if outside == inside or outside in inside.parents:
        relation = "is" if outside == inside else "encloses"
        raise ValueError(
            f"--output {output} {relation} the folder {folder} of the input, in which "
            "results are left out; expected a folder in it or beside it. Name another "
            "--output."
        )


def _add_convert(commands):
    command = commands.add_parser(
        "convert", help="port a .caffemodel, or the VGG16 of keras.applications"
    )
    add = command.add_argument
    add("source", help=".caffemodel, .caffemodel.h5, or keras.applications' VGG16")
    add("--output", required=True, help=".h5 file to write")
    net = command.add_mutually_exclusive_group(required=True)
    net.add_argument("--checkpoint", help="what it is: a name in `keras-fcn list`")
    net.add_argument("--backbone", choices=models.BACKBONES)
    kinds = command.add_mutually_exclusive_group()
    for kind, what in (
        ("classifier", "it is an ImageNet net, no FCN"),
        ("late-fusion", "it has two streams, color and hha"),
    ):
        const = kind.replace("-", "_")
        kinds.add_argument(
            f"--{kind}", dest="builder", action="store_const", const=const, help=what
        )
    add("--stride", type=int, choices=models.STRIDES, help="pixels")
    add("--num-classes", type=_classes, metavar="N", help="or sem=33,geo=3")
    add("--input-channels", type=int, choices=(3, 4), help="4: colour and depth")
    add("--skip-scales", type=numbers, metavar="pool4=0.01,pool3=0.0001")
    add("--upsampling", choices=("bilinear", "learned"), help="bilinear is checked")
    command.set_defaults(run=_convert)


def _classes(text):
    return int(text) if text.isdecimal() else numbers(text, int)


def _convert(options):
    from keras_fcn import porting  # and protobuf, which takes a quarter of a second

    cli_data.check_file(options.output, *weights.SUFFIXES)
    entry, output = _entry_of(options), pathlib.Path(options.output)
    model = models.skeleton(entry)
    in_hdf5 = options.source.endswith(weights.SUFFIXES)
    foreign = not in_hdf5 or hdf5.is_snapshot(options.source)
    with progress.reporting(f"Porting {options.source}") as report:
        rows = porting.port(
            options.source,
            output,
            model,
            metadata=entry,
            expected=entry.get("caffemodel" if foreign else "keras"),
            progress=report,
        )
    table = Table(box=None)
    for title in (options.source, "shapes", output.name, "shapes", ""):
        table.add_column(Text(title))
    for row in rows:
        theirs, ours = porting.shown(row.blobs), porting.shown(row.weights)
        table.add_row(Text(row.source), theirs, row.layer, ours, row.action)
    _print(table)
    entry["parameters"] = model.count_params()
    entry["file"] = {"name": output.name, **files.measure(output)}
    if foreign:
        original = weights.metadata(output)["original"]
        entry["caffemodel"] = {**entry.get("caffemodel", {}), **original}
    print(f"Wrote {output}, sha256 {entry['file']['sha256']}. For the manifest:\n")
    print(porting.entry_toml(options.checkpoint or output.stem, entry))


def _add_export(commands):
    command = commands.add_parser("export", help="write a net as ONNX or SavedModel")
    command.add_argument("checkpoint", help="a name in `keras-fcn list`, or a file")
    command.add_argument(
        "--output", required=True, type=pathlib.Path, help="net.onnx, or a new folder"
    )
    command.add_argument(
        "--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="(any)"
    )
    command.set_defaults(run=_export)


def _export(options):
    exporting.check_path(options.output, options.size)
    with busy(f"Loading {options.checkpoint}"):
        model = models.load_checkpoint(options.checkpoint)
    with busy(f"Writing {options.output}"):
        exporting.export(model, options.output, size=options.size)
    print(f"Wrote {options.output}")


def _entry_of(options):
    """Returns what the manifest says, or would say, of the net that a file is for."""
    names = ("stride", "num_classes", "input_channels", "skip_scales", "upsampling")
    given = {n: getattr(options, n) for n in names if getattr(options, n) is not None}
    if options.checkpoint:
        if options.builder or given.keys() - {"upsampling"}:
            raise ValueError(
                f"--checkpoint {options.checkpoint} says what the net is; expected no "
                "other option with it than --upsampling."
            )
        entry = manifest.checkpoint_info(options.checkpoint)
    else:
        entry = _described(options.builder, options.backbone, given)
    entry["model"].update(given)
    builder = entry["model"].get("builder", "fcn")
    takes = inspect.signature(models.BUILDERS[builder]).parameters
    wrong = [f"--{name.replace('_', '-')}" for name in given if name not in takes]
    if wrong:
        raise ValueError(f"{', '.join(wrong)} means nothing for a {builder}.")
    return entry


def _described(builder, backbone, given):
    if builder == "classifier":
        known = manifest.checkpoint_info(f"{backbone}-imagenet")
        return {key: known[key] for key in ("model", "input", "drop") if key in known}
    if missing := {"stride", "num_classes"} - given.keys():
        options = " and ".join(f"--{n.replace('_', '-')}" for n in sorted(missing))
        raise ValueError(f"--backbone {backbone} alone is no FCN; give {options}, too.")
    if builder == "late_fusion":
        model = {"builder": builder, "backbone": backbone}
        return {"model": model, "input": models.LATE_FUSION_INPUTS}
    data = models.DEFAULT_INPUTS[given.get("input_channels", 3)]
    # An FCN that was trained with the auxiliary heads of its classifier has them, too.
    known = manifest.checkpoint_info(f"{backbone}-imagenet")
    drop = {"drop": known["drop"]} if "drop" in known else {}
    return {"model": {"backbone": backbone}, "input": data, **drop}
