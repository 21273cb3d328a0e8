"""Keras' own layers and crops, where a backend has a faster way to the same numbers.

A map smaller than a window is refused here, too: each backend has words of its own for
it, and JAX may make it a map of no cells.

The one place, beside `devices`, that names backends, each in the functions of its own.
Keras hands PyTorch a copy of each map in another order of its axes, and composes batch
normalisation of small steps; neither is needed.
"""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_fcn")
class Conv2D(keras.layers.Conv2D):
    """Keras' own, without copies on PyTorch.

    Input shape: `(batch, h, w, channels)`.
    Output shape: `(batch, h', w', filters)`, as Keras'.
    """

    def convolution_op(self, inputs, kernel):
        """Returns `inputs` convolved with `kernel`, (height, width, in, out).

        Raises:
            ValueError: If a map is smaller than the kernel.
        """
        _check_size(self, inputs, self.kernel_size)
        pads = _pads_of_torch(self, self.kernel_size)
        if pads is None:
            return super().convolution_op(inputs, kernel)
        from torch.nn.functional import conv2d

        y = conv2d(
            _channels_first(inputs),
            ops.convert_to_tensor(kernel).permute(3, 2, 0, 1),
            stride=self.strides,
            padding=pads,
            dilation=self.dilation_rate,
            groups=self.groups,
        )
        return y.permute(0, 2, 3, 1)


@keras.saving.register_keras_serializable("keras_fcn")
class MaxPooling2D(keras.layers.MaxPooling2D):
    """Keras' own, without copies on PyTorch.

    Input shape: `(batch, h, w, channels)`.
    Output shape: `(batch, h', w', channels)`, as Keras'.
    """

    def call(self, inputs):
        """Returns `inputs` pooled.

        Raises:
            ValueError: If a map is smaller than a window.
        """
        _check_size(self, inputs, self.pool_size)
        pads = _pads_of_torch(self, self.pool_size)
        if pads is None:
            return super().call(inputs)
        from torch.nn.functional import max_pool2d

        x = _channels_first(inputs)
        y = max_pool2d(x, self.pool_size, self.strides, padding=pads)
        return y.permute(0, 2, 3, 1)


@keras.saving.register_keras_serializable("keras_fcn")
class AveragePooling2D(keras.layers.AveragePooling2D):
    """Keras' own, but that a map smaller than a window is refused in a sentence.

    Input shape: `(batch, h, w, channels)`.
    Output shape: `(batch, h', w', channels)`, as Keras'.
    """

    def call(self, inputs):
        """Returns the means of `inputs`.

        Raises:
            ValueError: If a map is smaller than a window.
        """
        _check_size(self, inputs, self.pool_size)
        return super().call(inputs)


def _check_size(layer, x, size):
    """Refuses a map without a single window, where its size is known by now."""
    if layer.padding != "valid" or layer.data_format != "channels_last":
        return
    for cells, span in zip(x.shape[1:3], _spans(layer, size), strict=True):
        if isinstance(cells, int) and cells <= span:
            raise ValueError(
                f"{layer.name} was given a map of {x.shape[1]} by {x.shape[2]} cells, "
                f"and its window is {size[0]} by {size[1]}; expected one window at "
                "least: take a larger picture."
            )


def _spans(layer, size):
    """Cells from the first to the last of a window, (down, across)."""
    rates = getattr(layer, "dilation_rate", (1, 1))
    return [(n - 1) * rate for n, rate in zip(size, rates, strict=True)]


def _pads_of_torch(layer, size):
    """What PyTorch has to pad for a layer, or None where it is not to do the work."""
    if keras.config.backend() != "torch" or layer.data_format != "channels_last":
        return None
    if layer.padding == "valid":
        return (0, 0)
    spans = _spans(layer, size)
    if max(layer.strides) > 1 or any(span % 2 for span in spans):
        return None  # not as much on either side
    return tuple(span // 2 for span in spans)


def _channels_first(x):
    return ops.convert_to_tensor(x).permute(0, 3, 1, 2)


def window(x, start, height, width):
    """Returns a part of `x`: TensorFlow's brackets have a slow gradient, of strides.

    Args:
        x: (batch, h, w, channels).
        start: The part's first row and column.
        height: Of the part, at most; less where `x` ends before.
        width: The same.
    """
    if keras.config.backend() != "tensorflow":
        return x[:, start : start + height, start : start + width]
    import tensorflow as tf

    batch, *ends, channels = ops.shape(x)
    starts = tf.minimum(start, ends)
    size = tf.minimum([height, width], ends - starts)
    begin = tf.concat([[0], starts, [0]], 0)
    return tf.slice(x, begin, tf.concat([[batch], size, [channels]], 0))


@keras.saving.register_keras_serializable("keras_fcn")
class BatchNormalization(keras.layers.BatchNormalization):
    """Keras' own, by TensorFlow's and PyTorch's one kernel for it in training.

    What that kernel cannot do, such as renormalisation, stays as Keras does it.

    Input shape: `(batch, h, w, channels)`.
    Output shape: the same.
    """

    def call(self, x, training=None):
        """Returns `x`, (batch, h, w, channels), normalised."""
        kernel = {"tensorflow": _normalize_tensorflow, "torch": _normalize_torch}
        normalize = kernel.get(keras.config.backend())
        plain = self.axis in (-1, 3) and self.scale and self.center
        plain = plain and not (self.renorm or self.synchronized)
        plain = plain and keras.backend.standardize_dtype(x.dtype) != "float64"
        plain = plain and tuple(x.shape[:3]) != (1, 1, 1)  # a cell: PyTorch refuses it
        if not (training and self.trainable and normalize and plain):
            return super().call(x, training=training)
        gamma, beta = map(ops.convert_to_tensor, (self.gamma, self.beta))
        y, mean, variance = normalize(x, gamma, beta, self.epsilon)
        cells = ops.cast(ops.size(x) / x.shape[-1], variance.dtype)
        variance = variance * (cells - 1) / cells  # Keras' is not the unbiased one
        for moving, now in (
            (self.moving_mean, mean),
            (self.moving_variance, variance),
        ):
            moving.assign(self.momentum * moving + (1 - self.momentum) * now)
        return y


def _normalize_tensorflow(x, gamma, beta, epsilon):
    from tensorflow.raw_ops import FusedBatchNormV3

    options = {"epsilon": epsilon, "is_training": True, "mean": [], "variance": []}
    return FusedBatchNormV3(x=x, scale=gamma, offset=beta, **options)[:3]


def _normalize_torch(x, gamma, beta, epsilon):
    from torch import zeros_like
    from torch.nn.functional import batch_norm

    mean, variance = zeros_like(beta), zeros_like(beta)
    x = _channels_first(x)
    y = batch_norm(x, mean, variance, gamma, beta, True, momentum=1.0, eps=epsilon)
    return y.permute(0, 2, 3, 1), mean, variance
