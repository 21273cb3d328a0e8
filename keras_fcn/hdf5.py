"""Reads HDF5 files that strangers wrote: headers are judged before data.

Nothing is followed, unpacked or taken into memory that the weights of a net would not
need; whatever is found wrong is one error with the name of the file.
"""

import contextlib
import math
import pathlib
import zlib

import h5py
import numpy as np

MAX_OBJECTS = 10_000
MAX_DEPTH = 8
MAX_BESIDE = 4 * 2**20  # bytes of a file that are not arrays; in ours 0.1 MB
MAX_MAGNITUDE = 1e6  # the largest published weights are below 100
OF_CAFFE = (
    "it is a file of Caffe's; expected an .h5 file in Keras' layout. Write one with "
    "`keras-fcn convert`, and load that."
)
# What h5py and zlib raise on damaged files.
_DAMAGE = (OSError, RuntimeError, LookupError, TypeError, zlib.error)
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE}


def is_snapshot(path):
    """Whether Caffe wrote an HDF5 file: a snapshot of a net, a .caffemodel.h5.

    Args:
        path: An .h5 file.

    Raises:
        ValueError: If it is no file of weights.
        OSError: If it cannot be read.
    """
    with opened(path) as (file, _):
        return is_of_caffe(file)


def read_snapshot(path):
    """Reads the weights of a snapshot that Caffe wrote in HDF5, a .caffemodel.h5.

    In the group "data" a layer is a group, and its blobs are "0", "1" and so on
    (Net::ToHDF5 in net.cpp). One that a layer shares with an earlier one is not there.
    The group "diff" is not read.

    Args:
        path: An .h5 file.

    Returns:
        `{layer: [arrays]}` of float32, sorted by name, without layers that hold none.

    Raises:
        ValueError: If it is no such file, or if a number is not that of a trained net.
        OSError: If it cannot be read.
    """
    layers = {}
    with opened(path) as (file, found):
        if not is_of_caffe(file):
            raise ValueError('it is no snapshot of Caffe\'s; expected a group "data".')
        for name in sorted(found):
            root, _, place = name.partition("/")
            if root == "data":
                layer, _, number = place.rpartition("/")
                layers.setdefault(layer, {})[number] = _read_blob(file[name], name)
        return {layer: _in_order(layer, blobs) for layer, blobs in layers.items()}


