import keras
import numpy as np
import oracle
import pytest
from keras import layers

from keras_fcn import models
from keras_fcn.dense import (
    DilatedAveragePooling2D,
    DilatedMaxPooling2D,
    rarefy,
    shift_and_stitch,
)
from keras_fcn.features import Feature, conv, max_pool
from keras_fcn.geometry import Grid
from keras_fcn.layers import LocalResponseNormalization, Preprocess


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def pictures(height, width):
    return 110 + 60 * noise(1, height, width, 3)


def chain(*steps, channels=3):
    """A net of layers one after the other, with random weights."""
    return oracle.draw(
        keras.Sequential([keras.Input((None, None, channels)), *steps], name="chain")
    )


def close(found, expected):
    assert found.shape == expected.shape
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found / scale, expected / scale, atol=2e-5)


# By hand


def line(*numbers):
    """An image of eight rows that are alike."""
    return np.tile(np.float32(numbers), (8, 1))[None, :, :, None]


def test_maxima_and_a_filter_are_rarefied_as_by_hand():
    filtered = layers.Conv2D(1, 2, use_bias=False, name="filter")
    model = chain(layers.MaxPooling2D(2, 2), filtered, channels=1)
    filtered.set_weights([np.float32([[1, 10], [0, 0]])[:, :, None, None]])
    image = line(3, 1, 4, 1, 5, 9, 2, 6)
    # Maxima of two: 3 4 4 5 9 9 6, of which the net has 3 4 9 6.
    coarse = [3 + 40, 4 + 90, 9 + 60]
    dense = [3 + 40, 4 + 50, 4 + 90, 5 + 90, 9 + 60]
    assert model.predict_on_batch(image)[0, 0, :, 0].tolist() == coarse
    for found in (shift_and_stitch(model, image, 2), rarefy(model)(image)):
        rows = keras.ops.convert_to_numpy(found)[0, :, :, 0].tolist()
        assert rows == [dense] * 5


def test_zeros_come_in_where_the_image_is_padded_as_by_hand():
    filtered = layers.Conv2D(1, (3, 1), 2, use_bias=False, name="filter")
    model = chain(layers.ZeroPadding2D((1, 0)), filtered, channels=1)
    filtered.set_weights([np.float32([1, 10, 100])[:, None, None, None]])
    image = line(3, 1, 4)[:, :3].transpose(0, 2, 1, 3)  # rows 3, 1, 4
    dense = [30 + 100, 3 + 10 + 400, 1 + 40]
    assert model.predict_on_batch(image)[0, :, 0, 0].tolist() == dense[::2]
    for found in (shift_and_stitch(model, image, 2), rarefy(model)(image)):
        columns = keras.ops.convert_to_numpy(found)[0, :, :, 0].T.tolist()
        assert columns == [dense] * 3


# What a dense score is: that of the net on one field of view alone

# (padding of the image, layers): kind, kernel, stride. Only the image is padded.
NETS = {
    "strided convolutions": (2, [("conv", 3, 2), ("conv", 2, 3)]),
    "pooling by 3": (0, [("conv", 2, 1), ("max", 3, 3), ("conv", 2, 1)]),
    "gaps between windows": (1, [("max", 2, 3), ("conv", 2, 2)]),
    "means": (1, [("mean", 3, 2), ("conv", 3, 1), ("mean", 2, 2)]),
    "AlexNet in small": (
        3,
        [
            ("conv", 3, 2),
            ("max", 3, 2),
            ("lrn", 1, 1),
            ("grouped", 3, 1),
            ("max", 2, 2),
        ],
    ),
}
CHANNELS = 4


def keras_layer(i, kind, kernel, stride):
    if kind in ("max", "mean"):
        pooling = layers.MaxPooling2D if kind == "max" else layers.AveragePooling2D
        return pooling(kernel, stride)
    if kind == "lrn":
        return LocalResponseNormalization()
    groups = 2 if kind == "grouped" else 1
    return layers.Conv2D(
        CHANNELS, kernel, stride, groups=groups, activation="relu", name=f"conv{i}"
    )


