"""Exported nets, in runtimes that share no code with the package."""

import functools
import sys
from contextlib import nullcontext

import keras
import numpy as np
import oracle
import pytest
import test_golden
from golden import golden

import keras_fcn
from keras_fcn import cli, exporting, models

BACKEND = keras.config.backend()
ONNX = pytest.mark.skipif(BACKEND == "jax", reason="Keras takes jax2onnx there")
ANY_SIZE = pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow alone")
# All remainders that pooling five times can leave, and some.
SIZES = [
    (1, 1),
    (2, 33),
    (31, 64),
    (57, 58),
    (40, 97),
    *((n, 99 - n) for n in range(34, 66)),
]


@pytest.fixture(autouse=True)
def _policy():
    policy = keras.config.dtype_policy()
    yield
    keras.config.set_dtype_policy(policy)


NETS = {
    "googlenet-4s": functools.partial(models.fcn, "googlenet", 4, 3),
    "learned": functools.partial(models.fcn, "vgg16", 8, 3, upsampling="learned"),
    "at once": functools.partial(models.fcn, "vgg16", 16, skip_scales={"pool4": 0.01}),
    "two heads": functools.partial(models.fcn, "vgg16", 16, {"sem": 3, "geo": 3}),
    "depth": functools.partial(models.fcn, "vgg16", 32, 3, input_channels=4),
    "late fusion": functools.partial(models.late_fusion, "vgg16", 32, 3),
    "normalised": functools.partial(models.fcn, "googlenet", 8, 3, batch_norm=True),
}


def pictures(model, height, width, batch=1):
    random = np.random.default_rng(0)
    shape = (batch, height, width)
    return {
        tensor.name: random.uniform(0, 255, (*shape, tensor.shape[-1])).astype(
            "float32"
        )
        for tensor in model.inputs
    }


def run(path, inputs):
    """What ONNX Runtime computes, by the names of the outputs."""
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def logits(model, inputs):
    inputs = inputs if isinstance(model.input, dict) else inputs[model.input.name]
    found = model.predict_on_batch(inputs)
    return found if isinstance(found, dict) else {"logits": found}


def compare(path, model, sizes):
    for height, width in sizes:
        inputs = pictures(model, height, width, batch=2)
        found, expected = run(path, inputs), logits(model, inputs)
        assert found.keys() == expected.keys()
        for head in found:
            limit = 1e-5 * np.abs(expected[head]).max()
            np.testing.assert_allclose(found[head], expected[head], 0, limit)


def some(*names):
    """All of `NETS`; those that are not named are slow."""
    slow = pytest.mark.slow
    return [x if x in names else pytest.param(x, marks=slow) for x in NETS]


