"""Weights in HDF5, layer name -> weight name -> array, matched by name both ways.

The layout is that of keras.applications' own files (`layer_names`, `weight_names`), so
plain `model.load_weights(file)` and any HDF5 viewer read them too. A file written here
also says what it is in the attribute `keras_fcn`.
"""

import contextlib
import json
from collections import Counter

import h5py
import keras
import numpy as np

from keras_fcn import hdf5
from keras_fcn.files import replacing

SUFFIXES = (".h5", ".hdf5")  # of a file, by which it is told from a name


def save(model, path, *, metadata=None, dtype=None):
    """Writes the weights of a model; the file appears whole or not at all.

    The same weights give the same bytes.

    Args:
        model: A `keras.Model` whose layers have names of their own.
        path: The .h5 file to write; if it is a link, the file that it leads to.
        metadata: What the file says of itself: a dict that JSON can hold; numbers and
            arrays of NumPy's will do.
        dtype: On disk, such as "float16"; that of the weights if None.

    Raises:
        ValueError: If `load` would refuse the numbers, if `dtype` is no type of floats,
            if two weights bear one name, or if JSON cannot hold the metadata; nothing
            is written.
        OSError: If the file cannot be written; an earlier one is then untouched.
    """
    if dtype is not None and np.dtype(dtype).kind != "f":
        raise ValueError(
            f'dtype={dtype!r} was given; expected "float16", "float32" or "float64".'
        )
    hidden = hidden_kernels(model)

    def trained():
        for name, variable in _variables(model).items():
            array = to_numpy(variable)
            with np.errstate(over="ignore"):  # infinity is found below
                array = array.astype(dtype or array.dtype, copy=False)
            if fault := hdf5.fault_of(array, name in hidden):
                raise ValueError(
                    f"{name} {fault}; expected trained weights, so {path} was not "
                    "written. Train with a lower learning rate, or save in float32."
                )
            yield name, array

    save_arrays(trained(), path, metadata=metadata)


def save_arrays(arrays, path, *, metadata=None):
    """Writes arrays as `save` writes weights, without a model to hold them.

    Args:
        arrays: Iterator of ("layer/weight", array); each is let go before the next is
            asked for.
        path: As in `save`.
        metadata: As in `save`.

    Raises:
        ValueError: If JSON cannot hold the metadata; nothing is written.
        OSError: If the file cannot be written; an earlier one is then untouched.
    """
    text = None if metadata is None else _json(metadata, path)
    # Through a file of Python's: on a full disk, HDF5's own ends the process.
    with replacing(path) as part, h5py.File(part, "w") as file:
        weights = {}
        for name, array in arrays:
            dataset = file.create_dataset(name, array.shape, array.dtype)
            for i in np.ndindex(array.shape[:-3]):  # transposed ones are copied
                dataset[i] = array[i]
            del array
            layer, weight = name.split("/", 1)
            weights.setdefault(layer, []).append(weight.encode())
        file.attrs["layer_names"] = [layer.encode() for layer in weights]
        for layer, names in weights.items():
            file[layer].attrs["weight_names"] = names
        file.attrs["backend"] = b"any"
        file.attrs["keras_version"] = b"3"
        if text is not None:
            file.attrs["keras_fcn"] = text


def _json(metadata, path):
    """Returns metadata as text, NumPy's numbers and arrays as Python's."""

    def plain(item):
        if isinstance(item, np.generic | np.ndarray):
            return item.tolist()
        raise TypeError(f"it holds {item!r:.80}, a {type(item).__name__}")

    try:
        return json.dumps(metadata, sort_keys=True, default=plain)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"What {path} is to say of itself is no JSON ({error}); expected dicts by "
            "text, lists, text and numbers. Nothing was written."
        ) from None


def metadata(path):
    """Returns what a weight file says of itself: a dict, empty for foreign files.

    Args:
        path: An .h5 file.

    Raises:
        ValueError: If it is not a weight file.
        OSError: If it cannot be read.
    """
    with _reading(path) as (file, _):
        if "keras_fcn" not in file.attrs:
            return {}
        header = file.attrs.get_id("keras_fcn")
        if header.shape != () or not h5py.check_string_dtype(header.dtype):
            raise ValueError("what it says of itself is no text; expected JSON.")
        text = file.attrs["keras_fcn"]
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise ValueError(
                f"it says of itself {ascii(text[:80])}; expected a JSON object. Write "
                "it again with keras_fcn.save_checkpoint."
            )
        return facts


