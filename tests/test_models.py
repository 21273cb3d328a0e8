import importlib.util
import inspect
import os
import subprocess
import sys

import keras
import numpy as np
import oracle
import pytest
from nets import assert_close, build, layers_of, pictures, predict

import keras_fcn
from keras_fcn import checkpoints, manifest, models, saving
from keras_fcn.backbones import BACKBONES
from keras_fcn.features import Feature, conv, max_pool
from keras_fcn.geometry import Grid
from keras_fcn.layers import BilinearUpsampling, CropLike

STRIDES = (32, 16, 8, 4)
NYUD_COLOR = np.float32([116.190, 97.203, 92.318])
NYUD_HHA = np.float32([132.431, 94.076, 118.477])
VOC = np.float32([104.00699, 116.66877, 122.67892])


@pytest.fixture
def _keras_settings():
    policy, layout = keras.config.dtype_policy(), keras.config.image_data_format()
    yield
    keras.config.set_dtype_policy(policy)
    keras.config.set_image_data_format(layout)


# Geometry


def same_padded(image, width=1.0):
    """A backbone of somebody's own, whose upsampled maps begin before its taps."""
    taps, x = {}, image
    for i in range(1, 6):
        x = conv(x, 2, 3, pad=1, name=f"conv{i}")
        x = taps[f"pool{i}"] = max_pool(x, 2, 2, name=f"pool{i}")
    return taps


TRUNKS = {**BACKBONES, "same_padded": same_padded}


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("backbone", TRUNKS)
def test_every_tap_gives_every_pixel_its_own_coordinate(backbone, stride):
    size = 190, 213
    image = Feature(keras.Input((None, None, 3), name="image"))
    image = image._replace(kernel_initializer="zeros")
    taps = TRUNKS[backbone](image, 1e-6)
    taps = {name: tap for name, tap in taps.items() if tap.grid.stride >= stride}
    trunk = keras.Model(image.tensor, {name: tap.tensor for name, tap in taps.items()})
    shapes = trunk.compute_output_shape((1, *size, 3))

    scores, arrays = {}, {"image": np.zeros((1, *size, 3), "float32")}
    for i, (name, tap) in enumerate(taps.items()):
        tensor = keras.Input((None, None, 2 * len(taps)), name=name)
        scores[name] = tap._replace(tensor=tensor)
        array = arrays[name] = np.zeros((*shapes[name][:3], 2 * len(taps)), "float32")
        rows, columns = np.indices(array.shape[1:3])
        array[0, ..., 2 * i] = tap.grid.start + tap.grid.stride * rows
        array[0, ..., 2 * i + 1] = tap.grid.start + tap.grid.stride * columns
    inputs = {name: score.tensor for name, score in scores.items()}
    result = models.fuse(scores, image)
    assert result.grid == Grid()
    model = keras.Model({**inputs, "image": image.tensor}, result.tensor)
    found = predict(model, arrays)[0]

    coarsest = list(taps)[-1]
    start = taps[coarsest].grid.start + 32  # scores fade towards the border
    stops = [start + 32 * (n - 3) for n in shapes[coarsest][1:3]]
    inside = tuple(slice(int(np.ceil(start)), int(stop)) for stop in stops)
    expected = np.tile(np.moveaxis(np.indices(size), 0, -1), len(taps))
    assert found.shape == expected.shape
    assert min(expected[inside].shape[:2]) > 64
    np.testing.assert_allclose(found[inside], expected[inside], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("backbone", "stride", "offsets", "kernels"),
    [
        ("vgg16", 32, [19], [64]),
        ("vgg16", 16, [5, 27], [4, 32]),
        ("vgg16", 8, [5, 9, 31], [4, 4, 16]),
        ("vgg16", 4, [5, 9, 17, 33], [4, 4, 4, 8]),
        ("alexnet", 32, [18], [63]),
        ("alexnet", 16, [5, 18], [3, 31]),
        ("alexnet", 8, [5, 10, 18], [3, 3, 15]),
        ("alexnet", 4, [5, 10, 20, 18], [3, 3, 3, 7]),
        ("googlenet", 32, [33], [63]),
        ("googlenet", 16, [0, 33], [3, 31]),
        ("googlenet", 8, [0, 0, 33], [3, 3, 15]),
        ("googlenet", 4, [0, 0, 0, 33], [3, 3, 3, 7]),
    ],
)
def test_crops_and_kernels_are_those_of_the_reference(
    backbone, stride, offsets, kernels
):
    model = build(backbone, stride, width=1e-6)
    crops = {layer.name: layer.offset for layer in layers_of(model, CropLike)}
    skips = [name for name in crops if name.startswith("score_")]
    assert [crops[name] for name in [*skips, "score"]] == offsets
    assert not any(crops[name] for name in crops if name.startswith("up"))
    upsamplings = layers_of(model, BilinearUpsampling)
    assert [layer.kernel_size for layer in upsamplings] == kernels
    assert [layer.factor for layer in upsamplings] == [2] * len(skips) + [stride]


