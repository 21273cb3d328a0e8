"""A score per pixel without upsampling (Long et al., 2015, section 3.2).

Two ways that give the same numbers: to run a net on every shift of its input, and to
take the strides out of it.
"""

import functools
import itertools

import keras
import numpy as np
from keras import layers, ops

from keras_fcn.kernels import (
    AveragePooling2D,
    BatchNormalization,
    Conv2D,
    MaxPooling2D,
)
from keras_fcn.layers import LocalResponseNormalization, Preprocess
from keras_fcn.weights import check_inputs, transplant

CONVOLUTIONS = (layers.Conv2D, Conv2D)
MAX_POOLINGS = (layers.MaxPooling2D, MaxPooling2D)
AVERAGE_POOLINGS = (layers.AveragePooling2D, AveragePooling2D)
# What works on each cell by itself does so at any stride.
CELL_BY_CELL = (
    layers.Activation,
    layers.Add,
    layers.Average,
    layers.BatchNormalization,
    layers.Concatenate,
    layers.Dropout,
    layers.Identity,
    layers.LeakyReLU,
    layers.Maximum,
    layers.Multiply,
    layers.ReLU,
    layers.Rescaling,
    layers.Softmax,
    layers.SpatialDropout2D,
    layers.Subtract,
    BatchNormalization,
    LocalResponseNormalization,
    Preprocess,
)
FAR = 2**20  # pixels: so many strides that a cell more or less does not count


def shift_and_stitch(model, images, stride):
    """Runs a net on every shift of its input and interlaces what it says.

    The images are shifted right by x and down by y pixels, for all x and y from 0 to
    stride - 1. Zeros fill what becomes free, and as much at the other end as makes all
    shifted images stride - 1 pixels larger. If the net's output lies on the `Grid`
    `(stride, start)`, cell i of shift x is centred on pixel `start + stride * i - x`.
    The result lies on `Grid(1, start)`: its cell n is cell `(n + x) / stride` of that
    shift x for which this is whole. It ends with the last cell whose window ends
    within the image and the net's padding, so that it is as large as `rarefy` makes it.

    Args:
        model: A net with one input, (batch, height, width, channels) of any size, and
            one output, (batch, h, w, classes). If it has a layer `Preprocess`, the
            zeros are what that layer gives: what is shifted in has the mean's colour.
        images: (batch, height, width, channels), what the net takes.
        stride: Pixels per cell of the output. The net runs stride * stride times.

    Returns:
        (batch, rows, columns, classes) float32.

    Raises:
        ValueError: If the net is another one or has another stride, or if the images
            do not fit or are too small for a cell.
    """
    images = ops.convert_to_numpy(images)
    _check(model, images, stride)
    batch, height, width, channels = images.shape
    more = stride - 1
    canvas = np.empty((batch, height + 2 * more, width + 2 * more, channels), "float32")
    canvas[:] = _blank(model)
    canvas[:, more : more + height, more : more + width] = images
    h, w = _size(model, images, more)
    stitched = np.empty(
        (batch, h * stride, w * stride, model.outputs[0].shape[3]), "float32"
    )
    for i, j in itertools.product(range(stride), repeat=2):
        # From i on, the canvas shows the images shifted by stride - 1 - i.
        shifted = canvas[:, i : i + height + more, j : j + width + more]
        stitched[:, i::stride, j::stride] = model.predict_on_batch(shifted)
    # The cells of all shifts, less the one that all but the first have before `start`.
    rows, columns = sum(_size(model, images, i) for i in range(stride)) - more
    return stitched[:, more : more + rows, more : more + columns]


def _check(model, images, stride):
    check_inputs(model)
    shapes = [tuple(x.shape) for x in (*model.inputs, *model.outputs)]
    if [len(shape) for shape in shapes] != [4, 4] or shapes[0][1:3] != (None, None):
        raise ValueError(
            f"{model.name} has inputs and outputs of shapes {shapes}; expected one of "
            "each, (batch, height, width, channels), and input of any size: "
            "keras.Input((None, None, channels))."
        )
    if images.ndim != 4 or images.shape[3] != shapes[0][3]:
        raise ValueError(
            f"Images of shape {images.shape} were given; expected (batch, height, "
            f"width, {shapes[0][3]}), what {model.name} takes."
        )
    try:
        cells = _size(model, images, 0)
    except ValueError as error:
        raise ValueError(
            f"Images of {images.shape[1]} by {images.shape[2]} pixels are too small "
            f"for {model.name}; expected enough for one cell."
        ) from error
    more = np.maximum(_size(model, images, FAR) - cells, 1)
    strides = [round(FAR / n) for n in more]
    if strides != [stride, stride]:
        raise ValueError(
            f"stride={stride} was given, but {model.name} has a cell every "
            f"{strides[0]} pixels down and {strides[1]} across; expected its stride, "
            "the same both ways."
        )


