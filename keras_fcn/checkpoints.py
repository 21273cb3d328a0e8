"""From `weights=` to a filled net: which checkpoint is meant, and where it lies."""

import difflib
import os
import pathlib
from typing import NamedTuple

from keras.layers import Conv2DTranspose

from keras_fcn import hub, manifest, weights
from keras_fcn.progress import reporting


class Checkpoint(NamedTuple):
    """What a checkpoint says of itself, and where its weights are.

    Args:
        entry: A dict in the manifest's fields.
        path: Its .h5 file, or None.
        name: Where there is no path, its name in the manifest, from which the file is
            found; with neither the weights stay zero.
        trust_first_download: As in `load_checkpoint`.
    """

    entry: dict
    path: str | None = None
    name: str | None = None
    trust_first_download: bool = False


def path_of(name):
    """Returns the path of the file that a name means, or None for one in the manifest.

    Args:
        name: A path, told by .h5 or .caffemodel at its end or a folder in it;
            `hf://owner/repo` or `hf://owner/repo@revision`, of which the file is
            fetched; or anything else.

    Raises:
        ValueError: If the address or the file there is not what it should be.
        OSError: If it cannot be fetched.
    """
    if str(name).startswith(hub.SCHEME):
        return hub.fetch_repository(name)
    # What Caffe wrote is refused as such, not as a name that does not exist.
    return name if is_path(name) or str(name).endswith(".caffemodel") else None


def is_path(name):
    """Whether a name is that of a file to write, which `path_of` finds again.

    Raises:
        ValueError: If it is no name at all.
    """
    if not isinstance(name, str | os.PathLike):
        raise ValueError(
            f"{name!r} was given for weights; expected text: a checkpoint's name, the "
            "path of an .h5 file, or hf://owner/repo."
        )
    return str(name).endswith(weights.SUFFIXES) or len(pathlib.Path(name).parts) > 1


def find(weights_argument, builder, backbone, stride=None):
    """Returns the `Checkpoint` that a builder's `weights` means, or None.

    Args:
        weights_argument: None, a tag, a path, an address `hf://owner/repo@revision`, or
            a `Checkpoint`, which is returned.
        builder: "fcn", "late_fusion" or "classifier".
        backbone: Of the net.
        stride: Of the net, None for a classifier.

    Raises:
        ValueError: If there is no such checkpoint for this net.
        OSError: If the file cannot be had.
    """
    if weights_argument is None or isinstance(weights_argument, Checkpoint):
        return weights_argument
    path = path_of(weights_argument)
    if path:
        return Checkpoint(weights.metadata(path), path)
    parts = [backbone, stride and f"{stride}s", weights_argument]
    name = "-".join(part for part in parts if part)
    names = manifest.list_checkpoints()
    entry = manifest.checkpoint_info(name) if name in names else {"model": {}}
    kind = entry["model"].get("builder", "fcn")
    if name not in names or kind != builder:
        if weights_argument in names:
            raise ValueError(
                f"weights={weights_argument!r} was given, which is a checkpoint's "
                "whole name; expected a tag, its last part. Call "
                f"keras_fcn.load_checkpoint({weights_argument!r}), which builds it."
            )
        alike = [n for n in names if n.endswith(f"-{weights_argument}")]
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.3)
        raise ValueError(
            f"There is no checkpoint {name!r} for {builder}(weights="
            f"{weights_argument!r}); what exists is "
            f"{', '.join(alike or [*near, 'others that list_checkpoints() names'])}. "
            "Choose builder, backbone and stride accordingly, or pass an .h5 file or "
            "hf://owner/repo."
        )
    return Checkpoint(entry, name=name)


def num_classes(wanted, checkpoint, default):
    """Returns the number of classes that the argument and the checkpoint agree on.

    Args:
        wanted: An integer, `{head: integer}`, or None.
        checkpoint: A `Checkpoint` or None.
        default: If neither says.

    Raises:
        ValueError: If they differ.
    """
    known = checkpoint and manifest.num_classes(checkpoint.entry)
    if None not in (known, wanted) and known != wanted:
        raise ValueError(
            f"weights={checkpoint.path or checkpoint.name!r} has {known} classes but "
            f"num_classes={wanted}. Build with weights=None, then "
            "keras_fcn.transplant(trained, model) to keep all but the score layers."
        )
    return known or wanted or default


