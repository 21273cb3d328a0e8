import keras
import numpy as np
import oracle
import pytest
from golden import golden

from keras_fcn.backbones import BACKBONES, SKIPS
from keras_fcn.features import Feature

# {tap: (start, stride)}, as derived by hand for the pads of the nets.
TAPS = {
    "alexnet": {
        "conv1": (-95, 4),
        "pool1": (-91, 8),
        "pool2": (-83, 16),
        "fc7": (13, 32),
    },
    "vgg16": {
        "pool2": (-97.5, 4),
        "pool3": (-95.5, 8),
        "pool4": (-91.5, 16),
        "fc7": (12.5, 32),
    },
    "googlenet": {
        "pool1": (5 - 35, 4),
        "pool2": (9 - 35, 8),
        "pool3": (17 - 35, 16),
        "inception_5b": (33 - 35, 32),
    },
}
LAST = {  # of their stride, where those above are the first
    "alexnet": ("conv1", "conv2", "conv5"),
    "vgg16": ("conv3_3", "conv4_3", "conv5_3"),
    "googlenet": ("conv2", "inception_3b", "inception_4e"),
}
# A width at which every layer has a whole number of channels, even in AlexNet.
WIDTHS = {"alexnet": 1 / 16, "vgg16": 1 / 64, "googlenet": 1 / 8}
CHANNELS = {
    "alexnet": {"conv1": 96, "pool1": 96, "pool2": 256, "fc7": 4096},
    "vgg16": {"pool2": 128, "pool3": 256, "pool4": 512, "fc7": 4096},
    "googlenet": {"pool1": 64, "pool2": 192, "pool3": 480, "inception_5b": 1024},
}
CASES = {
    "alexnet": "voc-fcn-alexnet",
    "vgg16": "voc-fcn8s",
    "googlenet": "fcn-googlenet-8s",
}


def image(channels=3, suffix=""):
    tensor = keras.Input((None, None, channels))
    return Feature(tensor, suffix=suffix, kernel_initializer="zeros")


def build(backbone, width=None, channels=3, suffix="", **arguments):
    x = image(channels, suffix)
    taps = BACKBONES[backbone](x, width or WIDTHS[backbone], **arguments)
    outputs = {name: tap.tensor for name, tap in taps.items()}
    return keras.Model(x.tensor, outputs), taps


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_taps_are_finest_first_and_lie_where_the_hand_put_them(backbone):
    _, taps = build(backbone)
    found = [(name, (tap.grid.start, tap.grid.stride)) for name, tap in taps.items()]
    assert found == list(TAPS[backbone].items())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_last_features_of_each_stride_lie_where_the_first_do(backbone):
    _, taps = build(backbone, skips=LAST[backbone])
    *_, last = TAPS[backbone]
    assert tuple(taps) == (*LAST[backbone], last)
    grids = [(tap.grid.start, tap.grid.stride) for tap in taps.values()]
    assert grids == list(TAPS[backbone].values())


@pytest.mark.parametrize(
    "skips",
    [
        ("pool4", "pool3"),  # the coarsest first
        ("pool3",),
        ("pool2", "pool4"),
        ("pool3", "conv4_3", "pool4"),
        ("pool1", "pool2", "pool3", "pool4"),
        ("pool2", "pool3", "pool4", "pool5"),
        ("pool4", "pool5"),
        ("conv4_2", "pool4"),
    ],
)
def test_skips_that_are_not_one_of_each_stride_are_refused(skips):
    with pytest.raises(ValueError, match="skips") as error:
        build("vgg16", skips=skips)
    assert str(error.value) == (
        f"The skips are {skips}; expected one each of stride 4, 8 and 16, in this "
        "order, or of the last of these: pool2 or conv3_3, pool3 or conv4_3, pool4 or "
        "conv5_3."
    )


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("count", range(4))
def test_the_coarsest_skips_alone_will_do(backbone, count):
    skips = LAST[backbone][3 - count :]
    _, taps = build(backbone, skips=skips)
    *_, last = TAPS[backbone]
    assert tuple(taps) == (*skips, last)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_taps_have_the_channels_of_the_reference(backbone):
    _, taps = build(backbone)
    found = {name: tap.tensor.shape[-1] for name, tap in taps.items()}
    width = WIDTHS[backbone]
    assert found == {name: n * width for name, n in CHANNELS[backbone].items()}


@pytest.mark.parametrize(
    ("backbone", "channels"),
    [
        ("alexnet", {"conv1": 8, "pool1": 8, "pool2": 24, "fc7": 408}),
        ("vgg16", {"pool2": 12, "pool3": 25, "pool4": 51, "fc7": 409}),
        # pool3: 12 + 19 + 9 + 6, inception_5b: 38 + 38 + 12 + 12.
        ("googlenet", {"pool1": 6, "pool2": 19, "pool3": 46, "inception_5b": 100}),
    ],
)
def test_a_tenth_of_the_channels_is_rounded_down_in_alexnet_to_pairs(
    backbone, channels
):
    _, taps = build(backbone, 0.1)
    assert {name: tap.tensor.shape[-1] for name, tap in taps.items()} == channels


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_convolution_has_the_name_and_shape_of_the_reference(backbone):
    model, _ = build(backbone)
    width, expected = WIDTHS[backbone], {}
    for layer in golden.load(CASES[backbone])["layers"]:
        if layer["type"] == "Convolution" and not layer["name"].startswith("score"):
            outputs, inputs, *kernel = layer["shapes"][0]
            inputs = inputs if inputs == 3 else inputs * width
            name = layer["name"].replace("/", "_")
            expected[name] = (*kernel, inputs, outputs * width)
    convolutions = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert {x.name: tuple(x.kernel.shape) for x in convolutions} == expected


