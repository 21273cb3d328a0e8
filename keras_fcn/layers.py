"""The layers of Caffe's FCNs that Keras lacks.

All take and give channels-last tensors.
"""

import keras
import numpy as np
from keras import ops

from keras_fcn.kernels import window


def bilinear_line(kernel_size):
    """Returns the bilinear kernel of one axis, (kernel_size,) float32.

    The outer product of two such lines is Caffe's `BilinearFiller` for odd and even
    sizes alike (`upsample_filt` in the reference's surgery.py).

    Args:
        kernel_size: Cells, from 1.
    """
    factor = (kernel_size + 1) // 2
    center = (kernel_size - 1) / 2 if kernel_size % 2 else factor - 0.5
    line = 1 - np.abs(np.arange(kernel_size) - center) / factor
    return line.astype("float32")


@keras.saving.register_keras_serializable("keras_fcn")
class BilinearKernel(keras.initializers.Initializer):
    """Fills a transposed convolution so that it interpolates each channel by itself.

    The kernel has shape (size, size, out, in): the bilinear kernel where out = in,
    zero elsewhere (`interp` in the reference's surgery.py).
    """

    def __call__(self, shape, dtype=None):
        """Returns the kernel; raises ValueError unless it is square, size and channels.

        Args:
            shape: (size, size, channels, channels).
            dtype: Of the result; Keras' default if None.
        """
        if shape[0] != shape[1] or shape[2] != shape[3]:
            raise ValueError(
                f"A bilinear kernel of shape {tuple(shape)} was asked for; expected "
                "(size, size, channels, channels)."
            )
        line = bilinear_line(shape[0])
        kernel = np.zeros(shape, "float32")
        channels = np.arange(shape[2])
        kernel[:, :, channels, channels] = np.outer(line, line)[:, :, None]
        return ops.convert_to_tensor(kernel, dtype or keras.config.floatx())


@keras.saving.register_keras_serializable("keras_fcn")
class BilinearUpsampling(keras.layers.Layer):
    """Upsamples every channel by itself with a fixed bilinear kernel.

    Equal to a transposed convolution with the kernel of `BilinearKernel`, without
    its zeros: the cost is linear in the number of channels. Near the border fewer
    cells contribute and nothing is renormalised, as in Caffe.

    Args:
        factor: Cells out per cell in.
        kernel_size: `2 * factor`, or `2 * factor - 1`.

    Raises:
        ValueError: If `kernel_size` is another.

    Input shape: `(batch, h, w, channels)`.
    Output shape: `(batch, factor * (h - 1) + kernel_size, ..., channels)`.
    """

    def __init__(self, factor, kernel_size, **kwargs):  # Keras' own name and dtype
        super().__init__(**kwargs)
        if kernel_size not in (2 * factor, 2 * factor - 1):
            raise ValueError(
                f"A bilinear kernel of {kernel_size} for factor {factor} was asked "
                f"for; expected {2 * factor} or {2 * factor - 1}."
            )
        self.factor = factor
        self.kernel_size = kernel_size

    def call(self, x):
        """Returns `x`, (batch, h, w, channels), upsampled."""
        sides = [self.factor * (n - 1) + self.kernel_size for n in ops.shape(x)[1:3]]
        return window(self._stretch(self._stretch(x, axis=1), axis=2), 0, *sides)

    def _stretch(self, x, axis):
        # The kernel is two cells wide, so output cell factor * i + phase is a mean
        # of the input cells i and i - 1: all phases at once are one outer product.
        before, after = [(0, 0)] * 4, [(0, 0)] * 4
        before[axis], after[axis] = (1, 0), (0, 1)
        line = np.zeros(2 * self.factor, "float32")
        line[: self.kernel_size] = bilinear_line(self.kernel_size)
        near, far = (
            ops.convert_to_tensor(half.reshape([-1] + [1] * (3 - axis)), x.dtype)
            for half in np.split(line, 2)
        )
        cells = ops.expand_dims(ops.pad(x, after), axis + 1)
        previous = ops.expand_dims(ops.pad(x, before), axis + 1)
        phases = near * cells + far * previous
        shape = list(ops.shape(x))
        size = self.factor * (shape[axis] + 1)
        return ops.reshape(phases, [*shape[:axis], size, *shape[axis + 1 :]])

    def compute_output_shape(self, shape):
        """Returns the output's shape for an input of `shape`."""
        sides = [
            None if n is None else self.factor * (n - 1) + self.kernel_size
            for n in shape[1:3]
        ]
        return (shape[0], *sides, shape[3])

    def get_config(self):
        """Returns what rebuilds the layer."""
        sizes = {"factor": self.factor, "kernel_size": self.kernel_size}
        return {**super().get_config(), **sizes}


