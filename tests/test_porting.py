import hashlib
import math
import os
import pathlib
import subprocess
import sys
import tomllib

import h5py
import keras
import numpy as np
import pytest
from caffemodels import caffe_layers, caffemodel, snapshot
from golden import golden

from keras_fcn import hdf5, manifest, models, weights
from keras_fcn.caffe import Layer
from keras_fcn.cli import main
from keras_fcn.porting import entry_toml, port

ROOT = pathlib.Path(__file__).parent.parent


def entry_of(backbone="vgg16", stride=8, num_classes=3, width=1 / 32, **arguments):
    model = {"backbone": backbone, "stride": stride, "num_classes": num_classes}
    return {"model": {**model, "width": width, **arguments}}


def classifier_of(backbone, num_classes=5, width=1 / 32):
    model = {"builder": "classifier", "backbone": backbone, "width": width}
    return {"model": {**model, "num_classes": num_classes}}


@pytest.fixture
def write(tmp_path):
    def write(content, name="net.caffemodel"):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return write


@pytest.fixture
def refused(tmp_path, write):
    """Ports what must not be ported, and returns the error."""

    def refused(layers, entry, hdf5=False, **arguments):
        if hdf5:
            source = snapshot(layers, tmp_path / "wrong.caffemodel.h5")
        else:
            source = write(caffemodel(layers), "wrong.caffemodel")
        before = sorted(tmp_path.iterdir())
        with pytest.raises(ValueError, match="wrong.caffemodel") as caught:
            port(source, tmp_path / "net.h5", models.build(entry), **arguments)
        assert sorted(tmp_path.iterdir()) == before
        return str(caught.value)

    return refused


@pytest.fixture
def googlenet(write):
    """A caffemodel of GoogLeNet-32s for three classes, at full width."""
    model = models.skeleton({"model": entry_of("googlenet", 32, width=1)["model"]})
    return write(caffemodel(caffe_layers(model)))


NET = ("--backbone", "googlenet", "--stride", "32", "--num-classes", "3")


# What a sound file becomes

RECORDED = {
    "voc-fcn8s": {"backbone": "vgg16", "stride": 8, "num_classes": 21},
    "voc-fcn-alexnet": {"backbone": "alexnet", "stride": 32, "num_classes": 21},
    "siftflow-fcn16s": {
        "backbone": "vgg16",
        "stride": 16,
        "num_classes": {"sem": 33, "geo": 3},
    },
    "fcn-alexnet-8s": {"backbone": "alexnet", "stride": 8, "num_classes": 21},
    "fcn-googlenet-8s": {"backbone": "googlenet", "stride": 8, "num_classes": 21},
    "bvlc-googlenet": {"builder": "classifier", "backbone": "googlenet"},
}
SMALL = ("fcn-googlenet-8s", "bvlc-googlenet")


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize(
    "name",
    [n if n in SMALL else pytest.param(n, marks=pytest.mark.slow) for n in RECORDED],
)
def test_a_ported_net_computes_what_real_caffe_computed(name, version, tmp_path, write):
    case = {**golden.load(name), "format": version}
    entry = {"model": {**RECORDED[name], "include_preprocessing": False}}
    if "builder" not in entry["model"]:
        entry["model"]["upsampling"] = "learned"
    source = write(golden.caffemodel(case))
    port(source, tmp_path / "net.h5", models.build(entry), metadata=entry)
    model = models.load_checkpoint(tmp_path / "net.h5")
    data = golden.inputs(case)["data"].transpose(0, 2, 3, 1)
    outputs = model.predict_on_batch(data)
    if not isinstance(outputs, dict):
        outputs = {case["outputs"][0].removeprefix("score_"): outputs}
    found = {}
    for blob in case["outputs"]:
        output = outputs[blob.removeprefix("score_")]
        found[blob] = np.transpose(output, (0, 3, 1, 2))
        if "InnerProduct" in (layer["type"] for layer in case["layers"]):
            found[blob] = found[blob].reshape(1, -1)
    assert max(golden.compare(case, found).values()) < 1e-5


@pytest.mark.parametrize(
    ("name", "backbone", "stride"),
    [("trace-vgg16-16s", "vgg16", 16), ("trace-alexnet-32s", "alexnet", 32)],
)
def test_with_the_bilinear_kernels_left_out_the_loss_is_that_of_real_caffe(
    name, backbone, stride, tmp_path, write
):
    case = golden.load(name)
    entry = entry_of(backbone, stride, 21, case["width"], include_preprocessing=False)
    source, output = write(golden.caffemodel(case, trace=True)), tmp_path / "net.h5"
    rows = port(source, output, models.build(entry), metadata=entry)
    left_out = [row.source for row in rows if not row.weights]
    assert left_out == [
        layer["name"] for layer in case["layers"] if "up" in layer["name"]
    ]
    model = models.load_checkpoint(output)
    data, label = golden.example(case, 0)
    logits = np.float64(model.predict_on_batch(data.transpose(0, 2, 3, 1)))
    known = label[0, 0] != 255
    scores = logits[0][known]
    likelihood = np.exp(scores - scores.max(-1, keepdims=True))
    likelihood /= likelihood.sum(-1, keepdims=True)
    losses = -np.log(likelihood[np.arange(known.sum()), label[0, 0][known]])
    loss = losses.mean() if backbone == "alexnet" else losses.sum()
    recorded = np.load(ROOT / "tests" / "golden" / f"{name}.npz")["losses"][0]
    assert loss == pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize("version", [1, 2])