def every_stride(backbone):
    """One trunk with all four decoders on it."""
    image = Feature(keras.Input((None, None, 3)), kernel_initializer="zeros")
    taps = TRUNKS[backbone](image, 1e-6)
    outputs = {
        str(stride): models.decode(taps, image, 2, stride, head=f"_{stride}").tensor
        for stride in STRIDES
    }
    return oracle.draw(keras.Model(image.tensor, outputs))


def assert_size_is_kept(model, *shape):
    outputs = predict(model, np.ones((*shape, 3), "float32"))
    assert {out.shape for out in outputs.values()} == {(*shape, 2)}
    assert all(np.isfinite(out).all() for out in outputs.values())


@pytest.mark.parametrize("backbone", TRUNKS)
def test_an_image_of_any_size_comes_out_as_large(backbone):
    model = every_stride(backbone)
    sizes = [(1, 1), (2, 33), (31, 48), (64, 15), (70, 17)]
    for batch, size in enumerate(sizes):
        assert_size_is_kept(model, 1 + batch % 3, *size)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", TRUNKS)
def test_an_image_of_every_size_comes_out_as_large(backbone):
    # 1 to 70 pixels, and in either direction every remainder of the largest stride.
    model = every_stride(backbone)
    for height in range(1, 36):
        assert_size_is_kept(model, 1, height, 71 - height)


def test_one_net_trains_and_predicts_at_two_sizes_in_a_row():
    model = build("alexnet", 16, width=1e-6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-6), loss)
    for size in [(9, 14), (21, 6)]:
        x = pictures(*size)
        history = model.fit(x, x[..., 0] % 3, verbose=0)
        assert np.isfinite(history.history["loss"]).all()
        assert model.predict(x, verbose=0).shape == (1, *size, 3)


# What the nets are made of


def test_the_layers_of_fcn8s_have_the_names_of_the_reference():
    model = build("vgg16", 8, upsampling="learned")
    names = [layer.name for layer in model.layers if layer.weights]
    decoder = "score_fr upscore2 score_pool4 upscore_pool4 score_pool3 upscore8".split()
    assert set(decoder) == set(names[15:])
    assert {"score_pool4c", "fuse_pool4", "score_pool3c", "fuse_pool3", "score"} < {
        layer.name for layer in model.layers
    }


def test_several_heads_have_the_names_of_the_reference_and_come_as_a_dict():
    model = build("vgg16", 8, {"sem": 5, "geo": 3}, upsampling="learned")
    names = {layer.name for layer in model.layers}
    for head in ("sem", "geo"):
        expected = (
            f"score_fr_{head} upscore2_{head} score_pool4_{head} score_pool4_{head}c "
            f"fuse_pool4_{head} upscore_pool4_{head} score_pool3_{head} "
            f"score_pool3_{head}c fuse_pool3_{head} upscore8_{head} score_{head}"
        )
        assert set(expected.split()) <= names
    outputs = predict(model, pictures())
    shapes = {head: out.shape for head, out in outputs.items()}
    assert shapes == {"sem": (1, 9, 14, 5), "geo": (1, 9, 14, 3)}


def test_each_head_is_a_net_of_its_own_on_a_common_trunk():
    both = build("alexnet", 16, {"sem": 5, "geo": 3})
    geo = build("alexnet", 16, 3)
    blobs = oracle.blobs(both)
    for name in oracle.blobs(geo):
        blobs[name] = blobs.get(name) or blobs[f"{name}_geo"]
    oracle.fill(geo, {name: blobs[name] for name in oracle.blobs(geo)})
    x = pictures()
    assert_close(predict(both, x)["geo"], predict(geo, x))


