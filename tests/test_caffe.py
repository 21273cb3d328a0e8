import contextlib
import io
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import tracemalloc

import numpy as np
import pytest
import scripts
from golden import golden

from keras_fcn import caffe
from keras_fcn.caffe import Layer, read_caffemodel, to_keras

FUZZER = scripts.ROOT / "benchmarks" / "fuzz_caffemodel.py"
fuzzer = scripts.load(FUZZER)  # its writer says anything that the wire format can say
data, doubles, legacy, shape = fuzzer.data, fuzzer.doubles, fuzzer.legacy, fuzzer.shape
field, integer, v1, v2 = fuzzer.field, fuzzer.integer, fuzzer.v1_layer, fuzzer.v2_layer

KERNEL, BIAS = fuzzer.small_arrays()
SOUND = shape(KERNEL.shape) + data(KERNEL)


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "net.caffemodel"
        path.write_bytes(content)
        return path

    return write


def equal(blobs, arrays):
    return [(b.shape, b.dtype, b.tobytes()) for b in blobs] == [
        (a.shape, a.dtype, a.tobytes()) for a in arrays
    ]


def conv1(*blobs):
    return v2("conv1", "Convolution", *blobs)


def of_four_dims(array):
    return array.reshape((1,) * (4 - array.ndim) + array.shape)


# What a sound file holds


@pytest.mark.parametrize(
    "name",
    [
        "bvlc-googlenet",
        "fcn-googlenet-8s",
        pytest.param("voc-fcn-alexnet", marks=pytest.mark.slow),
        pytest.param("siftflow-fcn16s", marks=pytest.mark.slow),
    ],
)
def test_the_files_that_real_caffe_computed_with_are_read_bit_for_bit(name, write):
    case = golden.load(name)
    weights = golden.weights(case)
    layers = read_caffemodel(write(golden.caffemodel(case)))
    assert list(layers) == list(weights)
    assert [layer.type for layer in layers.values()] == [
        layer["type"] for layer in case["layers"]
    ]
    for name, blobs in weights.items():
        if case.get("format") == "v1":
            blobs = [of_four_dims(blob) for blob in blobs]
        assert equal(layers[name].blobs, blobs)


@pytest.mark.parametrize("name", fuzzer.seeds())
def test_every_way_to_write_a_net_gives_the_same_arrays(name, write):
    layers = read_caffemodel(write(fuzzer.seeds()[name]))
    arrays = [of_four_dims(a) if "v1" in name else a for a in (KERNEL, BIAS)]
    assert layers["conv1"].type == "Convolution"
    assert equal(layers["conv1"].blobs, arrays)


def test_layers_keep_the_order_of_the_file(write):
    for order in (["norm1", "pool1"], ["pool1", "norm1"]):
        v1_net = v1("conv1", 4, legacy((2,)) + data(BIAS))
        v1_net += b"".join(v1(name, {"norm1": 15, "pool1": 17}[name]) for name in order)
        layers = read_caffemodel(write(v1_net))
        assert list(layers) == ["conv1", *order]
        types = {"norm1": "LRN", "pool1": "Pooling"}
        assert [layers[name] for name in order] == [
            Layer(types[name], []) for name in order
        ]


def test_what_a_layer_takes_and_gives_is_read_in_both_formats(write):
    links = {"bottoms": ["a", "b"], "tops": ["c", "d/e"]}
    for net in (
        conv1(SOUND) + v2("fuse", "Eltwise", **links),
        v1("conv1", 4, legacy((2,)) + data(BIAS)) + v1("fuse", 25, **links),
    ):
        layers = read_caffemodel(write(net))
        assert layers["fuse"] == Layer("Eltwise", [], ("a", "b"), ("c", "d/e"))
        assert layers["conv1"][2:] == ((), ())