def test_an_inner_product_becomes_the_convolution_over_the_whole_map(
    version, tmp_path, write
):
    model = models.build(classifier_of("alexnet"))
    layers = caffe_layers(model)
    for name in ("fc6", "fc7", "fc8"):
        kernel, bias = layers[name].blobs
        layers[name] = Layer("InnerProduct", [kernel.reshape(len(kernel), -1), bias])
    rows = port(write(caffemodel(layers, version)), tmp_path / "net.h5", model)
    assert [r.source for r in rows if "unfolded" in r.action] == ["fc6", "fc7", "fc8"]
    weights.load(model, tmp_path / "net.h5")
    kernel, bias = layers["fc6"].blobs
    x = np.random.default_rng(0).standard_normal((8, 6, 6), dtype=np.float32)
    found = model.get_layer("fc6")(x.transpose(1, 2, 0)[None])
    found = keras.ops.convert_to_numpy(found).ravel()
    np.testing.assert_allclose(
        found, np.maximum(kernel @ x.ravel() + bias, 0), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "entry",
    [
        entry_of("googlenet", 8),
        entry_of("alexnet", 16, upsampling="learned"),
        entry_of("vgg16", 8, skip_scales={"pool4": 1e-2, "pool3": 1e-4}),
        entry_of("vgg16", 8, {"sem": 4, "geo": 3}),
        entry_of("vgg16", 32, input_channels=4),
        classifier_of("vgg16"),
    ],
    ids=["googlenet", "learned", "at once", "two heads", "depth", "classifier"],
)
def test_a_port_is_byte_for_byte_what_saving_the_filled_net_gives(
    entry, tmp_path, write
):
    model = models.build(entry)
    source, output = write(caffemodel(caffe_layers(model))), tmp_path / "net.h5"
    entry["labels"] = {"names": ["a", "b", "c"]}
    entry |= {"input": models.VOC_INPUT, "license": "none", "trained_on": "nothing"}
    rows = port(source, output, model, metadata={**entry, "measured": {"miou": 1}})
    weights.load(model, output)
    original = {
        "bytes": source.stat().st_size,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    }
    assert weights.metadata(output) == {**entry, "original": original}
    weights.save(model, tmp_path / "saved.h5", metadata={**entry, "original": original})
    assert output.read_bytes() == (tmp_path / "saved.h5").read_bytes()
    assert {row.layer for row in rows if row.weights} == {
        layer.name for layer in model.layers if layer.weights
    }


def test_blobs_go_where_the_layout_says(tmp_path, write):
    entry = entry_of("alexnet", 16, upsampling="learned")
    model = models.build(entry)
    layers = caffe_layers(model)
    port(write(caffemodel(layers)), tmp_path / "net.h5", model)
    with h5py.File(tmp_path / "net.h5") as file:
        for name, layer in layers.items():
            blobs = layer.blobs
            kernel, blob = file[name]["kernel"], blobs[0]
            for corner in (0, -1):
                np.testing.assert_array_equal(
                    kernel[corner, :, :, 0].T, blob[0, :, corner, :]
                )
            if len(blobs) == 2:
                np.testing.assert_array_equal(file[name]["bias"], blobs[1])


def test_a_port_holds_no_times_so_that_any_day_gives_the_same_bytes(tmp_path, write):
    model = models.build(entry_of("googlenet", 32))
    source, output = write(caffemodel(caffe_layers(model))), tmp_path / "net.h5"
    port(source, output, model)
    times = []
    with h5py.File(output) as file:
        file.visititems(lambda _, item: times.append(h5py.h5o.get_info(item.id).mtime))
    assert set(times) == {0}
    first = output.read_bytes()
    port(source, tmp_path / "again.h5", model)
    assert (tmp_path / "again.h5").read_bytes() == first


def test_late_fusion_fills_both_streams_each_with_its_own(tmp_path, write):
    entry = {"model": {**entry_of(stride=32)["model"], "builder": "late_fusion"}}
    entry["input"] = models.LATE_FUSION_INPUTS
    model = models.build(entry)
    layers = caffe_layers(model)
    output = tmp_path / "net.h5"
    port(write(caffemodel(layers)), output, model, metadata=entry)
    filled = models.load_checkpoint(output)
    for stream in ("color", "hha"):
        kernel = filled.get_layer(f"conv3_2{stream}").kernel
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(kernel)[1, 2].T,
            layers[f"conv3_2{stream}"].blobs[0][:, :, 1, 2],
        )


def test_googlenets_auxiliary_heads_are_dropped_and_named(tmp_path, write):
    entry = classifier_of("googlenet")
    model = models.build(entry)
    layers = caffe_layers(model)
    drop = manifest.checkpoint_info("googlenet-imagenet")["drop"]
    assert len(drop) == 6
    for name in drop:
        layers[name] = Layer("InnerProduct", [np.ones((2, 3), np.float32)])
    source, output = write(caffemodel(layers)), tmp_path / "net.h5"
    rows = port(source, output, model, metadata={**entry, "drop": drop})
    assert [row.source for row in rows if row.action == "dropped"] == drop