def numpy_layer(x, weights, kind, kernel, stride):
    if kind == "max":
        return oracle.max_pooling(x, kernel, stride)
    if kind == "mean":
        return oracle.average_pooling(x, kernel, stride)
    if kind == "lrn":
        return oracle.lrn(x)
    groups = 2 if kind == "grouped" else 1
    return np.maximum(oracle.convolution(x, *weights, stride=stride, groups=groups), 0)


def build(pad, steps):
    convolutions = [keras_layer(i, *step) for i, step in enumerate(steps)]
    return chain(layers.ZeroPadding2D(pad), *convolutions, channels=CHANNELS)


def geometry(pad, steps):
    """The net's grid, and how many pixels one of its cells sees along each side."""
    grid, field = Grid().window(1, pad=pad), 1
    for _, kernel, stride in steps:
        field += int(grid.stride) * (kernel - 1)
        grid = grid.window(kernel, stride)
    return grid, field


def score_windows(model, images, pad, steps):
    """The net, in NumPy, on every window of the padded images by itself."""
    grid, field = geometry(pad, steps)
    assert grid.start == (field - 1) / 2 - pad  # so cell 0 sees pixels from -pad on
    x = np.pad(oracle.to_caffe(images), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    windows = np.lib.stride_tricks.sliding_window_view(x, (field, field), (2, 3))
    windows = windows.transpose(0, 2, 3, 1, 4, 5)
    x, weights = windows.reshape(-1, *windows.shape[3:]), oracle.blobs(model)
    for i, step in enumerate(steps):
        x = numpy_layer(x, weights.get(f"conv{i}"), *step)
    assert x.shape[2:] == (1, 1)
    return x.reshape(*windows.shape[:3], -1)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize("size", [(17, 20), (24, 19)])
def test_both_give_what_the_net_says_of_every_window_alone(net, size):
    model, images = build(*NETS[net]), noise(2, *size, CHANNELS)
    expected = score_windows(model, images, *NETS[net])
    grid, _ = geometry(*NETS[net])
    close(shift_and_stitch(model, images, int(grid.stride)), expected)
    close(rarefy(model).predict_on_batch(images), expected)
    coarse = model.predict_on_batch(images)
    close(expected[:, :: int(grid.stride), :: int(grid.stride)], coarse)


def test_an_image_of_one_field_of_view_has_one_score():
    pad, steps = NETS["pooling by 3"]
    grid, field = geometry(pad, steps)
    images = noise(1, field - 2 * pad, field - 2 * pad, CHANNELS)
    model = build(pad, steps)
    expected = model.predict_on_batch(images)
    assert expected.shape == (1, 1, 1, CHANNELS)
    close(shift_and_stitch(model, images, int(grid.stride)), expected)
    close(rarefy(model).predict_on_batch(images), expected)


@pytest.mark.parametrize("dtype", ["uint8", "float64"])
def test_images_of_any_type_are_shifted_as_they_are(dtype):
    model = chain(Preprocess("RGB", [1.5, 2.5, 3.5]), layers.MaxPooling2D(2))
    images = np.uint8(pictures(5, 6))
    found = shift_and_stitch(model, images.astype(dtype), 2)
    assert found.dtype == "float32"
    expected = shift_and_stitch(model, np.float32(images), 2)
    np.testing.assert_array_equal(found, expected)


# Two layers in a row are one layer (paper, section 3)


@pytest.mark.parametrize(
    ("k", "s", "kk", "ss"), [(3, 2, 2, 1), (2, 1, 3, 2), (3, 2, 3, 2), (4, 3, 2, 3)]
)
def test_two_poolings_are_one_of_the_composed_kernel_and_stride(k, s, kk, ss):
    two = chain(layers.MaxPooling2D(k, s), layers.MaxPooling2D(kk, ss))
    one = chain(layers.MaxPooling2D(k + (kk - 1) * s, s * ss))
    images = noise(1, 19, 22, 3)
    np.testing.assert_array_equal(
        two.predict_on_batch(images), one.predict_on_batch(images)
    )
    np.testing.assert_array_equal(rarefy(two)(images), rarefy(one)(images))
    np.testing.assert_array_equal(
        shift_and_stitch(two, images, s * ss), shift_and_stitch(one, images, s * ss)
    )


@pytest.mark.parametrize(
    ("k", "s", "kk", "ss"), [(3, 2, 2, 1), (2, 1, 3, 2), (3, 2, 3, 2), (2, 3, 2, 1)]
)
def test_two_convolutions_are_one_of_the_composed_kernel_and_stride(k, s, kk, ss):
    inner, outer = noise(k, k, 1, 1, seed=1), noise(kk, kk, 1, 1, seed=2)
    size = k + (kk - 1) * s
    kernel = np.zeros((size, size, 1, 1), "float32")
    for i in range(kk):
        for j in range(kk):
            kernel[i * s : i * s + k, j * s : j * s + k] += outer[i, j] * inner
    steps = [
        layers.Conv2D(1, k, s, use_bias=False, name="inner"),
        layers.Conv2D(1, kk, ss, use_bias=False, name="outer"),
        layers.Conv2D(1, size, s * ss, use_bias=False, name="composed"),
    ]
    two, one = chain(*steps[:2], channels=1), chain(steps[2], channels=1)
    for step, weight in zip(steps, (inner, outer, kernel), strict=True):
        step.set_weights([weight])
    images = noise(1, 19, 22, 1)
    close(rarefy(two).predict_on_batch(images), rarefy(one).predict_on_batch(images))
    stitched = (shift_and_stitch(net, images, s * ss) for net in (two, one))
    close(*stitched)


# Where maps within the net are padded


def differences(model, images, stride):
    """The rows and columns in which the two ways differ, of so many."""
    dense = rarefy(model).predict_on_batch(images)
    stitched = shift_and_stitch(model, images, stride)
    assert dense.shape == stitched.shape
    return np.abs(dense - stitched).max((0, 3)) > 2e-5 * np.abs(dense).max()


def inside(shape, before, after):
    mask = np.zeros(shape, bool)
    mask[before : shape[0] - after, before : shape[1] - after] = True
    return mask


@pytest.mark.parametrize("size", [(30, 33), (31, 32)])
@pytest.mark.parametrize(
    ("steps", "stride", "before", "after"),
    [
        # Rounding up at stride 2 hangs over by up to 2 cells of 2 pixels.
        (lambda x: max_pool(x, 3, 3, name="p"), 6, 0, 4),
        # The same, by 1 cell of 2 pixels, as VGG16 does it.
        (lambda x: max_pool(x, 2, 2, name="p"), 4, 0, 2),
        # 1 cell of 2 pixels, 2 cells of 4, and the overhang of 1 cell of 2.
        (
            lambda x: conv(
                max_pool(conv(x, 4, 3, pad=1, name="a"), 2, 2, name="p"),
                4,
                5,
                pad=2,
                name="b",
            ),
            4,
            2 + 8,
            2 + 8 + 2,
        ),
    ],
    ids=["overhang of 3", "overhang of 2", "same"],
)
def test_padding_of_maps_counts_at_the_border_and_no_further(
    size, steps, stride, before, after
):
    x = Feature(keras.Input((None, None, 3)))
    y = conv(steps(conv(x, 4, 3, stride=2, pad=1, name="first")), 2, 2, name="last")
    model = oracle.draw(keras.Model(x.tensor, y.tensor))
    wrong = differences(model, noise(4, *size, 3), stride)
    same = inside(wrong.shape, before, after)
    assert same.any()
    assert not (wrong & same).any()
    # The next row and the next column are not the same all along.
    for side in ([before - 1] if before else []) + ([-after] if after else []):
        assert wrong[side].any()
        assert wrong[:, side].any()


# The nets of the paper

# Layer: pixels per cell, and the padding of maps up to it, in pixels (hand-made sums).
DEPTHS = {
    "alexnet": ("conv2", 8, 2 * 8, 2 * 8 + 4),
    "vgg16": ("pool2", 4, 1 + 2 * 2, 1 + 2 * 2 + 1 + 2),
    "googlenet": ("inception_3a_output", 8, 4 + 2 * 8, 4 + 2 * 8 + 2 + 4),
}


def classifier(backbone):
    # Built without drawing numbers first, which JAX compiles for each layer.
    net = {"builder": "classifier", "backbone": backbone, "num_classes": 3}
    return oracle.draw(models.build({"model": {**net, "width": 1 / 32}}))


@pytest.mark.parametrize("backbone", DEPTHS)
def test_both_agree_within_the_nets_of_the_paper(backbone):
    layer, stride, before, after = DEPTHS[backbone]
    model = classifier(backbone)
    trunk = keras.Model(model.input, model.get_layer(layer).output)
    wrong = differences(trunk, pictures(67, 70), stride)
    same = inside(wrong.shape, before, after)
    assert same.sum() > 50
    assert not (wrong & same).any()


@pytest.mark.parametrize("backbone", DEPTHS)
def test_every_stride_th_cell_of_a_rarefied_classifier_is_its_own(backbone):
    model, images = classifier(backbone), pictures(227, 260)
    dense = rarefy(model).predict_on_batch(images)
    close(dense[:, ::32, ::32], model.predict_on_batch(images))


def test_a_rarefied_classifier_gives_what_the_classifier_says_of_a_shifted_image():
    model, images = classifier("alexnet"), pictures(384, 391)
    dense = rarefy(model).predict_on_batch(images)
    down, right = 5, 27
    shifted = np.pad(images, [(0, 0), (down, 0), (right, 0), (0, 0)])
    found = dense[:, 32 - down :: 32, 32 - right :: 32]
    expected = model.predict_on_batch(shifted)[:, 1:, 1:]
    # conv2 to conv5 pad by 64 pixels in all in front: 2 * 8 + 3 * 16.
    close(found[:, 2:, 2:], expected[:, 2:, 2:])


def test_what_is_shifted_in_has_the_colour_of_the_mean():
    mean = [104.5, 116.25, 122.0]
    steps = [layers.ZeroPadding2D(2), layers.Conv2D(4, 5, 3, name="c")]
    model = chain(Preprocess("BGR", mean), *steps)
    behind = keras.Sequential([keras.Input((None, None, 3)), *steps])
    images = np.round(pictures(10, 11))
    expected = shift_and_stitch(behind, images[..., ::-1] - np.float32(mean), 3)
    close(shift_and_stitch(model, images, 3), expected)
    close(rarefy(model).predict_on_batch(images), expected)


def test_depth_of_the_mean_is_shifted_in_too():
    mean = [1.0, 2.0, 3.0, 7.5]
    steps = [layers.ZeroPadding2D(2), layers.Conv2D(4, 5, 3, name="c")]
    model = chain(Preprocess("BGRD", mean), *steps, channels=4)
    images = 100 + noise(1, 10, 11, 4)
    expected = rarefy(model).predict_on_batch(images)
    close(shift_and_stitch(model, images, 3), expected)


# Layers


@pytest.mark.parametrize(
    "layer",
    [
        lambda: layers.Conv2D(4, 4, 2, padding="same", name="c"),
        lambda: layers.Conv2D(4, 2, 1, padding="same", name="c"),
        lambda: layers.Conv2D(4, 1, 3, padding="same", name="c"),
        lambda: layers.Conv2D(4, (3, 2), 1, padding="same", name="c"),
        lambda: layers.Conv2D(4, 3, 1, dilation_rate=(2, 1), name="c"),
        lambda: layers.Conv2D(4, 2, 1, padding="same", dilation_rate=2, name="c"),
        lambda: layers.Conv2D(4, 2, 1, padding="same", dilation_rate=3, name="c"),
        lambda: layers.MaxPooling2D(2, 2, padding="same"),
        lambda: layers.MaxPooling2D(4, 2, padding="same"),
        lambda: layers.MaxPooling2D((3, 2), 1, padding="same"),
        lambda: layers.ZeroPadding2D(((1, 2), (3, 0))),
    ],
)
def test_every_padding_is_that_of_keras_behind_any_stride(layer):
    first = layers.Conv2D(3, 1, (2, 3), name="first")  # no ReLU: maxima are negative
    model = chain(first, layer())
    down, across = np.array(model.compute_output_shape((1, 1200, 1200, 3))[1:3])
    for size in [(13, 14), (16, 16)]:
        images = noise(1, *size, 3) - 2
        dense = rarefy(model).predict_on_batch(images)
        found = dense[:, :: round(1200 / down), :: round(1200 / across)]
        close(found, model.predict_on_batch(images))


def test_layers_that_work_cell_by_cell_stay_as_they_are():
    x = keras.Input((None, None, 3))
    y = layers.Conv2D(4, 3, 2, name="a")(layers.Rescaling(1 / 255)(x))
    left = layers.ReLU()(layers.BatchNormalization()(y, training=False))
    right = layers.Activation("tanh")(layers.Conv2D(4, 1, name="b")(y))
    both = layers.Concatenate()([left, layers.Add()([left, right])])
    z = layers.Softmax()(layers.MaxPooling2D(2)(layers.Dropout(0.5)(both)))
    model = oracle.draw(keras.Model(x, z))
    images = pictures(14, 15)
    dense = rarefy(model).predict_on_batch(images)
    close(dense, shift_and_stitch(model, images, 4))
    close(dense[:, ::4, ::4], model.predict_on_batch(images))


def test_a_rarefied_net_has_the_names_of_the_net_and_weights_of_its_own():
    model = build(*NETS["AlexNet in small"])
    before = [w.copy() for w in model.get_weights()]
    rarefied = rarefy(model)
    names = [layer.name for layer in model.layers]
    assert [layer.name for layer in rarefied.layers[1:]] == names
    for layer in rarefied.layers:
        assert set(getattr(layer, "strides", (1,))) == {1}
        layer.set_weights([w + 1 for w in layer.get_weights()])
    for found, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_rarefied_net_computes_in_the_precision_of_the_net():
    pads = {"padding": "same", "dtype": "bfloat16"}  # 2: more on one side
    steps = [layers.Conv2D(4, 2, name="c", **pads), layers.MaxPooling2D(3, 1, **pads)]
    rarefied = rarefy(chain(layers.AveragePooling2D(2, dtype="bfloat16"), *steps))
    names = [layer.name for layer in rarefied.layers]
    assert "c_pad" in names
    assert {layer.compute_dtype for layer in rarefied.layers[1:]} == {"bfloat16"}


POOLINGS = {DilatedMaxPooling2D: np.max, DilatedAveragePooling2D: np.mean}


@pytest.mark.parametrize("kind", POOLINGS)
def test_dilated_pooling_takes_cells_that_lie_apart(kind):
    layer, x = kind((3, 2), (2, 5), ((1, 0), (0, 2))), noise(2, 7, 6, 3)
    outside = -np.inf if kind is DilatedMaxPooling2D else 0.0
    wide = np.full((2, 8, 8, 3), outside)
    wide[:, 1:, :6] = x
    expected = [
        [
            POOLINGS[kind](wide[:, i : i + 5 : 2, j : j + 6 : 5], (1, 2))
            for j in range(3)
        ]
        for i in range(4)
    ]
    found = keras.ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(found, np.float32(expected).transpose(2, 0, 1, 3), 1e-5)
    assert layer.compute_output_shape(x.shape) == found.shape
    assert layer.compute_output_shape((None, None, 6, 3)) == (None, None, 3, 3)


@pytest.mark.parametrize("kind", POOLINGS)
def test_dilated_pooling_is_rebuilt_from_its_config(kind):
    layer = kind((3, 2), (2, 5), ((1, 0), (0, 2)), name="named")
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert type(again) is kind
    assert again.get_config() == layer.get_config()


# Errors


def refuses(message, function, *arguments):
    with pytest.raises(ValueError, match="expected") as error:
        function(*arguments)
    assert str(error.value) == message


def test_a_map_smaller_than_a_window_is_refused():
    layer = DilatedMaxPooling2D((3, 3), (2, 2), name="p")
    refuses(
        "p was given a map of 4 by 9 cells, too small for one window; expected a "
        "larger image.",
        layer.compute_output_shape,
        (1, 4, 9, 1),
    )
    with pytest.raises(ValueError, match="p was given a map of 4 by 9 cells, too"):
        layer(noise(1, 4, 9, 1))


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (layers.Conv2DTranspose(3, 4, 2, name="x"), "Conv2DTranspose"),
        (layers.UpSampling2D(name="x"), "UpSampling2D"),
        (layers.Flatten(name="x"), "Flatten"),
        (layers.GlobalAveragePooling2D(name="x"), "GlobalAveragePooling2D"),
        (layers.Softmax(axis=1, name="x"), "Softmax"),
        (layers.MaxPooling2D(data_format="channels_first", name="x"), "MaxPooling2D"),
    ],
)
def test_a_layer_that_cannot_be_rarefied_is_named(layer, kind):
    inputs = keras.Input((None, None, 3))
    refuses(
        f"x is a {kind}, which cannot be rarefied; expected convolutions, poolings, "
        "zero padding and layers that work cell by cell, channels last. Rarefy the net "
        "up to there: keras.Model(model.input, model.get_layer(name).output).",
        rarefy,
        keras.Model(inputs, layer(inputs)),
    )


