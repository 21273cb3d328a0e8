"""What a net of this package is, read off its layers; and a file that says so."""

import keras

from keras_fcn import checkpoints, manifest
from keras_fcn import weights as weight_files
from keras_fcn.backbones import SKIPS
from keras_fcn.models import LATE_FUSION_INPUTS, skeleton

FIRST_LAYERS = {"alexnet": "conv1", "vgg16": "conv1_1", "googlenet": "conv1_7x7_s2"}


def save_checkpoint(model, path, *, facts=None, dtype=None):
    """Writes the weights of a net of this package, and what they are for.

    `load_checkpoint(path)` builds the net again; `fcn(..., weights=path)` too.

    Args:
        model: A net that `fcn` or `late_fusion` built, trained as you like.
        path: The .h5 file to write; it appears whole or not at all.
        facts: What else to say in the file, in the manifest's fields: `labels` (a
            name in `LABEL_SETS`, or `{"names": [...], "palette": [...]}`),
            `license`, `trained_on`, `measured`.
        dtype: On disk, such as "float16" for half the size.

    Raises:
        ValueError: If neither built the net as it is, if weights are not finite, if the
            path is a bare name without .h5, or if `labels` are not so or not one for
            each class.
        OSError: If the file cannot be written.
    """
    if not checkpoints.is_path(path):
        raise ValueError(
            f"The path {path} was given; expected one that ends in "
            f"{' or '.join(weight_files.SUFFIXES)}, by which load_checkpoint tells a "
            "file from a name."
        )
    metadata = {**describe(model), **(facts or {})}
    _check_described(model, metadata)
    manifest.check_labels(metadata)
    weight_files.save(model, path, metadata=metadata, dtype=dtype)


def _check_described(model, entry):
    """Checks that the net which an entry describes is the model, as far as one sees."""
    described = skeleton(entry)
    for what, each in {
        "weights": weight_files.shapes,
        "output": lambda net: (isinstance(net.output, dict), net.output_names),
    }.items():
        if each(model) != each(described):
            raise ValueError(
                f"The model {model.name!r} has other {what} than the net that its "
                "layers are of; expected one as keras_fcn.fcn built it. Write others "
                "with keras_fcn.weights.save."
            )


def describe(model):
    """Returns how to build a net again: the manifest's `model` and `input`.

    Everything is read off its layers.

    Args:
        model: A net that `fcn` or `late_fusion` built.

    Returns:
        A dict of dicts, for `models.build`: `model`, the arguments of the builder; and
        `input`, channels and mean (by stream of `late_fusion`), if there is a layer
        `preprocess`.

    Raises:
        ValueError: If it is another net.
    """
    weight_files.check_functional(model)
    firsts = {f"{first}_bgrd": first for first in FIRST_LAYERS.values()}
    found = layers = {firsts.get(x.name, x.name): x for x in model.layers}
    fused = len(model.inputs) > 1
    if fused:  # both streams are alike
        first = "color"
        found = {n.removesuffix(first): x for n, x in layers.items() if first in n}
    backbones = [name for name, first in FIRST_LAYERS.items() if first in found]
    heads = [
        name.removeprefix("score_fr")
        for name, layer in found.items()
        if name.startswith("score_fr") and isinstance(layer, keras.layers.Conv2D)
    ]
    if not backbones or not heads:
        raise ValueError(
            f"The model {model.name!r} has no layers of an FCN; expected one that "
            "keras_fcn.fcn built. Write others with keras_fcn.weights.save."
        )
    classes = {head[1:]: found[f"score_fr{head}"].filters for head in heads}
    skips = _skips(layers, heads)
    learned = any(isinstance(x, keras.layers.Conv2DTranspose) for x in model.layers)
    arguments = {
        "backbone": backbones[0],
        "stride": 32 >> len(skips),
        "num_classes": classes.get("", classes),
        "upsampling": "learned" if learned else "bilinear",
        "include_preprocessing": "preprocess" in found,
        "width": _width(found, backbones[0]),
    }
    if fused:
        arguments["builder"] = "late_fusion"
        names = {stream: f"preprocess{stream}" for stream in LATE_FUSION_INPUTS}
    else:
        first = SKIPS[backbones[0]][3 - len(skips) :]
        arguments["skips"] = None if skips == first else skips
        arguments["skip_scales"] = _skip_scales(found, skips, heads) or None
        arguments["batch_norm"] = any(
            isinstance(layer, keras.layers.BatchNormalization) for layer in model.layers
        )
        arguments["input_channels"] = model.inputs[0].shape[-1]
        names = {"": "preprocess"}
    if "preprocess" not in found:
        return {"model": arguments}
    inputs = {
        stream: {"channels": layers[name].channels, "mean": layers[name].mean}
        for stream, name in names.items()
    }
    return {"model": arguments, "input": inputs.get("", inputs)}


def _skips(layers, heads):
    """Returns the names of what is skipped from, finest first, to every head."""
    fused = [x.removeprefix("fuse_") for x in layers if x.startswith("fuse_")]
    parts = [(name, head) for name in fused for head in heads if name.endswith(head)]
    names = dict.fromkeys(name.removesuffix(head) for name, head in reversed(parts))
    # One head's name may end as another's does; but each is fused with every skip.
    return tuple(x for x in names if {f"{x}{head}" for head in heads} <= set(fused))


def _skip_scales(found, skips, heads):
    layers = {x: found.get(f"scale_{x}{head}") for x in skips for head in heads}
    return {name: layer.scale for name, layer in layers.items() if layer}


def _width(found, backbone):
    """Returns a width at which a backbone has the channels that it was found with."""
    counts = [
        (found[layer.name].filters, layer.filters)
        for layer in skeleton({"model": {"backbone": backbone, "stride": 32}}).layers
        if isinstance(layer, keras.layers.Conv2D) and layer.name != "score_fr"
    ]
    # Channels are rounded down, so that each count is a lower bound, but never to none.
    least = min(n for n, _ in counts)
    bounds = [n / filters for n, filters in counts if n > least or n == filters]
    width = max(bounds, default=min(n / filters for n, filters in counts))
    exact = all(int(width * filters) >= n for n, filters in counts if n > least)
    return width if exact else width * (1 + 1e-12)