def skips(wanted, checkpoint, default):
    """Returns the features that the argument and the checkpoint agree to skip from.

    Args:
        wanted: Their names, finest first, or None; the default ones where it ends.
        checkpoint: A `Checkpoint` or None.
        default: If neither says: those of all strides.

    Raises:
        ValueError: If they differ, or are no tuple or list.
    """
    net = checkpoint.entry.get("model") if checkpoint else None
    for given in (wanted, net and net.get("skips")):
        if not isinstance(given, list | tuple | None):
            raise ValueError(
                f"skips={given!r} was given; expected a tuple of names, such as "
                f"{default}."
            )
    known = net and tuple(net.get("skips") or default)
    shared = min(len(known or ()), len(wanted or ()))
    if shared and known[-shared:] != tuple(wanted)[-shared:]:
        raise ValueError(
            f"weights={checkpoint.path or checkpoint.name!r} was trained with "
            f"skips={known} but {tuple(wanted)} was given; leave skips out."
        )
    found = known or tuple(wanted or ())
    return (*default[: max(len(default) - len(found), 0)], *found)


def skip_scales(wanted, checkpoint):
    """Returns the skip scales that the argument and the checkpoint agree on.

    No weight shows them, so that a net without them would load and be wrong.

    Args:
        wanted: `{tap: factor}` or None.
        checkpoint: A `Checkpoint` or None.

    Raises:
        ValueError: If some are wanted and the checkpoint has none or others.
    """
    net = checkpoint.entry.get("model") if checkpoint else None
    known = net and net.get("skip_scales")
    if net and wanted and known != wanted:
        raise ValueError(
            f"weights={checkpoint.path or checkpoint.name!r} was trained with "
            f"skip_scales={known} but {wanted} was given; leave skip_scales out."
        )
    return known or wanted


def preprocessing(wanted, checkpoint):
    """Returns what the argument and the checkpoint agree on that a net is fed.

    Args:
        wanted: A dict of `channels` and `mean`, or None.
        checkpoint: A `Checkpoint` or None.

    Returns:
        The manifest's field `input`, or None if neither says.

    Raises:
        ValueError: If both say something else, or if none is wanted and the checkpoint
            is of a net without.
    """
    entry = checkpoint.entry if checkpoint else {}
    known = entry.get("input")
    if known and wanted and known != {**wanted, "mean": list(wanted.get("mean", ()))}:
        raise ValueError(
            f"The weights were trained on {known} but preprocessing={wanted} was given;"
            " leave it out."
        )
    if not wanted and not _facts(entry)["include_preprocessing"]:
        raise ValueError(
            f"weights={checkpoint.path or checkpoint.name!r} is of a net without "
            "preprocessing; expected include_preprocessing=False, or `preprocessing` "
            "that says what it was trained on."
        )
    return known or wanted


def check_file(checkpoint):
    """Checks that the file is of such a net, in what no weight shows.

    Args:
        checkpoint: A `Checkpoint`.

    Raises:
        ValueError: If the file says otherwise.
        OSError: If it cannot be read.
    """
    said = weights.metadata(checkpoint.path) if checkpoint.path else {}
    if "model" not in said:
        return
    wanted, found = _facts(checkpoint.entry), _facts(said)
    for fact, value in wanted.items():
        if found[fact] != value:
            raise ValueError(
                f"{checkpoint.path} says {fact} {found[fact]}; expected {value}. Load "
                "it alone: load_checkpoint builds the net that a file is of."
            )


def _facts(entry):
    """What a net of the same weights may differ in."""
    net = entry.get("model", {})
    return {
        "skip_scales": net.get("skip_scales"),
        "include_preprocessing": net.get("include_preprocessing", True),
        "input": entry.get("input"),
    }


def fill(model, checkpoint):
    """Fills a model with a checkpoint's weights, and returns it.

    Args:
        model: The net that the checkpoint is for.
        checkpoint: A `Checkpoint`; None leaves the model as it is.

    Raises:
        ValueError: If the weights do not fit.
        OSError: If they cannot be had.
    """
    if not checkpoint or not (checkpoint.path or checkpoint.name):
        return model
    path = checkpoint.path or locate(model, checkpoint)
    # A net whose upsampling was fixed has no kernels of it: they start as they were.
    known = checkpoint.entry.get("model", {"upsampling": "learned"})
    fixed = known.get("upsampling", "bilinear") == "bilinear"
    learned = [x.name for x in model.layers if isinstance(x, Conv2DTranspose)]
    weights.load(model, path, missing=learned if fixed else ())
    return model


def locate(model, checkpoint):
    """Finds or fetches the .h5 file of a checkpoint in the manifest.

    Args:
        model: The net that it is for.
        checkpoint: A `Checkpoint` with a name.

    Returns:
        Its path. The content is what the manifest says, or what was ported from that.

    Raises:
        ValueError: If the content is another.
        OSError: If it cannot be had.
    """
    name, entry = checkpoint.name, checkpoint.entry
    if "file" in entry:
        return manifest.shipped(name)

    def port(source, output):
        from keras_fcn import porting  # and protobuf, which few will need

        with reporting(f"Porting {name}") as report:
            porting.port(source, output, model, metadata=entry, progress=report)

    return hub.fetch(
        name, entry, port, trust_first_download=checkpoint.trust_first_download
    )