def _size(model, images, more):
    """Cells of the net's output, [down, across], for images larger by some pixels."""
    batch, height, width, channels = images.shape
    larger = (batch, height + more, width + more, channels)
    return np.array(model.compute_output_shape(larger)[1:3])


def _blank(model):
    """The pixel that the net's convolutions see as zero."""
    for layer in model.layers:
        if isinstance(layer, Preprocess):
            mean = dict(zip(layer.channels, layer.mean, strict=True))
            mean["D"] = np.exp(mean.get("D", 0))  # millimetres, see `Preprocess`
            return [mean[channel] for channel in "RGBD"[: len(layer.mean)]]
    return 0


def rarefy(model):
    """Returns a net with the same weights whose layers have no strides.

    Layer by layer each stride s becomes 1 and the filters behind it are rarefied:
    `f'[i, j] = f[i / s, j / s]` where s divides both, zero elsewhere. What a net has on
    `Grid(stride, start)` the rarefied one has on `Grid(1, start)`, with the same
    receptive fields. Padding by p cells becomes padding by p times the strides before
    it, so that every stride-th cell, from cell 0 on, is that of the net itself.

    The result is that of `shift_and_stitch` at every cell, for images of every size, if
    the net pads nothing but the image. Where it pads other maps, by p cells in front
    (above and on the left) and q cells behind, on a map of s pixels per cell, the first
    p * s and the last q * s cells along each side may differ, added up along the net,
    over those branches that pad most: the border of a map lies elsewhere in every
    shift, but in one place in a net without strides. Pooling that rounds up, as in
    `keras_fcn.features.max_pool`, pads by q = stride - 1.

    Args:
        model: A functional net, channels last, of `Conv2D`, `MaxPooling2D`,
            `AveragePooling2D` without padding, `ZeroPadding2D`, and layers that work
            cell by cell, such as `keras_fcn.classifier(...)`.

    Returns:
        A `keras.Model` whose layers have the names of the net's, and weights of their
        own.

    Raises:
        ValueError: If another layer is among them, if one is used twice, or if padding
            depends on the size of the image.
    """
    check_inputs(model)
    # Pixels per cell of the net, (down, across), by tensor of the rarefied one.
    strides, seen = {}, set()

    def call(layer, *inputs, **arguments):
        _check_layer(layer, seen)
        seen.add(layer.name)
        found = {strides.get(id(x), (1, 1)) for x in keras.tree.flatten(inputs)}
        if len(found) > 1:
            raise ValueError(
                f"{layer.name} merges maps of {sorted(found)} pixels per cell; "
                "expected one stride, which is kept when all strides become 1."
            )
        (before,) = found
        first, *others = _rarefied(layer, before)
        x = first(*inputs, **arguments)
        for other in others:
            x = other(x)
        strides[id(x)] = _times(before, getattr(layer, "strides", (1, 1)))
        return x

    if isinstance(model, keras.Sequential):
        model = keras.Model(model.inputs[0], model.outputs[0], name=model.name)
    rarefied = keras.models.clone_model(
        model, clone_function=lambda layer: layer, call_function=call
    )
    transplant(model, rarefied)
    return rarefied


def _check_layer(layer, seen):
    kinds = (
        *CONVOLUTIONS,
        *MAX_POOLINGS,
        *AVERAGE_POOLINGS,
        layers.ZeroPadding2D,
        *CELL_BY_CELL,
    )
    last = getattr(layer, "axis", -1) in (-1, 3)
    last &= getattr(layer, "data_format", "channels_last") == "channels_last"
    if type(layer) not in kinds or not last:
        raise ValueError(
            f"{layer.name} is a {type(layer).__name__}, which cannot be rarefied; "
            "expected convolutions, poolings, zero padding and layers that work cell "
            "by cell, channels last. Rarefy the net up to there: "
            "keras.Model(model.input, model.get_layer(name).output)."
        )
    if layer.name in seen:
        raise ValueError(
            f"{layer.name} is used more than once, which no one rarefied layer can be; "
            "expected a layer for each use."
        )
    if type(layer) in AVERAGE_POOLINGS and layer.padding != "valid":
        raise ValueError(
            f'{layer.name} averages with padding="{layer.padding}", over fewer cells '
            'at the border; expected padding="valid".'
        )