def test_padding_that_moves_with_the_size_of_the_image_is_refused():
    refuses(
        'c has kernel 3, stride 2 and padding="same", which begins on another cell for '
        'another size of the image; expected padding="valid" behind a ZeroPadding2D.',
        rarefy,
        chain(layers.Conv2D(2, 3, 2, padding="same", name="c")),
    )


def test_means_over_fewer_cells_at_the_border_are_refused():
    refuses(
        'p averages with padding="same", over fewer cells at the border; expected '
        'padding="valid".',
        rarefy,
        chain(layers.AveragePooling2D(2, padding="same", name="p")),
    )


def test_maps_of_two_strides_are_not_merged():
    x = keras.Input((None, None, 3))
    y = layers.Concatenate(name="both")([x, layers.MaxPooling2D(1, 2)(x)])
    refuses(
        "both merges maps of [(1, 1), (2, 2)] pixels per cell; expected one stride, "
        "which is kept when all strides become 1.",
        rarefy,
        keras.Model(x, y),
    )


def test_a_layer_that_is_used_twice_is_refused():
    x, layer = keras.Input((None, None, 3)), layers.Conv2D(3, 3, 2, name="c")
    refuses(
        "c is used more than once, which no one rarefied layer can be; expected a "
        "layer for each use.",
        rarefy,
        keras.Model(x, layer(layer(x))),
    )