def test_progress_counts_up_to_all_parameters(tmp_path, write):
    model = models.build(entry_of("googlenet", 32))
    seen = []
    port(
        write(caffemodel(caffe_layers(model))),
        tmp_path / "net.h5",
        model,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (model.count_params(),) * 2


# What is refused

AT_ONCE = entry_of(skip_scales={"pool4": 0.5, "pool3": 0.25})


def _without_bias(layers):
    layers["conv3_1"].blobs.pop()


def _one_ulp(layers):
    kernel = layers["upscore8"].blobs[0]
    kernel[1, 1, 3, 4] = np.nextafter(kernel[1, 1, 3, 4], np.float32(0))


def _beside(layers):
    layers["upscore2"].blobs[0][0, 2, 1, 1] = 1e-30


def _scale(layers):
    layers["scale_pool3"].blobs[0][5] = 0.26


def _zeros(layers):
    layers["fc7"].blobs[0][:] = 0


def _set(name, kind, *shapes):
    def change(layers):
        blobs = [np.ones(shape, np.float32) for shape in shapes]
        layers[name] = Layer(kind, blobs)

    return change


WRONG = {
    "a layer is missing": (
        lambda layers: layers.pop("score_pool3"),
        "score_pool3 (1, 1, 8, 3), (3,) is missing",
    ),
    "a layer has lost its weights": (
        _set("fc6", "Convolution"),
        "fc6 (7, 7, 16, 128), (128,) is missing",
    ),
    "a bilinear kernel is missing": (lambda layers: layers.pop("upscore2"), "upscore2"),
    "a scale is missing": (lambda layers: layers.pop("scale_pool4"), "scale_pool4"),
    "a layer too many": (
        _set("score_pool5", "Convolution", (3, 16, 1, 1), (3,)),
        "score_pool5 (3, 16, 1, 1), (3,) has no place in the net",
    ),
    "two names for one layer": (
        _set("conv3/1", "Convolution", (8, 4, 3, 3), (8,)),
        "conv3/1 (8, 4, 3, 3), (8,) has no place in the net",
    ),
    "no bias": (_without_bias, "conv3_1: holds (8, 4, 3, 3); expected 2 arrays"),
    "a third blob": (
        _set("conv3_1", "Convolution", (8, 4, 3, 3), (8,), (8,)),
        "conv3_1: holds (8, 4, 3, 3), (8,), (8,); expected 2 arrays",
    ),
    "another shape": (
        _set("score_fr", "Convolution", (4, 128, 1, 1), (4,)),
        "score_fr: A blob of shape (4, 128, 1, 1)",
    ),
    "another bias": (
        _set("score_fr", "Convolution", (3, 128, 1, 1), (4,)),
        "score_fr: A blob of shape (4,)",
    ),
    "another type": (
        _set("conv3_1", "Deconvolution", (8, 4, 3, 3), (8,)),
        "conv3_1: is of type Deconvolution; expected Convolution or InnerProduct",
    ),
    "an unknown type": (
        _set("upscore2", "Python", (3, 3, 4, 4)),
        "upscore2: is of type Python; expected Deconvolution",
    ),
    "a kernel learned a little": (
        _one_ulp,
        "upscore8: differs from the bilinear kernel in 1 of 2,304 numbers",
    ),
    "classes mixed a little": (
        _beside,
        "upscore2: differs from the bilinear kernel in 1 of 144 numbers",
    ),
    "a grouped deconvolution": (
        _set("upscore2", "Deconvolution", (3, 1, 4, 4)),
        "upscore2: holds (3, 1, 4, 4); expected (3, 3, 4, 4)",
    ),
    "a deconvolution with a bias": (
        _set("upscore2", "Deconvolution", (3, 3, 4, 4), (3,)),
        "upscore2: holds (3, 3, 4, 4), (3,)",
    ),
    "one factor differs": (_scale, "scale_pool3: holds factors from 0.25 to 0.26"),
    "an untrained kernel": (_zeros, "fc7: holds nothing but zeros"),
}


# HDF5 holds no types, and lists layers by name: of two the other one is left over.
OTHERWISE = {"another type", "an unknown type", "two names for one layer"}


@pytest.mark.parametrize(
    ("what", "hdf5"),
    [
        *[(what, False) for what in WRONG],
        *[(what, True) for what in WRONG if what not in OTHERWISE],
    ],
)
def test_a_file_that_is_not_of_the_net_is_refused_and_the_layer_named(
    what, hdf5, refused
):
    change, message = WRONG[what]
    layers = caffe_layers(models.build(AT_ONCE))
    change(layers)
    assert message in refused(layers, AT_ONCE, hdf5)


def test_the_sound_file_of_these_tests_is_accepted(tmp_path, write):
    model = models.build(AT_ONCE)
    layers = caffe_layers(model)
    for name in ("data", "relu1_1", "drop6", "data_data_0_split"):
        layers[name] = Layer("ReLU", [])
    for blob in (*layers["score_fr"].blobs, layers["fc7"].blobs[1]):
        blob[:] = 0  # as they began
    layers["fc7"].blobs[0][:, 0] = 0  # as others may be, in part
    port(write(caffemodel(layers)), tmp_path / "net.h5", model)


def test_a_learned_kernel_is_taken_where_it_is_asked_for(tmp_path, write):
    layers = caffe_layers(models.build(entry_of()))
    layers["upscore8"].blobs[0][0, 1, 2, 3] = 0.5
    model = models.build(entry_of(upsampling="learned"))
    entry = {**entry_of(), "input": models.VOC_INPUT}  # as of the published nets
    port(write(caffemodel(layers)), tmp_path / "net.h5", model, metadata=entry)
    model = models.load_checkpoint(tmp_path / "net.h5")
    kernel = keras.ops.convert_to_numpy(model.get_layer("upscore8").kernel)
    assert kernel[2, 3, 1, 0] == 0.5


def test_learned_kernels_that_are_all_bilinear_are_left_out_of_a_fixed_net_s_file(
    tmp_path, write
):
    entry, fixed = entry_of(), models.build(entry_of())
    model = models.build(entry_of(upsampling="learned"))
    source, output = write(caffemodel(caffe_layers(fixed))), tmp_path / "net.h5"
    rows = port(source, output, model, metadata=entry)
    left_out = {row.layer: row.action for row in rows if not row.weights}
    upsamplings = ("upscore2", "upscore_pool4", "upscore8")
    assert left_out == dict.fromkeys(upsamplings, "bilinear, left out")
    assert weights.metadata(output)["model"] == entry["model"]
    weights.load(fixed, output)


def test_a_convolution_is_not_taken_for_a_learned_upsampling(refused):
    entry = entry_of(upsampling="learned")
    layers = caffe_layers(models.build(entry))
    layers["upscore2"] = Layer("Convolution", layers["upscore2"].blobs)
    message = "upscore2: is of type Convolution; expected Deconvolution"
    assert message in refused(layers, entry)


def test_five_differences_are_listed_and_the_rest_counted(refused):
    layers = caffe_layers(models.build(entry_of()))
    message = refused(layers, entry_of("googlenet"))
    assert message.count("\n  ") == 6
    assert "conv1_1 (2, 3, 3, 3), (2,) has no place in the net" in message
    assert "more\nDescribe the net that the file is for." in message


# {layer: (type, what it takes, what it gives)}, as models/*/train_val.prototxt say.
CAFFENET = {
    "conv1": ("Convolution", ["data"], ["conv1"]),
    "relu1": ("ReLU", ["conv1"], ["conv1"]),
    "pool1": ("Pooling", ["conv1"], ["pool1"]),
    "norm1": ("LRN", ["pool1"], ["norm1"]),
    "conv2": ("Convolution", ["norm1"], ["conv2"]),
    "relu2": ("ReLU", ["conv2"], ["conv2"]),
    "pool2": ("Pooling", ["conv2"], ["pool2"]),
    "norm2": ("LRN", ["pool2"], ["norm2"]),
    "conv3": ("Convolution", ["norm2"], ["conv3"]),
}
TAPPED = {
    **CAFFENET,
    "pool1_split": ("Split", ["pool1"], ["pool1_0", "pool1_1"]),
    "norm1": ("LRN", ["pool1_1"], ["norm1"]),
}
ALEXNET = {
    **CAFFENET,
    "norm1": ("LRN", ["conv1"], ["norm1"]),
    "pool1": ("Pooling", ["norm1"], ["pool1"]),
    "conv2": ("Convolution", ["pool1"], ["conv2"]),
    "norm2": ("LRN", ["conv2"], ["norm2"]),
    "pool2": ("Pooling", ["norm2"], ["pool2"]),
    "conv3": ("Convolution", ["pool2"], ["conv3"]),
}
SECOND = {name: ALEXNET[name] for name in ("norm2", "pool2", "conv3")}
SPLIT = {
    **ALEXNET,
    "norm1_split": ("Split", ["norm1"], ["norm1_0", "norm1_1"]),
    "pool1": ("Pooling", ["norm1_0"], ["pool1"]),
}


def alexnet(links, order):
    """The model, and a file of its weights whose layers lie in this order."""
    model = models.build(classifier_of("alexnet"))
    layers = caffe_layers(model)
    for name, (kind, bottoms, tops) in links.items():
        blobs = layers[name].blobs if name in layers else []
        layers[name] = Layer(kind, blobs, tuple(bottoms), tuple(tops))
    return model, {name: layers[name] for name in order([*links, *layers])}


def check_convolutions(layers, path):
    """Checks that a file holds the kernels and biases of conv1 to conv5."""
    read = weights.read_arrays(path)
    for name in (f"conv{i}" for i in range(1, 6)):
        kernel, bias = layers[name].blobs
        np.testing.assert_array_equal(
            read[f"{name}/kernel"], kernel.transpose(2, 3, 1, 0)
        )
        np.testing.assert_array_equal(read[f"{name}/bias"], bias.ravel())


ORDERS = [list, lambda names: names[::-1], sorted]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ORDERS, ids=["as run", "reversed", "by name"])
@pytest.mark.parametrize("links", [CAFFENET, TAPPED], ids=["caffenet", "tapped"])
def test_caffenet_is_ported_in_whatever_order_its_layers_lie(
    links, order, version, tmp_path, write
):
    model, layers = alexnet(links, order)
    port(write(caffemodel(layers, version)), tmp_path / "net.h5", model)
    check_convolutions(layers, tmp_path / "net.h5")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("order", ORDERS, ids=["as run", "reversed", "by name"])