def _rarefied(layer, strides):
    """The layers at stride 1 that stand for one behind strides, (down, across)."""
    kind, config = type(layer), layer.get_config()
    if kind in CELL_BY_CELL:
        return [kind.from_config(config)]
    if kind is layers.ZeroPadding2D:
        config["padding"] = _scaled(layer.padding, strides)
        return [kind.from_config(config)]
    pads = _scaled(_pads(layer), strides)
    if kind in CONVOLUTIONS:
        rate = _times(layer.dilation_rate, strides)
        config |= {"strides": (1, 1), "dilation_rate": rate}
        config["kernel_initializer"] = "zeros"  # not drawn: the net's weights come in
        if all(before == after for before, after in pads):
            return [kind.from_config(config)]  # as Keras pads, too
        name = f"{layer.name}_pad"
        pad = layers.ZeroPadding2D(pads, name=name, dtype=layer.dtype_policy)
        return [pad, kind.from_config({**config, "padding": "valid"})]
    maximum = kind in MAX_POOLINGS
    pooling = DilatedMaxPooling2D if maximum else DilatedAveragePooling2D
    named = {"name": layer.name, "dtype": layer.dtype_policy}
    return [pooling(layer.pool_size, strides, pads, **named)]


def _pads(layer):
    """The (before, after) of each axis that give the cells of the layer's padding."""
    if layer.padding == "valid":
        return [(0, 0), (0, 0)]
    if type(layer) in CONVOLUTIONS:
        rates = zip(layer.kernel_size, layer.dilation_rate, strict=True)
        sizes = [(size - 1) * rate + 1 for size, rate in rates]
    else:
        sizes = layer.pool_size
    pads = []
    for size, stride in zip(sizes, layer.strides, strict=True):
        # By the size of the map Keras pads size - stride to size - 1 cells in all.
        before = {max(cells, 0) // 2 for cells in range(size - stride, size)}
        if len(before) > 1:
            raise ValueError(
                f'{layer.name} has kernel {size}, stride {stride} and padding="same", '
                "which begins on another cell for another size of the image; expected "
                'padding="valid" behind a ZeroPadding2D.'
            )
        (before,) = before
        pads.append((before, size - 1 - before))
    return pads


def _times(sizes, strides):
    return tuple(n * stride for n, stride in zip(sizes, strides, strict=True))


def _scaled(pads, strides):
    return [
        (before * stride, after * stride)
        for (before, after), stride in zip(pads, strides, strict=True)
    ]


@keras.saving.register_keras_serializable("keras_fcn")
class DilatedMaxPooling2D(layers.Layer):
    """Takes maxima over cells that lie apart, at stride 1; Keras has no such pooling.

    Args:
        pool_size: Cells per window, (down, across).
        dilation_rate: From one cell of a window to the next, (down, across).
        padding: `((top, bottom), (left, right))` cells around that are no maximum.

    Input shape: `(batch, h, w, channels)`.
    Output shape: `(batch, top + h + bottom - dilation * (size - 1), ..., channels)`.
    """

    outside = -np.inf

    def __init__(self, pool_size, dilation_rate, padding=((0, 0), (0, 0)), **kwargs):
        super().__init__(**kwargs)  # Keras' own name and dtype
        self.pool_size = tuple(pool_size)
        self.dilation_rate = tuple(dilation_rate)
        self.padding = tuple(map(tuple, padding))

    def call(self, x):
        """Returns `x`, (batch, h, w, channels), pooled."""
        rows, columns = self._sides(ops.shape(x))
        if any(map(any, self.padding)):
            pads = ((0, 0), *self.padding, (0, 0))
            x = ops.pad(x, pads, constant_values=self.outside)
        # A window's maximum is that of the maxima of its columns.
        down, across = map(self._starts, (0, 1))
        x = self._merge([x[:, i : i + rows] for i in down])
        return self._merge([x[:, :, j : j + columns] for j in across])

    def _starts(self, axis):
        rate = self.dilation_rate[axis]
        return range(0, rate * self.pool_size[axis], rate)

    def _merge(self, maps):
        return functools.reduce(ops.maximum, maps)

    def _sides(self, shape):
        sides = [
            None if n is None else n + sum(self.padding[axis]) - self._starts(axis)[-1]
            for axis, n in enumerate(shape[1:3])
        ]
        if any(isinstance(n, int) and n < 1 for n in sides):
            raise ValueError(
                f"{self.name} was given a map of {shape[1]} by {shape[2]} cells, too "
                "small for one window; expected a larger image."
            )
        return sides

    def compute_output_shape(self, shape):
        """Returns the output's shape for an input of `shape`."""
        return (shape[0], *self._sides(shape), shape[3])

    def get_config(self):
        """Returns what rebuilds the layer."""
        names = ("pool_size", "dilation_rate", "padding")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


@keras.saving.register_keras_serializable("keras_fcn")
class DilatedAveragePooling2D(DilatedMaxPooling2D):
    """Takes means over cells that lie apart, at stride 1; see `DilatedMaxPooling2D`.

    The padding counts, as zeros.
    """

    outside = 0.0

    def _merge(self, maps):
        return sum(maps) / len(maps)