@keras.saving.register_keras_serializable("keras_fcn")
class CropLike(keras.layers.Layer):
    """Crops a feature map to the height and width of another.

    The crop starts `offset` cells in and ends where the reference does, or
    where the map itself ends if that comes first.

    Args:
        offset: Cells to drop above and to the left.

    Input shape: `[(batch, H, W, channels), (batch, h, w, any)]`.
    Output shape: `(batch, min(h, H - offset), min(w, W - offset), channels)`.
    """

    def __init__(self, offset, **kwargs):  # Keras' own name and dtype
        super().__init__(**kwargs)
        self.offset = offset

    def call(self, inputs):
        """Returns the first of `inputs`, cropped to the second."""
        x, reference = inputs
        return window(x, self.offset, *ops.shape(reference)[1:3])

    def compute_output_shape(self, shapes):
        """Returns the output's shape for inputs of `shapes`."""
        x, reference = shapes
        sides = [
            None if None in (n, m) else max(0, min(m, n - self.offset))
            for n, m in zip(x[1:3], reference[1:3], strict=True)
        ]
        return (x[0], *sides, x[3])

    def get_config(self):
        """Returns what rebuilds the layer."""
        return {**super().get_config(), "offset": self.offset}


@keras.saving.register_keras_serializable("keras_fcn")
class LocalResponseNormalization(keras.layers.Layer):
    """Normalises each cell by its neighbours in channel order, as Caffe's LRN does.

    `y = x * (k + alpha / size * sum of x^2 over the size channels around) ^ -beta`;
    alpha is divided by the size (Krizhevsky et al., 2012, section 3.3, does not).

    Args:
        size: Channels in the window, odd.
        alpha: Scale of the sum.
        beta: Exponent.
        k: Added to the sum.

    Input shape: `(batch, h, w, channels)`.
    Output shape: the same.
    """

    def __init__(self, size=5, alpha=1e-4, beta=0.75, k=1.0, **kwargs):
        super().__init__(**kwargs)  # Keras' own name and dtype
        self.size = size
        self.alpha = alpha
        self.beta = beta
        self.k = k

    def call(self, x):
        """Returns `x`, (batch, h, w, channels), normalised."""
        wide = ops.cast(x, self.variable_dtype)  # squares overflow float16
        channel = np.arange(x.shape[-1])
        near = np.abs(channel[:, None] - channel) <= self.size // 2
        total = ops.matmul(ops.square(wide), ops.cast(near, wide.dtype))
        scale = self.k + self.alpha / self.size * total
        if self.beta == 0.75:  # of every Caffe net: two roots are faster than a power
            root = ops.rsqrt(scale)
            return ops.cast(wide * (root * ops.sqrt(root)), x.dtype)
        return ops.cast(wide * ops.power(scale, -self.beta), x.dtype)

    def compute_output_shape(self, shape):
        """Returns `shape`."""
        return shape

    def get_config(self):
        """Returns what rebuilds the layer."""
        names = ("size", "alpha", "beta", "k")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable("keras_fcn")
class Preprocess(keras.layers.Layer):
    """Turns pictures into what a Caffe net was trained on: channel order and mean.

    Args:
        channels: The order of the output's channels, letters of the input's: "BGR"
            for a net trained on reversed pictures, "RGB" for one that was not (HHA),
            "BGRD" with depth. D comes in millimetres and becomes its natural log.
        mean: One number per output channel, to subtract.

    Raises:
        ValueError: If the letters are not RGB or RGBD, or not as many as the means.

    Input shape: `(batch, height, width, channels)`, RGB 0-255, or RGBD.
    Output shape: the same.
    """

    def __init__(self, channels, mean, **kwargs):  # Keras' own name and dtype
        super().__init__(**kwargs)
        if len(channels) != len(mean) or sorted(channels) != sorted(
            "RGBD"[: len(mean)]
        ):
            raise ValueError(
                f"Preprocessing with channels {channels!r} and mean {mean!r} was asked "
                'for; expected the letters RGB or RGBD in some order, such as "BGR", '
                "and as many means."
            )
        self.channels = channels
        self.mean = [float(number) for number in mean]

    def call(self, x):
        """Returns `x`, reordered, minus the mean."""
        x = ops.cast(x, self.compute_dtype)  # uint8 would have no room for it
        planes = []
        for channel in self.channels:
            plane = x[..., "RGBD".index(channel)]
            # 1 mm: where a sensor saw nothing it says 0, which has no logarithm
            planes.append(ops.log(ops.maximum(plane, 1)) if channel == "D" else plane)
        return ops.stack(planes, axis=-1) - ops.convert_to_tensor(self.mean, x.dtype)

    def compute_output_shape(self, shape):
        """Returns `shape`."""
        return shape

    def get_config(self):
        """Returns what rebuilds the layer."""
        return {
            **super().get_config(),
            "channels": self.channels,
            "mean": self.mean,
        }