def read_arrays(path):
    """Reads every array of a weight file, of whatever net.

    Args:
        path: An .h5 file in the layout of this module.

    Returns:
        `{name: array}`, "layer/weight", sorted by name.

    Raises:
        ValueError: If it is not a weight file, or if a number is not that of a trained
            net.
        OSError: If it cannot be read.
    """
    arrays = {}
    with _reading(path) as (file, found):
        for name in sorted(found):
            arrays[name] = hdf5.read(file[name], name)
            if fault := hdf5.fault_of(arrays[name], hidden=False):
                raise ValueError(f"{name} {fault}; expected trained weights.")
    return arrays


def shapes(model):
    """Returns `{name: shape}` of the weights of a model, in the order of its file.

    Args:
        model: A `keras.Model` whose layers have names of their own.
    """
    return {name: tuple(weight.shape) for name, weight in _variables(model).items()}


def check_functional(model):
    """Checks that a model says what it takes and gives, by name where it is several.

    Raises:
        ValueError: If it is of another kind, such as a Sequential one around a net.
    """
    check_inputs(model)
    if not hasattr(model, "output"):  # a Sequential one with an Input has `inputs` only
        raise ValueError(
            f"{model.name} is a {type(model).__name__} around layers; expected a "
            "functional net, keras.Model(inputs, outputs). Pass the net itself, or "
            "build keras.Model(model.inputs[0], model.outputs[0])."
        )


def check_inputs(model):
    """Checks that a model, functional or Sequential, says what it takes.

    Raises:
        ValueError: If it does not, such as a Sequential one without an Input.
    """
    if not getattr(model, "inputs", None):
        raise ValueError(
            f"{getattr(model, 'name', model)} is a {type(model).__name__} whose layers "
            "do not say what they take; expected a functional net, "
            "keras.Model(inputs, outputs)."
        )


def load(model, path, *, missing=()):
    """Fills a model from a file, or leaves it as it was.

    Args:
        model: A `keras.Model`.
        path: An .h5 file in this module's layout, of any float type.
        missing: Names of layers that the file need not hold; they stay.

    Raises:
        ValueError: If names, shapes or types differ, naming the first of them, or if
            a number is not that of a trained net. Nothing is assigned then.
        OSError: If the file cannot be read.
    """
    variables, hidden = _variables(model), hidden_kernels(model)
    with _reading(path) as (file, found):
        held = {_layer(name) for name in found}
        wanted = {
            name: tuple(variable.shape)
            for name, variable in variables.items()
            if _layer(name) in held or _layer(name) not in missing
        }
        _compare(wanted, found)
        pairs = []
        for name in wanted:
            array = hdf5.read(file[name], name)
            if fault := hdf5.fault_of(array, name in hidden):
                raise ValueError(
                    f"{name} {fault}; expected trained weights. Nothing was loaded: "
                    "fetch or convert the file again."
                )
            pairs.append((variables[name], array))
    assign_all(pairs)


def transplant(source, target, suffix=""):
    """Copies weights by name, where the shapes agree (`transplant` in surgery.py).

    This is how 32s becomes 16s and 8s, and how a classifier becomes an FCN. A first
    convolution `conv1_1` fills one named `conv1_1_bgrd`, whose fourth channel
    becomes the mean of its three others.

    Args:
        source: The `keras.Model` to copy from.
        target: The `keras.Model` to copy to.
        suffix: Of the target's layer names, such as "color" in a late-fusion net.

    Returns:
        The names, "layer/weight", of the target's weights that stayed as they were.

    Raises:
        ValueError: If two weights of a model bear one name.
    """
    given = {
        f"{_layer(name)}{suffix}/{name.split('/', 1)[1]}": variable
        for name, variable in _variables(source).items()
    }
    copied, stayed = [], []
    for name, variable in _variables(target).items():
        array = given.get(name, given.get(name.replace("_bgrd", "")))
        if array is not None:
            # A copy: JAX deletes what two nets share when one of them is trained.
            array = to_numpy(array)
        if array is not None and "_bgrd" in name and name not in given:
            array = _with_depth(array)
        if array is None or array.shape != tuple(variable.shape):
            stayed.append(name)
        else:
            copied.append((variable, array))
    assign_all(copied)
    return stayed


def assign_all(pairs):
    """Assigns arrays to variables: all of them, or none.

    Args:
        pairs: List of (variable, array of its shape); it is emptied, so that what is
            assigned need not be kept.

    Raises:
        Exception: What an assignment raises; those before it are then undone.
    """
    # The largest comes last: what it replaces need not be kept either.
    pairs.sort(key=lambda pair: -pair[1].size)
    done = []
    try:
        while pairs:
            variable, array = pairs.pop()
            if pairs:
                done.append((variable, to_numpy(variable)))
            variable.assign(array)
    except BaseException:
        for variable, before in done:
            variable.assign(before)
        raise


