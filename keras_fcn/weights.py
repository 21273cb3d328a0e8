"""Weights in HDF5, layer name -> weight name -> array, matched by name both ways.

The layout is that of keras.applications' own files (`layer_names`, `weight_names`), so
plain `model.load_weights(file)` and any HDF5 viewer read them too. A file written here
also says what it is in the attribute `keras_fcn`.
"""

import io
import json
import os
import pathlib
import tempfile

import h5py
import keras
import numpy as np

MAX_OBJECTS = 10_000
MAX_MAGNITUDE = 1e6  # the largest published weights are below 100
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}


def save(model, path, *, metadata=None, dtype=None):
    """Writes the weights of a model; the file appears whole or not at all.

    Args:
        model: A `keras.Model` whose layers have names of their own.
        path: The .h5 file to write.
        metadata: What the file says of itself: a dict that JSON can hold.
        dtype: On disk, such as "float16"; that of the weights if None.

    Raises:
        ValueError: If the weights are not finite in `dtype`; nothing is written.
        OSError: If the file cannot be written.
    """
    arrays = {}
    for name, variable in _variables(model).items():
        array = keras.ops.convert_to_numpy(variable)
        array = array.astype(dtype or array.dtype)
        if not np.isfinite(array).all():
            raise ValueError(
                f"{name} holds numbers that are not finite in {array.dtype}; expected "
                f"finite ones, so {path} was not written. Train with a lower learning "
                "rate, or save in float32."
            )
        arrays[name] = array
    write_bytes(path, _to_hdf5(arrays, metadata))


def _to_hdf5(arrays, metadata):
    # In memory: HDF5 that runs out of disk takes the process down with it.
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        layers = {}
        for name, array in arrays.items():
            layer, weight = name.split("/", 1)
            layers.setdefault(layer, []).append(weight)
            file.create_dataset(name, data=array)
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        for layer, names in layers.items():
            file[layer].attrs["weight_names"] = [name.encode() for name in names]
        file.attrs["backend"] = b"any"
        file.attrs["keras_version"] = b"3"
        if metadata is not None:
            file.attrs["keras_fcn"] = json.dumps(metadata, sort_keys=True)
    return buffer.getbuffer()


def write_bytes(path, data):
    """Writes a file that appears whole or not at all, and survives a power cut.

    Args:
        path: Of the file.
        data: Its bytes.

    Raises:
        OSError: If that fails; an earlier file of that name is then untouched.
    """
    path = pathlib.Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = pathlib.Path(name)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's files are private
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def metadata(path):
    """Returns what a weight file says of itself: a dict, empty for foreign files.

    Args:
        path: An .h5 file.

    Raises:
        ValueError: If it is not a weight file.
        OSError: If it cannot be read.
    """
    with _open(path) as file:
        text = file.attrs.get("keras_fcn", "{}")
        try:
            return dict(json.loads(text))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path} says of itself {str(text)[:80]!r}; expected a JSON object. "
                "Write it again with keras_fcn.save_checkpoint."
            ) from error


