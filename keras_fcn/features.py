"""Layers that know where their cells lie: each adds a layer *and* composes a grid."""

import random
from typing import Any, NamedTuple

import keras
from keras import layers

from keras_fcn.geometry import Grid, bilinear_kernel_size
from keras_fcn.kernels import (
    AveragePooling2D,
    BatchNormalization,
    Conv2D,
    MaxPooling2D,
)
from keras_fcn.layers import (
    BilinearKernel,
    BilinearUpsampling,
    CropLike,
    LocalResponseNormalization,
)


class Feature(NamedTuple):
    """A feature map and where it lies on the image.

    Args:
        tensor: (batch, height, width, channels), a Keras tensor.
        grid: The `Grid` of its cells.
        suffix: Appended to the names of the layers on it, as Caffe's two-stream nets
            name theirs (`conv1_1color`, `conv1_1hha`).
        kernel_initializer: For the convolutions on it. Nets whose weights are about
            to be loaded use "zeros": drawing 134 M random numbers takes seconds.
        batch_norm: Whether the hidden convolutions on it are normalised, as in no
            published net: `batch_norm.fold_batch_norm` takes that out after training.
    """

    tensor: Any
    grid: Grid = Grid()
    suffix: str = ""
    kernel_initializer: str = "he_normal"
    batch_norm: bool = False

    def then(self, layer, grid=None):
        """Returns the feature that a Keras layer makes of this one.

        Args:
            layer: A Keras layer, from (batch, height, width, channels) to such a map.
            grid: The new `Grid`, if the layer moves cells; this one's if None.
        """
        return self._replace(tensor=layer(self.tensor), grid=grid or self.grid)


def conv(x, filters, kernel, *, name, stride=1, pad=0, groups=1, activation="relu"):
    """Returns `x` convolved, with bias; score layers (no activation) start at zero.

    Args:
        x: A `Feature`.
        filters: Channels of the result.
        kernel: Cells along each side of the kernel.
        name: Of the layer, before the suffix of `x`.
        stride: Cells of `x` per cell of the result.
        pad: Cells of zeros around `x`, on every side.
        groups: Parts of the channels that are convolved apart, as in AlexNet.
        activation: A name that Keras knows, or None for a score layer, which is not
            normalised either and stays in the weights' precision.

    Raises:
        ValueError: If the groups do not divide the channels, in Keras' words.
    """
    name += x.suffix
    grid = x.grid.window(kernel, stride, pad)
    same = stride == 1 and 2 * pad == kernel - 1
    if pad and not same:
        x = x.then(layers.ZeroPadding2D(pad, name=f"{name}_pad"))
    normalized = activation and x.batch_norm
    layer = Conv2D(
        int(filters),  # NumPy's own would not go into a checkpoint's JSON
        kernel,
        stride,
        padding="same" if same else "valid",
        groups=groups,
        activation=None if normalized else activation,
        kernel_initializer=x.kernel_initializer if activation else "zeros",
        dtype=None if activation else _full_precision(),
        name=name,
    )
    x = x.then(layer, grid)
    if activation:  # what a clone draws by, be this one about to be loaded
        layer.kernel_initializer = keras.initializers.get("he_normal")
    if normalized:
        x = x.then(BatchNormalization(momentum=0.97, name=f"{name}_bn"))
        x = x.then(layers.Activation(activation, name=f"{name}_relu"))
    return x


def max_pool(x, kernel, stride, *, name, pad=0):
    """Returns the maxima of non-negative `x`, its size rounded up as in Caffe.

    Args:
        x: A `Feature` without negative numbers: zeros pad it.
        kernel: Cells along each side of a window.
        stride: Cells from one window to the next.
        name: Of the layer, before the suffix of `x`.
        pad: Cells around `x`, on every side.
    """
    name += x.suffix
    grid = x.grid.window(kernel, stride, pad)
    # Where "same" pads as Caffe does: around stride 1, and below and right of 2 by 2.
    same = kernel == stride == 2 or (stride == 1 and 2 * pad == kernel - 1)
    if not same:
        edges = (pad, pad + stride - 1)  # a zero beats no maximum of a ReLU
        x = x.then(layers.ZeroPadding2D((edges, edges), name=f"{name}_pad"))
    padding = "same" if same else "valid"
    return x.then(MaxPooling2D(kernel, stride, padding, name=name), grid)


def average_pool(x, kernel, *, name):
    """Returns the means of `x` over kernel by kernel cells, at stride 1.

    Args:
        x: A `Feature`, `kernel` cells high and wide at least.
        kernel: Cells along each side of a window.
        name: Of the layer, before the suffix of `x`.
    """
    layer = AveragePooling2D(kernel, 1, name=name + x.suffix)
    return x.then(layer, x.grid.window(kernel))