@pytest.mark.parametrize(
    ("links", "stages"),
    [(ALEXNET, "12"), (SPLIT, "12"), ({**CAFFENET, **SECOND}, "2")],
    ids=["alexnet", "through a split", "second stage alone"],
)
def test_alexnet_that_normalises_before_it_pools_is_refused(
    links, stages, order, version, tmp_path, write
):
    model, layers = alexnet(links, order)
    source = write(caffemodel(layers, version))
    with pytest.raises(ValueError, match="as in bvlc_alexnet") as caught:
        port(source, tmp_path / "net.h5", model)
    for stage in "12":
        said = f"norm{stage} comes before pool{stage}" in str(caught.value)
        assert said == (stage in stages)
    assert not (tmp_path / "net.h5").exists()


def test_an_alexnet_whose_order_the_file_does_not_say_is_taken(tmp_path, write):
    model, layers = alexnet(ALEXNET, list)
    unlinked = {name: layer._replace(tops=()) for name, layer in layers.items()}
    stripped = {name: layer for name, layer in layers.items() if layer.blobs}
    for i, said in enumerate((unlinked, stripped)):
        port(write(caffemodel(said)), tmp_path / f"{i}.h5", model)
        check_convolutions(layers, tmp_path / f"{i}.h5")
    hdf5 = snapshot(layers, tmp_path / "net.caffemodel.h5")  # which lists by name
    port(hdf5, tmp_path / "net.h5", model)
    check_convolutions(layers, tmp_path / "net.h5")


# The published nets (nets.md of the reference, section 2), a 32nd as wide.
NETS = {
    "voc-fcn32s": entry_of(stride=32, num_classes=21),
    "voc-fcn16s": entry_of(stride=16, num_classes=21),
    "voc-fcn8s": entry_of(stride=8, num_classes=21),
    "voc-fcn8s-atonce": entry_of(
        num_classes=21, skip_scales={"pool4": 1e-2, "pool3": 1e-4}
    ),
    "voc-fcn-alexnet": entry_of("alexnet", 32, 21),
    "nyud-fcn32s-color": entry_of(stride=32, num_classes=40),
    "nyud-fcn32s-color-d": entry_of(stride=32, num_classes=40, input_channels=4),
    "nyud-fcn32s-hha": entry_of(stride=32, num_classes=40),
    "nyud-fcn32s-color-hha": {
        **entry_of(stride=32, num_classes=40, builder="late_fusion"),
        "input": models.LATE_FUSION_INPUTS,
    },
    **{
        f"siftflow-fcn{stride}s": entry_of(
            stride=stride, num_classes={"sem": 33, "geo": 3}
        )
        for stride in (32, 16, 8)
    },
    **{
        f"pascalcontext-fcn{stride}s": entry_of(stride=stride, num_classes=60)
        for stride in (32, 16, 8)
    },
}
TWINS = {"nyud-fcn32s-color", "nyud-fcn32s-hha"}


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Every published net, and a file of it: `{name: (model, layers, path)}`."""
    folder, nets = tmp_path_factory.mktemp("published"), {}
    for seed, (name, entry) in enumerate(NETS.items()):
        model = models.skeleton(entry)
        layers = caffe_layers(model, seed)
        path = folder / f"{name}.caffemodel"
        path.write_bytes(caffemodel(layers))
        nets[name] = model, layers, path
    return nets


@pytest.mark.parametrize("name", NETS)
def test_no_published_file_passes_for_another_net(name, published, tmp_path):
    _, mine, source = published[name]
    for other, (model, theirs, _) in published.items():
        output = tmp_path / f"{other}.h5"
        if other == name or {name, other} == TWINS:
            port(source, output, model)
            assert output.exists()
            continue
        shapes = {n: [b.shape for b in layer.blobs] for n, layer in mine.items()}
        wanted = {n: [b.shape for b in layer.blobs] for n, layer in theirs.items()}
        first = next(n for n in [*shapes, *wanted] if shapes.get(n) != wanted.get(n))
        with pytest.raises(ValueError, match=f"\n  {first}[: ]"):
            port(source, output, model)
        assert not output.exists()


@pytest.mark.parametrize("digest", ["sha256", "sha1", "md5"])
def test_nets_that_agree_in_every_shape_are_told_apart_by_the_published_hash(
    digest, published, tmp_path
):
    model, _, color = published["nyud-fcn32s-color"]
    _, _, hha = published["nyud-fcn32s-hha"]
    expected = {digest: hashlib.new(digest, color.read_bytes()).hexdigest()}
    expected["url"] = "http://localhost/"
    port(color, tmp_path / "color.h5", model, expected=expected)
    with pytest.raises(ValueError, match=f"hha.*has {digest}.*{expected[digest]}"):
        port(hha, tmp_path / "hha.h5", model, expected=expected)
    assert not (tmp_path / "hha.h5").exists()


def test_a_file_of_another_length_than_known_is_refused(write, tmp_path):
    model = models.build(entry_of())
    source = write(caffemodel(caffe_layers(model)))
    size = source.stat().st_size
    with pytest.raises(ValueError, match=f"has bytes {size}; expected {size + 1}"):
        port(source, tmp_path / "net.h5", model, expected={"bytes": size + 1})
    port(source, tmp_path / "net.h5", model, expected={"bytes": size})


def test_a_full_disk_ends_in_a_sentence_and_leaves_the_earlier_file(
    tmp_path, googlenet
):
    disk = tmp_path / "disk"
    disk.mkdir()
    output, command = disk / "net.h5", [sys.executable, "-m", "keras_fcn", "convert"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("A full disk takes a small one, which only root can mount.")
    try:
        output.write_bytes(b"as it was")
        done = subprocess.run(
            [*command, str(googlenet), "--output", str(output), *NET],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2, done.stderr  # and not a signal
        assert "bytes that are free" in done.stderr
        assert output.read_bytes() == b"as it was"
        assert list(disk.iterdir()) == [output]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_names_from_a_file_are_printed_without_control_characters(refused):
    layers = caffe_layers(models.build(entry_of()))
    layers["\x1b[31mred\n"] = layers.pop("conv1_1")
    message = refused(layers, entry_of())
    assert "\x1b" not in message
    assert r"'\x1b[31mred\n' (2, 3, 3, 3)" in message


def test_a_file_that_is_missing_or_none_at_all_is_named(tmp_path, write):
    model, output = models.build(classifier_of("vgg16")), tmp_path / "net.h5"
    with pytest.raises(FileNotFoundError, match="absent.caffemodel is not a file; ex"):
        port(tmp_path / "absent.caffemodel", output, model)
    with pytest.raises(ValueError, match="page.caffemodel.*HTML page"):
        port(write(b"<html>", "page.caffemodel"), output, model)
    with pytest.raises(ValueError, match="page.h5"):
        port(write(b"<html>", "page.h5"), output, model)
    assert not output.exists()


# Caffe's snapshots in HDF5


def inner_products(layers, *names):
    """Makes convolutions over a whole map what they are in a classifier's net."""
    for name in names:
        kernel, bias = layers[name].blobs
        layers[name] = Layer("InnerProduct", [kernel.reshape(len(kernel), -1), bias])
    return layers