def test_an_operation_without_a_layer_is_named():
    x = keras.Input((None, None, 3))
    with pytest.raises(ValueError, match="is a Add, which cannot be rarefied"):
        rarefy(keras.Model(x, x + 1.0))


@pytest.mark.parametrize(
    "function", [rarefy, lambda net: shift_and_stitch(net, noise(1, 9, 9, 3), 2)]
)
def test_a_net_that_is_not_built_is_refused(function):
    refuses(
        "net is a Sequential whose layers do not say what they take; expected a "
        "functional net, keras.Model(inputs, outputs).",
        function,
        keras.Sequential([layers.Conv2D(3, 3, 2)], name="net"),
    )


def test_a_stride_that_the_net_has_not_is_refused():
    refuses(
        "stride=8 was given, but chain has a cell every 6 pixels down and 6 across; "
        "expected its stride, the same both ways.",
        shift_and_stitch,
        build(*NETS["strided convolutions"]),
        noise(1, 9, 9, CHANNELS),
        8,
    )


def test_an_image_too_small_for_a_cell_is_refused():
    refuses(
        "Images of 3 by 9 pixels are too small for chain; expected enough for one "
        "cell.",
        shift_and_stitch,
        chain(layers.Conv2D(2, 5, 2, name="c")),
        noise(1, 3, 9, 3),
        2,
    )


@pytest.mark.parametrize("shape", [(9, 9, 3), (1, 9, 9, 1)])
def test_images_that_the_net_does_not_take_are_refused(shape):
    refuses(
        f"Images of shape {shape} were given; expected (batch, height, width, 3), what "
        "chain takes.",
        shift_and_stitch,
        chain(layers.Conv2D(2, 3, 2, name="c")),
        noise(*shape),
        2,
    )


def test_a_net_of_fixed_size_or_several_outputs_is_refused():
    x, fixed = keras.Input((None, None, 3)), keras.Input((9, 9, 3))
    y = layers.MaxPooling2D(2, name="p")
    for model, shapes in [
        (keras.Model(x, [y(x), y(x)], name="net"), [(None, None, None, 3)] * 3),
        (keras.Model(fixed, y(fixed), name="net"), [(None, 9, 9, 3), (None, 4, 4, 3)]),
    ]:
        refuses(
            f"net has inputs and outputs of shapes {shapes}; expected one of each, "
            "(batch, height, width, channels), and input of any size: "
            "keras.Input((None, None, channels)).",
            shift_and_stitch,
            model,
            noise(1, 9, 9, 3),
            2,
        )
