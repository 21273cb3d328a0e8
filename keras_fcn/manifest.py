"""The checkpoints that exist: the table in weights_manifest/, read and looked up."""

import copy
import difflib
import functools
import pathlib
import tomllib

import numpy as np

from keras_fcn.files import measure
from keras_fcn.labels import LABEL_SETS, LabelSet, voc_colormap

_HERE = pathlib.Path(__file__).parent


def folder():
    """Returns the folder of the manifest: in the wheel, else beside the package.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    for place in (_HERE / "weights_manifest", _HERE.parent / "weights_manifest"):
        if (place / "checkpoints.toml").is_file():
            return place
    raise FileNotFoundError(
        f"weights_manifest/checkpoints.toml is neither in {_HERE} nor in "
        f"{_HERE.parent}; install keras_fcn again."
    )


@functools.cache
def _table():
    return tomllib.loads((folder() / "checkpoints.toml").read_text(encoding="utf-8"))


def list_checkpoints(backbone=None):
    """Returns the names of the known checkpoints.

    Args:
        backbone: "alexnet", "vgg16" or "googlenet" to list only those.

    Returns:
        A list of names in the manifest's order, each of which `load_checkpoint` and
        `checkpoint_info` take.

    Raises:
        ValueError: If there is no such backbone.
    """
    known = sorted({entry["model"]["backbone"] for entry in _table().values()})
    if backbone not in (None, *known):
        raise ValueError(
            f"backbone={backbone!r} was given; expected one of "
            f"{', '.join(map(repr, known))}, or None for all."
        )
    return [
        name
        for name, entry in _table().items()
        if backbone in (None, entry["model"]["backbone"])
    ]


def checkpoint_info(name):
    """Returns what the manifest says of a checkpoint: a plain dict, a copy.

    Args:
        name: `{backbone}-{stride}s-{tag}`, such as "googlenet-8s-camvid".

    Returns:
        The fields of weights_manifest/README.md, such as `model` (the arguments of the
        builder), `input` (channels and mean), `labels` (of a classifier there are
        none), `license`, `published` and `measured` (scores in percent).

    Raises:
        ValueError: If there is no such checkpoint; names those that come near.
    """
    if name not in _table():
        near = difflib.get_close_matches(str(name), _table(), n=3, cutoff=0.3)
        raise ValueError(
            f"There is no checkpoint {name!r}; expected one of list_checkpoints(), "
            f"such as {', '.join(near or _table())}."
        )
    return copy.deepcopy(_table()[name])


def num_classes(entry):
    """Returns how many classes a checkpoint tells apart, `{head: classes}` for several.

    Args:
        entry: A dict as `checkpoint_info` returns it, or a file's own.

    Returns:
        None if the entry does not say.
    """
    if "num_classes" in entry.get("model", {}):
        return entry["model"]["num_classes"]
    classes = {head: len(known.names) for head, known in label_sets(entry).items()}
    return classes.get("", classes or None)


def label_sets(entry):
    """Returns the classes of a checkpoint by head: `{"": LabelSet}` for a single one.

    Args:
        entry: A dict as `checkpoint_info` returns it, or a file's own.

    Returns:
        `{head: LabelSet}`, empty if the entry does not name its classes. Classes
        without colours get those of the VOC colour map.

    Raises:
        ValueError: If the entry names them otherwise than the manifest does.
    """
    labels = entry.get("labels")
    if labels is None:
        return {}
    several = isinstance(labels, dict) and "names" not in labels
    heads = labels if several else {"": labels}
    return {head: _label_set(known) for head, known in heads.items()}


def check_labels(entry):
    """Checks that an entry names as many classes as its net has, if it names any.

    Args:
        entry: A file's own, whose `model` says how many.

    Raises:
        ValueError: If not, or as in `label_sets`.
    """
    found = {head: len(known.names) for head, known in label_sets(entry).items()}
    classes = entry["model"]["num_classes"]
    if found and found != (classes if isinstance(classes, dict) else {"": classes}):
        raise ValueError(
            f"The labels name {found.get('', found)} classes; expected {classes}, as "
            "many as the net has."
        )


def _label_set(labels):
    """The `LabelSet` of one head: a name in `LABEL_SETS`, or names and colours."""
    if isinstance(labels, str) and labels in LABEL_SETS:
        return LABEL_SETS[labels]
    names = labels.get("names") if isinstance(labels, dict) else None
    palette = labels.get("palette") if names else None
    try:
        names = () if isinstance(names, str) else tuple(names)
        colors = np.array(
            voc_colormap(len(names)) if palette is None else palette, "uint8"
        )
    except (TypeError, ValueError, OverflowError):
        names, colors = (), None
    if not names or colors.shape != (len(names), 3):
        raise ValueError(
            f"The labels {labels!r} were given; expected one of "
            f"{', '.join(LABEL_SETS)}, or names and, if you like, as many colours: "
            '{"names": ["road", "rest"], "palette": [[128, 64, 128], [0, 0, 0]]}.'
        )
    return LabelSet(names, colors)


def shipped(name):
    """Returns the path of a checkpoint's weights that came with the package, verified.

    Args:
        name: Of the checkpoint.

    Raises:
        OSError: If the file cannot be read.
        ValueError: If its content is not what the manifest says.
    """
    file = checkpoint_info(name)["file"]
    path = folder() / file["name"]
    found = measure(path)["sha256"]
    if found != file["sha256"]:
        raise ValueError(
            f"{path} has sha256 {found}; expected {file['sha256']}. Install keras_fcn "
            "again."
        )
    return path