@contextlib.contextmanager
def opened(path):
    """Opens a file and judges its headers.

    Args:
        path: Of the file.

    Yields:
        (file, `{name: shape}` of every array in it).

    Raises:
        ValueError: If it is damaged or more than arrays of floats, and whatever is
            found wrong until it is closed again, with its name.
        OSError: If it cannot be read.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; expected an .h5 weight file.")
    with open(path, "rb"):
        pass  # permissions and disks have OSErrors of their own
    try:
        with h5py.File(path, "r") as file:
            yield file, _headers(file)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except _DAMAGE as error:
        if pathlib.Path(path).suffix == ".caffemodel":
            raise ValueError(f"{path}: {OF_CAFFE}") from error
        remedy = "Fetch or convert it again."
        if pathlib.Path(path).suffix == ".keras":
            remedy = (
                "A .keras file holds a whole model: keras.models.load_model opens it, "
                "and keras_fcn.save_checkpoint then writes such weights."
            )
        raise ValueError(
            f"{path} is not an HDF5 file, or is damaged ({error}); expected weights "
            "written by keras_fcn.save_checkpoint or `keras-fcn convert`, or those "
            f"that they are converted from. {remedy}"
        ) from error


def read(dataset, name):
    """Returns an array of a file that is open, in the byte order of this machine.

    Args:
        dataset: An `h5py.Dataset` of floats.
        name: What an error calls it.

    Raises:
        ValueError: If it unpacks to more than it says.
    """
    if dataset.chunks:
        _check_chunks(dataset, name)
    array = dataset[()]
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def fault_of(array, hidden):
    """Says what no trained weights have, or returns None.

    Args:
        array: Of floats.
        hidden: Whether they are a kernel that only an untrained net has all zero.
    """
    # Without arrays in between: memory costs more time than arithmetic.
    low, high = float(array.min(initial=0)), float(array.max(initial=0))
    if not -MAX_MAGNITUDE < low <= high < MAX_MAGNITUDE:
        return (
            f"holds {array.dtype} numbers from {low} to {high}, not finite or beyond "
            f"{MAX_MAGNITUDE:g}"
        )
    return "holds nothing but zeros" if hidden and low == high == 0 else None


def printable(name):
    """Returns a name from a file as it may be printed: short, no control characters.

    Args:
        name: Of a layer or an array, as a stranger wrote it.
    """
    return name if name.isprintable() and len(name) < 100 else ascii(name[:100])


def _headers(file):
    """Returns {name: shape} of every array, without reading or following anything."""
    shapes, groups, seen, stored = {}, [(file, "")], {_address(file)}, 0
    while groups:
        group, prefix = groups.pop()
        if len(seen) + len(group) > MAX_OBJECTS or prefix.count("/") > MAX_DEPTH:
            raise ValueError(
                f"it holds more than {MAX_OBJECTS:,} objects, or groups in more than "
                f"{MAX_DEPTH} groups; expected the weights of one net."
            )
        for key in group:
            name = f"{prefix}{key}"
            linked = not isinstance(group.get(key, getlink=True), h5py.HardLink)
            if linked or "/" in key:
                raise ValueError(f"{printable(name)} is a link; expected only arrays.")
            item = group[key]
            if _address(item) in seen:
                raise ValueError(
                    f"{printable(name)} is held twice; expected a tree of arrays."
                )
            seen.add(_address(item))
            if isinstance(item, h5py.Group):
                groups.append((item, f"{name}/"))
            else:
                shapes[name] = _header(item, name)
                stored += item.id.get_storage_size()
    beside = file.id.get_filesize() - stored
    if not 0 <= beside <= MAX_BESIDE:
        raise ValueError(
            f"its arrays fill {stored:,} of its {file.id.get_filesize():,} bytes; "
            f"expected all but {MAX_BESIDE:,}. Load it where it is from, and save it "
            "anew."
        )
    return shapes


def _header(item, name):
    """Returns the shape of an array that can be read without surprises."""
    if not isinstance(item, h5py.Dataset):
        raise ValueError(f"{printable(name)} is no array; expected arrays of floats.")
    plist = item.id.get_create_plist()
    filters = {plist.get_filter(i)[0] for i in range(plist.get_nfilters())}
    # Before the shape is asked for: a virtual array opens other files to know its own.
    virtual = plist.get_layout() == h5py.h5d.VIRTUAL
    if virtual or plist.get_external_count() or filters - _FILTERS:
        raise ValueError(
            f"{printable(name)} is stored outside the file or through unknown filters; "
            "expected plain or gzip-compressed floats."
        )
    if item.dtype.kind != "f" or item.dtype.itemsize > 8 or item.shape is None:
        raise ValueError(
            f"{printable(name)} holds {ascii(item.dtype)[:80]}; expected an array of "
            "floats of 16, 32 or 64 bits."
        )
    if not _is_complete(item):
        raise ValueError(
            f"{printable(name)} claims {item.shape} numbers that the file does not "
            "hold; expected all of them. Fetch or convert it again."
        )
    return item.shape


def _is_complete(item):
    # HDF5 fills what is missing with zeros.
    if not item.chunks:
        return item.id.get_storage_size() == math.prod(item.shape) * item.dtype.itemsize
    per_axis = [-(-n // c) for n, c in zip(item.shape, item.chunks, strict=True)]
    inside = all(c <= n for n, c in zip(item.shape, item.chunks, strict=True))
    return inside and item.id.get_num_chunks() == math.prod(per_axis)


def _address(item):
    return h5py.h5o.get_info(item.id).addr


def _check_chunks(dataset, name):
    """Makes sure that no chunk is larger than it says: deflate knows no limit."""
    limit = math.prod(dataset.chunks) * dataset.dtype.itemsize
    chunks = []
    dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        too_large = chunk.size > limit + limit // 100 + 100  # of noise, by deflate
        if dataset.compression and not chunk.filter_mask and not too_large:
            _, packed = dataset.id.read_direct_chunk(chunk.chunk_offset)
            unpacked = zlib.decompressobj().decompress(packed, limit + 1)
            too_large = len(unpacked) > limit
        if too_large:
            raise ValueError(
                f"{printable(name)} holds a chunk of more than its {limit:,} bytes; "
                "expected no more. Fetch or convert it again."
            )


def is_of_caffe(file):
    """Whether a file holds "data", maybe "diff", of groups, as Caffe's snapshots do.

    Args:
        file: An `h5py.File` whose headers are sound.
    """
    groups = [key for key in file if isinstance(file[key], h5py.Group)]
    known = set(file) in ({"data"}, {"data", "diff"}) and len(groups) == len(file)
    return known and "layer_names" not in file.attrs


def _read_blob(dataset, name):
    with np.errstate(over="ignore"):  # infinity is found below
        array = read(dataset, name).astype(np.float32, copy=False)
    if fault := fault_of(array, hidden=False):
        raise ValueError(f"{printable(name)} {fault}; expected trained weights.")
    return array


def _in_order(layer, blobs):
    """Returns a list of `{number as text: blob}`, of which none may be missing."""
    numbers = [str(i) for i in range(len(blobs))]
    if not layer or blobs.keys() != set(numbers):
        raise ValueError(
            f"{printable(f'data/{layer}')} holds {printable(', '.join(blobs))}; "
            f"expected the blobs {', '.join(numbers)[:80]} of a layer. Those that it "
            "shares with another are not there, and no net here shares any."
        )
    return [blobs[number] for number in numbers]