# Counted from the reference's prototxts: all weights but the frozen ones of the
# transposed convolutions, and those.
REFERENCE = {
    "voc-fcn32s": ({"stride": 32}, 134_346_581, 1_806_336),
    "voc-fcn16s": ({"stride": 16}, 134_357_354, 458_640),
    "voc-fcn8s": ({"stride": 8}, 134_362_751, 127_008),
    "voc-fcn8s-atonce": (
        {"stride": 8, "skip_scales": {"pool4": 0.01, "pool3": 0.0001}},
        134_362_751,
        127_008,
    ),
    "voc-fcn-alexnet": ({"backbone": "alexnet", "stride": 32}, 56_954_261, 1_750_329),
    "nyud-fcn32s-color": ({"stride": 32, "num_classes": 40}, 134_424_424, 6_553_600),
    "nyud-fcn32s-color-d": (
        {"stride": 32, "num_classes": 40, "input_channels": 4},
        134_425_000,
        6_553_600,
    ),
    "nyud-fcn32s-color-hha": (
        {"builder": "late_fusion", "stride": 32},
        268_848_848,
        6_553_600,
    ),
    "siftflow-fcn32s": (
        {"stride": 32, "num_classes": {"sem": 33, "geo": 3}},
        134_408_036,
        4_497_408,
    ),
    "siftflow-fcn16s": (
        {"stride": 16, "num_classes": {"sem": 33, "geo": 3}},
        134_426_504,
        1_141_920,
    ),
    "siftflow-fcn8s": (
        {"stride": 8, "num_classes": {"sem": 33, "geo": 3}},
        134_435_756,
        316_224,
    ),
    "pascalcontext-fcn32s": (
        {"stride": 32, "num_classes": 60},
        134_506_364,
        14_745_600,
    ),
    "pascalcontext-fcn16s": (
        {"stride": 16, "num_classes": 60},
        134_537_144,
        3_744_000,
    ),
    "pascalcontext-fcn8s": ({"stride": 8, "num_classes": 60}, 134_552_564, 1_036_800),
    "bvlc_alexnet": (
        {"builder": "classifier", "backbone": "alexnet", "num_classes": 1000},
        60_965_224,
        None,
    ),
    "VGG_ILSVRC_16": (
        {"builder": "classifier", "num_classes": 1000},
        138_357_544,
        None,
    ),
    "bvlc_googlenet": (
        {"builder": "classifier", "backbone": "googlenet", "num_classes": 1000},
        6_998_552,
        None,
    ),
}


@pytest.mark.parametrize(
    "net",
    [
        pytest.param(net, marks=pytest.mark.slow) if "googlenet" in net else net
        for net in REFERENCE
    ],
)
def test_a_net_has_as_many_parameters_as_the_reference(net):
    arguments, parameters, frozen = REFERENCE[net]
    arguments = {"backbone": "vgg16", "include_preprocessing": False, **arguments}

    def count(width, **more):
        model = models.build({"model": {**arguments, "width": width, **more}})
        return model.count_params()

    # Kernels grow with the square of the width, so that three narrow nets, whose
    # channels are whole numbers, tell the count of the full one.
    n = {"alexnet": 16, "vgg16": 64, "googlenet": 8}[arguments["backbone"]]
    one, two, three = (count(i / n) for i in (1, 2, 3))
    slope, bend = two - one, (three - two) - (two - one)
    assert one + slope * (n - 1) + bend * (n - 1) * (n - 2) // 2 == parameters
    if frozen:
        assert count(1 / n, upsampling="learned") - one == frozen


def test_the_short_names_build_the_nets_of_their_strides():
    entry = {"num_classes": 3, "width": 1e-6}
    for name, stride in [("FCN32s", 32), ("FCN16s", 16), ("FCN8s", 8)]:
        model = getattr(keras_fcn, name)("alexnet", **entry)
        assert model.name == f"fcn{stride}s_alexnet"
        assert saving.describe(model)["model"]["stride"] == stride


def test_the_short_names_take_what_fcn_takes_but_for_the_stride():
    takes = dict(inspect.signature(keras_fcn.fcn).parameters)
    del takes["stride"]
    assert dict(inspect.signature(keras_fcn.FCN16s).parameters) == takes
    assert "one skip" in keras_fcn.FCN16s.__doc__
    model = keras_fcn.FCN32s("alexnet", 3, width=1e-6)
    assert model.output_shape[-1] == 3
    with pytest.raises(TypeError, match="stride"):
        keras_fcn.FCN32s(stride=8)