def load(model, path, *, missing=(), extra=()):
    """Fills a model from a file, or leaves it as it was.

    Args:
        model: A `keras.Model`.
        path: An .h5 file in this module's layout, of any float type.
        missing: Names of layers that the file need not hold; they stay.
        extra: Names of layers of the file that the model need not have.

    Raises:
        ValueError: If names, shapes or types differ, naming the first of them, or if
            a number is not finite. Nothing is assigned then.
        OSError: If the file cannot be read.
    """
    variables = _variables(model)
    with _open(path) as file:
        found = _headers(file, path)
        stay = {n for n in variables if n not in found and _layer(n) in missing}
        ignored = {n for n in found if n not in variables and _layer(n) in extra}
        _compare(
            {n: tuple(v.shape) for n, v in variables.items() if n not in stay},
            {n: v for n, v in found.items() if n not in ignored},
            path,
        )
        arrays = {n: _read(file, n, path) for n in variables if n not in stay}
    for name, array in arrays.items():
        variables[name].assign(array)


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
        The names of the target's weights that stayed as they were.
    """
    given = {
        f"{_layer(name)}{suffix}/{name.split('/', 1)[1]}": variable
        for name, variable in _variables(source).items()
    }
    stayed = []
    for name, variable in _variables(target).items():
        array = given.get(name, given.get(name.replace("_bgrd", "")))
        if array is not None and "_bgrd" in name and name not in given:
            array = _with_depth(keras.ops.convert_to_numpy(array))
        if array is None or tuple(array.shape) != tuple(variable.shape):
            stayed.append(name)
        else:
            variable.assign(array)
    return stayed


def _with_depth(array):
    if array.ndim == 1:
        return array
    return np.concatenate([array, array.mean(axis=2, keepdims=True)], axis=2)


def _layer(name):
    return name.split("/", 1)[0]


def _variables(model):
    named = {}
    for layer in model.layers:
        for variable in layer.weights:
            name = f"{layer.name}/{variable.path.removeprefix(f'{layer.name}/')}"
            if name in named:
                raise ValueError(
                    f"Two weights of the model are called {name}; expected names of "
                    "their own: name the layers."
                )
            named[name] = variable
    return named


def _open(path):
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; expected an .h5 weight file.")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(
            f"{path} is not an HDF5 file, or is cut short ({error}); expected weights "
            "written by keras_fcn.save_checkpoint or tools/convert_caffe.py."
        ) from error


def _headers(file, path):
    """Returns {name: shape} of every array, without reading or following anything."""
    shapes, groups, seen = {}, [(file, "")], set()
    while groups:
        group, prefix = groups.pop()
        for key in group:
            name = f"{prefix}{key}"
            if not isinstance(group.get(key, getlink=True), h5py.HardLink):
                raise ValueError(f"{path}: {name} is a link; expected only arrays.")
            item = group[key]
            address = h5py.h5o.get_info(item.id).addr
            if address in seen or len(seen) >= MAX_OBJECTS:
                raise ValueError(
                    f"{path}: {name} is held twice, or is beyond {MAX_OBJECTS} "
                    "objects; expected a tree of arrays."
                )
            seen.add(address)
            if isinstance(item, h5py.Group):
                groups.append((item, f"{name}/"))
            else:
                shapes[name] = _header(item, name, path)
    return shapes


def _header(item, name, path):
    if not isinstance(item, h5py.Dataset) or item.dtype.kind != "f" or item.ndim > 8:
        raise ValueError(
            f"{path}: {name} is {getattr(item, 'dtype', 'no array')}; expected an "
            "array of floats."
        )
    plist = item.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    if item.external or item.is_virtual or filters - _FILTERS:
        raise ValueError(
            f"{path}: {name} is stored outside the file or through unknown filters; "
            "expected plain or gzip-compressed floats."
        )
    return item.shape


def _compare(wanted, found, path):
    """Raises one error that names missing, extra and mismatched arrays together."""
    rows = [f"{n} {wanted[n]} is missing" for n in wanted if n not in found]
    rows += [f"{n} {found[n]} is not in the model" for n in found if n not in wanted]
    rows += [
        f"{n} is {found[n]}, expected {wanted[n]}"
        for n in wanted
        if n in found and wanted[n] != found[n]
    ]
    if rows:
        listed = "".join(f"\n  {row}" for row in rows[:5])
        more = f"\n  and {len(rows) - 5} more" if len(rows) > 5 else ""
        raise ValueError(
            f"{path} does not hold the weights of this model; nothing was loaded:"
            f"{listed}{more}\nBuild the net that the file is for, or copy what fits "
            "with keras_fcn.transplant."
        )


def _read(file, name, path):
    array = file[name][()].astype("float32")
    if not (np.abs(array) < MAX_MAGNITUDE).all():
        raise ValueError(
            f"{path}: {name} holds a number that is not finite or beyond "
            f"{MAX_MAGNITUDE:g}; expected trained weights. Nothing was loaded: fetch "
            "or convert the file again."
        )
    return array
