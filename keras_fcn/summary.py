"""What a net is made of: the paper's Table 1, read off the layers themselves."""

from typing import NamedTuple

import keras
import numpy as np

from keras_fcn.geometry import Grid
from keras_fcn.layers import BilinearUpsampling, CropLike


class Row(NamedTuple):
    """One layer of a net, at a given image size.

    Args:
        name: Of the layer.
        kind: Its class.
        shape: (height, width, channels) of its output.
        grid: Where its cells lie on the image.
        field: Pixels along one axis that a cell sees: the receptive field. Of cells
            that were upsampled, which do not all see as much, the largest.
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


class View(NamedTuple):
    """What the cells of a map see along one axis.

    What was upsampled sees more or less, by where it lies between coarse cells: after
    so many cells as these arrays have numbers it is the same again.

    Args:
        before: Pixels from the first that a cell sees to its own place.
        after: Pixels from there to the last one.
    """

    before: np.ndarray
    after: np.ndarray

    @property
    def field(self):
        """Pixels that the widest of them sees."""
        return float((self.before + self.after).max()) + 1


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
            view = View(np.zeros(1), np.zeros(1))
            row = Row(layer.name, "Input", size, Grid(), view.field, 0, 0, 0)
        else:
            inputs = [made[id(tensor)] for tensor in keras.tree.flatten(layer.input)]
            row, view = _row(layer, *zip(*inputs, strict=True))
        made[id(layer.output)] = row, view
        rows.append(row)
    return rows


def _row(layer, sources, views):
    """The row of a layer and its view, from those of its inputs."""
    shapes = [(1, *source.shape) for source in sources]
    try:
        shape = layer.compute_output_shape(shapes if len(shapes) > 1 else shapes[0])[1:]
    except ValueError:  # Keras' own, which names no layer
        shape = (0, 0)
    if min(shape) < 1:
        raise ValueError(
            f"{layer.name} has no output at this image size; expected 1 by 1 cells at "
            "least: take a larger image."
        )
    grid = sources[0].grid
    depth = max(source.depth for source in sources)
    work = 0
    if isinstance(layer, keras.layers.ZeroPadding2D):
        (pad, _), _ = layer.padding
        grid = grid.window(1, pad=pad)
    elif isinstance(layer, CropLike):
        grid, depth = grid.crop(layer.offset), sources[0].depth
    elif isinstance(layer, (BilinearUpsampling, keras.layers.Conv2DTranspose)):
        kernel, factor = _upsampling(layer)
        grid = grid.upsample(kernel, factor)
        work = _upsampling_work(layer, sources[0].shape, shape)
    elif hasattr(layer, "strides"):
        kernel, stride = _window(layer)
        same = layer.padding == "same" and stride == 1
        grid = grid.window(kernel, stride, (kernel - 1) // 2 if same else 0)
        if isinstance(layer, keras.layers.Conv2D):
            depth += 1
            taps = kernel * kernel * sources[0].shape[-1] // layer.groups
            work = shape[0] * shape[1] * shape[2] * taps
    kind = type(layer).__name__
    count = layer.count_params()
    view = _view(layer, grid, sources[0].grid, views)
    row = Row(layer.name, kind, tuple(shape), grid, view.field, depth, count, work)
    return row, view


def _view(layer, grid, coarse, views):
    """What a layer's cells on `grid` see, the first of its inputs being on `coarse`."""
    view = views[0]
    if isinstance(layer, CropLike):
        return View(*(np.roll(pixels, -layer.offset) for pixels in view))
    if isinstance(layer, (BilinearUpsampling, keras.layers.Conv2DTranspose)):
        return _upsampled(view, coarse, grid, *_upsampling(layer))
    if hasattr(layer, "strides"):
        reach = (_window(layer)[0] - 1) / 2 * coarse.stride
        return View(*(pixels + reach for pixels in view))
    period = max(len(view.before) for view in views)
    return View(
        *(
            np.max([np.resize(pixels, period) for pixels in each], axis=0)
            for each in zip(*views, strict=True)
        )
    )


def _upsampled(view, coarse, fine, kernel, factor):
    """Takes together what all coarse cells see in which a fine one has a share."""
    before, after = np.full((2, factor * len(view.before)), -np.inf)
    for cell in range(len(before)):
        for source in range(-((kernel - 1 - cell) // factor), cell // factor + 1):
            apart = fine.start + cell * fine.stride
            apart -= coarse.start + source * coarse.stride
            at = source % len(view.before)
            before[cell] = max(before[cell], view.before[at] + apart)
            after[cell] = max(after[cell], view.after[at] - apart)
    return View(before, after)


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