def test_a_new_net_has_a_random_trunk_and_logits_of_zero():
    model = keras_fcn.fcn("alexnet", 16, upsampling="learned", width=1e-6)
    assert model.output_shape == (None, None, None, 21)
    hidden = [x for x in layers_of(model, keras.layers.Conv2D) if "score" not in x.name]
    assert all(layer.get_weights()[0].std() > 0 for layer in hidden)
    assert np.count_nonzero(predict(model, pictures())) == 0


# Upsampling and skips


@pytest.mark.parametrize(
    ("backbone", "stride"), [("alexnet", 8), ("vgg16", 32), ("googlenet", 16)]
)
def test_learned_upsampling_starts_as_the_fixed_one(backbone, stride):
    outputs = {}
    for upsampling in ("bilinear", "learned"):
        image = Feature(keras.Input((None, None, 3)), kernel_initializer="ones")
        taps = BACKBONES[backbone](image, 1e-6)
        logits = models.decode(taps, image, 3, stride, upsampling=upsampling)
        model = oracle.draw(keras.Model(image.tensor, logits.tensor))
        outputs[upsampling] = predict(model, pictures())
    assert_close(outputs["learned"], outputs["bilinear"])
    assert np.abs(outputs["bilinear"]).max() > 0


def test_skip_scales_multiply_the_taps_before_their_scores():
    scales = {"pool4": 1e-2, "pool3": 1e-4}
    scaled, plain = build(skip_scales=scales), build()
    for tap, factor in scales.items():
        kernel, bias = plain.get_layer(f"score_{tap}").get_weights()
        plain.get_layer(f"score_{tap}").set_weights([factor * kernel, bias])
    x = pictures()
    assert_close(predict(scaled, x), predict(plain, x))


def test_a_net_skips_from_what_it_is_told():
    skips = ("conv2", "inception_3b", "inception_4e")
    model = build("googlenet", 4, skips=skips)
    for name, layer in zip(skips, ("conv2_3x3", *skips[1:]), strict=True):
        source = layer if name == "conv2" else f"{layer}_output"
        score = model.get_layer(f"score_{name}")
        assert score.input is model.get_layer(source).output
    first = build("googlenet", 4)
    names = {x.name for x in first.layers} - {x.name for x in model.layers}
    assert {x for x in names if x.startswith("score_") and x[-1] != "c"} == {
        "score_pool1",
        "score_pool2",
        "score_pool3",
    }
    x = pictures(40, 60)
    assert predict(model, x).shape == predict(first, x).shape
    coarser = build("googlenet", 8, skips=skips)  # where the finest one is not used
    assert not any(layer.name == "score_conv2" for layer in coarser.layers)
    fewer = build("googlenet", 4, skips=skips[2:])  # and the first ones are, else
    names = {layer.name for layer in fewer.layers}
    assert {"score_pool1", "score_pool2", "score_inception_4e"} <= names


def test_a_decoder_of_a_stride_between_those_of_the_taps_is_refused():
    image = Feature(keras.Input((None, None, 3)), kernel_initializer="zeros")
    taps = BACKBONES["vgg16"](image, 1 / 64, skips=("pool3", "pool4"))
    with pytest.raises(ValueError, match="stride=4 was given for taps of stride 8, 16"):
        models.decode(taps, image, 3, 4)


# What the nets are fed


def test_pictures_are_turned_to_what_the_reference_was_trained_on():
    with_layer, without = build(), build(include_preprocessing=False)
    x = pictures()
    expected = predict(without, x[..., ::-1] - VOC)
    assert_close(predict(with_layer, x), expected)
    assert_close(predict(with_layer, x.astype("uint8")), expected)


def test_depth_enters_with_colour_through_a_convolution_of_its_own():
    model, without = (
        build("vgg16", 32, input_channels=4, include_preprocessing=flag)
        for flag in (True, False)
    )
    names = [layer.name for layer in layers_of(model, keras.layers.Conv2D)]
    assert names[:2] == ["conv1_1_bgrd", "conv1_2"]
    x = pictures(channels=4)
    x[..., 3] = 10 * x[..., 3] + 800  # millimetres
    data = np.concatenate([x[..., 2::-1] - NYUD_COLOR, np.log(x[..., 3:]) - 7.844], -1)
    assert_close(predict(model, x), predict(without, data.astype("float32")), 1e-4)


