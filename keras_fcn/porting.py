"""Ports trained weights from elsewhere: Caffe's files, and Keras' file of VGG16.

One rule serves all nets: a layer of the source fills the layer of that name, "/" being
"_" in Keras. What a net holds as constants, such as bilinear kernels, is compared with
the source and left out. Whatever is missing, left over or different fails the port.
"""

import json
import math
import pathlib
from typing import NamedTuple

import keras
import numpy as np

from keras_fcn import caffe, hdf5, weights
from keras_fcn.files import DIGESTS, measure
from keras_fcn.layers import BilinearUpsampling, bilinear_line

# Of a manifest's entry. The rest changes when a port is published and measured, and the
# same source shall give the same bytes.
FACTS = ("model", "input", "labels", "license", "trained_on")
# keras.applications.VGG16, whose weights are those of the Caffe net.
KERAS_VGG16 = {
    **{f"block{i}_conv{j}": f"conv{i}_{j}" for i in range(1, 6) for j in range(1, 4)},
    **{"fc1": "fc6", "fc2": "fc7", "predictions": "fc8"},
}
# {type of layer in the source: {what it fills: what is done to it}}
ACTIONS = {
    "Convolution": {keras.layers.Conv2D: "transposed"},
    "InnerProduct": {keras.layers.Conv2D: "unfolded, transposed"},
    "Deconvolution": {
        keras.layers.Conv2DTranspose: "transposed",
        BilinearUpsampling: "bilinear, left out",
    },
    "Scale": {keras.layers.Rescaling: "constant, left out"},
    "Conv2D": {keras.layers.Conv2D: "copied"},
    "Dense": {keras.layers.Conv2D: "unfolded"},
}


class Row(NamedTuple):
    """What became of a layer of the source.

    Args:
        source: Its name there, as it may be printed.
        blobs: The shapes of its arrays there.
        layer: The name of the Keras layer; empty if there is none.
        weights: The shapes of the Keras weights; empty if there are none.
        action: What was done, such as "transposed".
    """

    source: str
    blobs: list[tuple]
    layer: str
    weights: list[tuple]
    action: str


def port(source, output, model, *, metadata=None, expected=None, progress=None):
    """Writes the weights of a trained net from elsewhere as an .h5 file for a net here.

    The same source gives the same bytes.

    Args:
        source: A .caffemodel, or what Caffe writes instead with `snapshot_format:
            HDF5`, a .caffemodel.h5; or the .h5 file of `keras.applications.VGG16` with
            its top, for `classifier("vgg16")`.
        output: The .h5 file to write; it appears whole or not at all.
        model: The net that the file is for, of which only names and shapes count.
        metadata: An entry of the manifest; its `FACTS` go into the file, so that
            `load_checkpoint(output)` builds the net. Layers that it says to `drop` are
            left out. Where the net has learned upsampling but the entry speaks of a
            fixed one, the kernels are left out, too, if all of them are bilinear.
        expected: What is known of the source: any of `bytes`, `sha256`, `sha1`, `md5`.
            Nothing else tells nets apart that agree in every shape.
        progress: Function of (numbers written, numbers in all).

    Returns:
        A list of `Row`, in the order of the source.

    Raises:
        ValueError: If the source is not of this net, or is damaged. Names the file and
            the layers; nothing is written.
        OSError: If a file cannot be read or written.
    """
    source = pathlib.Path(source)
    entry = metadata or {}
    if not source.is_file():
        raise FileNotFoundError(f"{source} is not a file; expected trained weights.")
    _check_published(source, entry.get("caffemodel", {}))
    found = _check_hashes(source, expected or {})
    facts = {key: entry[key] for key in FACTS if key in entry}
    rows, arrays = _match(source, model, entry.get("drop", ()))
    if facts.get("model", {"upsampling": "learned"}).get("upsampling") != "learned":
        if _leave_out_bilinear(model, rows, arrays):
            facts["model"] = {**facts["model"], "upsampling": "learned"}
    facts["original"] = {key: found[key] for key in ("bytes", "sha256")}
    ported = _ported(arrays, weights.shapes(model), progress)
    weights.save_arrays(ported, output, metadata=facts)
    return rows


def _check_published(source, published):
    """Raises ValueError for a snapshot in HDF5 that shall be a file of known hash."""
    known = [f"{kind} {published[kind]}" for kind in DIGESTS if kind in published]
    if known and _is_snapshot(source):
        raise ValueError(
            f"{source} is a snapshot in HDF5; expected the .caffemodel with {known[0]},"
            " which the manifest says of this net. Give that, or describe the net that "
            "the file is for."
        )


