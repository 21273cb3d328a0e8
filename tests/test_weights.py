import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import zlib

import h5py
import keras
import numpy as np
import pytest
from keras import layers

from keras_fcn import weights
from keras_fcn.models import classifier, fcn, late_fusion, load_checkpoint
from keras_fcn.saving import save_checkpoint

THIN = {"width": 1 / 64}
NETS = {
    f"{backbone}-{stride}s": lambda backbone=backbone, stride=stride: fcn(
        backbone, stride, 3, **THIN
    )
    for backbone, strides in {
        "alexnet": (32, 16, 8),
        "vgg16": (32, 16, 8, 4),
        "googlenet": (32, 8),
    }.items()
    for stride in strides
} | {
    "alexnet-classifier": lambda: classifier("alexnet", 7, **THIN),
    "vgg16-classifier": lambda: classifier("vgg16", 7, **THIN),
    "googlenet-classifier": lambda: classifier("googlenet", 7, **THIN),
    "vgg16-8s-learned": lambda: fcn("vgg16", 8, 3, upsampling="learned", **THIN),
    "vgg16-8s-other-classes": lambda: fcn("vgg16", 8, 4, **THIN),
    "vgg16-8s-wider": lambda: fcn("vgg16", 8, 3, width=1 / 32),
    "vgg16-32s-depth": lambda: fcn("vgg16", 32, 3, input_channels=4, **THIN),
    "vgg16-16s-two-heads": lambda: fcn("vgg16", 16, {"sem": 3, "geo": 2}, **THIN),
    "vgg16-32s-late-fusion": lambda: late_fusion("vgg16", 32, 3, **THIN),
}


def small():
    """A net of three hidden layers and one that may start at zero."""
    relu = {"activation": "relu", "padding": "same"}
    return keras.Sequential(
        [
            keras.Input((None, None, 3)),
            layers.Conv2D(4, 3, name="conv1", **relu),
            layers.Conv2D(5, 3, name="conv2", **relu),
            layers.Conv2D(6, 3, name="conv3", **relu),
            layers.Conv2D(2, 1, name="score", kernel_initializer="zeros"),
        ]
    )


