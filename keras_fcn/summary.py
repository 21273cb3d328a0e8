"""What a net is made of: the paper's Table 1, read off the layers themselves."""

from typing import NamedTuple

import keras

from keras_fcn.geometry import Grid
from keras_fcn.layers import BilinearUpsampling, CropLike


class Row(NamedTuple):
    """One layer of a net, at a given image size.

    Args:
        name: Of the layer.
        kind: Its class.
        shape: (height, width, channels) of its output.
        grid: Where its cells lie on the image.
        field: Pixels along one axis that a cell sees: the receptive field.
        depth: Convolutions on the longest way from the image, upsampling aside.
        parameters: Numbers it holds.
        multiply_adds: That it takes.
    """

    name: str
    kind: str
    shape: tuple
    grid: Grid
    field: float
    depth: int
    parameters: int
    multiply_adds: int


def summarize(model, height=500, width=500):
    """Follows an image through a net without computing anything.

    Args:
        model: A net that `keras_fcn.fcn`, `late_fusion` or `classifier` built.
        height: Of the image, in pixels.
        width: Of the image, in pixels.

    Returns:
        A list of `Row`, in the order of the layers.

    Raises:
        ValueError: If a layer's output would be empty at this size.
    """
    rows, made = [], {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.InputLayer):
            size = (height, width, layer.output.shape[-1])
            row = Row(layer.name, "Input", size, Grid(), 1, 0, 0, 0)
        else:
            inputs = keras.tree.flatten(layer.input)
            row = _row(layer, [made[id(tensor)] for tensor in inputs])
        made[id(layer.output)] = row
        rows.append(row)
    return rows


def _row(layer, sources):
    shapes = [(1, *source.shape) for source in sources]
    shape = layer.compute_output_shape(shapes if len(shapes) > 1 else shapes[0])[1:]
    if min(shape) < 1:
        raise ValueError(
            f"{layer.name} has an output of {shape} at this image size; expected 1 by "
            "1 cells at least: take a larger image."
        )
    grid, field = sources[0].grid, max(source.field for source in sources)
    depth = max(source.depth for source in sources)
    work = 0
    if isinstance(layer, keras.layers.ZeroPadding2D):
        (pad, _), _ = layer.padding
        grid = grid.window(1, pad=pad)
    elif isinstance(layer, CropLike):
        grid, field, depth = grid.crop(layer.offset), sources[0].field, sources[0].depth
    elif isinstance(layer, (BilinearUpsampling, keras.layers.Conv2DTranspose)):
        kernel, factor = _upsampling(layer)
        # A fine cell sees at most two coarse ones along each axis.
        field += grid.stride
        grid = grid.upsample(kernel, factor)
        work = _upsampling_work(layer, sources[0].shape, shape)
    elif hasattr(layer, "strides"):
        kernel, stride = _window(layer)
        field += (kernel - 1) * grid.stride
        same = layer.padding == "same" and stride == 1
        grid = grid.window(kernel, stride, (kernel - 1) // 2 if same else 0)
        if isinstance(layer, keras.layers.Conv2D):
            depth += 1
            taps = kernel * kernel * sources[0].shape[-1] // layer.groups
            work = shape[0] * shape[1] * shape[2] * taps
    kind = type(layer).__name__
    count = layer.count_params()
    return Row(layer.name, kind, tuple(shape), grid, field, depth, count, work)


def _window(layer):
    size = getattr(layer, "kernel_size", None) or layer.pool_size
    return size[0], layer.strides[0]


def _upsampling(layer):
    if isinstance(layer, BilinearUpsampling):
        return layer.kernel_size, layer.factor
    return layer.kernel_size[0], layer.strides[0]


def _upsampling_work(layer, source, shape):
    if isinstance(layer, BilinearUpsampling):  # two taps along each axis in turn
        return 2 * shape[0] * source[1] * shape[2] + 2 * shape[0] * shape[1] * shape[2]
    kernel = layer.kernel_size[0]
    return source[0] * source[1] * kernel * kernel * source[2] * shape[2]


def totals(rows):
    """Computes the paper's Table 1 for a net.

    Args:
        rows: As `summarize` returns them.

    Returns:
        A dict: `conv_layers`, on the longest way; `parameters`; `receptive_field` of
        the coarsest score and `max_stride`, in pixels; `multiply_adds`.
    """
    scored = [row for row in rows if row.kind == "Conv2D"]
    deepest = max(scored, key=lambda row: (row.grid.stride, row.depth))
    return {
        "conv_layers": deepest.depth,
        "parameters": sum(row.parameters for row in rows),
        "receptive_field": int(deepest.field),
        "max_stride": int(deepest.grid.stride),
        "multiply_adds": sum(row.multiply_adds for row in rows),
    }
