import keras
import numpy as np
import oracle
import pytest

from keras_fcn.features import (
    Feature,
    add,
    average,
    average_pool,
    concat,
    conv,
    crop_like,
    dropout,
    lrn,
    max_pool,
    scale,
    upsample,
)
from keras_fcn.geometry import Grid


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, "float32")


def image(channels=3, **fields):
    return Feature(keras.Input((None, None, channels)), **fields)


def net(x, feature):
    return keras.Model(x.tensor, feature.tensor)


def run(x, feature, array):
    return oracle.to_caffe(net(x, feature).predict_on_batch(array))


def close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.fixture
def _mixed_precision():
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    yield
    keras.config.set_dtype_policy(before)


# Convolutions: every (kernel, stride, pad, groups) of the nets, pads of 100 as 9


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "groups"),
    [
        (1, 1, 0, 1),
        (3, 1, 1, 1),
        (3, 1, 1, 2),
        (3, 1, 9, 1),
        (5, 1, 2, 2),
        (6, 1, 0, 1),
        (7, 1, 0, 1),
        (7, 2, 9, 1),
        (7, 2, 3, 1),
        (11, 4, 9, 1),
        (11, 4, 0, 1),
    ],
)
@pytest.mark.parametrize("size", [(11, 13), (12, 15)])
def test_a_convolution_is_that_of_caffe(kernel, stride, pad, groups, size):
    x = image(4)
    y = conv(
        x, 6, kernel, stride=stride, pad=pad, groups=groups, name="c", activation=None
    )
    assert y.grid == Grid().window(kernel, stride, pad)
    weight, bias = noise(6, 4 // groups, kernel, kernel, seed=1), noise(6, seed=2)
    model = net(x, y)
    model.get_layer("c").set_weights([oracle.kernel_to_keras(weight), bias])
    array = noise(2, *size, 4)
    expected = oracle.convolution(
        oracle.to_caffe(array), weight, bias, stride=stride, pad=pad, groups=groups
    )
    np.testing.assert_allclose(
        oracle.to_caffe(model.predict_on_batch(array)), expected, rtol=1e-4, atol=1e-4
    )


def test_a_convolution_is_rectified_and_starts_random_but_a_score_starts_at_zero():
    x = image()
    hidden, score = conv(x, 8, 3, name="c"), conv(x, 8, 1, name="s", activation=None)
    model = keras.Model(x.tensor, [hidden.tensor, score.tensor])
    y, z = model.predict_on_batch(noise(1, 9, 9, 3))
    assert y.min() == 0 < y.max()
    assert np.count_nonzero(z) == 0
    kernel, bias = model.get_layer("c").get_weights()
    assert 0.5 < kernel.std() / np.sqrt(2 / 27) < 1.5  # (He et al., 2015)
    assert np.count_nonzero(bias) == 0


def test_normalisation_forgets_three_percent_of_its_statistics_a_step():
    x = image(1, batch_norm=True)
    model = net(x, conv(x, 1, 1, name="c"))
    model.get_layer("c").set_weights([np.ones((1, 1, 1, 1)), np.zeros(1)])
    values = np.float32([1, 3, 5, 7]).reshape(1, 2, 2, 1)  # mean 4, variance 5
    model(values, training=True)
    _, _, mean, variance = model.get_layer("c_bn").get_weights()
    close(mean, 0.03 * 4)
    close(variance, 0.97 * 1 + 0.03 * 5)
    assert [layer.name for layer in model.layers[1:]] == ["c", "c_bn", "c_relu"]


def test_a_net_about_to_be_loaded_draws_no_numbers():
    x = image(grid=Grid(2, 0.5), kernel_initializer="zeros")
    y = upsample(conv(x, 2, 3, pad=1, name="c"), 2, image(), name="u", learned=True)
    *drawn, interpolating = net(x, y).get_weights()
    assert not any(np.count_nonzero(w) for w in drawn)
    # Not drawn: a classifier's weights, transplanted, bring none for this layer.
    np.testing.assert_array_equal(interpolating[:, :, 0, 0].sum(), 4)
    assert not interpolating[:, :, 0, 1].any()


@pytest.mark.parametrize("suffix", ["", "color"])
def test_layers_are_named_as_told_with_the_suffix_of_their_stream(suffix):
    x = image(suffix=suffix, kernel_initializer="zeros")
    y = conv(x, 4, 3, pad=9, name="conv1")
    y = max_pool(y, 3, 2, name="pool1")
    y = lrn(y, name="norm1")
    y = concat([y, average_pool(y, 1, name="mean")], name="both")
    y = dropout(scale(y, 0.5, name="half"), 0.5, name="drop1")
    names = [layer.name for layer in net(x, y).layers[1:]]
    expected = "conv1_pad conv1 pool1_pad pool1 norm1 mean both half drop1".split()
    helpers = {"conv1_pad": f"conv1{suffix}_pad", "pool1_pad": f"pool1{suffix}_pad"}
    assert names == [helpers.get(name, name + suffix) for name in expected]


# Pooling


@pytest.mark.parametrize(
    ("kernel", "stride", "pad"), [(2, 2, 0), (3, 2, 0), (3, 3, 0), (3, 1, 1)]
)
def test_max_pooling_rounds_up_at_every_size(kernel, stride, pad):
    x = image(2)
    y = max_pool(x, kernel, stride, pad=pad, name="p")
    assert y.grid == Grid().window(kernel, stride, pad)
    model = net(x, y)
    smallest = 2 if kernel == 3 and not pad else 1  # Caffe has no cell below
    for height in range(smallest, 21):
        width = 40 + smallest - height  # so that an axis has each size to 40
        array = np.abs(noise(1, height, width, 2))  # as after a ReLU
        expected = oracle.max_pooling(oracle.to_caffe(array), kernel, stride, pad)
        found = oracle.to_caffe(model.predict_on_batch(array))
        np.testing.assert_array_equal(found, expected.astype("float32"))


@pytest.mark.parametrize("size", [(7, 7), (8, 7), (9, 10)])
def test_average_pooling_is_that_of_caffe(size):
    x = image(2)
    y = average_pool(x, 7, name="p")
    assert y.grid == Grid().window(7)
    array = noise(2, *size, 2)
    close(run(x, y, array), oracle.average_pooling(oracle.to_caffe(array), 7))


# What works cell by cell


def test_normalisation_has_the_constants_of_every_caffe_net():
    x, array = image(7), 50 * noise(1, 3, 4, 7)
    y = lrn(x, name="n")
    assert y.grid == x.grid
    close(run(x, y, array), oracle.lrn(oracle.to_caffe(array), 5, 1e-4, 0.75, 1.0))


def test_dropout_drops_each_number_by_itself_and_only_in_training():
    x, array = image(50), np.ones((1, 20, 20, 50), "float32")
    model = net(x, dropout(x, 0.4, name="d"))
    np.testing.assert_array_equal(model.predict_on_batch(array), array)
    trained = keras.ops.convert_to_numpy(model(array, training=True))
    kept = trained > 0
    np.testing.assert_allclose(trained[kept], 1 / 0.6, rtol=1e-6)
    assert abs(kept.mean() - 0.6) < 0.02
    assert len(np.unique(kept.reshape(-1, 50), axis=0)) == 400  # whole maps would be 1


def test_each_dropout_draws_for_itself_and_all_by_the_seed_that_was_set():
    array, masks = np.ones((1, 20, 20, 50), "float32"), []
    for seed in (1, 1, 2):
        keras.utils.set_random_seed(seed)
        x = image(50)
        dropped = [dropout(x, 0.5, name=name).tensor for name in ("drop6", "drop7")]
        found = keras.Model(x.tensor, dropped)(array, training=True)
        masks.append([keras.ops.convert_to_numpy(y) > 0 for y in found])
    first, again, other = masks
    np.testing.assert_array_equal(again, first)
    for one, two in ((first[0], first[1]), (first[0], other[0])):
        assert abs((one == two).mean() - 0.5) < 0.02


def test_scaling_multiplies_by_a_constant():
    x, array = image(), noise(1, 3, 4, 3)
    np.testing.assert_allclose(
        net(x, scale(x, 1e-2, name="s")).predict_on_batch(array), array * 1e-2, 1e-6
    )


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        (add, lambda a, b: oracle.eltwise_sum(a, b)),
        (average, lambda a, b: oracle.eltwise_sum(a, b, coefficients=[0.5, 0.5])),
        (lambda a, b, name: concat([a, b], name=name), lambda a, b: np.hstack([a, b])),
    ],
    ids=["add", "average", "concat"],
)
def test_maps_of_one_grid_are_merged_as_in_caffe(merge, expected):
    xs = [image(), image()]
    y = merge(*xs, name="m")
    model = keras.Model([x.tensor for x in xs], y.tensor)
    arrays = [noise(2, 3, 5, 3, seed=seed) for seed in (1, 2)]
    found = oracle.to_caffe(model.predict_on_batch(arrays))
    close(found, expected(*map(oracle.to_caffe, arrays)))
    assert y.grid == Grid()


