"""Batch normalisation for training alone: put into a net, and folded away again."""

import keras
import numpy as np

from keras_fcn import weights as weight_files
from keras_fcn.models import build
from keras_fcn.saving import describe


def fold_batch_norm(model):
    """Returns the plain net that a trained one with batch normalisation amounts to.

    At prediction a normalised convolution is a convolution with another kernel and
    bias (Ioffe & Szegedy, 2015, section 3.1).

    Args:
        model: A net that `fcn(..., batch_norm=True)` built; it stays as it is.

    Returns:
        The `keras.Model` that `fcn` builds without: the same logits up to rounding. Of
        a net that has none, a copy.

    Raises:
        ValueError: If `fcn` did not build it.
    """
    facts = describe(model)
    plain = build({**facts, "model": {**facts["model"], "batch_norm": False}})
    weight_files.transplant(model, plain)
    for norm in _batch_norms(model):
        name = norm.name.removesuffix("_bn")
        gamma, beta, mean, variance = map(weight_files.to_numpy, norm.weights)
        kernel, bias = map(weight_files.to_numpy, plain.get_layer(name).weights)
        factor = gamma / np.sqrt(variance + norm.epsilon)
        plain.get_layer(name).set_weights(
            [kernel * factor, (bias - mean) * factor + beta]
        )
    return plain


def fit_batch_norm(model, pictures):
    """Makes the normalisation of a net one that changes nothing, as far as it can.

    For a net that was given weights of one without: each layer's statistics become
    those of the pictures, its scale and offset what undoes them. Kernels get the size
    of drawn ones (He et al., 2015), which the normalisation undoes, too: those of a
    folded net may be smaller by far, and a step of training would change them more.

    Args:
        model: A net that `fcn(..., batch_norm=True)` built.
        pictures: (batch, height, width, channels), what the net is fed.

    Raises:
        ValueError: If the net has no batch normalisation.
    """
    norms = _batch_norms(model)
    if not norms:
        raise ValueError(
            f"{model.name} has no batch normalisation to fit; expected a net that "
            "fcn(..., batch_norm=True) built."
        )
    for norm in norms:
        none = np.zeros(norm.gamma.shape, "float32")
        norm.set_weights([none + 1, none, none, none + 1 - norm.epsilon])
    inputs = keras.Model(model.input, [norm.input for norm in norms])
    for norm, x in zip(norms, inputs.predict_on_batch(pictures), strict=True):
        x = np.asarray(x, "float32")  # under mixed precision a sum would stop growing
        mean, variance = x.mean(axis=(0, 1, 2)), x.var(axis=(0, 1, 2))
        factor = _to_drawn_size(model.get_layer(norm.name.removesuffix("_bn")))
        variance = factor**2 * variance
        gamma = np.sqrt(variance + norm.epsilon) / factor
        norm.set_weights([gamma, mean, factor * mean, variance])


def _to_drawn_size(layer):
    """Multiplies a convolution so that its kernel is as large as a drawn one."""
    kernel, bias = map(weight_files.to_numpy, layer.weights)
    size = np.sqrt(np.square(kernel).mean())
    factor = np.sqrt(2 / kernel[..., 0].size) / size if size else np.float32(1)
    layer.set_weights([factor * kernel, factor * bias])
    return factor


def _batch_norms(model):
    kind = keras.layers.BatchNormalization
    return [layer for layer in model.layers if isinstance(layer, kind)]