def lrn(x, *, name):
    """Returns `x` normalised across channels, with the constants of every Caffe net.

    Args:
        x: A `Feature`.
        name: Of the layer, before the suffix of `x`.
    """
    return x.then(LocalResponseNormalization(name=name + x.suffix))


def dropout(x, rate, *, name):
    """Returns `x` with each number dropped by itself at `rate`, in training only.

    Args:
        x: A `Feature`.
        rate: Probability, from 0 and below 1; what is kept is divided by 1 - rate.
        name: Of the layer, before the suffix of `x`.
    """
    # A seed, set by `keras.utils.set_random_seed`: without one PyTorch draws from a
    # generator of its own, whose state no snapshot of a training holds.
    seed = random.randint(1, 10**9)
    return x.then(layers.Dropout(rate, seed=seed, name=name + x.suffix))


def scale(x, factor, *, name):
    """Returns `x` times a constant (Caffe's frozen Scale layer, voc-fcn8s-atonce).

    Args:
        x: A `Feature`.
        factor: A number, which is not trained.
        name: Of the layer, before the suffix of `x`.
    """
    return x.then(layers.Rescaling(float(factor), name=name + x.suffix))


def concat(xs, *, name):
    """Returns maps of one grid as one map, their channels in the order given.

    Args:
        xs: A list of `Feature`.
        name: Of the layer, before the suffix of the first.

    Raises:
        ValueError: If their grids differ.
    """
    return _merge(layers.Concatenate(name=name + xs[0].suffix), xs)


def add(*xs, name):
    """Returns the sum of maps of one grid.

    Args:
        xs: The `Feature` of each, of as many channels.
        name: Of the layer.

    Raises:
        ValueError: If their grids differ.
    """
    return _merge(layers.Add(dtype=_full_precision(), name=name), xs)


def average(*xs, name):
    """Returns the mean of maps of one grid, named without their suffixes.

    Args:
        xs: The `Feature` of each, of as many channels.
        name: Of the layer.

    Raises:
        ValueError: If their grids differ.
    """
    layer = layers.Average(dtype=_full_precision(), name=name)
    return _merge(layer, xs)._replace(suffix="")


def upsample(x, factor, onto, *, name, learned=False):
    """Returns `x` upsampled bilinearly to where `crop_like` can lay it onto another.

    Args:
        x: A score `Feature`.
        factor: Cells out per cell in.
        onto: The `Feature` to be laid onto; its grid decides the kernel's parity.
        name: Of the layer.
        learned: Dense transposed convolution with weights, bilinear at start, in
            place of the fixed one.

    Raises:
        ValueError: If no bilinear kernel lands on whole cells of `onto`, as in
            `keras_fcn.geometry.bilinear_kernel_size`.
    """
    kernel = bilinear_kernel_size(x.grid, factor, onto.grid)
    if learned:
        layer = layers.Conv2DTranspose(
            x.tensor.shape[-1],
            kernel,
            factor,
            use_bias=False,
            kernel_initializer=BilinearKernel(),
            dtype=_full_precision(),
            name=name,
        )
    else:
        layer = BilinearUpsampling(factor, kernel, dtype=_full_precision(), name=name)
    return x.then(layer, x.grid.upsample(kernel, factor))


def crop_like(x, onto, *, name):
    """Returns `x` from the cell that lies on the first cell of `onto`, and as large.

    Args:
        x: A `Feature`; what it ends short of `onto` stays missing.
        onto: The `Feature` to be laid onto, of the same stride.
        name: Of the layer.

    Raises:
        ValueError: If the strides differ, or if that cell is none of `x`, as in
            `keras_fcn.geometry.Grid.offset`.
    """
    offset = x.grid.offset(onto.grid)
    layer = CropLike(offset, dtype=_full_precision(), name=name)
    return x._replace(tensor=layer([x.tensor, onto.tensor]), grid=x.grid.crop(offset))


def crop_alike(x, y, *, names):
    """Returns two features of one stride, cropped to the cells that both have.

    Args:
        x: A `Feature`.
        y: Another.
        names: Of the layers that crop `x` and `y`.
    """
    if x.grid.start > y.grid.start:  # the one that begins further out is cropped first
        return crop_alike(y, x, names=names[::-1])[::-1]
    x = crop_like(x, y, name=names[0])
    return x, crop_like(y, x, name=names[1])


def _merge(layer, xs):
    grids = {x.grid for x in xs}
    if len(grids) > 1:
        raise ValueError(
            f"{layer.name} was given maps on {sorted(grids)}; expected one grid: crop "
            "the maps onto each other first."
        )
    return xs[0]._replace(tensor=layer([x.tensor for x in xs]))


def _full_precision():
    # Scores are small maps: under mixed precision they stay in the weights' dtype.
    return keras.config.dtype_policy().variable_dtype