def to_numpy(variable):
    """Returns a copy of a variable's numbers, bfloat16 as float32.

    Args:
        variable: A `keras.Variable`.
    """
    # A copy, for TensorFlow has one on each of several devices, unknown to NumPy.
    array = keras.ops.convert_to_numpy(keras.ops.copy(variable.value))
    # Neither HDF5 nor NumPy's files have a type for bfloat16.
    return array.astype("float32") if array.dtype.kind == "V" else array


def unshare(variables):
    """Gives variables arrays of their own.

    On JAX a variable that was assigned another shares its array, which a training step
    that is given one of them frees.

    Args:
        variables: `keras.Variable`s.
    """
    for variable in variables:
        variable.assign(keras.ops.copy(variable.value))


def _with_depth(array):
    if array.ndim == 1:
        return array
    return np.concatenate([array, array.mean(axis=2, keepdims=True)], axis=2)


def _layer(name):
    return name.split("/", 1)[0]


def _variables(model):
    if not isinstance(model, keras.Model):
        raise ValueError(
            f"{model!r} is a {type(model).__name__}; expected a keras.Model. Of a name "
            "or a file keras_fcn.load_checkpoint makes one."
        )
    named = {}
    for layer in model.layers:
        for variable in layer.weights:
            name = f"{layer.name}/{_path_within(layer, variable)}"
            if name in named:
                raise ValueError(
                    f"Two weights of the model are called {name}; expected names of "
                    "their own: name the layers."
                )
            named[name] = variable
    return named


def _path_within(layer, variable):
    # A layer that its model has built bears the model's name, too.
    parts = variable.path.split("/")
    return "/".join(parts[parts.index(layer.name) + 1 if layer.name in parts else 0 :])


def hidden_kernels(model):
    """Returns the names of kernels that only an untrained net has all zero.

    A layer of ReLUs with such a kernel says nothing of the picture, and never will.

    Args:
        model: A `keras.Model`.
    """
    relu = keras.activations.relu
    hidden = {x.name for x in model.layers if getattr(x, "activation", None) is relu}
    return {
        n for n in _variables(model) if _layer(n) in hidden and n.endswith("kernel")
    }


@contextlib.contextmanager
def _reading(path):
    """Opens a file in Keras' layout, as `hdf5.opened` does any."""
    with hdf5.opened(path) as (file, found):
        if hdf5.is_of_caffe(file):
            raise ValueError(hdf5.OF_CAFFE)
        _check_lists(file, found)
        yield file, found


def _check_lists(file, shapes):
    """Makes sure that the lists by which Keras reads the file are there.

    Their length is all that is asked for: a list may refer to one long text many times.
    """
    counts = Counter(map(_layer, shapes))
    lists = [(file, "layer_names", range(len(counts), len(file) + 1))]
    lists += [(file[key], "weight_names", [counts[key]]) for key in counts]
    for item, attribute, lengths in lists:
        known = attribute in item.attrs
        shape = item.attrs.get_id(attribute).shape if known else ()
        if len(shape) != 1 or shape[0] not in lengths:
            raise ValueError(
                f"{hdf5.printable(item.name)} has no list {attribute!r} as long as "
                "what it holds; expected Keras' layout. If model.save wrote this file, "
                "open it with keras.models.load_model, if model.save_weights did, with "
                "model.load_weights; then write it with keras_fcn.save_checkpoint."
            )


def _compare(wanted, found):
    """Raises one error that names missing, extra and mismatched arrays together."""
    rows = [f"{n} {wanted[n]} is missing" for n in wanted if n not in found]
    rows += [
        f"{hdf5.printable(n)} {found[n]} is not in the model"
        for n in found
        if n not in wanted
    ]
    rows += [
        f"{n} is {found[n]}, expected {wanted[n]}"
        for n in wanted
        if n in found and wanted[n] != found[n]
    ]
    if rows:
        raise ValueError(
            "it does not hold the weights of this model; nothing was loaded:"
            f"{listed(rows)}\nBuild the net that the file is for, or copy what fits "
            "with keras_fcn.transplant."
        )


def listed(rows):
    """Returns the first five of some lines, indented, and how many more there are.

    Args:
        rows: List of strings.
    """
    more = [f"and {len(rows) - 5} more"] if len(rows) > 5 else []
    return "".join(f"\n  {row}" for row in [*rows[:5], *more])