def fill(model, seed=0):
    """Fills a model with numbers of its own, and returns it."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        variable.assign(rng.standard_normal(variable.shape).astype("float32"))
    return model


def read(tensor):
    return keras.ops.convert_to_numpy(getattr(tensor, "value", tensor))


def numbers(model):
    """All weights of a model by name, bit for bit."""
    return {
        f"{layer.name}/{i}": read(variable).tobytes()
        for layer in model.layers
        for i, variable in enumerate(layer.weights)
    }


def resident(field):
    """Resident memory in MB: VmRSS is now, VmHWM the most since it was last reset."""
    with open("/proc/self/status") as file:
        return next(int(x.split()[1]) for x in file if x.startswith(field)) / 1000


EVENTS = []
FORBIDDEN = ("marshal.loads", "pickle.find_class", "exec", "compile", "import")
FORBIDDEN += ("socket.", "subprocess.", "os.system", "os.posix_spawn", "ctypes.")
sys.addaudithook(
    lambda event, _: EVENTS.append(event) if event.startswith(FORBIDDEN) else None
)


@contextlib.contextmanager
def harmless():
    """Holds a block to 1 s, 50 MB, and to running no code and using no network."""

    def too_long(*_):
        raise TimeoutError("more than 5 s")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(5)  # a read that hangs would hang the tests
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before, start = resident("VmRSS"), time.process_time()
    EVENTS.clear()
    try:
        yield
    finally:
        signal.alarm(0)
    assert not EVENTS
    assert time.process_time() - start < 1
    assert resident("VmHWM") - before < 50


def refused(model, path, match=None):
    """Checks that a file is refused, names itself, and changes nothing."""
    before = numbers(model)
    with pytest.raises(ValueError, match=match) as caught, harmless():
        weights.load(model, path)
    assert str(path) in str(caught.value)
    assert numbers(model) == before
    return str(caught.value)


@pytest.fixture
def model():
    return fill(small())


@pytest.fixture
def path(tmp_path, model):
    path = tmp_path / "net.h5"
    weights.save(model, path)
    weights.load(small(), path)  # what is imported at the first use is imported
    return path


# Saving


def test_the_file_shows_layers_and_in_them_their_weights(path, model):
    with h5py.File(path) as file:
        assert set(file) == {"conv1", "conv2", "conv3", "score"}
        assert set(file["conv1"]) == {"kernel", "bias"}
        kernel = read(model.get_layer("conv1").kernel)
        np.testing.assert_array_equal(file["conv1/kernel"][()], kernel)


def test_arrays_are_read_in_the_order_of_their_names(path):
    order = ["conv1", "conv2", "conv3", "score"]
    names = [f"{layer}/{weight}" for layer in order for weight in ("bias", "kernel")]
    assert list(weights.read_arrays(path)) == names


def test_the_same_weights_give_the_same_bytes(tmp_path):
    for name, facts in {"a": {"b": 1, "a": [2]}, "b": {"a": [2], "b": 1}}.items():
        weights.save(fill(small()), tmp_path / name, metadata=facts)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.fixture(scope="module")
def nets(tmp_path_factory):
    """{name: (net, its file, the same net with other weights)}."""
    folder = tmp_path_factory.mktemp("nets")
    built = {}

    def zeros(_, shape, dtype=None):
        return np.zeros(shape, dtype)

    with pytest.MonkeyPatch.context() as patch:  # JAX compiles random draws, by shape
        patch.setattr(keras.initializers.HeNormal, "__call__", zeros)
        for name, build in NETS.items():
            built[name] = fill(build()), folder / f"{name}.h5", build()
            weights.save(*built[name][:2], metadata={"any": "thing"})
    return built


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("arguments", [{}, {"by_name": True}])
def test_plain_keras_loads_every_net_by_order_and_by_name(name, arguments, nets):
    source, path, target = nets[name]
    target.load_weights(path, **arguments)
    assert numbers(target) == numbers(source)
    fill(target, seed=1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_any_float_type_on_disk_comes_back_as_near_as_it_can(dtype, tmp_path, model):
    path = tmp_path / "net.h5"
    weights.save(model, path, dtype=dtype)
    target = small()
    weights.load(target, path)
    for there, here in zip(model.weights, target.weights, strict=True):
        rounded = read(there).astype(dtype)
        np.testing.assert_array_equal(read(here), rounded)
    with h5py.File(path) as file:
        assert file["conv1/kernel"].dtype == np.dtype(dtype)


@pytest.mark.parametrize("policy", ["bfloat16", "float16", "float64"])
def test_weights_of_any_type_come_back_bit_for_bit(policy, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        source, target = fill(small()), small()
    finally:
        keras.config.set_dtype_policy(before)
    for variable in source.weights:
        variable.assign(variable.value / 3)  # in float64 no float32
    weights.save(source, tmp_path / "net.h5")
    weights.load(target, tmp_path / "net.h5")
    assert numbers(target) == numbers(source)
    with h5py.File(tmp_path / "net.h5") as file:
        wanted = weights.to_numpy(source.get_layer("conv1").kernel).dtype
        assert file["conv1/kernel"].dtype == wanted


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bool"])
def test_types_that_could_not_be_loaded_are_not_saved(dtype, tmp_path, model):
    with pytest.raises(ValueError, match=f"dtype='{dtype}'.*expected \"float16\""):
        weights.save(model, tmp_path / "net.h5", dtype=dtype)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "dtype"),
    [(np.nan, None), (-np.inf, None), (1e6, None), (7e4, "float16")],
)
def test_numbers_that_could_not_be_loaded_are_not_saved(number, dtype, tmp_path, model):
    (tmp_path / "net.h5").write_bytes(b"an earlier file")
    model.get_layer("conv2").bias.assign([0, 0, number, 0, 0])
    with pytest.raises(ValueError, match=r"conv2/bias holds .*net.h5 was not written"):
        weights.save(model, tmp_path / "net.h5", dtype=dtype)
    assert (tmp_path / "net.h5").read_bytes() == b"an earlier file"


def test_a_kernel_that_only_an_untrained_net_has_is_not_saved(path, model):
    before = path.read_bytes()
    model.get_layer("conv2").kernel.assign(np.zeros((3, 3, 4, 5)))
    with pytest.raises(ValueError, match="conv2/kernel holds nothing but zeros"):
        weights.save(model, path)
    assert path.read_bytes() == before


class Twins(layers.Layer):
    def build(self, shape):
        self.first = self.add_weight(shape=(2,), name="scale")
        self.second = self.add_weight(shape=(3,), name="scale")

    def call(self, x):
        return x


def test_weights_of_one_name_are_refused(tmp_path):
    model = keras.Sequential([keras.Input((3,)), Twins(name="twins")])
    with pytest.raises(
        ValueError, match="Two weights of the model are called twins/sc"
    ):
        weights.save(model, tmp_path / "net.h5")


class Pair(layers.Layer):
    def __init__(self, name):
        super().__init__(name=name)
        self.one, self.two = (layers.Dense(3, name=name) for name in ("one", "two"))

    def build(self, shape):
        self.one.build(shape)
        self.two.build(shape)

    def call(self, x):
        return self.one(x) + self.two(x)


def test_weights_of_layers_within_a_layer_are_told_apart(tmp_path):
    source, target = (keras.Sequential([keras.Input((3,)), Pair("pair")]) for _ in "ab")
    weights.save(fill(source), tmp_path / "net.h5")
    weights.load(target, tmp_path / "net.h5")
    assert numbers(target) == numbers(source)
    assert "pair/two/kernel" in weights.read_arrays(tmp_path / "net.h5")


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path, model):
    with pytest.raises(FileNotFoundError) as caught:
        weights.save(model, tmp_path / "nowhere" / "net.h5")
    assert caught.value.filename == str(tmp_path / "nowhere" / "net.h5")


# What the file says of itself


@pytest.mark.parametrize("facts", [{}, {"model": {"stride": 8}, "labels": ["Straße"]}])
def test_what_a_file_says_of_itself_comes_back(facts, tmp_path, model):
    weights.save(model, tmp_path / "net.h5", metadata=facts)
    assert weights.metadata(tmp_path / "net.h5") == facts


def test_numbers_of_numpy_are_written_as_numbers(tmp_path, model):
    given = {
        "mean_iou": np.float32(0.5),
        "images": np.int64(7),
        "whole": np.bool_(True),
        "palette": np.uint8([[1, 2, 3]]),
        "deep": [{"iou": (np.float64(0.25),)}],
    }
    weights.save(model, tmp_path / "a.h5", metadata=given)
    assert weights.metadata(tmp_path / "a.h5") == {
        "mean_iou": 0.5,
        "images": 7,
        "whole": True,
        "palette": [[1, 2, 3]],
        "deep": [{"iou": [0.25]}],
    }


def endless():
    facts = {}
    facts["facts"] = facts
    return facts


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"measured": {1, 2}}, r"holds \{1, 2\}, a set"),
        ({"trained_on": pathlib.Path("sbd")}, r"Path\('sbd'\), a P"),
        ({"a": np.complex64(1)}, "a complex"),
        ({(1, 2): 3}, "keys must be"),
        ({"a": 1, 2: 3}, "not supported between"),
        (endless(), "Circular"),
    ],
)
def test_what_json_cannot_hold_is_refused_before_anything_is_written(
    facts, words, tmp_path, model, monkeypatch
):
    path = tmp_path / "a.h5"
    path.write_text("an earlier file")
    monkeypatch.setattr(weights, "replacing", None)  # opens the file
    with pytest.raises(ValueError, match=rf"a\.h5 is .*{words}.*; expected dicts"):
        weights.save(model, path, metadata=facts)
    assert path.read_text() == "an earlier file"


def test_a_file_that_says_nothing_of_itself_has_no_metadata(path):
    assert weights.metadata(path) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1, 2]",
        '[["a", 1]]',
        "null",
        "",
        "[" * 100_000,
        b"\xff\xfe{}",
        7,
        ["{}"],
        h5py.Empty("f4"),
    ],
)
def test_metadata_that_is_no_json_object_is_refused(text, path):
    with h5py.File(path, "a") as file:
        file.attrs["keras_fcn"] = text
    with pytest.raises(ValueError, match=r"net.h5: .*says of itself"), harmless():
        weights.metadata(path)


# Loading


@pytest.mark.parametrize("name", NETS)
def test_a_net_takes_its_own_file_and_no_other_net_s(name, nets):
    source, own, target = nets[name]
    for other, (_, path, _) in nets.items():
        if other != name:
            message = refused(target, path, "does not hold the weights of this model")
            assert 1 < len(message.splitlines()) <= 8  # the first five are listed
    weights.load(target, own)
    assert numbers(target) == numbers(source)


def rewrite(path, change):
    """Writes a file anew after `change({name: array})`, its lists in order."""
    with h5py.File(path) as file:
        arrays = {f"{a}/{b}": file[a][b][()] for a in file for b in file[a]}
    change(arrays)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            file[name] = array
        list_names(file)


def list_names(file):
    file.attrs["layer_names"] = [name.encode() for name in file]
    for layer in file.values():
        layer.attrs["weight_names"] = [name.encode() for name in layer]


DIFFERENCES = {
    "conv3/kernel (3, 3, 5, 6) is missing": lambda x: (
        x.pop("conv3/kernel"),
        x.pop("conv3/bias"),
    ),
    "conv1/bias (4,) is missing": lambda x: x.pop("conv1/bias"),
    "conv4/bias (4,) is not in the model": lambda x: x.update(
        {"conv4/bias": x["conv1/bias"]}
    ),
    "conv1/scale (4,) is not in the model": lambda x: x.update(
        {"conv1/scale": x["conv1/bias"]}
    ),
    "conv1/bias is (1, 4), expected (4,)": lambda x: x.update(
        {"conv1/bias": x["conv1/bias"][None]}
    ),
    "conv1/kernel is (3, 3, 4, 3), expected (3, 3, 3, 4)": lambda x: x.update(
        {"conv1/kernel": x["conv1/kernel"].swapaxes(2, 3)}
    ),
    "Conv1/kernel (3, 3, 3, 4) is not in the model": lambda x: x.update(
        {"Conv1/kernel": x.pop("conv1/kernel"), "Conv1/bias": x.pop("conv1/bias")}
    ),
    "conv2/bias is (4,), expected (5,)": lambda x: x.update(
        {"conv1/bias": x["conv2/bias"], "conv2/bias": x["conv1/bias"]}
    ),
    "'conv1/\\x1b[2J' (1,) is not in the model": lambda x: x.update(
        {"conv1/\x1b[2J": np.ones(1)}
    ),
    "'conv1/aaaa": lambda x: x.update({f"conv1/{'a' * 60_000}": np.ones(1)}),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_a_difference_is_named(difference, path):
    rewrite(path, DIFFERENCES[difference])
    message = refused(small(), path)
    assert difference in message
    assert len(message) < 1000


def test_missing_extra_and_mismatched_weights_are_reported_together(path):
    def change(arrays):
        arrays["conv9/kernel"] = arrays.pop("conv1/kernel")
        arrays["conv2/bias"] = np.ones(9)

    rewrite(path, change)
    assert refused(small(), path).splitlines()[1:4] == [
        "  conv1/kernel (3, 3, 3, 4) is missing",
        "  conv9/kernel (3, 3, 3, 4) is not in the model",
        "  conv2/bias is (9,), expected (5,)",
    ]


def test_layers_may_be_missing_where_that_is_said(path, model):
    def change(arrays):
        for weight in ("kernel", "bias"):
            del arrays[f"conv1/{weight}"]

    rewrite(path, change)
    target = fill(small(), seed=1)
    before = numbers(target)
    weights.load(target, path, missing=["conv1"])
    expected = {**numbers(model), "conv1/0": before["conv1/0"]}
    assert numbers(target) == {**expected, "conv1/1": before["conv1/1"]}


def test_half_a_layer_is_not_a_missing_layer(path):
    rewrite(path, lambda arrays: arrays.pop("conv1/bias"))
    with pytest.raises(ValueError, match=r"conv1/bias \(4,\) is missing"):
        weights.load(small(), path, missing=["conv1"])


@pytest.mark.parametrize("failing", range(8))
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_assignment_that_fails_undoes_those_before_it(
    failing, error, path, monkeypatch
):
    target = fill(small(), seed=1)
    before, assign, calls = numbers(target), keras.Variable.assign, []

    def fail(variable, value):
        calls.append(variable)
        if len(calls) == failing + 1:
            raise error("no memory")
        return assign(variable, value)

    monkeypatch.setattr(keras.Variable, "assign", fail)
    with pytest.raises(error, match="no memory"):
        weights.load(target, path)
    assert numbers(target) == before


def test_of_all_that_is_replaced_the_largest_need_not_be_kept(path, monkeypatch):
    kept, to_numpy, target = [], weights.to_numpy, small()
    largest = target.get_layer("conv3").kernel
    monkeypatch.setattr(weights, "to_numpy", lambda x: kept.append(x) or to_numpy(x))
    weights.load(target, path)
    assert len(kept) == len(target.weights) - 1
    assert not any(variable is largest for variable in kept)


FAULTS = {
    "nan": lambda x: x.__setitem__((0,) * x.ndim, np.nan),
    "infinity": lambda x: x.__setitem__((-1,) * x.ndim, -np.inf),
    "1e7": lambda x: x.__setitem__((0,) * x.ndim, 1e7),
    "zeros": lambda x: x.fill(0),
    "strings": lambda x: x.astype("S"),
    "complex": lambda x: x.astype("complex64"),
}


@pytest.mark.parametrize("layer", ["conv1", "conv2", "conv3"])
@pytest.mark.parametrize("fault", FAULTS)
def test_numbers_that_no_training_leaves_are_refused(layer, fault, path):
    def change(arrays):
        kernel = arrays[f"{layer}/kernel"]
        changed = FAULTS[fault](kernel)
        arrays[f"{layer}/kernel"] = kernel if changed is None else changed

    rewrite(path, change)
    refused(fill(small(), seed=1), path, f"{layer}/kernel holds")


def test_a_score_layer_may_still_be_zero(tmp_path):
    source, target = small(), fill(small())
    weights.save(source, tmp_path / "net.h5")
    weights.load(target, tmp_path / "net.h5")
    assert numbers(target) == numbers(source)


@pytest.mark.parametrize("options", [{}, {"shuffle": True}, {"chunks": (3, 2, 3, 1)}])
def test_compressed_files_load(options, path, model):
    with h5py.File(path, "a") as file:
        array = file["conv1/kernel"][()]
        del file["conv1/kernel"]
        file["conv1"].create_dataset(
            "kernel", data=array, compression="gzip", **options
        )
    target = small()
    weights.load(target, path)
    assert numbers(target) == numbers(model)


def test_a_chunk_that_was_left_unpacked_loads(path, model):
    with h5py.File(path, "a") as file:
        array = file["conv1/kernel"][()]
        del file["conv1/kernel"]
        chunks = {"chunks": array.shape, "compression": "gzip"}
        item = file["conv1"].create_dataset("kernel", array.shape, "f4", **chunks)
        item.id.write_direct_chunk((0,) * 4, array.tobytes(), filter_mask=1)
    target = small()
    weights.load(target, path)
    assert numbers(target) == numbers(model)


# Hostile files


def replace(make):
    """A tamper that puts something else where an array was."""

    def tamper(file, name):
        array = file[name][()]
        del file[name]
        make(file, name, array)

    return tamper


def create(**options):
    return replace(lambda file, name, array: file.create_dataset(name, **options))


def again(**options):
    return replace(lambda f, name, array: f.create_dataset(name, data=array, **options))


def cast(dtype):
    return replace(lambda f, n, array: f.create_dataset(n, data=array.astype(dtype)))


def put(make):
    return replace(lambda file, name, array: file.__setitem__(name, make(file, array)))


def moved(file, array):
    file["elsewhere"] = array
    return h5py.SoftLink("/elsewhere")


def outside(file, array):
    folder = os.path.dirname(file.filename)
    with h5py.File(f"{folder}/outside.h5", "w") as other:
        other["k"] = array
    array.tofile(f"{folder}/outside")
    return f"{folder}/outside"


def external_link(file, array):
    outside(file, array)
    return h5py.ExternalLink("outside.h5", "/k")


def external_storage(file, name, array):
    storage = [(outside(file, array), 0, array.nbytes)]
    file.create_dataset(name, array.shape, "f4", external=storage)


def virtual(file, name, array):
    layout = h5py.VirtualLayout(array.shape, "f4")
    layout[...] = h5py.VirtualSource(f"{outside(file, array)}.h5", "k", array.shape)
    file.create_virtual_dataset(name, layout)


def virtual_from_pipe(file, name, array):
    """HDF5 opens the source to know the shape: if it is a pipe, it waits for ever."""
    os.mkfifo(f"{os.path.dirname(file.filename)}/pipe")
    all_rows = slice(h5py.h5s.UNLIMITED)
    source = h5py.VirtualSource("pipe", "k", (3, 3), maxshape=(None, 3))
    layout = h5py.VirtualLayout((3, 3), "f4", maxshape=(None, 3))
    layout[all_rows] = source[all_rows]
    file.create_virtual_dataset(name, layout)


def deflate_bomb(file, name, array):
    """256 MB, packed, as the only chunk of a small array."""
    chunks = {"chunks": array.shape, "compression": "gzip"}
    item = file.create_dataset(name, array.shape, "f4", **chunks)
    packer = zlib.compressobj()
    packed = b"".join(packer.compress(bytes(2**20)) for _ in range(256))
    item.id.write_direct_chunk((0,) * array.ndim, packed + packer.flush())


def half_of_the_chunks(file, name, array):
    item = file.create_dataset(name, array.shape, "f4", chunks=(1, *array.shape[1:]))
    item[:1] = array[:1]


def many(file, name):
    for i in range(10_001):
        file.create_group(f"many/{i}")


TAMPERS = {
    "a shape beyond the memory": (
        create(shape=(3, 3, 3, 2**40), dtype="f4", chunks=(3, 3, 3, 4)),
        "claims",
    ),
    "a shape beyond 64 bits": (create(shape=(2**20,) * 3, dtype="f4"), "claims"),
    "32 dimensions": (create(data=np.ones((1,) * 32, "f4")), "expected"),
    "no data": (
        replace(lambda f, n, array: f.create_dataset(n, array.shape, "f4")),
        "claims",
    ),
    "half of the chunks": (replace(half_of_the_chunks), "claims"),
    "chunks larger than the array": (
        again(chunks=(64,) * 4, maxshape=(None,) * 4),
        "claims",
    ),
    "a chunk larger than it says": (replace(deflate_bomb), "holds a chunk of more"),
    "no shape": (create(data=h5py.Empty("f4")), "conv1/kernel holds"),
    "strings": (cast("S"), "conv1/kernel holds"),
    "strings of any length": (
        replace(lambda f, n, a: f.create_dataset(n, a.shape, h5py.string_dtype())),
        "conv1/kernel holds",
    ),
    "8-bit integers": (cast("int8"), "conv1/kernel holds"),
    "64-bit integers": (cast("int64"), "conv1/kernel holds"),
    "booleans": (cast("bool"), "conv1/kernel holds"),
    "128-bit floats": (cast("longdouble"), "conv1/kernel holds"),
    "complex numbers": (cast("complex64"), "conv1/kernel holds"),
    "records": (cast([("a", "f4")]), "conv1/kernel holds"),
    "a reference to an object": (
        put(lambda file, _: file["score/bias"].ref),
        "conv1/kernel holds",
    ),
    "a reference to a region": (
        put(lambda file, _: file["score/bias"].regionref[:]),
        "conv1/kernel holds",
    ),
    "a type": (put(lambda file, _: np.dtype("f4")), "is no array"),
    "a group": (replace(lambda f, name, _: f.create_group(name)), "has no list"),
    "a soft link": (put(moved), "is a link"),
    "a soft link to nowhere": (put(lambda *_: h5py.SoftLink("/no/where")), "is a link"),
    "a soft link to itself": (put(lambda *_: h5py.SoftLink(".")), "is a link"),
    "an external link": (put(external_link), "is a link"),
    "an array held twice": (put(lambda file, _: file["score/bias"]), "held twice"),
    "a layer held twice": (
        lambda file, name: file.__setitem__("copy", file[name].parent),
        "held twice",
    ),
    "a group that holds its parent": (
        lambda file, name: file.__setitem__(f"{name}s", file[name].parent),
        "held twice",
    ),
    "a group that holds the file": (
        lambda file, name: file.__setitem__(f"{name}s", file["/"]),
        "held twice",
    ),
    "a virtual array": (replace(virtual), "stored outside"),
    "a virtual array of a pipe": (replace(virtual_from_pipe), "stored outside"),
    "external storage": (replace(external_storage), "stored outside"),
    "szip": (again(compression="szip"), "unknown filters"),
    "lzf": (again(compression="lzf"), "unknown filters"),
    "scale and offset": (again(scaleoffset=3), "unknown filters"),
    "checksums": (again(fletcher32=True), "unknown filters"),
    "deep groups": (lambda f, _: f.create_group("/".join("a" * 999)), "more than 8"),
    "many groups": (many, "more than 10,000"),
    "a huge text": (lambda f, _: f.attrs.create("a", "a" * 100_000_000), "arrays fill"),
}
LISTS = {
    "no layer_names": (lambda f: f.attrs.pop("layer_names"), "/ has no list 'layer_na"),
    "too few layer_names": (
        lambda f: f.attrs.create("layer_names", [b"conv1"]),
        "/ has no list 'layer_names'",
    ),
    "too many layer_names": (
        lambda f: f.attrs.create("layer_names", [b"conv1"] * 5),
        "/ has no list 'layer_names'",
    ),
    "a text as layer_names": (
        lambda f: f.attrs.create("layer_names", "conv1"),
        "/ has no list 'layer_names'",
    ),
    "no weight_names": (
        lambda f: f["conv1"].attrs.pop("weight_names"),
        "/conv1 has no list 'weight_names'",
    ),
    "too many weight_names": (
        lambda f: f["conv1"].attrs.create("weight_names", [b"kernel"] * 3),
        "/conv1 has no list 'weight_names'",
    ),
}


@pytest.mark.parametrize("tamper", TAMPERS)
def test_headers_are_judged_before_data(tamper, path):
    change, match = TAMPERS[tamper]
    with h5py.File(path, "a") as file:
        change(file, "conv1/kernel")
    refused(fill(small(), seed=1), path, match)


@pytest.mark.parametrize("tamper", TAMPERS)
def test_headers_of_keras_own_files_are_judged_before_data(tamper, tmp_path, path):
    own = tmp_path / "keras.weights.h5"
    small().save_weights(own)
    with h5py.File(own, "a") as file:
        file["score/bias"] = np.ones(2)  # where tampers look for something to link to
        TAMPERS[tamper][0](file, "layers/conv2d/vars/0")
    refused(fill(small(), seed=1), own)


@pytest.mark.parametrize("tamper", LISTS)
def test_files_that_keras_could_not_read_are_refused(tamper, path):
    change, match = LISTS[tamper]
    with h5py.File(path, "a") as file:
        change(file)
    refused(fill(small(), seed=1), path, match)


def test_keras_own_files_are_refused_with_what_to_do(tmp_path, path):
    small().save_weights(tmp_path / "keras.weights.h5")
    message = refused(small(), tmp_path / "keras.weights.h5")
    assert "if model.save_weights did, with model.load_weights" in message


def test_of_a_whole_model_in_hdf5_the_error_says_how_it_is_opened(tmp_path):
    net, path = fcn("googlenet", 16, 2, width=1 / 16), tmp_path / "whole.h5"
    net.save(path)
    with pytest.raises(ValueError, match="If model.save .* keras.models.load_model"):
        load_checkpoint(path)
    opened = keras.models.load_model(path, compile=False)
    save_checkpoint(opened, tmp_path / "net.h5")
    assert numbers(load_checkpoint(tmp_path / "net.h5")) == numbers(net)


def test_what_is_no_model_is_not_transplanted():
    for pair in (("vgg16", small()), (small(), {"color": small()})):
        with pytest.raises(ValueError, match="expected a keras.Model. Of a name"):
            weights.transplant(*pair)


DIMENSIONS = np.array([3, 3, 3, 4], "<u8").tobytes()


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        (b"\x04\x01" + bytes(5) + DIMENSIONS, b"\x46\x01" + bytes(5), "damaged"),
        (b"conv1\0", b"co/v1\0", "is a link"),
        (b"conv1\0", b".\0", "damaged"),
        (b"conv1\0", b"conv2\0", "twice|damaged|has no list"),
    ],
    ids=["70 dimensions", "a path as a name", "a dot as a name", "one name twice"],
)
def test_bytes_that_hdf5_would_not_write_are_refused(before, after, match, path):
    content = path.read_bytes()
    assert before in content
    path.write_bytes(content.replace(before, after.ljust(len(before), b"\0")))
    refused(fill(small(), seed=1), path, match)


@pytest.mark.parametrize(
    "content", [b"", b"no HDF5", b"\x89HDF\r\n\x1a\n", bytes(9999)]
)
def test_other_files_are_refused(content, tmp_path, path):
    path.write_bytes(content)
    refused(fill(small(), seed=1), path, "is not an HDF5 file")


def test_of_a_keras_file_the_error_says_how_it_is_opened(tmp_path):
    net = fcn("alexnet", 32, 2, width=1 / 32)
    net.save(tmp_path / "net.keras")
    with pytest.raises(ValueError, match="not an HDF5 .* keras.models.load_model"):
        load_checkpoint(tmp_path / "net.keras")
    opened = keras.models.load_model(tmp_path / "net.keras")
    save_checkpoint(opened, tmp_path / "net.h5")
    assert numbers(load_checkpoint(tmp_path / "net.h5")) == numbers(net)


def test_files_cut_short_are_refused(path):
    content, model = path.read_bytes(), fill(small(), seed=1)
    hundredths = {len(content) * i // 100 for i in range(100)}
    before = numbers(model)
    for length in sorted({*range(0, 4096, 64), *hundredths}):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="net.h5 is not an HDF5 file"), harmless():
            weights.load(model, path)
    assert numbers(model) == before


def test_what_is_no_file_is_an_os_error_that_names_it(tmp_path, model):
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.h5", ".", "pipe"):
        with pytest.raises(FileNotFoundError, match=str(tmp_path / name)), harmless():
            weights.load(model, tmp_path / name)


def test_mutants_load_or_are_refused(tmp_path):
    pytest.importorskip("jax", reason="Keras' NumPy backend needs JAX and SciPy")
    fuzzer = os.path.join(os.path.dirname(__file__), "../benchmarks/fuzz_weights.py")
    command = [
        sys.executable,
        fuzzer,
        "--mutants",
        "1000",
        "--findings",
        tmp_path / "f",
    ]
    report = subprocess.run(command, capture_output=True, text=True, check=False)
    assert report.returncode == 0, report.stdout + report.stderr


# Transplants


def picture(channels=3):
    pixels = np.random.default_rng(0).uniform(0, 255, (1, 33, 45, channels))
    return pixels.astype("float32")


def scored(model, seed=1):
    """Gives a fresh net's score layers something to say, and returns the net."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if layer.name.startswith("score") and layer.weights:
            layer.kernel.assign(rng.standard_normal(layer.kernel.shape))
    return model


