"""Thin nets with drawn weights, and pictures for them."""

import numpy as np
import oracle

from keras_fcn import models


def build(backbone="vgg16", stride=8, num_classes=3, *, width=1 / 32, **arguments):
    """A net with weights drawn by NumPy, the same on every backend."""
    model = {"backbone": backbone, "stride": stride, "num_classes": num_classes}
    return oracle.draw(models.build({"model": {**model, "width": width, **arguments}}))


def pictures(height=9, width=14, channels=3, batch=1, seed=0):
    rng = np.random.default_rng(seed)
    shape = (batch, height, width, channels)
    return rng.integers(0, 256, shape).astype("float32")


def predict(model, x):
    return model.predict_on_batch(x)


def assert_close(found, expected, relative=1e-5):
    assert np.abs(found - expected).max() <= relative * np.abs(expected).max()


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]