def test_an_average_of_two_streams_belongs_to_neither():
    color, hha = image(suffix="color"), image(suffix="hha")
    fused = average(color, hha, name="score_fused")
    assert fused.suffix == ""
    assert fused.tensor._keras_history.operation.name == "score_fused"


@pytest.mark.parametrize(
    "merge", [add, average, lambda *xs, name: concat(xs, name=name)]
)
def test_maps_of_two_grids_are_not_merged(merge):
    with pytest.raises(ValueError, match="expected one grid") as error:
        merge(image(grid=Grid(2, 1)), image(), name="fuse_pool4")
    assert str(error.value) == (
        "fuse_pool4 was given maps on [Grid(stride=1.0, start=0.0), Grid(stride=2, "
        "start=1)]; expected one grid: crop the maps onto each other first."
    )


# Upsampling and cropping


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("start", "kernel", "offset"), [(0.5, 8, 3), (-11.5, 8, 15), (0, 7, 3), (3, 7, 0)]
)
def test_a_score_is_upsampled_and_cropped_to_where_the_other_lies(
    learned, start, kernel, offset
):
    x, onto = image(2, grid=Grid(4, start)), image(1)
    up = upsample(x, 4, onto, name="u", learned=learned)
    y = crop_like(up, onto, name="c")
    assert y.grid == onto.grid
    array, other = noise(1, 5, 6, 2), noise(1, 8, 9, 1)
    model = keras.Model([x.tensor, onto.tensor], y.tensor)
    found = oracle.to_caffe(model.predict_on_batch([array, other]))
    array, other = oracle.to_caffe(array), oracle.to_caffe(other)
    filler = oracle.bilinear_filler(2, kernel)
    whole = oracle.deconvolution(array, filler, stride=4)
    close(found, oracle.crop(whole, other, offset))


def test_only_a_learned_upsampling_has_weights():
    x = image(grid=Grid(2, 0.5))
    fixed = net(x, upsample(x, 2, image(), name="u"))
    learned = net(x, upsample(x, 2, image(), name="u", learned=True))
    assert [w.shape for w in learned.get_weights()] == [(4, 4, 3, 3)]
    assert not fixed.get_weights()


@pytest.mark.usefixtures("_mixed_precision")
@pytest.mark.parametrize("learned", [False, True])
def test_scores_are_fused_in_full_precision(learned):
    x, onto = image(grid=Grid(2, 0.5)), image()
    up = upsample(x, 2, onto, name="u", learned=learned)
    cropped = crop_like(onto._replace(grid=up.grid), up, name="c")
    for y in (up, cropped, add(up, cropped, name="a"), average(up, cropped, name="b")):
        assert y.tensor.dtype == "float32"
    assert conv(x, 4, 1, name="conv").tensor.dtype == "bfloat16"
