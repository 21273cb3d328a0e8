"""Reads .caffemodel files, and turns their arrays into Keras' layout.

A file may hold any bytes, so the work is split. A walk over the file finds where each
field lies and stops at limits; it reads no arrays. Protobuf decodes the small fields.
Arrays then go from the file straight into NumPy, so that memory stays at the size of
the weights. The field numbers are those of caffe.proto (BVLC/caffe, 2014 to 2020).
"""

import contextlib
import functools
import math
import pathlib
from typing import NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from keras_fcn import hdf5

MAX_BYTES = 2**31 - 1  # protobuf's own limit
MAX_LAYERS = 2_000
MAX_BLOBS = 16  # of one layer
# Of the whole file; the reference nets have below 10,000. Numbers that are not packed
# are a field each, so that a run of them counts as one.
MAX_FIELDS = 100_000
MAX_SMALL = 4_096  # bytes of the small fields of one message
MAX_DIMS = 8
BLOCK = 100_000  # unpacked numbers that are read at a time

# {message: {field: (number, type)}}, only what is read.
_SCHEMA = {
    "NetParameter": {"layers": (2, "located"), "layer": (100, "located")},
    "V1LayerParameter": {
        "layer": (1, "located"),
        "bottoms": (2, "names"),
        "tops": (3, "names"),
        "name": (4, "bytes"),
        "type": (5, "int64"),
        "blobs": (6, "located"),
    },
    "LayerParameter": {
        "name": (1, "bytes"),
        "type": (2, "bytes"),
        "bottoms": (3, "names"),
        "tops": (4, "names"),
        "blobs": (7, "located"),
    },
    "BlobProto": {
        "num": (1, "int64"),  # 64 bits, so that 2**32 + 3 is not taken for 3
        "channels": (2, "int64"),
        "height": (3, "int64"),
        "width": (4, "int64"),
        "data": (5, "floats"),
        "shape": (7, "BlobShape"),
        "double_data": (8, "doubles"),
    },
    "BlobShape": {"dim": (1, "dims")},
}
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
# Types that stay in the file, with their wire types: numbers are packed or one by one.
_LARGE = {
    "located": {_LENGTH},
    "floats": {_LENGTH, _FIXED32},
    "doubles": {_LENGTH, _FIXED64},
}
# By their number in V1LayerParameter.LayerType, named as since February 2015.
_V1_TYPES = (
    *("", "Accuracy", "BNLL", "Concat", "Convolution", "Data", "Dropout"),
    *("EuclideanLoss", "Flatten", "HDF5Data", "HDF5Output", "Im2col", "ImageData"),
    *("InfogainLoss", "InnerProduct", "LRN", "MultinomialLogisticLoss", "Pooling"),
    *("ReLU", "Sigmoid", "Softmax", "SoftmaxWithLoss", "Split", "TanH", "WindowData"),
    *("Eltwise", "Power", "SigmoidCrossEntropyLoss", "HingeLoss", "MemoryData"),
    *("ArgMax", "Threshold", "DummyData", "Slice", "MVN", "AbsVal", "Silence"),
    *("ContrastiveLoss", "Exp", "Deconvolution"),
)
_BINARY = {
    b"\x08": "a .solverstate",
    b"\x1f\x8b": "a gzip archive",
    b"PK\x03\x04": "a zip archive",
}
_TEXT = {
    b"<": "an HTML page",
    b"version https://git-lfs": "a Git LFS pointer",
    b"name:": "a prototxt",
    b"layer": "a prototxt",
    b"input": "a prototxt",
    b"#": "a prototxt",
}


class _Span(NamedTuple):
    """Where a field of the file lies, or a run of fixed numbers with equal tags.

    Args:
        start: Of the value; of a run, of its first tag.
        stop: Where that ends.
        tag: Bytes before each number; 0 where they are packed.
    """

    start: int
    stop: int
    tag: int = 0

    def count(self, dtype):
        """Returns how many numbers it holds; refuses a part of one."""
        numbers, rest = divmod(self.stop - self.start, self.tag + dtype.itemsize)
        if rest:
            raise ValueError(
                f"has {self.stop - self.start:,} bytes of {dtype.name}; expected whole "
                "ones."
            )
        return numbers


