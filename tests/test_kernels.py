"""Keras' own layers are the oracle of those that take another way."""

import keras
import numpy as np
import pytest

from keras_fcn.kernels import (
    AveragePooling2D,
    BatchNormalization,
    Conv2D,
    MaxPooling2D,
    window,
)
from keras_fcn.layers import CropLike


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def run(layer, x):
    return keras.ops.convert_to_numpy(layer(x))


# Convolution and pooling


@pytest.mark.parametrize("size", [(9, 12), (10, 7), (8, 8)])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (3, 1), (1, 2)])
@pytest.mark.parametrize("kernel", [1, 2, 3, (4, 3)])
def test_convolution_is_keras_own(kernel, stride, dilation, padding, size):
    x = noise(2, *size, 4)
    window = {"strides": stride, "dilation_rate": dilation, "padding": padding}
    ours = Conv2D(6, kernel, groups=2, activation="relu", **window)
    keras_own = keras.layers.Conv2D(6, kernel, groups=2, activation="relu", **window)
    found = run(ours, x)
    keras_own.build(x.shape)
    keras_own.set_weights(ours.get_weights())
    np.testing.assert_allclose(found, run(keras_own, x), atol=1e-5)


@pytest.mark.parametrize("size", [(9, 12), (10, 7), (8, 8)])
@pytest.mark.parametrize("padding", ["valid", "same"])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 2, 3, (5, 2)])
def test_maximum_pooling_is_keras_own(kernel, stride, padding, size):
    x = noise(2, *size, 4)  # maxima may be negative: padding is no maximum
    found, expected = (
        run(kind(kernel, stride, padding), x)
        for kind in (MaxPooling2D, keras.layers.MaxPooling2D)
    )
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "layer",
    [
        MaxPooling2D((3, 2), name="x"),
        AveragePooling2D((3, 2), name="x"),
        Conv2D(1, (3, 2), name="x"),
        Conv2D(1, (2, 2), dilation_rate=(2, 1), name="x"),
    ],
)
def test_a_map_smaller_than_a_window_is_refused(layer):
    assert layer(noise(1, 3, 2, 1)).shape == (1, 1, 1, 1)
    for size in ((2, 2), (3, 1), (0, 0)):
        found = "x was given a map of {} by {} cells, and its window is".format(*size)
        with pytest.raises(ValueError, match=found):
            layer(noise(1, *size, 1))


# Batch normalisation


@pytest.mark.parametrize("dtype", ["float32", "float64", "mixed_bfloat16"])
@pytest.mark.parametrize("shape", [(3, 7, 5, 4), (1, 1, 1, 4)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"epsilon": 100.0},
        {"axis": 1},
        {"scale": False},
        {"center": False},
        {"renorm": True},
    ],
    ids=str,
)
def test_batch_normalization_learns_and_predicts_as_keras_own(options, shape, dtype):
    x, y = 50 * noise(*shape) + 100, noise(*shape, seed=1)
    found = []
    for kind in (BatchNormalization, keras.layers.BatchNormalization):
        start = keras.layers.Dense(
            4, use_bias=False, kernel_initializer="identity", dtype=dtype
        )
        norm = kind(momentum=0.9, dtype=dtype, **options)
        model = keras.Sequential([keras.Input(shape[1:]), start, norm])
        model.compile(keras.optimizers.SGD(0.1), "mse")
        for _ in range(3):
            model.train_on_batch(x, y)
        logits = model.predict(x, verbose=0).astype("float32")
        found.append([*model.get_weights(), logits])
    tolerance = 3e-2 if dtype == "mixed_bfloat16" else 1e-4
    for ours, keras_own in zip(*found, strict=True):
        largest = np.abs(keras_own).max()
        np.testing.assert_allclose(ours, keras_own, atol=tolerance * largest)


def test_batch_normalization_that_is_not_trainable_keeps_its_statistics():
    norm = BatchNormalization()
    x = 3 * noise(2, 4, 4, 3) + 1
    norm(x)
    before = norm.get_weights()
    norm.trainable = False
    np.testing.assert_allclose(norm(x, training=True), norm(x), rtol=1e-6)
    for now, then in zip(norm.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


# Rebuilt


@pytest.mark.parametrize(
    "layer",
    [
        BatchNormalization(momentum=0.9),
        Conv2D(3, 3, strides=2, kernel_initializer="ones"),
        MaxPooling2D(3, 2),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_a_layer_is_rebuilt_from_its_config(layer):
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(layer)
    )
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()
    x = noise(1, 9, 8, 3)
    np.testing.assert_array_equal(run(again, x), run(layer, x))


# Crops


@pytest.mark.parametrize("start", [0, 2, 6, 9])
@pytest.mark.parametrize("sides", [(1, 1), (3, 5), (6, 4), (20, 20), (0, 3)])
def test_a_window_is_numpys_slice(start, sides):
    x = noise(2, 6, 8, 3)
    height, width = sides
    found = keras.ops.convert_to_numpy(
        window(keras.ops.convert_to_tensor(x), start, *sides)
    )
    expected = x[:, start : start + height, start : start + width]
    np.testing.assert_array_equal(found, expected)


def test_what_a_window_leaves_out_has_no_gradient():
    scale = keras.layers.EinsumDense("bhwc,hwc->bhwc", (6, 8, 3))
    image = keras.Input((6, 8, 3), batch_size=1)
    model = keras.Model(image, CropLike(2)([scale(image), image]))
    model.compile("sgd", lambda truth, found: found)
    before = scale.get_weights()[0]
    model.train_on_batch(np.ones((1, 6, 8, 3), "float32"), np.zeros((1, 4, 6, 3)))
    changed = before != scale.get_weights()[0]
    assert changed[2:, 2:].all()
    assert not changed[:2].any()
    assert not changed[:, :2].any()
