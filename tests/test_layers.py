import keras
import numpy as np
import oracle
import pytest

from keras_fcn.layers import (
    BilinearKernel,
    BilinearUpsampling,
    CropLike,
    LocalResponseNormalization,
    Preprocess,
    bilinear_line,
)

KERNELS = [3, 4, 7, 8, 15, 16, 31, 32, 63, 64]  # of all nets at all strides
LAYERS = [
    BilinearUpsampling(8, 15),
    CropLike(2),
    LocalResponseNormalization(3, 0.5, 0.6, 2.0),
    Preprocess("BGR", [104.5, 116.25, 122.0]),
]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def factor_of(kernel):
    return (kernel + 1) // 2


def run(layer, *inputs):
    x = layer(inputs if len(inputs) > 1 else inputs[0])
    return keras.ops.convert_to_numpy(x)


def transposed_convolution(x, kernel):
    layer = keras.layers.Conv2DTranspose(
        x.shape[-1],
        kernel,
        factor_of(kernel),
        use_bias=False,
        kernel_initializer=BilinearKernel(),
    )
    return run(layer, x)


# Bilinear upsampling


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bilinear_line_sums_to_its_factor_in_every_phase(kernel):
    line = bilinear_line(kernel)
    assert line.dtype == np.float32
    for phase in range(factor_of(kernel)):
        assert line[phase :: factor_of(kernel)].sum() == 1


@pytest.mark.parametrize(
    ("kernel", "start"),
    [
        (4, [1 / 4, 3 / 4]),
        (3, [1 / 2, 1]),
        (64, [1 / 64, 3 / 64]),
        (63, [1 / 32, 1 / 16]),
    ],
)
def test_a_bilinear_line_starts_as_that_of_caffe(kernel, start):
    assert bilinear_line(kernel)[:2].tolist() == start


@pytest.mark.parametrize("kernel", [1, 2, *KERNELS[:6]])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_bilinear_kernel_is_the_filler_of_the_reference(kernel, channels):
    weight = BilinearKernel()((kernel, kernel, channels, channels))
    expected = oracle.kernel_to_keras(oracle.bilinear_filler(channels, kernel))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(weight), expected, atol=1e-7)


def test_a_bilinear_kernel_has_the_type_asked_for():
    for dtype in ("float16", "float32"):
        weight = BilinearKernel()((4, 4, 2, 2), dtype)
        assert keras.backend.standardize_dtype(weight.dtype) == dtype
    assert keras.backend.standardize_dtype(BilinearKernel()((4, 4, 2, 2)).dtype) == (
        keras.config.floatx()
    )


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 4, 2, 3)])
def test_a_bilinear_kernel_that_is_not_square_is_refused(shape):
    with pytest.raises(ValueError, match="bilinear kernel of shape") as error:
        BilinearKernel()(shape)
    assert str(error.value) == (
        f"A bilinear kernel of shape {shape} was asked for; expected (size, size, "
        "channels, channels)."
    )