def _check_hashes(source, expected):
    """Returns the facts of a file, which must be the expected ones."""
    kinds = [kind for kind in DIGESTS if kind == "sha256" or kind in expected]
    found = measure(source, kinds)
    for key, value in found.items():
        if expected.get(key, value) != value:
            raise ValueError(
                f"{source} has {key} {value}; expected {expected[key]}. It is another "
                "file, or a damaged one: fetch it again, or describe the net that it "
                "is for."
            )
    return found


def _match(source, model, drop):
    """Compares a source with a net, layer by layer.

    Returns:
        A list of `Row`, and `{weight: (type of its layer in the source, array)}`.
    """
    given, slots = _read(source), _slots(model)
    hidden = weights.hidden_kernels(model)
    rows, arrays, problems = [], {}, _misordered(given)
    for given_title, layer in given.items():
        if not layer.blobs:
            continue
        title = hdf5.printable(given_title)
        name, shapes = _keras_name(title, layer), [blob.shape for blob in layer.blobs]
        if title in drop:
            rows.append(Row(title, shapes, "", [], "dropped"))
        elif name in slots:
            target, wanted = slots.pop(name)
            if layer.type is None:
                layer = layer._replace(type=_type_for(target, layer.blobs))
            try:
                action, filled = _pair(layer, target, wanted, hidden)
            except ValueError as error:
                problems.append(f"{title}: {error}")
            else:
                arrays |= filled
                rows.append(Row(title, shapes, name, list(wanted.values()), action))
        else:
            problems.append(f"{title} {shown(shapes)} has no place in the net")
    for name, (_, wanted) in slots.items():
        problems.append(f"{name} {shown(wanted.values())} is missing")
    if problems:
        raise ValueError(
            f"{source} does not hold the weights of {model.name}; nothing was written:"
            f"{weights.listed(problems)}\nDescribe the net that the file is for."
        )
    return rows, arrays


def _read(source):
    """Returns `{name: caffe.Layer}` of a file."""
    if source.suffix not in weights.SUFFIXES:
        return caffe.read_caffemodel(source)
    if _is_snapshot(source):
        read = hdf5.read_snapshot(source)
        return {name: caffe.Layer(None, blobs) for name, blobs in read.items()}
    layers = {}
    for name, array in weights.read_arrays(source).items():
        layers.setdefault(name.split("/")[0], []).append(array)
    for name, arrays in layers.items():
        arrays.sort(key=lambda array: -array.ndim)  # the kernel first
        kind = "Dense" if arrays[0].ndim == 2 else "Conv2D"
        layers[name] = caffe.Layer(kind, arrays)
    return layers


def _is_snapshot(source):
    return source.suffix in weights.SUFFIXES and hdf5.is_snapshot(source)


def _type_for(target, blobs):
    """Returns the type that a layer of the source must have to fill one of the net."""
    if isinstance(target, keras.layers.Rescaling):
        return "Scale"
    if isinstance(target, keras.layers.Conv2D):
        return "InnerProduct" if blobs[0].ndim == 2 else "Convolution"
    return "Deconvolution"


def _keras_name(title, layer):
    if layer.type in ("Conv2D", "Dense"):
        return KERAS_VGG16.get(title, title)
    return title.replace("/", "_")


def _slots(model):
    """Returns `{name: (layer, {weight: shape})}` of what a source must hold."""
    shapes, slots = weights.shapes(model), {}
    for layer in model.layers:
        own = {n: s for n, s in shapes.items() if n.startswith(f"{layer.name}/")}
        if own or isinstance(layer, (BilinearUpsampling, keras.layers.Rescaling)):
            slots[layer.name] = layer, own
    return slots


def _misordered(layers):
    """Says where an AlexNet normalises before it pools, as no net here does.

    The weights of bvlc_alexnet and bvlc_reference_caffenet have the same names and
    shapes; only what feeds what tells them apart, as far as the file says.
    """
    return [
        f"{norm} comes before {pool}, as in bvlc_alexnet; expected it after {pool}, as "
        "in bvlc_reference_caffenet"
        for norm, pool in (("norm1", "pool1"), ("norm2", "pool2"))
        if {norm, pool} <= layers.keys() and _feeds(layers, norm, pool)
    ]


def _feeds(layers, first, second):
    """Whether a layer's tops reach another, at once or through layers in between."""
    following = {}
    for layer in layers.values():
        for bottom in layer.bottoms:
            following.setdefault(bottom, []).extend(layer.tops)
    reached, waiting = set(), list(layers[first].tops)
    while waiting:
        blob = waiting.pop()
        if blob not in reached:
            reached.add(blob)
            waiting += following.get(blob, ())
    return not reached.isdisjoint(layers[second].bottoms)


