"""Batch normalisation, put into a net and folded away again."""

import itertools

import keras
import numpy as np
import pytest
from nets import assert_close, build, layers_of, pictures, predict

from keras_fcn import batch_norm, training, weights
from keras_fcn.backbones import BACKBONES

NORM = keras.layers.BatchNormalization


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_normalised_net_is_folded_into_the_plain_one_of_the_same_logits(backbone):
    model, twin = build(backbone, batch_norm=True), build(backbone)
    rng = np.random.default_rng(0)
    for norm in layers_of(model, NORM):
        drawn = rng.uniform(0.5, 1.5, (4, *norm.gamma.shape)).astype("float32")
        norm.set_weights(list(drawn))
    plain = batch_norm.fold_batch_norm(model)
    assert [v.path for v in plain.weights] == [v.path for v in twin.weights]
    assert_close(predict(plain, pictures(45, 67)), predict(model, pictures(45, 67)))
    assert np.ptp(predict(plain, pictures(45, 67))) > 0


def test_a_normalised_net_that_learns_is_folded_as_it_predicts():
    model = build("alexnet", batch_norm=True)
    training.compile_modern(model, 20, averaging=None)
    x = pictures(40, 40, batch=4)
    before = [norm.get_weights() for norm in layers_of(model, NORM)]
    model.fit(x, np.int32(x[..., 0] // 86), epochs=2, verbose=0)
    for norm, then in zip(layers_of(model, NORM), before, strict=True):
        for number, earlier in zip(norm.get_weights(), then, strict=True):
            assert (number != earlier).any()
    assert_close(predict(batch_norm.fold_batch_norm(model), x), predict(model, x))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_normalisation_can_be_put_into_a_trained_net_without_changing_it(backbone):
    plain, model = build(backbone), build(backbone, batch_norm=True)
    names = [norm.name.removesuffix("_bn") for norm in layers_of(model, NORM)]
    for size, name in zip(itertools.cycle((0.02, 50)), names, strict=False):
        kernel, bias = plain.get_layer(name).get_weights()
        plain.get_layer(name).set_weights([size * kernel, bias + size])
    weights.transplant(plain, model)
    batch_norm.fit_batch_norm(model, pictures(45, 67, batch=2))
    x = pictures(45, 67, seed=1)
    assert_close(predict(model, x), predict(plain, x))
    for name in names:
        kernel, bias = model.get_layer(name).get_weights()
        drawn = (2 / np.prod(kernel.shape[:3])) ** 0.5
        assert np.square(kernel).mean() ** 0.5 == pytest.approx(drawn, rel=1e-5)
        # In training the statistics are the batch's: those that were put in, at first.
        norm = model.get_layer(f"{name}_bn")
        gamma, beta, mean, variance = norm.get_weights()
        factor = bias[0] / plain.get_layer(name).get_weights()[1][0]
        np.testing.assert_allclose(mean, factor * beta, rtol=1e-5)
        undone = (factor * gamma) ** 2 - norm.epsilon
        np.testing.assert_allclose(undone, variance, rtol=1e-3, atol=1e-6)


def test_the_normalisation_of_a_net_without_is_not_fitted():
    with pytest.raises(ValueError, match="fcn8s_vgg16 has no batch normalisation to"):
        batch_norm.fit_batch_norm(build("vgg16"), pictures(9, 9))