@pytest.mark.parametrize(
    ("backbone", "rates"),
    [
        ("alexnet", {"drop6": 0.5, "drop7": 0.5}),
        ("vgg16", {"drop6": 0.5, "drop7": 0.5}),
        ("googlenet", {"pool5_drop_7x7_s1": 0.4}),
    ],
)
def test_numbers_are_dropped_as_in_the_reference(backbone, rates):
    layers = build(backbone)[0].layers
    dropouts = [layer for layer in layers if isinstance(layer, keras.layers.Dropout)]
    assert {layer.name: layer.rate for layer in dropouts} == rates
    assert not any(layer.noise_shape for layer in dropouts)  # number by number


@pytest.mark.parametrize(
    ("backbone", "first"),
    [("alexnet", "conv1"), ("vgg16", "conv1_1"), ("googlenet", "conv1_7x7_s2")],
)
def test_the_first_convolution_on_depth_has_a_name_of_its_own(backbone, first):
    names = {}
    for channels in (1, 3, 4):
        model, _ = build(backbone, channels=channels)
        layers = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
        names[channels] = layers[0].name
        assert layers[0].kernel.shape[2] == channels
    assert names == {1: first, 3: first, 4: f"{first}_bgrd"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_layer_of_a_stream_bears_its_suffix(backbone):
    plain, stream = (build(backbone, suffix=suffix)[0] for suffix in ("", "hha"))
    for one, other in zip(plain.layers[1:], stream.layers[1:], strict=True):
        stem, helper, _ = one.name.partition("_pad")
        assert other.name in (f"{one.name}hha", f"{stem}hha{helper}")


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_narrowest_net_still_has_channels(backbone):
    _, taps = build(backbone, width=1e-6)
    assert min(tap.tensor.shape[-1] for tap in taps.values()) >= 1


# The reference's prototxts, followed with the oracle


def alexnet(x, layer):
    taps = {"conv1": layer("conv1", x, stride=4, pad=100)}
    taps["pool1"] = oracle.max_pooling(taps["conv1"], 3, 2)
    x = taps["conv2"] = layer("conv2", oracle.lrn(taps["pool1"]), pad=2, groups=2)
    taps["pool2"] = oracle.max_pooling(x, 3, 2)
    x = layer("conv3", oracle.lrn(taps["pool2"]), pad=1)
    x = layer("conv4", x, pad=1, groups=2)
    x = taps["conv5"] = layer("conv5", x, pad=1, groups=2)
    x = layer("fc6", oracle.max_pooling(x, 3, 2))
    return {**taps, "fc7": layer("fc7", x)}


def vgg16(x, layer):
    taps = {}
    for block, repeats in enumerate([2, 2, 3, 3, 3], start=1):
        for i in range(1, repeats + 1):
            x = layer(f"conv{block}_{i}", x, pad=100 if block == i == 1 else 1)
            taps[f"conv{block}_{i}"] = x
        x = taps[f"pool{block}"] = oracle.max_pooling(x, 2, 2)
    return {**taps, "fc7": layer("fc7", layer("fc6", x))}


def googlenet(x, layer):
    def inception(x, module):
        def branch(name, x, pad=0):
            return layer(f"inception_{module}_{name}", x, pad=pad)

        branches = [
            branch("1x1", x),
            branch("3x3", branch("3x3_reduce", x), pad=1),
            branch("5x5", branch("5x5_reduce", x), pad=2),
            branch("pool_proj", oracle.max_pooling(x, 3, 1, 1)),
        ]
        return np.concatenate(branches, axis=1)

    taps, x = {}, layer("conv1_7x7_s2", x, stride=2, pad=35)
    x = taps["pool1"] = oracle.max_pooling(x, 3, 2)
    x = layer("conv2_3x3_reduce", oracle.lrn(x))
    x = taps["conv2"] = layer("conv2_3x3", x, pad=1)
    x = taps["pool2"] = oracle.max_pooling(oracle.lrn(x), 3, 2)
    for module in ("3a", "3b"):
        x = taps[f"inception_{module}"] = inception(x, module)
    x = taps["pool3"] = oracle.max_pooling(x, 3, 2)
    for module in ("4a", "4b", "4c", "4d", "4e"):
        x = taps[f"inception_{module}"] = inception(x, module)
    x = oracle.max_pooling(x, 3, 2)
    for module in ("5a", "5b"):
        x = taps[f"inception_{module}"] = inception(x, module)
    return taps


@pytest.mark.parametrize("skips", [SKIPS, LAST], ids=["first", "last"])
@pytest.mark.parametrize("reference", [alexnet, vgg16, googlenet])
def test_a_backbone_computes_what_its_prototxt_says(reference, skips):
    model, _ = build(reference.__name__, skips=skips[reference.__name__])
    weights = oracle.blobs(oracle.draw(model))
    x = 60 * np.random.default_rng(0).standard_normal((1, 4, 9, 3), "float32")

    def layer(name, x, **arguments):  # and its ReLU
        return np.maximum(oracle.convolution(x, *weights[name], **arguments), 0)

    expected = reference(oracle.to_caffe(x), layer)
    for name, found in model.predict_on_batch(x).items():
        error = np.abs(oracle.to_caffe(found) - expected[name]).max()
        assert error < 1e-5 * expected[name].max()