def _leave_out_bilinear(model, rows, arrays):
    """Removes the kernels of a learned upsampling if they are all as they began.

    Returns:
        Whether there are others, so that all of them stay.
    """
    layers = [
        x.name for x in model.layers if isinstance(x, keras.layers.Conv2DTranspose)
    ]
    if any(_deviations(arrays[f"{name}/kernel"][1]) for name in layers):
        return True
    for name in layers:
        del arrays[f"{name}/kernel"]
    action = ACTIONS["Deconvolution"][BilinearUpsampling]
    for i, row in enumerate(rows):
        if row.layer in layers:
            rows[i] = row._replace(weights=[], action=action)
    return False


def _pair(given, target, wanted, hidden):
    """Checks a layer of the source against the layer of the net that it is for.

    Returns:
        What is done, and `{weight: (type, array)}`.
    """
    actions = {
        kind: action
        for kind, uses in ACTIONS.items()
        for filled, action in uses.items()
        if isinstance(target, filled)
    }
    if given.type not in actions:
        raise ValueError(f"is of type {given.type}; expected {' or '.join(actions)}")
    action = actions[given.type]
    if not wanted:
        _check_constant(target, given.blobs)
        return action, {}
    shapes = [blob.shape for blob in given.blobs]
    if len(shapes) != len(wanted):
        raise ValueError(f"holds {shown(shapes)}; expected {len(wanted)} arrays")
    for (name, shape), blob in zip(wanted.items(), given.blobs, strict=True):
        _to_keras(given.type, blob, shape)
        if name in hidden and not blob.any():
            raise ValueError("holds nothing but zeros; expected trained weights")
    return action, {
        name: (given.type, blob) for name, blob in zip(wanted, given.blobs, strict=True)
    }


def _check_constant(layer, blobs):
    """Raises ValueError unless blobs are what a layer without weights stands for."""
    channels, shapes = layer.output.shape[-1], [blob.shape for blob in blobs]
    bilinear = isinstance(layer, BilinearUpsampling)
    size = (layer.kernel_size,) * 2 if bilinear else ()
    shape = (channels, channels, *size) if bilinear else (channels,)
    if shapes != [shape]:
        raise ValueError(f"holds {shown(shapes)}; expected {shape}")
    if bilinear:
        if count := _deviations(blobs[0]):
            raise ValueError(
                f"differs from the bilinear kernel in {count:,} of {blobs[0].size:,} "
                "numbers; expected none. If it was learned, choose learned upsampling"
            )
    elif (blobs[0] != np.float32(layer.scale)).any():
        raise ValueError(
            f"holds factors from {blobs[0].min():g} to {blobs[0].max():g}; expected "
            f"{layer.scale:g}. Give the skip scales of this net"
        )


def _deviations(kernel):
    """Counts the numbers that differ from the bilinear kernel, and zero beside it.

    Args:
        kernel: (channels, channels, size, size).
    """
    line, channels = bilinear_line(kernel.shape[-1]), np.arange(len(kernel))
    diagonal = kernel[channels, channels]
    beside = np.count_nonzero(kernel) - np.count_nonzero(diagonal)
    return beside + np.count_nonzero(diagonal != np.outer(line, line))


def _to_keras(kind, array, shape):
    if kind not in ("Conv2D", "Dense"):
        return caffe.to_keras(array, shape)
    # A Dense layer on (height, width, in) is a convolution over the whole map.
    if array.shape not in (shape, (math.prod(shape[:-1]), shape[-1])):
        raise ValueError(f"holds {array.shape}; expected what fills {shape}")
    return array.reshape(shape)


def _ported(arrays, shapes, progress):
    """Yields (weight, array in Keras' layout), in the order of `shapes`."""
    shapes = {name: shape for name, shape in shapes.items() if name in arrays}
    done, total = 0, sum(map(math.prod, shapes.values()))
    for name, shape in shapes.items():
        yield name, _to_keras(*arrays[name], shape)
        done += math.prod(shape)
        if progress:
            progress(done, total)


def shown(shapes):
    """Returns shapes as text.

    Args:
        shapes: Of the arrays of one layer.
    """
    return ", ".join(map(str, shapes))


def entry_toml(name, entry):
    """Returns an entry of the manifest as the text that belongs there.

    Args:
        name: Of the checkpoint.
        entry: A dict of dicts, lists, strings, numbers and truth values.
    """
    known = _known(entry)
    width = max(map(len, known))
    lines = [f"{key:{width}} = {_toml(value)}" for key, value in known.items()]
    return "\n".join([f"[{name}]", *lines])


def _known(table):
    """TOML has no word for None: what is left out is None."""
    return {key: value for key, value in table.items() if value is not None}


def _toml(value):
    if isinstance(value, dict):
        pairs = [f"{key} = {_toml(item)}" for key, item in _known(value).items()]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:_}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value, ensure_ascii=False)  # the same in TOML