@ANY_SIZE
@pytest.mark.parametrize("name", some("two heads"))
def test_onnx_gives_the_logits_of_the_net_at_any_size(name, tmp_path):
    model = oracle.draw(NETS[name](width=1 / 32))
    keras_fcn.export(model, tmp_path / "net.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    compare(tmp_path / "net.onnx", model, SIZES)


@ONNX
@pytest.mark.parametrize("name", some("learned", "late fusion"))
def test_onnx_gives_the_logits_of_the_net_at_one_size(name, tmp_path):
    model = oracle.draw(NETS[name](width=1 / 32))
    keras_fcn.export(model, tmp_path / "net.onnx", size=(40, 97))
    compare(tmp_path / "net.onnx", model, [(40, 97)])


@ONNX
@pytest.mark.parametrize(
    "name",
    [
        name
        if name == "fcn-googlenet-8s"
        else pytest.param(name, marks=pytest.mark.slow)
        for name in ("fcn-googlenet-8s", "voc-fcn-alexnet", "siftflow-fcn16s")
        if BACKEND == "torch" or "googlenet" in name  # others are large, or have groups
    ],
)
def test_onnx_computes_what_caffe_computed(name, tmp_path):
    case, net = golden.load(name), test_golden.NETS[name]
    entry = {**net, "include_preprocessing": False, "upsampling": "learned"}
    model = models.build({"model": entry})
    oracle.fill(model, golden.weights(case))
    inputs = {"image": oracle.to_keras(golden.inputs(case)["data"]).astype("float32")}
    _, *size, _ = inputs["image"].shape
    keras_fcn.export(model, tmp_path / "net.onnx", size=size)
    outputs = run(tmp_path / "net.onnx", inputs)
    found = {
        blob: oracle.to_caffe(
            outputs.get(blob.removeprefix("score_"), outputs.get("logits"))
        )
        for blob in case["outputs"]
    }
    assert max(golden.compare(case, found).values()) < 1e-5


@ONNX
def test_onnx_of_one_size_says_so(tmp_path):
    import onnx

    model = oracle.draw(models.classifier("googlenet", 5, width=1 / 32))
    keras_fcn.export(model, tmp_path / "net.onnx", size=(224, 256))
    [taken] = onnx.load(tmp_path / "net.onnx").graph.input
    dims = [dim.dim_value or dim.dim_param for dim in taken.type.tensor_type.shape.dim]
    assert (taken.name, dims) == ("image", ["batch", 224, 256, 3])
    inputs = pictures(model, 224, 256)
    found, expected = run(tmp_path / "net.onnx", inputs), logits(model, inputs)
    np.testing.assert_allclose(found["logits"], expected["logits"], atol=1e-5)


@ONNX
@pytest.mark.parametrize("bias", [0, np.nan])
def test_a_file_that_computes_something_else_is_not_kept(bias, monkeypatch, tmp_path):
    write = exporting._write_onnx

    def other(model, path, signature):
        other = oracle.draw(models.fcn("googlenet", 32, 3, width=1 / 32), 1)
        other.get_layer("score_fr").bias.assign([bias] * 3)
        write(other, path, signature)

    monkeypatch.setattr(exporting, "_write_onnx", other)
    model = oracle.draw(models.fcn("googlenet", 32, 3, width=1 / 32))
    with pytest.raises(ValueError, match="gives logits that are off by"):
        keras_fcn.export(model, tmp_path / "net.onnx", size=(40, 50))
    assert not list(tmp_path.iterdir())


@ONNX
@pytest.mark.parametrize("fails", [True, False])
def test_an_earlier_file_is_replaced_by_a_whole_one_or_stays(
    fails, monkeypatch, tmp_path
):
    def copy(source, target):
        target.write(b"half")
        if fails:
            raise OSError("no space")

    monkeypatch.setattr(exporting, "_write_onnx", lambda _, part, __: part.touch())
    monkeypatch.setattr(exporting, "_compare", lambda *_: None)
    monkeypatch.setattr(exporting.shutil, "copyfileobj", copy)
    path = tmp_path / "net.onnx"
    path.write_bytes(b"before")
    model = models.fcn("alexnet", 32, 3, width=1e-6)
    with pytest.raises(OSError, match="no space") if fails else nullcontext():
        keras_fcn.export(model, path, size=(9, 9))
    assert path.read_bytes() == (b"before" if fails else b"half")
    assert list(tmp_path.iterdir()) == [path]


@ANY_SIZE
def test_of_a_saved_model_that_fails_half_way_nothing_is_left(monkeypatch, tmp_path):
    def fail(model, part, *_):
        part.mkdir()
        (part / "saved_model.pb").touch()
        assert not (tmp_path / "net").exists()
        raise MemoryError

    monkeypatch.setattr(exporting, "_run_exporter", fail)
    with pytest.raises(MemoryError):
        keras_fcn.export(models.fcn("alexnet", 32, 3, width=1e-6), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@ANY_SIZE
@pytest.mark.parametrize("name", ["googlenet-4s", "two heads", "late fusion"])
def test_a_saved_model_gives_the_logits_of_the_net_at_any_size(name, tmp_path):
    import tensorflow as tf

    model = oracle.draw(NETS[name](width=1 / 32))
    keras_fcn.export(model, tmp_path / "net")
    assert [path.name for path in tmp_path.iterdir()] == ["net"]
    served = tf.saved_model.load(tmp_path / "net")
    for size in SIZES:
        inputs = pictures(model, *size, batch=2)
        fed = inputs if isinstance(model.input, dict) else inputs["image"]
        found, expected = served.serve(fed), logits(model, inputs)
        found = found if isinstance(found, dict) else {"logits": found}
        for head in expected:
            limit = 1e-5 * np.abs(expected[head]).max()
            np.testing.assert_allclose(found[head], expected[head], 0, limit)


def test_what_cannot_be_exported_is_said_before_anything_is_loaded(capsys, tmp_path):
    for folder in ("folder", "folder.onnx"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").touch()
    refused = {
        "net.pb": "expected a name that ends in .onnx",
        "folder": "folder exists",
        "folder.onnx": "folder.onnx exists",
        "file": "file exists",
        "nowhere/net.onnx": "nowhere is no folder",
        "net.onnx --size 0 9": "size=[0, 9] was given; expected pixels from 1",
    }
    if BACKEND != "tensorflow":
        refused["net.onnx"] = "set KERAS_BACKEND to tensorflow"
        refused["net"] = "would be a SavedModel"
    for output, said in refused.items():
        path, *options = str(tmp_path / output).split()
        assert cli.main(["export", "no-such-net", "--output", path, *options]) == 2
        assert said in capsys.readouterr().err


@ONNX
@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_package_that_is_missing_is_named_before_anything_is_loaded(
    package, monkeypatch, capsys, tmp_path
):
    monkeypatch.setitem(sys.modules, package, None)  # Python's sign for that
    options = ["--output", str(tmp_path / "net.onnx"), "--size", "9", "9"]
    assert cli.main(["export", "no-such-net", *options]) == 2
    said = capsys.readouterr().err
    assert f"takes {package}, which" in said
    assert "pip install" in said


@ONNX
def test_a_net_of_mixed_precision_is_not_exported(tmp_path):
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = models.fcn("alexnet", 32, 3, width=1e-6)
    with pytest.raises(ValueError, match="computes in bfloat16 and float32; expected"):
        keras_fcn.export(model, tmp_path / "net.onnx", size=(9, 9))


@ANY_SIZE
def test_what_an_exporter_cannot_write_is_said_in_a_sentence(tmp_path):
    model = models.fcn("alexnet", 32, 3, width=1 / 32)  # with groups
    with pytest.raises(ValueError, match="cannot be written as ONNX on the .* backend"):
        keras_fcn.export(model, tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


@ANY_SIZE
def test_what_takes_too_much_memory_to_export_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(exporting, "MAX_PARAMETERS", 99)
    model = models.fcn("vgg16", 32, 3, width=1 / 64)
    with pytest.raises(ValueError, match="parameters, for .* expected 99 at most"):
        keras_fcn.export(model, tmp_path / "net.onnx", size=(9, 9))
    keras_fcn.export(model, tmp_path / "folder")


@ONNX
def test_the_command_exports_what_ships(capsys, tmp_path):
    path = tmp_path / "net.onnx"
    options = ["--output", str(path), "--size", "40", "48"]
    assert cli.main(["export", "googlenet-8s-camvid", *options]) == 0
    assert str(path) in capsys.readouterr().out
    model = models.load_checkpoint("googlenet-8s-camvid")
    inputs = pictures(model, 40, 48)
    found, expected = run(path, inputs)["logits"], logits(model, inputs)["logits"]
    np.testing.assert_array_equal(found.argmax(-1), expected.argmax(-1))