@pytest.mark.parametrize("kernel", KERNELS)
def test_bilinear_upsampling_is_the_deconvolution_of_caffe(kernel):
    x, factor = noise(2, 5, 3, 3), factor_of(kernel)
    expected = oracle.deconvolution(
        oracle.to_caffe(x), oracle.bilinear_filler(3, kernel), stride=factor
    )
    found = run(BilinearUpsampling(factor, kernel), x)
    np.testing.assert_allclose(found, oracle.to_keras(expected), atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bilinear_upsampling_is_the_transposed_convolution_without_weights(kernel):
    x = noise(1, 1, 2, 60)
    layer = BilinearUpsampling(factor_of(kernel), kernel)
    found = run(layer, x)
    assert not layer.weights
    for classes in (1, 21, 60):
        expected = transposed_convolution(x[..., :classes], kernel)
        np.testing.assert_allclose(found[..., :classes], expected, atol=1e-6)


@pytest.mark.parametrize("kernel", [3, 4, 7, 8])
def test_bilinear_upsampling_is_the_transposed_convolution_at_459_classes(kernel):
    x = noise(1, 2, 1, 459)
    found = run(BilinearUpsampling(factor_of(kernel), kernel), x)
    np.testing.assert_allclose(found, transposed_convolution(x, kernel), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", KERNELS[4:])
def test_bilinear_upsampling_is_block_by_block_dense_at_459_classes(kernel):
    # A dense kernel takes up to 3.4 GB; its blocks off the diagonal are zero.
    x = noise(1, 2, 1, 459)
    found = run(BilinearUpsampling(factor_of(kernel), kernel), x)
    for block in np.split(np.arange(459), 9):
        expected = transposed_convolution(x[..., block], kernel)
        np.testing.assert_allclose(found[..., block], expected, atol=1e-6)


@pytest.mark.slow
def test_a_bilinear_kernel_is_zero_off_the_diagonal_at_459_classes():
    weight = keras.ops.convert_to_numpy(BilinearKernel()((15, 15, 459, 459)))
    diagonal = np.einsum("hwcc->chw", weight)
    assert (diagonal == oracle.bilinear_filler(1, 15)[0, 0].astype("float32")).all()
    assert np.count_nonzero(weight) == 459 * 15 * 15


@pytest.mark.parametrize("kernel", [14, 17, 8])
def test_upsampling_with_another_kernel_is_refused(kernel):
    with pytest.raises(ValueError, match="bilinear kernel of") as error:
        BilinearUpsampling(8, kernel)
    assert str(error.value) == (
        f"A bilinear kernel of {kernel} for factor 8 was asked for; expected 16 or 15."
    )


# Crop


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_crop_is_that_of_caffe(offset):
    x, reference = noise(2, 9, 8, 3), noise(2, 6, 5, 1)
    expected = oracle.crop(oracle.to_caffe(x), oracle.to_caffe(reference), offset)
    found = run(CropLike(offset), x, reference)
    np.testing.assert_array_equal(found, oracle.to_keras(expected))


def test_a_crop_ends_where_the_map_ends():
    x = noise(1, 7, 9, 2)
    found = run(CropLike(2), x, np.zeros((1, 6, 4, 1), "float32"))
    np.testing.assert_array_equal(found, x[:, 2:7, 2:6])


# Local response normalisation


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 17])
@pytest.mark.parametrize(
    "constants", [(5, 1e-4, 0.75, 1.0), (3, 2.0, 0.5, 0.5), (1, 1.0, 1.0, 2.0)]
)
def test_local_response_normalization_is_that_of_caffe(channels, constants):
    x = 30 * noise(2, 3, 5, channels)
    expected = oracle.lrn(oracle.to_caffe(x), *constants)
    found = run(LocalResponseNormalization(*constants), x)
    np.testing.assert_allclose(found, oracle.to_keras(expected), rtol=1e-5)


def test_the_constants_of_local_response_normalization_are_those_of_every_caffe_net():
    layer = LocalResponseNormalization()
    assert (layer.size, layer.alpha, layer.beta, layer.k) == (5, 1e-4, 0.75, 1.0)


@pytest.mark.parametrize("dtype", ["mixed_float16", "mixed_bfloat16"])
def test_squares_do_not_overflow_under_mixed_precision(dtype):
    x = np.abs(1000 * noise(1, 3, 3, 8))  # 65504 is the largest float16
    expected = oracle.to_keras(oracle.lrn(oracle.to_caffe(x)))
    found = LocalResponseNormalization(dtype=dtype)(x)
    assert keras.backend.standardize_dtype(found.dtype) == dtype.removeprefix("mixed_")
    found = keras.ops.convert_to_numpy(keras.ops.cast(found, "float32"))
    np.testing.assert_allclose(found, expected, rtol=1e-2)


# Preprocessing