# Numbers from caffe.proto, names from Caffe's layer catalogue.
@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, ""),
        (3, "Concat"),
        (4, "Convolution"),
        (5, "Data"),
        (6, "Dropout"),
        (8, "Flatten"),
        (12, "ImageData"),
        (14, "InnerProduct"),
        (15, "LRN"),
        (17, "Pooling"),
        (18, "ReLU"),
        (20, "Softmax"),
        (21, "SoftmaxWithLoss"),
        (22, "Split"),
        (23, "TanH"),
        (25, "Eltwise"),
        (26, "Power"),
        (29, "MemoryData"),
        (30, "ArgMax"),
        (33, "Slice"),
        (35, "AbsVal"),
        (38, "Exp"),
        (39, "Deconvolution"),
        (40, "V1LayerType 40"),
        (-1, "V1LayerType -1"),
    ],
)
def test_a_type_that_was_a_number_before_2015_gets_its_name_of_today(
    number, name, write
):
    layers = read_caffemodel(write(v1("a", number, legacy((2,)) + data(BIAS))))
    assert layers["a"].type == name


EIGHT = (1, 2, 1, 3, 1, 2, 1, 2)
ACCEPTED = {
    "legacy shape in V2": (conv1(legacy(KERNEL.shape) + data(KERNEL)), KERNEL),
    "both shapes, equal": (
        conv1(legacy(KERNEL.shape) + shape(KERNEL.shape) + data(KERNEL)),
        KERNEL,
    ),
    "both shapes, equal but for ones": (
        conv1(legacy((2,)) + shape((2,)) + data(BIAS)),
        BIAS.reshape(1, 1, 1, 2),
    ),
    "both shapes, the newer of other dims": (
        conv1(shape((3, 2, 2, 2)) + legacy((2, 3, 2, 2)) + data(KERNEL)),
        KERNEL,
    ),
    "both shapes, the newer of another rank": (
        conv1(legacy((1, 1, 6, 4)) + shape((24,)) + data(KERNEL)),
        KERNEL.reshape(1, 1, 6, 4),
    ),
    "both shapes, the newer of nine dims": (
        conv1(legacy((2, 3, 2, 2)) + shape((1,) * 8 + (24,)) + data(KERNEL)),
        KERNEL,
    ),
    "floats and doubles": (conv1(SOUND + doubles(2 * KERNEL)), 2 * KERNEL),
    "doubles, then floats that are too few": (
        conv1(shape(KERNEL.shape) + doubles(KERNEL) + data(BIAS)),
        KERNEL,
    ),
    "eight dims": (conv1(shape(EIGHT) + data(KERNEL)), KERNEL.reshape(EIGHT)),
    "dims not packed": (conv1(field(7, integer(1, 2)) + data(BIAS)), BIAS),
    "empty double_data": (conv1(SOUND + field(8, b"")), KERNEL),
    "empty data": (
        conv1(shape(KERNEL.shape) + field(5, b"") + doubles(KERNEL)),
        KERNEL,
    ),
    "data in pieces": (
        conv1(
            data(KERNEL[0, :2])
            + fuzzer.unpacked(KERNEL[0, 2])
            + shape(KERNEL.shape)
            + data(KERNEL[1])
        ),
        KERNEL,
    ),
    "just below the limit": (
        conv1(shape((2,)) + data([999_999, -999_999])),
        np.array([999_999, -999_999], np.float32),
    ),
    "layers without weights and of one name": (
        v2("data", "A") + v2("data", "B") + conv1(SOUND),
        KERNEL,
    ),
    "2,000 layers": (
        conv1(SOUND) + b"".join(v2(f"relu{i}", "ReLU") for i in range(1999)),
        KERNEL,
    ),
    "numbers where messages belong": (
        integer(2, 1) + integer(100, 1) + conv1(SOUND),
        KERNEL,
    ),
    "100,000 fields": (conv1(SOUND) + integer(5, 1) * (100_000 - 6), KERNEL),
    "long tags, then one that begins alike": (
        conv1(
            shape(BIAS.shape)
            + b"".join(b"\xad\x00" + number.tobytes() for number in BIAS)
            + b"\xad\x01"
            + bytes(4)  # field 21
        ),
        BIAS,
    ),
    "unknown fields": (
        integer(5, 1) + field(8, b"xyz") + conv1(SOUND + field(6, KERNEL.tobytes())),
        KERNEL,
    ),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_caffe_might_write_is_read(name, write):
    content, array = ACCEPTED[name]
    assert equal(read_caffemodel(write(content))["conv1"].blobs, [array])


def test_sixteen_blobs_are_read_in_their_order(write):
    blobs = [shape((1,)) + data([i]) for i in range(16)]
    layers = read_caffemodel(write(conv1(*blobs)))
    assert [blob.item() for blob in layers["conv1"].blobs] == list(range(16))


def test_doubles_become_the_nearest_floats(write):
    values = np.array([1 / 3, -1e-50, 7e5], np.float64)
    layers = read_caffemodel(write(conv1(shape((3,)) + doubles(values))))
    assert equal(layers["conv1"].blobs, [values.astype(np.float32)])


def test_a_million_numbers_written_one_by_one_are_read_and_their_diff_is_not(write):
    values = np.random.default_rng(0).standard_normal(1_000_003, np.float32)
    records = np.empty((len(values), 5), np.uint8)
    records[:, 1:] = values.view(np.uint8).reshape(-1, 4)
    blob = shape(values.shape)
    for number in (6, 5):  # the diff first
        records[:, 0] = number << 3 | 5
        blob += records.tobytes()
    path = write(conv1(blob))
    assert equal(read_caffemodel(path)["conv1"].blobs, [values])
    tracemalloc.start()
    try:
        read_caffemodel(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < values.nbytes + 2_000_000


def test_a_million_doubles_written_one_by_one_are_read(write):
    values = np.random.default_rng(0).standard_normal(1_000_003)
    records = np.empty((len(values), 9), np.uint8)
    records[:, 0] = 8 << 3 | 1
    records[:, 1:] = values.view(np.uint8).reshape(-1, 8)
    layers = read_caffemodel(write(conv1(shape(values.shape) + records.tobytes())))
    assert equal(layers["conv1"].blobs, [values.astype(np.float32)])


@pytest.mark.parametrize("count", [1, 2, 3, 16, 17, 18, 48, 49, 112, 113, 200])
def test_runs_of_any_length_and_between_other_fields_are_read_in_their_order(
    count, write
):
    values = np.arange(3 * count, dtype=np.float32).reshape(3, count)
    pieces = [fuzzer.unpacked(values[0]), data(values[1]), fuzzer.unpacked(values[2])]
    blob = shape((3 * count,)) + integer(99, 1).join(pieces)
    long_tags = b"".join(b"\xad\x00" + number.tobytes() for number in values[0])
    layers = read_caffemodel(write(conv1(blob, shape((count,)) + long_tags)))
    assert equal(layers["conv1"].blobs, [values.ravel(), values[0]])


def test_a_run_that_its_layer_cuts_is_refused(write):
    run = fuzzer.unpacked(np.arange(40, dtype=np.float32))
    for cut in (1, 4, 199):
        with pytest.raises(ValueError, match=r"conv1.*(is cut short|ends within)"):
            read_caffemodel(write(conv1(shape((40,)) + run[:-cut])))


def test_of_two_layers_without_weights_and_of_one_name_the_first_stays(write):
    path = write(v2("data", "A") + v2("data", "B") + conv1(SOUND))
    assert read_caffemodel(path)["data"] == Layer("A", [])


def test_memory_is_that_of_the_weights_whatever_else_is_in_the_file(write):
    array = np.ones(4_000_000, np.float32)
    blob = shape(array.shape) + data(array) + field(6, array.tobytes())  # a diff
    read_caffemodel(write(conv1(SOUND)))  # builds what is built once
    path = write(conv1(blob) + field(99, array.tobytes()))
    tracemalloc.start()
    try:
        layers = read_caffemodel(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert equal(layers["conv1"].blobs, [array])
    assert peak < array.nbytes + 1_000_000


# Files that lie


def lie(dims, numbers=KERNEL):
    return conv1(shape(dims) + data(numbers))


def old(dims, numbers=KERNEL):
    fields = b"".join(integer(i, dim) for i, dim in enumerate(dims, start=1))
    return v1("conv1", 4, fields + data(numbers))


def worth(*values):
    return conv1(shape((len(values),)) + data(values))


PLAIN = KERNEL.tobytes()
LIES = {
    # shapes
    "dim -1": (lie((-1, 3, 2, 2)), "conv1.*dims"),
    "dim 0": (lie((0, 3, 2, 2)), "conv1.*dims"),
    "dim 0 and no numbers": (conv1(shape((0,))), "conv1.*dims"),
    "dim 2**40": (lie((2**40, 3, 2, 2)), "conv1.*dims"),
    "dim 2**31 + 1": (lie((2**31 + 1,)), "conv1.*dims"),
    "dim 2**63": (lie((2**63,)), "conv1.*dims"),
    "two wild dims": (lie((-1, -24)), "conv1.*dims"),
    "product wraps to the count": (lie((2**31,) * 3 + (24,)), "conv1.*24 numbers"),
    "too few numbers": (lie((2, 3, 2, 3)), "conv1.*24 numbers; expected 36"),
    "too many numbers": (lie((2, 3, 2, 1)), "conv1.*24 numbers; expected 12"),
    "no numbers": (conv1(shape((2,))), "conv1.*0 numbers"),
    "no shape": (conv1(data(KERNEL)), "conv1.*dims"),
    "a shape without dims": (conv1(shape(()) + data([1])), "conv1.*dims"),
    "nine dims": (lie((1,) * 5 + (2, 3, 2, 2)), "conv1.*9 dims"),
    "65 dims": (lie((1,) * 64 + (24,)), "conv1.*65 dims"),
    "5,000 dims": (lie((1,) * 5000), "conv1.*shapes"),
    "two shapes, the one that counts of other numbers": (
        conv1(legacy((3, 3, 2, 2)) + shape((2, 3, 2, 2)) + data(KERNEL)),
        "conv1.*24 numbers; expected 36",
    ),
    "two shapes, the one that counts not whole": (
        conv1(integer(4, 24) + shape((24,)) + data(KERNEL)),
        "conv1.*dims",
    ),
    "legacy dim missing": (old((24,)), "conv1.*dims"),
    "legacy dim 0": (old((2, 3, 4, 0)), "conv1.*dims"),
    "legacy dim -1": (old((-1, 3, 2, 2)), "conv1.*dims"),
    "legacy dim 2**40": (old((2**40, 1, 1, 1)), "conv1.*dims"),
    "legacy dim 2**32 + 2": (old((2**32 + 2, 3, 2, 2)), "conv1.*dims"),
    "shape that is no message": (
        conv1(field(7, b"\x0a\x05\x01") + data(KERNEL)),
        "conv1.*BlobProto",
    ),
    # numbers
    "floats that are whole and doubles that are not": (
        conv1(SOUND + doubles(KERNEL[0])),
        "conv1.*12 numbers; expected 24",
    ),
    "sound floats and infinite doubles": (
        conv1(SOUND + doubles(np.full(24, np.inf))),
        "conv1.*not finite",
    ),
    "a byte too many": (
        conv1(shape((2, 3, 2, 2)) + field(5, PLAIN + b"\0")),
        "conv1.*bytes",
    ),
    "half a number in each of two pieces": (
        conv1(shape((1,)) + field(5, PLAIN[:2]) + field(5, PLAIN[2:4])),
        "conv1.*bytes",
    ),
    "half a double": (conv1(shape((2,)) + field(8, PLAIN[:12])), "conv1.*bytes"),
    "one of the unpacked numbers missing": (
        conv1(shape((2,)) + fuzzer.unpacked(BIAS[:1])),
        "conv1.*1 numbers",
    ),
    "numbers as integers": (conv1(shape((2,)) + integer(5, 1) * 2), "conv1.*0 numbers"),
    "NaN": (worth(1, np.nan, 1), "conv1.*not finite"),
    "infinity": (worth(1, np.inf), "conv1.*not finite"),
    "minus infinity": (worth(-np.inf, 1), "conv1.*not finite"),
    "1e6": (worth(0, 1e6), "conv1.*beyond"),
    "-1e6": (worth(0, -1e6), "conv1.*beyond"),
    "a double beyond all floats": (
        conv1(shape((1,)) + doubles([1e300])),
        "conv1.*beyond",
    ),
    # layers
    "V1 and V2": (
        conv1(SOUND) + v1("conv2", 4, legacy((2,)) + data(BIAS)),
        "V1 and 1 in V2",
    ),
    "V0": (field(2, field(1, field(1, b"conv1"))), "layer 0.*V0"),
    "no layer": (field(1, b"net"), "no layer"),
    "no weights": (conv1() + v2("relu1", "ReLU"), "no layer with weights"),
    "17 blobs": (conv1(*[SOUND] * 17), "conv1.*17 blobs"),
    "2,001 layers": (conv1(SOUND) + conv1() * 2000, "2,001 layers"),
    "one name twice": (conv1(SOUND) * 2, "layer 1.*conv1.*second"),
    "one name twice, then without weights": (conv1(SOUND) + conv1(), "conv1.*second"),
    "one name twice, first without weights": (conv1() + conv1(SOUND), "conv1.*second"),
    "no name": (v2("", "Convolution", SOUND), "layer 0.*no name"),
    "a name that is no text": (
        field(100, field(1, b"\xff") + field(7, SOUND)),
        "layer 0",
    ),
    "a name of 5,000 letters": (v2("a" * 5000, "A", SOUND), "layer 0.*names"),
    "2,000 bottoms": (v2("a", "A", SOUND, bottoms=["b"] * 2000), "layer 0.*bottoms"),
    # the wire
    "a field 0": (conv1(SOUND) + integer(0, 1), "field 0"),
    "a field 2**29": (conv1(SOUND) + integer(2**29, 1), "field 536870912"),
    "a group": (conv1(SOUND) + b"\x0b\x0c", "wire type 3"),
    "wire type 7": (conv1(SOUND) + b"\x0f", "wire type 7"),
    "a length beyond the file": (conv1(SOUND) + b"\x0a\x05abc", "5 bytes where 3"),
    "a length of 2**63": (conv1(SOUND) + b"\x0a" + fuzzer.varint(2**63), "are left"),
    "a blob longer than its layer": (
        field(100, field(1, b"conv1") + b"\x3a\x20" + SOUND[:16]) + SOUND,
        "layer 0.*32 bytes where 16",
    ),
    "a number of eleven bytes": (
        conv1(SOUND) + b"\x08" + b"\xff" * 10 + b"\1",
        "above 10",
    ),
    "100,001 fields": (
        conv1(SOUND) + integer(5, 1) * (100_001 - 6),  # of conv1
        "100,000 fields",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_contradicts_itself_is_refused_with_its_layer_named(name, write):
    content, words = LIES[name]
    path = write(content)
    with pytest.raises(ValueError, match=words) as caught:
        read_caffemodel(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("name", fuzzer.seeds())
def test_a_file_cut_at_any_byte_is_refused_or_ends_with_a_whole_layer(name, write):
    content = fuzzer.seeds()[name]
    whole = read_caffemodel(write(content))
    read = []
    for length in range(1, len(content)):
        with contextlib.suppress(ValueError):
            read.append(read_caffemodel(write(content[:length])))
    # After conv1, and after each layer that follows but the last.
    assert [list(layers) for layers in read] == [list(whole)[:n] for n in (2, 3, 4)]
    assert all(equal(n["conv1"].blobs, whole["conv1"].blobs) for n in read)


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"<!DOCTYPE html><html>404</html>", "an HTML page"),
        (b"\n\n<html>", "an HTML page"),
        (b'name: "FCN"\nlayer {\n', "a prototxt"),
        (b"# FCN\nlayer {\n", "a prototxt"),
        (b'layers {\n  name: "conv1"', "a prototxt"),
        (integer(1, 100_000) + field(2, b"net.caffemodel"), "a .solverstate"),
        (b"\x1f\x8b\x08\x00" + bytes(20), "a gzip archive"),
        (b"PK\x03\x04" + bytes(20), "a zip archive"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    ],
)
def test_a_file_of_another_kind_is_told_by_its_first_bytes(content, kind, write):
    with pytest.raises(ValueError, match=f"begins like {kind}: give the .caffemodel"):
        read_caffemodel(write(content))


def test_a_snapshot_in_hdf5_under_another_name_is_told_what_to_be_called(write):
    with pytest.raises(ValueError, match="begins like an HDF5 file: let its name end "):
        read_caffemodel(write(b"\x89HDF\r\n\x1a\n" + bytes(20)))


def test_a_file_of_2_gib_is_refused_unread_and_an_empty_one_too(write, monkeypatch):
    path = write(b"")
    monkeypatch.setattr(caffe, "open", None, raising=False)
    with pytest.raises(ValueError, match="net.caffemodel has 0 bytes"):
        read_caffemodel(path)
    os.truncate(path, 2**31)  # a hole, which takes no disk
    with pytest.raises(ValueError, match="net.caffemodel has 2,147,483,648 bytes"):
        read_caffemodel(path)


def test_a_file_that_becomes_shorter_while_it_is_read_is_refused(write, monkeypatch):
    content = conv1(SOUND)
    path = write(content)
    for length in range(len(content)):
        stump = io.BytesIO(content[:length])
        monkeypatch.setattr(caffe, "open", lambda *_, file=stump: file, raising=False)
        with pytest.raises(ValueError, match="net.caffemodel"):
            read_caffemodel(path)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path, tmp_path / "absent.caffemodel"):
        with pytest.raises(FileNotFoundError, match=path.name):
            read_caffemodel(path)


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory through /proc")
def test_small_files_that_claim_much_are_refused_in_a_second_and_200_megabytes():
    command = [sys.executable, str(FUZZER), "--amplify", "--megabytes", "20"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(list(fuzzer.amplifications(20)))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["v1", "v2"])
def test_ten_thousand_mutants_of_a_format_give_arrays_or_a_value_error(name):
    files = [seed for key, seed in fuzzer.seeds().items() if key.startswith(name)]
    read = refused = 0
    with tempfile.TemporaryDirectory(dir=fuzzer.MEMORY) as folder:
        path = pathlib.Path(folder) / "mutant.caffemodel"
        for i in range(10_000):
            path.write_bytes(fuzzer.mutate(random.Random(i), files[i % len(files)]))
            try:
                layers = read_caffemodel(path)
            except ValueError as error:
                refused += str(error).startswith(str(path))
                continue
            blobs = [blob for layer in layers.values() for blob in layer.blobs]
            assert blobs
            assert all(blob.dtype == np.float32 for blob in blobs)
            assert all((np.abs(blob) < 1e6).all() for blob in blobs)
            read += 1
    assert read + refused == 10_000
    assert min(read, refused) > 1_000


# What a porter makes of it


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_convolution_kernel_keeps_each_number_at_its_place(outputs):
    blob = np.arange(outputs * 3 * 4 * 5).reshape(outputs, 3, 4, 5)
    kernel = to_keras(blob, (4, 5, 3, outputs))
    assert kernel.shape == (4, 5, 3, outputs)
    for o, i, y, x in np.ndindex(blob.shape):
        assert kernel[y, x, i, o] == blob[o, i, y, x]


def test_a_deconvolution_kernel_of_in_out_becomes_one_of_out_in():
    blob = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)  # 2 channels in, 3 out
    kernel = to_keras(blob, (4, 4, 3, 2))
    for i, o, y, x in np.ndindex(blob.shape):
        assert kernel[y, x, o, i] == blob[i, o, y, x]


@pytest.mark.parametrize("dims", [(5, 24), (1, 1, 5, 24)])
def test_an_inner_product_is_a_convolution_over_the_whole_map(dims):
    random = np.random.default_rng(0)
    weights, features = random.normal(size=(5, 24)), random.normal(size=(2, 3, 4))
    kernel = to_keras(weights.reshape(dims), (3, 4, 2, 5))  # features are (C, H, W)
    channels_last = features.transpose(1, 2, 0)
    np.testing.assert_allclose(
        np.einsum("yxi,yxio->o", channels_last, kernel), weights @ features.ravel()
    )


@pytest.mark.parametrize("dims", [(6,), (1, 1, 1, 6), (1,), (1, 1, 1, 1)])
def test_a_bias_stays_as_it_is(dims):
    n = dims[-1]
    assert to_keras(np.arange(n).reshape(dims), (n,)).tolist() == list(range(n))


@pytest.mark.parametrize(
    ("dims", "wanted"),
    [
        ((2, 3, 4, 4), (4, 4, 3, 3)),
        ((2, 3, 4, 4), (4, 4, 2, 3)),  # as many numbers, in another order
        ((3, 2, 2, 4), (4, 2, 2, 3)),
        ((24, 5), (3, 4, 2, 5)),
        ((6,), (5,)),
        ((2, 3), (6,)),
        ((24,), (2, 3, 2, 2)),
        ((4, 6), (4, 6)),
    ],
)
def test_a_blob_that_does_not_fill_the_weight_is_refused(dims, wanted):
    with pytest.raises(ValueError, match="does not fill a Keras weight"):
        to_keras(np.zeros(dims), wanted)