def coarse(model):
    """The scores that the last layer upsamples."""
    names = [x.name for x in model.layers if x.name.startswith(("score_fr", "fuse"))]
    return model.get_layer(names[-1])


@pytest.mark.parametrize("backbone", ["alexnet", "vgg16", "googlenet"])
def test_each_stage_begins_where_the_one_before_ended(backbone):
    source = scored(fcn(backbone, 32, 3, **THIN))
    for stride in (16, 8):
        target = fcn(backbone, stride, 3, **THIN)
        fuse = coarse(target)
        skip = fuse.name.replace("fuse", "score")
        stayed = weights.transplant(source, target)
        assert stayed == [f"{skip}/kernel", f"{skip}/bias"]
        before = target.get_layer(coarse(source).name)
        maps = [before.output, fuse.input[0], fuse.output]
        again, upsampled, fused = keras.Model(target.input, maps)(picture())
        there = keras.Model(source.input, coarse(source).output)(picture())
        np.testing.assert_allclose(*map(read, (again, there)), rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(*map(read, (fused, upsampled)))
        source = scored(target, seed=stride)


@pytest.mark.parametrize("backbone", ["alexnet", "vgg16", "googlenet"])
def test_a_classifier_fills_all_but_the_score_layers(backbone):
    source, target = fill(classifier(backbone, 7, **THIN)), fcn(backbone, 8, 3, **THIN)
    stayed = weights.transplant(source, target)
    kept = {layer.name for layer in target.layers if layer.name.startswith("score")}
    assert {name.split("/")[0] for name in stayed} <= kept
    there, here = numbers(source), numbers(target)
    common = set(there) & set(here)
    assert len(common) + len(stayed) == len(here)
    assert all(there[name] == here[name] for name in common)


def test_depth_begins_as_the_mean_of_the_colours():
    source = fill(fcn("vgg16", 32, 3, **THIN))
    target = fcn("vgg16", 32, 3, input_channels=4, **THIN)
    assert weights.transplant(source, target) == []
    colours = read(source.get_layer("conv1_1").kernel)
    depth = read(target.get_layer("conv1_1_bgrd").kernel)
    np.testing.assert_array_equal(depth[:, :, :3], colours)
    mean = (colours[:, :, 0] + colours[:, :, 1] + colours[:, :, 2]) / 3
    np.testing.assert_allclose(depth[:, :, 3], mean, rtol=1e-6)
    other = fcn("vgg16", 16, 3, input_channels=4, **THIN)
    weights.transplant(target, other)
    np.testing.assert_array_equal(read(other.get_layer("conv1_1_bgrd").kernel), depth)


def test_two_nets_transplanted_into_a_late_fusion_are_averaged():
    plain = {"include_preprocessing": False, **THIN}
    nets = {
        stream: scored(fcn("vgg16", 16, 3, **plain), seed)
        for seed, stream in enumerate(("color", "hha"))
    }
    fused = late_fusion("vgg16", 16, 3, **plain)
    stays = [set(weights.transplant(net, fused, name)) for name, net in nets.items()]
    assert not set.intersection(*stays)
    images = {"color": picture(), "hha": picture()[:, ::-1]}
    outputs = [read(net(images[stream])) for stream, net in nets.items()]
    expected = (outputs[0] + outputs[1]) / 2
    np.testing.assert_allclose(read(fused(images)), expected, rtol=1e-3, atol=1e-3)


def test_weights_of_other_shapes_stay():
    source, target = fill(small()), small()
    before = numbers(target)
    names = [f"{layer.name}/{w}" for layer in target.layers for w in ("kernel", "bias")]
    for channels, filters in ((3, 9), (4, 3)):  # the latter has as many numbers
        other = keras.Sequential(
            [
                keras.Input((None, None, channels)),
                layers.Conv2D(filters, 3, name="conv1"),
            ]
        )
        assert weights.transplant(other, target) == names
        assert numbers(target) == before
    assert weights.transplant(source, target) == []
    assert numbers(target) == numbers(source)


def test_a_transplant_that_fails_half_way_is_undone(monkeypatch):
    source, target = fill(small()), fill(small(), seed=1)
    before, assign, calls = numbers(target), keras.Variable.assign, []

    def fail(variable, value):
        calls.append(variable)
        if len(calls) == 5:
            raise MemoryError
        return assign(variable, value)

    monkeypatch.setattr(keras.Variable, "assign", fail)
    with pytest.raises(MemoryError):
        weights.transplant(source, target)
    assert numbers(target) == before


def test_training_the_copy_leaves_the_source_alone():
    source, target = fill(small()), small()
    weights.transplant(source, target)
    before = numbers(source)
    target.compile("sgd", "mse")
    target.fit(picture(), np.ones((1, 33, 45, 2)), verbose=0)
    assert numbers(source) == before
    assert numbers(target) != before
    assert np.isfinite(read(source(picture()))).all()


def test_a_checkpoint_says_what_it_is_for_and_loads(tmp_path):
    source = scored(fcn("vgg16", 16, 3, **THIN))
    save_checkpoint(source, tmp_path / "net.h5", facts={"license": "none"})
    assert weights.metadata(tmp_path / "net.h5")["license"] == "none"
    target = fcn("vgg16", 16, 3, weights=str(tmp_path / "net.h5"), **THIN)
    assert numbers(target) == numbers(source)


def test_a_checkpoint_in_half_precision_takes_half_the_bytes(tmp_path):
    source = scored(fcn("vgg16", 16, 3, **THIN))
    sizes = {}
    for dtype, arguments in {"float32": {}, "float16": {"dtype": "float16"}}.items():
        path = tmp_path / f"{dtype}.h5"
        save_checkpoint(source, path, **arguments)
        assert {x.dtype.name for x in weights.read_arrays(path).values()} == {dtype}
        sizes[dtype] = path.stat().st_size
    saved = sizes["float32"] - sizes["float16"]
    assert saved == pytest.approx(2 * source.count_params(), rel=0.05)
    target = load_checkpoint(tmp_path / "float16.h5")
    for there, here in zip(source.weights, target.weights, strict=True):
        np.testing.assert_allclose(read(here), read(there), rtol=2**-11, atol=2**-25)
    assert numbers(target) != numbers(source)


@pytest.mark.slow
def test_a_net_of_full_size_needs_no_more_than_four_times_its_file(tmp_path):
    path = tmp_path / "net.h5"
    save_checkpoint(scored(fcn("vgg16", 8, 21)), path)
    size = path.stat().st_size / 1e6
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    model = fcn("vgg16", 8, 21, weights=str(path))
    times = {"tensorflow": 4, "jax": 3, "torch": 3}[keras.backend.backend()]
    assert model.count_params() * 4 < size * 1e6
    assert resident("VmHWM") - before < times * size