@pytest.mark.parametrize(
    ("channels", "order"),
    [("BGR", [2, 1, 0]), ("RGB", [0, 1, 2]), ("GRB", [1, 0, 2])],
)
def test_preprocessing_reorders_channels_then_subtracts_the_mean(channels, order):
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 3)).astype("float32")
    mean = [104.00699, 116.66877, 122.67892]
    expected = np.stack(
        [x[..., i] - np.float32(m) for i, m in zip(order, mean, strict=True)], -1
    )
    np.testing.assert_array_equal(run(Preprocess(channels, mean), x), expected)


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float16"])
def test_preprocessing_of_whole_numbers_is_that_of_the_same_in_float32(dtype):
    x = np.random.default_rng(0).integers(0, 256, (1, 3, 5, 3)).astype(dtype)
    layer = Preprocess("BGR", [104.5, 116.25, 122.0])
    expected = run(layer, x.astype("float32"))
    image = keras.Input((None, None, 3), dtype=dtype)
    models = keras.Model(image, layer(image)), layer
    for found in (models[0].predict_on_batch(x), layer(keras.ops.convert_to_tensor(x))):
        found = keras.ops.convert_to_numpy(found)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_depth_becomes_its_natural_logarithm_and_no_depth_that_of_a_millimetre():
    x = np.float32([[[[10, 20, 30, 2550], [1, 2, 3, 1], [0, 0, 0, 0]]]])
    found = run(Preprocess("BGRD", [1, 2, 3, 7.844]), x)
    depth = [np.log(2550) - 7.844, -7.844, -7.844]
    np.testing.assert_allclose(found[0, 0, :, 3], depth, atol=1e-6)
    assert found[0, 0, 0, :3].tolist() == [29, 18, 7]


@pytest.mark.parametrize(
    ("channels", "mean"),
    [
        ("BGR", [1, 2]),
        ("BG", [1, 2, 3]),
        ("BGX", [1, 2, 3]),
        ("BGRR", [1, 2, 3, 4]),
        ("BGRD", [1, 2, 3, 4, 5]),
    ],
)
def test_preprocessing_of_other_channels_is_refused(channels, mean):
    with pytest.raises(ValueError, match="Preprocessing with channels") as error:
        Preprocess(channels, mean)
    assert str(error.value) == (
        f"Preprocessing with channels {channels!r} and mean {mean!r} was asked for; "
        'expected the letters RGB or RGBD in some order, such as "BGR", and as many '
        "means."
    )


# What Keras asks of a layer


def assert_shape(layer, *inputs):
    shapes = [x.shape for x in inputs]
    promised = layer.compute_output_shape(shapes if len(inputs) > 1 else shapes[0])
    assert tuple(promised) == run(layer, *inputs).shape


@pytest.mark.parametrize("size", [(0, 3), (2, 0), (1, 1), (1, 4), (5, 3)])
@pytest.mark.parametrize("kernel", [3, 4])
def test_bilinear_upsampling_promises_the_shape_it_has(size, kernel):
    assert_shape(BilinearUpsampling(factor_of(kernel), kernel), noise(2, *size, 3))


@pytest.mark.parametrize("size", [(0, 3), (1, 1), (5, 3)])
@pytest.mark.parametrize("reference", [(0, 1), (1, 1), (9, 2)])
@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_crop_promises_the_shape_it_has(size, reference, offset):
    assert_shape(CropLike(offset), noise(2, *size, 3), noise(2, *reference, 1))


@pytest.mark.parametrize("size", [(0, 2), (1, 1), (5, 3)])
@pytest.mark.parametrize("layer", LAYERS[2:], ids=lambda layer: type(layer).__name__)
def test_the_other_layers_promise_the_shape_they_have(size, layer):
    assert_shape(layer, noise(2, *size, 3))


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_shapes_that_are_not_known_yet_stay_unknown(layer):
    inputs = [
        keras.Input((None, None, 3)) for _ in range(isinstance(layer, CropLike) + 1)
    ]
    symbolic = layer(inputs if len(inputs) > 1 else inputs[0])
    assert symbolic.shape == (None, None, None, 3)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: type(layer).__name__)
def test_a_layer_is_rebuilt_from_its_config(layer):
    named = type(layer).from_config({**layer.get_config(), "name": "named"})
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(named)
    )
    assert type(again) is type(layer)
    assert again.get_config() == {**layer.get_config(), "name": "named"}
    inputs = [noise(1, 9, 8, 3), noise(1, 4, 4, 3)][: isinstance(layer, CropLike) + 1]
    np.testing.assert_array_equal(run(again, *inputs), run(layer, *inputs))


def test_an_initializer_is_rebuilt_from_its_config():
    again = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(BilinearKernel())
    )
    assert isinstance(again, BilinearKernel)