class Layer(NamedTuple):
    """A layer of a .caffemodel.

    Args:
        type: Caffe's word of today, such as "Convolution", also for a file from before
            2015; "V1LayerType 40" where the number is of somebody's fork; None if the
            file does not hold types.
        blobs: Its float32 arrays, in the shapes of the file; empty for most layers.
        bottoms: The names of the feature maps that it takes.
        tops: Of those that it gives.
    """

    type: str | None
    blobs: list[np.ndarray]
    bottoms: tuple[str, ...] = ()
    tops: tuple[str, ...] = ()


def read_caffemodel(path) -> dict[str, Layer]:
    """Reads the layers of a .caffemodel and their weights, in the order of the file.

    Both formats are read: `layer` (V2) and `layers` (V1, before February 2015). Of two
    layers with one name and no weights, the first stays. Where a blob says a thing
    twice, what Caffe takes counts (Blob::FromProto in blob.cpp): numbers in 64 bits
    before those in 32, the four dims of before March 2015 before a shape of any rank.
    A file without a known hash is safe to read; whether it is complete, only a hash can
    tell.

    Args:
        path: The file.

    Returns:
        `{name: Layer}`, with the layers that have no weights.

    Raises:
        ValueError: If the file is no .caffemodel, is cut short or above 2 GiB, if it
            contradicts itself, or if a weight is not finite or beyond 1e6. Names the
            file and the layer.
        OSError: If it cannot be read.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a .caffemodel.")
    size = path.stat().st_size
    if not 0 < size <= MAX_BYTES:
        raise ValueError(
            f"{path} has {size:,} bytes; expected a .caffemodel of 1 to "
            f"{MAX_BYTES:,}. Fetch the file again."
        )
    with open(path, "rb") as file:
        with _naming(path, _remedy(file.read(64))):
            return _read_net(_Walk(file), size)


def to_keras(blob, shape):
    """Returns a blob in the layout of a Keras weight, as a view where that can be.

    A kernel (out, in, height, width) is transposed by (2, 3, 1, 0). So is that of a
    Deconvolution (in, out, height, width), as Keras' Conv2DTranspose wants. That of an
    InnerProduct (out, in * height * width) is first unfolded, as if it were a
    convolution over the whole map. A bias, and the factors of a Scale, stay.

    Args:
        blob: An array in Caffe's layout, with leading ones or without.
        shape: Of the Keras weight: (height, width, in, out), for a Conv2DTranspose
            (height, width, out, in), or (n,).

    Raises:
        ValueError: If the blob is of another shape.
    """
    kernel = shape = tuple(shape)
    accepted = [shape]
    if len(shape) == 4:
        height, width, inputs, outputs = shape
        kernel = (outputs, inputs, height, width)
        accepted = [kernel, (outputs, inputs * height * width)]
    if len(shape) not in (1, 4) or _bare(blob.shape) not in map(_bare, accepted):
        raise ValueError(
            f"A blob of shape {blob.shape} does not fill a Keras weight of shape "
            f"{shape}; expected {' or '.join(map(str, accepted))}. Build the net that "
            "the file is for."
        )
    blob = blob.reshape(kernel)
    return blob.transpose(2, 3, 1, 0) if len(shape) == 4 else blob


def _bare(shape):
    while shape[:1] == (1,):
        shape = shape[1:]
    return shape


def _remedy(head):
    kinds = [kind for magic, kind in _BINARY.items() if head.startswith(magic)]
    kinds += [kind for magic, kind in _TEXT.items() if head.lstrip().startswith(magic)]
    if head.startswith(b"\x89HDF"):
        return " It begins like an HDF5 file: let its name end in .h5, as Caffe does."
    if kinds:
        return f" It begins like {kinds[0]}: give the .caffemodel."
    return " Fetch the file again."


@contextlib.contextmanager
def _naming(place, remedy=""):
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}{remedy}") from None


def _read_net(walk, size):
    _, located = walk.message("NetParameter", 0, size)
    v1, v2 = located["layers"], located["layer"]
    if v1 and v2:
        raise ValueError(
            f"holds {len(v1)} layers in the format V1 and {len(v2)} in V2; expected "
            "one of them."
        )
    if len(v1 + v2) > MAX_LAYERS:
        count = len(v1 + v2)
        raise ValueError(f"holds {count:,} layers; expected {MAX_LAYERS:,} at most.")
    layers = {}
    for i, (start, stop, _) in enumerate(v1 + v2):
        with _naming(f"layer {i}"):
            kind = "V1LayerParameter" if v1 else "LayerParameter"
            name, layer = _read_layer(walk, kind, start, stop)
            twin = layers.setdefault(name, layer)
            if twin is not layer and (twin.blobs or layer.blobs):
                raise ValueError(f"{name!r} is a second layer of that name.")
    if not any(layer.blobs for layer in layers.values()):
        raise ValueError("holds no layer with weights; expected trained weights.")
    return layers


def _read_layer(walk, kind, start, stop):
    small, located = walk.message(kind, start, stop)
    if located.get("layer"):
        raise ValueError(
            "is in Caffe's first format (V0); expected V1 or V2. Convert the file with "
            "Caffe's upgrade_net_proto_binary."
        )
    name, kind = small.name.decode(), small.type
    links = [tuple(map(bytes.decode, names)) for names in (small.bottoms, small.tops)]
    if isinstance(kind, bytes):
        kind = kind.decode()
    elif 0 <= kind < len(_V1_TYPES):
        kind = _V1_TYPES[kind]
    else:
        kind = f"V1LayerType {kind}"
    blobs = located["blobs"]
    with _naming(repr(name)):
        if len(blobs) > MAX_BLOBS:
            raise ValueError(f"has {len(blobs)} blobs; expected {MAX_BLOBS} at most.")
        if blobs and not name:
            raise ValueError("has weights but no name; expected one.")
        arrays = []
        for i, span in enumerate(blobs):
            with _naming(f"blob {i}"):
                arrays.append(_read_blob(walk, span.start, span.stop))
    return name, Layer(kind, arrays, *links)


def _read_blob(walk, start, stop):
    small, located = walk.message("BlobProto", start, stop)
    floats, doubles = (
        [span for span in located[name] if span.start < span.stop]
        for name in ("data", "double_data")
    )
    spans, dtype = (doubles, np.dtype("<f8")) if doubles else (floats, np.dtype("<f4"))
    count = sum(span.count(dtype) for span in spans)
    shape = _shape(small)
    if math.prod(shape) != count:
        raise ValueError(
            f"has {count:,} numbers; expected {math.prod(shape):,} for the shape "
            f"{shape}."
        )
    array = walk.numbers(spans, dtype)
    with np.errstate(invalid="ignore", over="ignore"):  # refused below, in a sentence
        array = array.astype(np.float32, copy=False).reshape(shape)
    if fault := hdf5.fault_of(array, hidden=False):
        raise ValueError(f"{fault}; expected trained weights.")
    return array


def _shape(blob):
    names = ("num", "channels", "height", "width")
    legacy = [getattr(blob, name) for name in names]
    dims = list(blob.shape.dim)
    if any(blob.HasField(name) for name in names):
        dims = legacy
    if len(dims) > MAX_DIMS:
        raise ValueError(f"has {len(dims)} dims; expected {MAX_DIMS} at most.")
    if not dims or not all(0 < dim <= 2**31 for dim in dims):
        raise ValueError(f"has the dims {dims}; expected each of 1 to 2**31.")
    return tuple(dims)


class _Walk:
    """Finds the fields of a file's messages, and reads no more than is asked for.

    Args:
        file: The open file.
    """

    def __init__(self, file):
        self.file = file
        self.fields_left = MAX_FIELDS

    def message(self, kind, start, stop):
        """Returns the small fields, as a message, and `{large: [_Span]}`."""
        schema = _SCHEMA[kind].items()
        located = {name: [] for name, (_, type) in schema if type in _LARGE}
        numbers = {number: (name, type) for name, (number, type) in schema}
        small = b""
        for number, wire, begin, value, end in self.fields(start, stop):
            name, type = numbers.get(number, ("", "unknown"))
            if wire in _LARGE.get(type, ()):
                packed = wire == _LENGTH
                span = _Span(value, end) if packed else _Span(begin, end, value - begin)
                located[name].append(span)
            elif name:
                if len(small) + end - begin > MAX_SMALL:
                    raise ValueError(
                        f"has {len(small) + end - begin:,} bytes or more of names and "
                        f"shapes, up to its {name}; expected {MAX_SMALL:,} at most."
                    )
                small += self.read(begin, bytearray(end - begin))
        try:
            return _messages()[kind].FromString(small), located
        except message.DecodeError as error:
            raise ValueError(f"holds no {kind}: {error}.") from None

    def fields(self, start, stop):
        """Yields (number, wire type, start, start of the value, end) of each field.

        A run of fixed numbers with equal tags is one field, from the first to the last.
        """
        while start < stop:
            if not self.fields_left:
                raise ValueError(
                    f"the file goes beyond {MAX_FIELDS:,} fields here; expected fewer."
                )
            self.fields_left -= 1
            self.file.seek(start)
            head = self.file.read(min(20, stop - start))  # two varints at most
            tag, value = _varint(head, 0)
            number, wire = tag >> 3, tag & 7
            if wire == _LENGTH:
                size, value = _varint(head, value)
            elif wire == _VARINT:
                size = _varint(head, value)[1] - value
            elif wire in (_FIXED32, _FIXED64):
                size = 4 if wire == _FIXED32 else 8
            else:
                raise ValueError(f"holds wire type {wire}, which Caffe does not write.")
            if not 0 < number < 2**29:
                raise ValueError(f"holds a field {number}; expected 1 to 2**29 - 1.")
            value += start
            if value + size > stop:
                raise ValueError(
                    f"declares {size:,} bytes where {max(stop - value, 0):,} are left: "
                    "the file is cut short or no .caffemodel."
                )
            end = value + size
            tag, following = head[: value - start], head[end - start :]
            if wire in (_FIXED32, _FIXED64) and following.startswith(tag):
                end = self.run(tag, end, end - start, stop)
            yield number, wire, start, value, end
            start = end

    def run(self, tag, start, size, stop):
        """Returns where the records of one size end that begin with a tag."""
        records = 16  # then twice as many, so that short runs cost little
        while size <= stop - start:
            records = min(records, (stop - start) // size)
            block = self.read(start, np.empty((records, size), np.uint8))
            other = (block[:, : len(tag)] != np.frombuffer(tag, np.uint8)).any(1)
            if other.any():
                return start + size * int(other.argmax())
            start += size * records
            records = min(2 * records, BLOCK)
        return start

    def numbers(self, spans, dtype):
        """Returns the numbers that spans hold, without their tags."""
        array, done = np.empty(sum(span.count(dtype) for span in spans), dtype), 0
        for span in spans:
            part = array[done : done + span.count(dtype)]
            done += len(part)
            if not span.tag:
                self.read(span.start, part)
                continue
            size = span.tag + dtype.itemsize
            for first in range(0, len(part), BLOCK):
                piece = part[first : first + BLOCK]
                block = np.empty((len(piece), size), np.uint8)
                self.read(span.start + size * first, block)
                piece.view(np.uint8).reshape(len(piece), -1)[:] = block[:, span.tag :]
        return array

    def read(self, start, buffer):
        """Fills an array or a bytearray from the file, and returns it."""
        self.file.seek(start)
        view = memoryview(buffer).cast("B")
        if self.file.readinto(view) != len(view):
            raise ValueError("the file became shorter while it was read.")
        return buffer


def _varint(data, start):
    """Returns the number at `start`, lowest 7 bits first, and where it ends."""
    value = 0
    for i, byte in enumerate(data[start : start + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, start + i + 1
    raise ValueError("ends within a number, or holds one above 10 bytes.")


@functools.cache
def _messages():
    """Returns {name: protobuf class}, with the small fields of the schema only."""
    proto = descriptor_pb2.FileDescriptorProto(name="caffe", package="caffe")
    for kind, fields in _SCHEMA.items():
        descriptor = proto.message_type.add(name=kind)
        for name, (number, type) in fields.items():
            if type in _LARGE:
                continue
            field = descriptor.field.add(name=name, number=number)
            many = type in ("dims", "names")
            field.label = field.LABEL_REPEATED if many else field.LABEL_OPTIONAL
            text = type in ("bytes", "names")
            if type in _SCHEMA:
                field.type_name = type
            else:
                field.type = field.TYPE_BYTES if text else field.TYPE_INT64
    pool = descriptor_pool.DescriptorPool()
    pool.Add(proto)
    return {
        kind: message_factory.GetMessageClass(
            pool.FindMessageTypeByName(f"caffe.{kind}")
        )
        for kind in _SCHEMA
    }