@pytest.mark.parametrize("stride", [32, 8])
def test_late_fusion_is_the_mean_of_a_colour_and_an_hha_net(stride):
    fused = oracle.draw(models.late_fusion("alexnet", stride, 3, width=1e-6))
    blobs, logits = oracle.blobs(fused), []
    x = {"color": pictures(seed=1), "hha": pictures(seed=2)}
    data = {"color": x["color"][..., ::-1] - NYUD_COLOR, "hha": x["hha"] - NYUD_HHA}
    for stream in ("color", "hha"):
        single = build("alexnet", stride, width=1e-6, include_preprocessing=False)
        names = oracle.blobs(single)
        oracle.fill(single, {name: blobs[name + stream] for name in names})
        logits.append(predict(single, data[stream]))
    found = predict(fused, x)
    assert_close(found, (logits[0] + logits[1]) / 2)
    assert np.abs(logits[0] - logits[1]).max() > 0.1 * np.abs(found).max()


def test_late_fusion_has_the_names_of_the_reference():
    model = models.late_fusion("vgg16", width=1e-6, include_preprocessing=False)
    assert model.name == "fcn32s_vgg16_late_fusion"
    assert {x.name: x.shape for x in model.inputs} == dict.fromkeys(
        ["color", "hha"], (None, None, None, 3)
    )
    assert model.output_shape == (None, None, None, 40)
    names = {layer.name for layer in model.layers}
    streams = [
        f"{name}{stream}"
        for name in ("conv1_1", "pool5", "fc6", "score_fr")
        for stream in ("color", "hha")
    ]
    assert {*streams, "score_fused", "upscore", "score"} <= names


def test_late_fusion_is_built_from_an_entry_that_does_not_say_its_input():
    entry = {"builder": "late_fusion", "backbone": "alexnet", "width": 1e-6}
    model = models.build({"model": entry})
    for stream, mean in [("color", NYUD_COLOR), ("hha", NYUD_HHA)]:
        layer = model.get_layer(f"preprocess{stream}")
        np.testing.assert_array_equal(np.float32(layer.mean), mean)


# Classifiers


@pytest.mark.parametrize(
    ("backbone", "size"), [("alexnet", 227), ("vgg16", 224), ("googlenet", 224)]
)
def test_a_classifier_has_one_cell_at_its_own_size_and_one_more_every_32_pixels(
    backbone, size
):
    entry = {"builder": "classifier", "backbone": backbone, "num_classes": 7}
    model = models.build({"model": {**entry, "width": 1e-6}})
    assert predict(model, pictures(size, size)).shape == (1, 1, 1, 7)
    assert predict(model, pictures(size + 32, size + 96)).shape == (1, 2, 4, 7)


@pytest.mark.parametrize(
    ("backbone", "size", "layer"),
    [
        ("alexnet", 198, "fc6"),
        ("vgg16", 192, "fc6"),
        ("googlenet", 222, "pool5_7x7_s1"),
    ],
)
def test_a_classifier_says_that_a_picture_is_too_small(backbone, size, layer):
    model = models.classifier(backbone, 3, width=1e-6)
    assert predict(model, pictures(size + 1, size + 1)).shape == (1, 1, 1, 3)
    for sides in ((size, size + 1), (size, size)):
        model = models.classifier(backbone, 3, width=1e-6)
        with pytest.raises(ValueError, match=f"{layer} was given a map of"):
            predict(model, pictures(*sides))


@pytest.mark.parametrize(
    ("backbone", "last"),
    [("alexnet", "fc8"), ("vgg16", "fc8"), ("googlenet", "loss3_classifier")],
)
def test_a_classifier_ends_in_logits_of_1000_classes(backbone, last):
    model = models.classifier(backbone, width=1e-6)
    assert model.name == f"{backbone}_classifier"
    assert model.layers[-1].name == last
    assert model.layers[-1].activation is keras.activations.linear
    assert model.output_shape == (None, None, None, 1000)


# Precision