def with_the_rest(layers):
    """Adds layers without weights, as Caffe writes all that a net has."""
    rest = ("data", "relu1_1", "fc6/relu", "loss")
    return {**layers, **{name: Layer("ReLU", []) for name in rest}}


def same_ports(layers, entry, folder, **written):
    """Ports a net from both formats, and returns the rows if the weights are equal."""
    binary = folder / "net.caffemodel"
    binary.write_bytes(caffemodel(layers))
    hdf5 = snapshot(layers, folder / "net.caffemodel.h5", **written)
    rows, arrays = [], []
    for source, output in ((binary, "a.h5"), (hdf5, "b.h5")):
        model = models.skeleton(entry)
        rows.append(port(source, folder / output, model, metadata=entry))
        arrays.append(weights.read_arrays(folder / output))
    expected, found = arrays
    assert len(expected) > 10
    assert {n: (a.dtype, a.shape, a.tobytes()) for n, a in found.items()} == {
        n: (a.dtype, a.shape, a.tobytes()) for n, a in expected.items()
    }
    assert sorted(rows[0]) == sorted(rows[1])
    return rows[1]


SNAPSHOTS = {
    "fcn8s": (entry_of(), ()),
    "fcn8s with inner products": (entry_of(), ("fc6", "fc7")),
    "classifier": (classifier_of("vgg16"), ("fc6", "fc7", "fc8")),
    "caffenet": (classifier_of("alexnet"), ("fc6", "fc7", "fc8")),
    "at once": (
        entry_of("vgg16", 8, skip_scales={"pool4": 1e-2, "pool3": 1e-4}),
        ("fc6",),
    ),
    "two heads": (entry_of("vgg16", 8, {"sem": 4, "geo": 3}), ()),
    "learned": (entry_of("alexnet", 16, upsampling="learned"), ()),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_a_snapshot_in_hdf5_gives_the_bits_of_the_binary_one(name, tmp_path):
    entry, flat = SNAPSHOTS[name]
    layers = inner_products(caffe_layers(models.build(entry)), *flat)
    rows = same_ports(with_the_rest(layers), entry, tmp_path)
    assert {row.source for row in rows if "unfolded" in row.action} == set(flat)


@pytest.mark.parametrize("name", SMALL)
def test_a_googlenet_with_slashes_in_its_names_ports_from_nested_groups(name, tmp_path):
    case = golden.load(name)
    kinds = {layer["name"]: layer["type"] for layer in case["layers"]}
    layers = {n: Layer(kinds[n], blobs) for n, blobs in golden.weights(case).items()}
    layers["conv1"] = Layer("Python", [])  # so that Caffe could write conv1/7x7_s2
    entry = {"model": {**RECORDED[name], "num_classes": 1000}}
    if name != "bvlc-googlenet":
        entry["model"] |= {"num_classes": 21, "upsampling": "learned"}
    rows = same_ports(layers, entry, tmp_path)
    assert rows[0].source == "conv1/7x7_s2"
    assert rows[0].layer == "conv1_7x7_s2"


def test_numbers_in_64_bits_are_rounded_and_a_diff_is_not_looked_at(tmp_path):
    layers = caffe_layers(models.build(entry_of()))
    same_ports(layers, entry_of(), tmp_path, dtype="float64")
    same_ports(layers, entry_of(), tmp_path, diff=True)  # which is NaN


def test_a_layer_named_within_another_that_has_weights_is_a_layer(tmp_path):
    layers = caffe_layers(models.build(entry_of()))
    layers["conv3_1/aux"] = Layer("Convolution", [np.ones((2, 3), np.float32)])
    entry = {**entry_of(), "drop": ["conv3_1/aux"]}
    rows = same_ports(layers, entry, tmp_path)
    assert [row.source for row in rows if row.action == "dropped"] == ["conv3_1/aux"]


def _shared(file):
    del file["data/conv3_1/0"]


def _to(name, value):
    def change(file):
        del file[name]
        file[name] = value

    return change


TAMPERS = {
    "a kernel shared with another layer": (_shared, "data/conv3_1 holds 1; expected "),
    "a bias shared with another layer": (
        lambda file: file.__delitem__("data/conv3_1/1"),
        "conv3_1: holds (8, 4, 3, 3); expected 2 arrays",
    ),
    "both shared": (
        lambda file: file.__delitem__("data/conv3_1"),
        "conv3_1 (3, 3, 4, 8), (8,) is missing",
    ),
    "a blob that is no number": (
        lambda file: file.move("data/conv3_1/1", "data/conv3_1/bias"),
        "data/conv3_1 holds 0, bias; expected the blobs 0, 1 of a layer",
    ),
    "a blob of no layer": (
        lambda file: file.__setitem__("data/0", np.ones(2)),
        "data/ holds 0; expected",
    ),
    "NaN": (_to("data/fc7/1", np.full(128, np.nan)), "data/fc7/1 holds"),
    "1e6": (_to("data/fc7/1", np.full(128, 1e6 - 1e-9)), "data/fc7/1 holds"),
    "beyond all floats": (_to("data/fc7/1", np.full(128, 1e300)), "data/fc7/1 holds"),
    "integers": (_to("data/fc7/1", np.ones(128, int)), "expected an array of floats"),
    "a scalar": (_to("data/fc7/1", 1.0), "fc7: A blob of shape ()"),
    "no numbers": (_to("data/fc7/0", np.ones((0, 128))), "fc7: A blob of shape (0, 12"),
    "a link": (
        lambda file: file.__setitem__("data/a", h5py.SoftLink("/data/fc7")),
        "data/a is a link",
    ),
    "another group": (lambda file: file.create_group("more"), "'layer_names'"),
    "data for a net, not of one": (
        lambda file: (file.clear(), file.create_dataset("data", data=np.ones(3))),
        "'layer_names'",
    ),
    "nothing": (lambda file: file.clear(), "'layer_names'"),
    "no layers": (
        lambda file: file["data"].clear(),
        "conv1_1 (3, 3, 3, 2), (2,) is missing",
    ),
    "two names for one layer": (
        lambda file: file.copy("data/conv3_1", "data/conv3/1"),
        "conv3_1 (8, 4, 3, 3), (8,) has no place in the net",
    ),
    "a solver's state": (
        lambda file: (file.clear(), file.create_dataset("iter", data=3)),
        "iter holds",
    ),
}


@pytest.mark.parametrize("tamper", TAMPERS)
def test_a_damaged_snapshot_and_a_foreign_hdf5_file_give_a_sentence(tamper, tmp_path):
    change, message = TAMPERS[tamper]
    model = models.build(entry_of())
    source = snapshot(caffe_layers(model), tmp_path / "net.caffemodel.h5")
    with h5py.File(source, "a") as file:
        change(file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=f"^{source}") as caught:
        port(source, tmp_path / "net.h5", model)
    assert message in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_snapshot_cut_anywhere_gives_a_sentence(tmp_path):
    model = models.build(entry_of())
    source = snapshot(caffe_layers(model), tmp_path / "net.caffemodel.h5")
    content = source.read_bytes()
    for length in (0, 1, 7, 8, 100, *range(2048, len(content), len(content) // 20)):
        source.write_bytes(content[:length])
        with pytest.raises(ValueError, match="net.caffemodel.h5"):
            port(source, tmp_path / "net.h5", model)
    assert not (tmp_path / "net.h5").exists()


def test_a_file_of_keras_layout_is_no_snapshot(tmp_path):
    model, path = models.build(entry_of()), tmp_path / "net.h5"
    source = snapshot(caffe_layers(model), tmp_path / "net.caffemodel.hdf5")
    port(source, path, model)
    assert hdf5.is_snapshot(source)
    assert not hdf5.is_snapshot(path)
    with pytest.raises(ValueError, match="net.h5: .* expected a group"):
        hdf5.read_snapshot(path)


def test_a_snapshot_is_no_file_of_a_published_hash(tmp_path):
    known = manifest.checkpoint_info("vgg16-8s-voc")["caffemodel"]
    entry = {**entry_of(num_classes=21), "caffemodel": known}
    model = models.build(entry)
    layers = caffe_layers(model)
    source = snapshot(layers, tmp_path / "net.caffemodel.h5")
    with pytest.raises(ValueError, match=f"in HDF5; expected .* {known['sha1']}"):
        port(source, tmp_path / "net.h5", model, metadata=entry)
    entry["caffemodel"] = {"url": known["url"]}
    port(source, tmp_path / "net.h5", model, metadata=entry)


@pytest.mark.parametrize("load", [models.load_checkpoint, models.FCN8s])
def test_a_file_of_caffes_is_told_as_such_where_one_of_keras_is_expected(
    load, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    layers = caffe_layers(models.build(entry_of()))
    snapshot(layers, "net.caffemodel.h5")
    snapshot(layers, "hdf5.caffemodel")
    pathlib.Path("net.caffemodel").write_bytes(caffemodel(layers))
    for name in ("net.caffemodel.h5", "hdf5.caffemodel", "net.caffemodel"):
        for path in (name, tmp_path / name):
            with pytest.raises(ValueError, match=f"{path}.*Caffe's.*keras-fcn convert"):
                load(path) if load is models.load_checkpoint else load(weights=path)
    with pytest.raises(FileNotFoundError, match="absent.caffemodel"):
        models.load_checkpoint("absent.caffemodel")


# The VGG16 of keras.applications


def keras_vgg16(classes=5):
    """A 32nd of VGG16 as keras.applications builds it, and its file's arrays."""
    rng, x = np.random.default_rng(3), keras.Input((224, 224, 3))
    inputs = x
    for block, repeats in enumerate((2, 2, 3, 3, 3), start=1):
        filters = min(2 << block - 1, 16)
        for i in range(1, repeats + 1):
            x = keras.layers.Conv2D(
                filters,
                3,
                padding="same",
                activation="relu",
                name=f"block{block}_conv{i}",
            )(x)
        x = keras.layers.MaxPooling2D(name=f"block{block}_pool")(x)
    x = keras.layers.Flatten(name="flatten")(x)
    x = keras.layers.Dense(128, activation="relu", name="fc1")(x)
    x = keras.layers.Dense(128, activation="relu", name="fc2")(x)
    model = keras.Model(inputs, keras.layers.Dense(classes, name="predictions")(x))
    for variable in model.weights:
        scale = math.sqrt(2 / max(math.prod(variable.shape[:-1]), 1))
        variable.assign(rng.standard_normal(variable.shape) * scale)
    return model


def write_as_keras_did(model, path, names=("W_1:0", "b_1:0")):
    """Writes weights as the published file holds them: `fc1/fc1_W_1:0`."""
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.name.encode() for layer in model.layers]
        for layer in model.layers:
            group, titles = file.create_group(layer.name), []
            for name, weight in zip(names, layer.weights, strict=False):
                titles.append(f"{layer.name}_{name}".encode())
                group[titles[-1]] = keras.ops.convert_to_numpy(weight)
            group.attrs["weight_names"] = titles or np.zeros(0, "S1")


@pytest.mark.parametrize("names", [("W_1:0", "b_1:0"), ("kernel:0", "bias:0")])
def test_the_vgg16_of_keras_fills_the_classifier_and_sees_the_same(names, tmp_path):
    theirs = keras_vgg16()
    source, output = tmp_path / "vgg16.h5", tmp_path / "net.h5"
    write_as_keras_did(theirs, source, names)
    entry = classifier_of("vgg16")
    entry["model"]["include_preprocessing"] = False
    rows = port(source, output, models.build(entry), metadata=entry)
    assert [row.source for row in rows if row.action == "unfolded"] == [
        *("fc1", "fc2", "predictions")
    ]
    model = models.load_checkpoint(output)
    image = np.random.default_rng(0).standard_normal((1, 224, 224, 3)) * 60
    found = model.predict_on_batch(image.astype("float32"))
    expected = theirs.predict_on_batch(image.astype("float32"))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(found[:, 0, 0], expected, rtol=1e-4, atol=1e-4)


def test_the_vgg16_of_keras_is_held_to_the_same_rules(tmp_path):
    source, output = tmp_path / "vgg16.h5", tmp_path / "net.h5"
    write_as_keras_did(keras_vgg16(classes=6), source)
    with pytest.raises(ValueError, match=r"predictions: holds \(128, 6\)"):
        port(source, output, models.build(classifier_of("vgg16")))
    with pytest.raises(ValueError, match="score_fr .* is missing"):
        port(source, output, models.build(entry_of(stride=32)))
    with h5py.File(source, "a") as file:
        kernel = file["predictions/predictions_W_1:0"][()]
        del file["predictions/predictions_W_1:0"]
        file["predictions/predictions_W_1:0"] = kernel.T
    with pytest.raises(ValueError, match=r"predictions: holds \(6, 128\); expected"):
        port(source, output, models.build(classifier_of("vgg16", 6)))
    with h5py.File(source, "a") as file:
        file["fc2/fc2_W_1:0"][0, 0] = np.nan
    with pytest.raises(ValueError, match="vgg16.h5: fc2"):
        port(source, output, models.build(classifier_of("vgg16", 6)))
    assert not output.exists()


def test_another_file_than_that_of_keras_is_not_taken_for_it(tmp_path, capsys):
    source, output = tmp_path / "vgg16.h5", tmp_path / "net.h5"
    write_as_keras_did(keras_vgg16(), source)
    assert _convert(source, "--output", output, "--checkpoint", "vgg16-imagenet") == 2
    md5 = "64373286793e3c8b2b4e3219cbf3544b"  # keras/src/applications/vgg16.py
    assert f"expected {md5}" in capsys.readouterr().err
    assert not output.exists()


# The command


def _convert(*arguments):
    return main(["convert", *map(str, arguments)])


def test_convert_reports_each_layer_and_prints_the_entry(googlenet, tmp_path, capsys):
    output = tmp_path / "googlenet-32s-mine.h5"
    assert _convert(googlenet, "--output", output, *NET) == 0
    out = capsys.readouterr().out
    for line in (
        "(64, 3, 7, 7), (64,) conv1_7x7_s2 (7, 7, 3, 64), (64,) transposed",
        "upscore (3, 3, 63, 63) upscore bilinear, left out",
    ):
        assert line in " ".join(out.split())
    entry = tomllib.loads(out[out.index("[googlenet-32s-mine]") :])
    entry = entry["googlenet-32s-mine"]
    model = {"backbone": "googlenet", "stride": 32, "num_classes": 3}
    assert entry["model"] == model
    assert entry["input"] == models.VOC_INPUT
    assert entry["parameters"] == models.load_checkpoint(output).count_params()
    for file, facts in ((output, "file"), (googlenet, "caffemodel")):
        content = file.read_bytes()
        assert entry[facts]["bytes"] == len(content)
        assert entry[facts]["sha256"] == hashlib.sha256(content).hexdigest()


def test_an_entry_is_written_as_toml_that_says_the_same():
    entry = {
        "model": {"backbone": "vgg16", "stride": 8, "skip_scales": {"pool4": 1e-2}},
        "input": {"channels": "BGR", "mean": [104.5, 0, -1e-7]},
        "labels": {
            "names": ["Straße", 'a "b"\\c'],
            "palette": [[0, 128, 255], [1] * 3],
        },
        "parameters": 134_362_751,
        "published": {},
    }
    said = {**entry, "trained_on": None, "measured": {"mean_iou": None}}
    said["model"] = {**entry["model"], "batch_norm": True, "width": None}
    entry["model"] |= {"batch_norm": True}
    text = entry_toml("net", said)
    assert tomllib.loads(text) == {"net": {**entry, "measured": {}}}
    assert "batch_norm = true" in text  # 1 is equal to that
    assert len(text.splitlines()) == 7


def test_convert_takes_a_snapshot_in_hdf5(googlenet, tmp_path, capsys, monkeypatch):
    model = models.skeleton({"model": entry_of("googlenet", 32, width=1)["model"]})
    source = snapshot(caffe_layers(model), tmp_path / "net.caffemodel.h5")
    output, binary = tmp_path / "mine.h5", tmp_path / "binary.h5"
    assert _convert(googlenet, "--output", binary, *NET) == 0
    assert _convert(source, "--output", output, *NET) == 0
    expected, found = weights.read_arrays(binary), weights.read_arrays(output)
    assert found.keys() == expected.keys()
    assert all(found[n].tobytes() == a.tobytes() for n, a in expected.items())
    sha256 = hashlib.sha256(source.read_bytes()).hexdigest()
    assert weights.metadata(output)["original"]["sha256"] == sha256
    assert models.load_checkpoint(output).count_params() == model.count_params()

    known = {"url": "http://localhost/net.caffemodel"}
    entry = {
        "model": {"backbone": "googlenet", "stride": 32},
        "input": models.VOC_INPUT,
        "labels": "siftflow-geo",
        "caffemodel": known,
    }
    checkpoint = ("--output", output, "--checkpoint", "googlenet-32s-x")
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_table", lambda: {"googlenet-32s-x": entry})
        assert _convert(source, *checkpoint) == 0
        known["md5"] = "0" * 32
        assert _convert(source, *checkpoint) == 2
    assert "is a snapshot in HDF5; expected the .caffe" in capsys.readouterr().err
    assert weights.metadata(output)["labels"] == "siftflow-geo"

    hidden = source.rename(tmp_path / "net.caffemodel")
    assert _convert(hidden, "--output", output, *NET) == 2
    assert "let its name end in .h5" in capsys.readouterr().err


def test_convert_takes_a_checkpoint_of_the_manifest_and_its_hash(
    googlenet, tmp_path, capsys, monkeypatch
):
    entry = {
        "model": {"backbone": "googlenet", "stride": 32},
        "input": {"channels": "BGR", "mean": [1.5, 2, 3]},
        "labels": "siftflow-geo",
        "license": 'none, "really"',
        "caffemodel": {"sha1": hashlib.sha1(googlenet.read_bytes()).hexdigest()},
    }
    monkeypatch.setattr(manifest, "_table", lambda: {"googlenet-32s-x": entry})
    output = tmp_path / "net.h5"
    options = ("--output", output, "--checkpoint", "googlenet-32s-x")
    assert _convert(googlenet, *options) == 0
    printed = tomllib.loads(capsys.readouterr().out.partition("manifest:")[2])
    printed = printed["googlenet-32s-x"]
    facts = {key: entry[key] for key in ("model", "input", "labels", "license")}
    assert {key: printed[key] for key in facts} == facts
    assert printed["caffemodel"]["sha1"] == entry["caffemodel"]["sha1"]
    held = weights.metadata(output)
    assert {key: held[key] for key in facts} == facts
    assert models.load_checkpoint(output).get_layer("preprocess").mean == [1.5, 2, 3]

    entry["caffemodel"]["sha1"] = "0" * 40
    output.unlink()
    assert _convert(googlenet, *options) == 2
    assert "expected 0000" in capsys.readouterr().err
    assert not output.exists()


def test_convert_builds_what_its_options_say(tmp_path, capsys, monkeypatch):
    """The nets are too large for a quick test, so they stop before they are built."""
    seen = []

    def build(entry):
        seen.append(entry)
        raise ValueError("stop")

    monkeypatch.setattr(models, "build", build)
    options = [
        "--backbone vgg16 --stride 8 --num-classes 21"
        " --skip-scales pool4=0.01,pool3=1e-4",
        "--backbone vgg16 --stride 16 --num-classes sem=33,geo=3",
        "--backbone vgg16 --stride 32 --num-classes 40 --input-channels 4",
        "--backbone vgg16 --stride 32 --num-classes 40 --late-fusion",
        "--backbone alexnet --classifier",
        "--checkpoint vgg16-8s-voc --upsampling learned",
        "--backbone googlenet --stride 8 --num-classes 21",
    ]
    for line in options:
        assert _convert("in", "--output", tmp_path / "x.h5", *line.split()) == 2
    found = [entry["model"] for entry in seen]
    vgg16 = {"backbone": "vgg16"}
    assert found == [
        {
            **vgg16,
            "stride": 8,
            "num_classes": 21,
            "skip_scales": {"pool4": 1e-2, "pool3": 1e-4},
        },
        {**vgg16, "stride": 16, "num_classes": {"sem": 33, "geo": 3}},
        {**vgg16, "stride": 32, "num_classes": 40, "input_channels": 4},
        {**vgg16, "stride": 32, "num_classes": 40, "builder": "late_fusion"},
        {"backbone": "alexnet", "num_classes": 1000, "builder": "classifier"},
        {**vgg16, "stride": 8, "upsampling": "learned"},
        {"backbone": "googlenet", "stride": 8, "num_classes": 21},
    ]
    assert seen[2]["input"]["channels"] == "BGRD"
    assert seen[3]["input"].keys() == {"color", "hha"}
    assert "drop" not in seen[4]
    assert "loss1/classifier" in seen[6]["drop"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--backbone vgg16", "give --num-classes and --stride"),
        ("--backbone vgg16 --stride 8", "give --num-classes"),
        ("--backbone vgg16 --classifier --stride 8", "--stride means nothing"),
        (
            "--backbone vgg16 --late-fusion --stride 8 --num-classes 2"
            " --skip-scales pool3=1",
            "--skip-scales means nothing",
        ),
        ("--checkpoint vgg16-8s-voc --stride 8", "no other option"),
        ("--checkpoint vgg16-8s-voc --late-fusion", "no other option"),
        ("--checkpoint vgg16-imagenet --upsampling learned", "--upsampling means"),
        ("--checkpoint vgg16-8s-vox", "vgg16-8s-voc"),
        (
            "--backbone googlenet --stride 32 --num-classes 4",
            "score_fr: A blob of shape (3, 1024, 1, 1)",
        ),
        (
            "--backbone googlenet --stride 8 --num-classes 3 --skip-scales pool5=1",
            "pool5",
        ),
    ],
)
def test_convert_says_in_a_sentence_what_is_wrong_and_writes_nothing(
    options, message, googlenet, tmp_path, capsys
):
    output = tmp_path / "net.h5"
    output.write_bytes(b"as it was")
    assert _convert(googlenet, "--output", output, *options.split()) == 2
    assert message in capsys.readouterr().err
    assert output.read_bytes() == b"as it was"


def test_the_tool_is_the_command(googlenet, tmp_path):
    tool = [sys.executable, str(ROOT / "tools" / "convert_caffe.py"), str(googlenet)]
    output = tmp_path / "net.h5"
    done = subprocess.run(
        [*tool, "--output", str(output), *NET], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(output.read_bytes()).hexdigest() in done.stdout