@pytest.mark.usefixtures("_keras_settings")
@pytest.mark.parametrize(
    "backbone",
    [
        "alexnet",
        pytest.param("vgg16", marks=pytest.mark.slow),
        pytest.param("googlenet", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_a_net_in_mixed_precision_has_logits_in_full_precision(backbone, policy):
    x = pictures()
    expected = predict(build(backbone, 16), x)
    keras.config.set_dtype_policy(policy)
    model = build(backbone, 16)
    assert model.get_layer("preprocess").compute_dtype == "float32"
    trunk = [layer for layer in model.layers if layer.name.startswith("conv")]
    assert trunk[-1].compute_dtype == policy.removeprefix("mixed_")
    assert model.get_layer("score_fr").compute_dtype == "float32"
    assert model.outputs[0].dtype == "float32"
    logits = predict(model, x)
    assert logits.dtype == "float32"
    assert_close(logits, expected, 0.05)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1e-6), loss)
    assert np.isfinite(model.train_on_batch(x, x[..., 0] % 3))


# Saved and built again


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_saved_net_has_the_same_logits(backbone, tmp_path):
    model, x = build(backbone, 8, 5), pictures()
    logits = predict(model, x)
    model.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras")
    np.testing.assert_array_equal(predict(again, x), logits)
    saving.save_checkpoint(model, tmp_path / "net.h5")
    again = models.load_checkpoint(tmp_path / "net.h5")
    np.testing.assert_array_equal(predict(again, x), logits)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of TensorFlow")
@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_exported_net_has_the_same_logits_at_any_size(backbone, tmp_path):
    import tensorflow as tf

    model = build(backbone, 8, 5)
    model.export(tmp_path / "net", verbose=False)
    served = tf.saved_model.load(tmp_path / "net")
    for x in (pictures(40, 40), pictures(33, 58, batch=2)):
        np.testing.assert_allclose(served.serve(x), predict(model, x), atol=1e-5)


SCRIPT = """
import sys, keras, numpy as np, keras_fcn
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[3], model.predict_on_batch(np.load(sys.argv[2])))
print(keras.backend.backend())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("other", ["jax", "tensorflow", "torch"])
def test_a_saved_model_has_the_same_logits_on_other_backends(backbone, other, tmp_path):
    if importlib.util.find_spec(other) is None:
        pytest.skip(f"{other} is not installed")
    model, x = build(backbone, 8, upsampling="learned"), pictures()
    paths = [tmp_path / name for name in ("net.keras", "x.npy", "logits.npy")]
    model.save(paths[0])
    np.save(paths[1], x)
    root = os.path.dirname(os.path.dirname(keras_fcn.__file__))
    search = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, paths)],
        env={**os.environ, "KERAS_BACKEND": other, "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [other]
    assert_close(np.load(paths[2]), predict(model, x))


# Errors


BUILDERS = [models.fcn, models.late_fusion, models.classifier]


@pytest.mark.usefixtures("_keras_settings")
@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_channels_first_is_refused(builder):
    keras.config.set_image_data_format("channels_first")
    with pytest.raises(ValueError, match="channels_first") as error:
        builder("vgg16")
    assert str(error.value) == (
        'Keras is set to image_data_format "channels_first"; expected '
        '"channels_last", the only layout of keras_fcn. Call '
        'keras.config.set_image_data_format("channels_last") first.'
    )


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
def test_an_unknown_backbone_is_refused(builder):
    with pytest.raises(ValueError, match="backbone") as error:
        builder("resnet")
    assert str(error.value) == (
        "backbone='resnet' was given; expected one of 'alexnet', 'vgg16', 'googlenet'."
    )


@pytest.mark.parametrize("builder", BUILDERS[:2], ids=lambda builder: builder.__name__)
@pytest.mark.parametrize("stride", [64, 2, 0, "8s", None, 8.0])
def test_an_unknown_stride_is_refused(builder, stride):
    with pytest.raises(ValueError, match="stride") as error:
        builder("vgg16", stride)
    assert str(error.value) == (
        f"stride={stride!r} was given; expected one of 32, 16, 8, 4."
    )


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize("classes", [0, -1, 2.5, "21", {}, {"a": 3, "b": 0}])
def test_what_is_no_number_of_classes_is_refused(builder, classes):
    with pytest.raises(ValueError, match="num_classes") as error:
        builder("vgg16", num_classes=classes)
    heads = ", or a dict of such by head" if builder is models.fcn else ""
    assert str(error.value) == (
        f"num_classes={classes!r} was given; expected an integer from 1{heads}."
    )


@pytest.mark.parametrize("builder", BUILDERS[1:], ids=lambda builder: builder.__name__)
def test_a_net_of_one_head_refuses_several(builder):
    with pytest.raises(ValueError, match="expected an integer from 1[.]"):
        builder("vgg16", num_classes={"sem": 33, "geo": 3})


@pytest.mark.parametrize("builder", BUILDERS, ids=lambda builder: builder.__name__)
@pytest.mark.parametrize("width", [0, -1, float("nan"), float("inf")])
def test_a_width_of_nothing_is_refused(builder, width):
    with pytest.raises(ValueError, match=f"width={width} .* a number above 0"):
        builder("vgg16", width=width)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"input_channels": 0}, "input_channels=0 was given; expected an integer from"),
        ({"input_channels": "3"}, "input_channels='3' was given; expected an integer"),
        ({"input_channels": 3.5}, "input_channels=3.5 was given; expected an integer"),
        ({"width": "a"}, "width='a' was given; expected a number above 0"),
        ({"skips": "pool4"}, "skips='pool4' was given; expected a tuple of names"),
        ({"skips": 3}, "skips=3 was given; expected a tuple of names"),
        ({"skips": ("pool9",)}, "'pool3', 'pool9'.; expected one each of stride 4, 8"),
        (
            {"skip_scales": ["pool4"]},
            "skip_scales=.'pool4'. was given; expected a",
        ),
    ],
)
def test_arguments_of_another_kind_are_refused(argument, message):
    with pytest.raises(ValueError, match=message):
        models.fcn("vgg16", include_preprocessing=False, **argument)


@pytest.mark.parametrize("builder", BUILDERS[:2], ids=lambda builder: builder.__name__)
def test_an_unknown_upsampling_is_refused(builder):
    with pytest.raises(ValueError, match="upsampling") as error:
        builder("vgg16", upsampling="nearest")
    assert str(error.value) == (
        "upsampling='nearest' was given; expected one of 'bilinear', 'learned'."
    )


@pytest.mark.parametrize(
    ("stride", "scales", "unknown", "skips"),
    [
        (8, {"pool5": 1.0, "fc7": 1.0, "pool4": 1.0}, "fc7, pool5", "pool3, pool4"),
        (16, {"pool3": 1e-4}, "pool3", "pool4"),
        (32, {"pool4": 1e-2}, "pool4", "none at stride 32"),
    ],
)
def test_scales_of_taps_that_are_no_skips_are_refused(stride, scales, unknown, skips):
    with pytest.raises(ValueError, match="skip_scales") as error:
        build("vgg16", stride, skip_scales=scales)
    assert str(error.value) == (
        f"skip_scales names {unknown}; expected taps that this net skips from: {skips}."
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"upsampling": "nearest"}, "upsampling='nearest' was given; expected one of"),
        ({"stride": 64}, "stride=64 was given for taps of stride 4, 8, 16, 32;"),
        ({"skip_scales": {"fc7": 0.1}}, "skip_scales names fc7; expected taps that"),
    ],
)
def test_the_decoder_of_a_backbone_of_one_s_own_is_as_strict(arguments, message):
    image = Feature(keras.Input((None, None, 3)), kernel_initializer="zeros")
    taps = BACKBONES["vgg16"](image, 1 / 64)
    with pytest.raises(ValueError, match=message):
        models.decode(taps, image, 3, **arguments)


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_other_channels_than_colour_and_depth_have_no_preprocessing(channels):
    with pytest.raises(ValueError, match="input_channels") as error:
        build(input_channels=channels)
    assert str(error.value) == (
        f"input_channels={channels} has no preprocessing; expected 3 (RGB) or 4 (RGB "
        "and depth). Pass include_preprocessing=False and feed the net data that is "
        "centred on zero."
    )
    model = build(input_channels=channels, include_preprocessing=False)
    assert model.input_shape == (None, None, None, channels)


HHA = {"channels": "RGB", "mean": NYUD_HHA.tolist()}


def test_what_a_net_is_fed_can_be_said_where_no_weights_say_it(tmp_path):
    thin = {"num_classes": 3, "width": 1 / 32}
    model, picture = keras_fcn.fcn(**thin, preprocessing=HHA), pictures()
    preprocess = keras.Model(model.input, model.get_layer("preprocess").output)
    expected = picture - NYUD_HHA  # not reversed, as HHA is not
    np.testing.assert_allclose(predict(preprocess, picture), expected, rtol=1e-6)
    path = str(tmp_path / "hha.h5")
    keras_fcn.save_checkpoint(model, path)
    for more in ({}, {"preprocessing": HHA}):
        again = keras_fcn.fcn(**thin, weights=path, **more)
        assert saving.describe(again)["input"] == HHA
    other = {**HHA, "mean": [1, 2, 3]}
    with pytest.raises(ValueError, match="weights were trained on .*; leave it out"):
        keras_fcn.fcn(**thin, weights=path, preprocessing=other)
    with pytest.raises(ValueError, match="expected as many letters and means"):
        keras_fcn.fcn(**thin, input_channels=4, preprocessing=HHA)
    with pytest.raises(ValueError, match="expected as many letters and means"):
        keras_fcn.fcn(**thin, preprocessing={"mean": [1, 2, 3]})
    with pytest.raises(ValueError, match="leave one of them out"):
        keras_fcn.fcn(**thin, preprocessing=HHA, include_preprocessing=False)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "a b", 1, None])
def test_a_head_that_layers_cannot_be_called_by_is_refused(name):
    with pytest.raises(ValueError, match="has the head .*expected a name of letters"):
        models.fcn("alexnet", 32, {"sem": 3, name: 2}, width=1e-6)


def test_imagenet_is_for_colour_and_depth(monkeypatch):
    monkeypatch.setattr(models, "classifier", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(ValueError, match="input_channels=1; expected 3, or 4"):
        models.fcn(weights="imagenet", input_channels=1, include_preprocessing=False)


@pytest.mark.parametrize(
    ("builder", "name"),
    [
        (models.fcn, "vgg16-8s-nowhere"),
        (models.late_fusion, "vgg16-32s-nowhere"),
        (models.classifier, "vgg16-nowhere"),
    ],
)
def test_weights_that_do_not_exist_are_named_with_those_that_do(
    builder, name, monkeypatch
):
    known = ["alexnet-8s-nowhere", "vgg16-8s-voc"]
    monkeypatch.setattr(manifest, "list_checkpoints", lambda: known)
    with pytest.raises(ValueError, match="There is no checkpoint") as error:
        builder("vgg16", weights="nowhere")
    assert f"{name!r}" in str(error.value)
    assert "what exists is alexnet-8s-nowhere." in str(error.value)
    assert "pass an .h5 file" in str(error.value)


def test_a_whole_name_for_weights_leads_to_load_checkpoint():
    with pytest.raises(ValueError, match="whole name") as error:
        keras_fcn.FCN8s("googlenet", weights="googlenet-8s-camvid")
    assert "load_checkpoint('googlenet-8s-camvid')" in str(error.value)


def test_a_tag_that_nothing_bears_is_answered_with_a_few_near_names():
    with pytest.raises(ValueError, match="There is no checkpoint") as error:
        keras_fcn.FCN16s(weights="pascalcontext")
    assert "what exists is vgg16-16s-pascal-context, " in str(error.value)
    assert "list_checkpoints()" in str(error.value)
    assert "camvid" not in str(error.value)


@pytest.mark.parametrize(
    ("tag", "builder", "other"),
    [
        ("nyud", "fcn", "late_fusion"),
        ("nyud-color-hha", "late_fusion", "fcn"),
    ],
)
def test_a_checkpoint_is_found_for_the_builder_of_its_net_alone(tag, builder, other):
    name = f"vgg16-32s-{tag}"
    assert checkpoints.find(tag, builder, "vgg16", 32).name == name
    with pytest.raises(ValueError, match=f"no checkpoint {name!r} for {other}.weights"):
        checkpoints.find(tag, other, "vgg16", 32)


def test_the_checkpoint_of_a_classifier_is_found_for_classifiers_alone():
    assert checkpoints.find("imagenet", "classifier", "vgg16").name == "vgg16-imagenet"
    with pytest.raises(ValueError, match="'vgg16-imagenet' for fcn.weights"):
        checkpoints.find("imagenet", "fcn", "vgg16")


def test_a_file_that_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing.h5"):
        models.fcn("vgg16", weights=tmp_path / "missing.h5")
    with pytest.raises(FileNotFoundError, match="missing.h5"):
        models.load_checkpoint(tmp_path / "missing.h5")
