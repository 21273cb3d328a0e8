"""Caffe's layers in plain NumPy loops: slow, obvious, float64.

Written from the rules of Caffe's sources alone. Blobs are (batch, channels, height,
width), kernels (out, in / groups, height, width), those of a deconvolution (in, out,
height, width). Loops run over cells; a sum over one window is a sum.
"""

import math
import zlib

import numpy as np


def convolution(x, weight, bias=None, *, stride=1, pad=0, groups=1):
    """Cross-correlates `x`; output block g sees input block g alone."""
    outputs, _, kernel, _ = weight.shape
    x = np.pad(np.float64(x), [(0, 0), (0, 0), (pad, pad), (pad, pad)])
    height, width = ((size - kernel) // stride + 1 for size in x.shape[2:])
    y = np.zeros((len(x), outputs, height, width))
    given = np.split(x, groups, axis=1)
    weights = np.split(weight, groups)
    made = np.split(y, groups, axis=1)  # views
    for block, kernels, result in zip(given, weights, made, strict=True):
        for i in range(height):
            for j in range(width):
                top, left = i * stride, j * stride
                window = block[:, :, top : top + kernel, left : left + kernel]
                result[:, :, i, j] = np.tensordot(window, kernels, [(1, 2, 3)] * 2)
    return y if bias is None else y + bias[:, None, None]


def max_pooling(x, kernel, stride, pad=0):
    """Takes the maxima of windows clipped to the image."""
    return _pooling(x, kernel, stride, pad, lambda window, area: window.max((2, 3)))


def average_pooling(x, kernel, stride=1, pad=0):
    """Takes means that count the padding, but not what hangs over it."""
    return _pooling(
        x, kernel, stride, pad, lambda window, area: window.sum((2, 3)) / area
    )


def pooled_size(size, kernel, stride, pad=0):
    """Returns Caffe's size: rounded up, less a window that starts in the padding."""
    pooled = math.ceil((size + 2 * pad - kernel) / stride) + 1
    return pooled - 1 if pad and (pooled - 1) * stride >= size + pad else pooled


def _pooling(x, kernel, stride, pad, reduce):
    def span(i, size):
        start = i * stride - pad
        counted = min(start + kernel, size + pad) - start
        return slice(max(start, 0), min(start + kernel, size)), counted

    x = np.float64(x)
    height, width = x.shape[2:]
    rows, columns = (pooled_size(size, kernel, stride, pad) for size in x.shape[2:])
    y = np.zeros((*x.shape[:2], rows, columns))
    for i in range(rows):
        for j in range(columns):
            (down, tall), (across, wide) = span(i, height), span(j, width)
            y[:, :, i, j] = reduce(x[:, :, down, across], tall * wide)
    return y


def lrn(x, size=5, alpha=1e-4, beta=0.75, k=1.0):
    """Normalises across channels; alpha is divided by the size of the window."""
    x = np.float64(x)
    y = np.zeros_like(x)
    for channel in range(x.shape[1]):
        first = max(channel - size // 2, 0)
        near = x[:, first : channel + size // 2 + 1]
        total = (near**2).sum(axis=1)
        y[:, channel] = x[:, channel] * (k + alpha / size * total) ** -beta
    return y


def deconvolution(x, weight, bias=None, *, stride=1, pad=0):
    """Scatters a kernel per cell of `x` and adds up."""
    x = np.float64(x)
    _, outputs, kernel, _ = weight.shape
    height, width = x.shape[2:]
    size = [stride * (n - 1) + kernel for n in (height, width)]
    y = np.zeros((len(x), outputs, *size))
    for i in range(height):
        for j in range(width):
            top, left = i * stride, j * stride
            patch = np.tensordot(x[:, :, i, j], weight, 1)
            y[:, :, top : top + kernel, left : left + kernel] += patch
    y = y[:, :, pad : size[0] - pad, pad : size[1] - pad]
    return y if bias is None else y + bias[:, None, None]


def bilinear_filler(channels, kernel):
    """Returns the kernel that interpolates each channel by itself."""
    factor = (kernel + 1) // 2
    center = factor - 1 if kernel % 2 else factor - 0.5
    weight = np.zeros((channels, channels, kernel, kernel))
    for channel in range(channels):
        for i in range(kernel):
            for j in range(kernel):
                tall, wide = (1 - abs(n - center) / factor for n in (i, j))
                weight[channel, channel, i, j] = tall * wide
    return weight


def crop(x, reference, offset):
    """Slices `x` from `offset` on, as large as `reference`."""
    height, width = reference.shape[2:]
    if offset + height > x.shape[2] or offset + width > x.shape[3]:
        raise ValueError(f"{x.shape} from {offset} on does not hold {reference.shape}.")
    return x[:, :, offset : offset + height, offset : offset + width]


def eltwise_sum(*xs, coefficients=None):
    """Adds blobs of one shape, each times its coefficient."""
    total = np.zeros(xs[0].shape)
    for x, coefficient in zip(xs, coefficients or [1] * len(xs), strict=True):
        total += coefficient * x
    return total


# Between Caffe and Keras


def to_caffe(x):
    """Moves channels from the end to where Caffe has them."""
    return np.moveaxis(np.asarray(x), -1, 1)


def to_keras(x):
    """Moves channels to the end."""
    return np.moveaxis(x, 1, -1)


def kernel_to_keras(weight):
    """Turns a kernel as Keras has it: (height, width, in, out), or out, in."""
    return weight.transpose(2, 3, 1, 0)


def blobs(model):
    """Returns the weights of a net as Caffe would have them, by layer."""
    found = {}
    for layer in model.layers:
        if layer.weights:
            kernel, *bias = layer.get_weights()
            found[layer.name] = [kernel.transpose(3, 2, 0, 1), *bias]
    return found


def fill(model, blobs):
    """Gives a net the weights of one of Caffe, by name: every one, and no more."""
    names = {name.replace("/", "_"): arrays for name, arrays in blobs.items()}
    layers = {layer.name: layer for layer in model.layers if layer.weights}
    if names.keys() != layers.keys():
        raise ValueError(f"Only one of the two has {names.keys() ^ layers.keys()}.")
    for name, (kernel, *bias) in names.items():
        kernel = kernel.reshape(*kernel.shape, *[1] * (4 - kernel.ndim))
        layers[name].set_weights([kernel_to_keras(kernel), *bias])


def draw(model, seed=0):
    """Gives a net random weights that depend on the names of its layers alone.

    Transposed convolutions keep theirs.
    """
    for layer in model.layers:
        if len(layer.weights) == 2:
            rng = np.random.default_rng([seed, zlib.crc32(layer.name.encode())])
            shapes = [weight.shape for weight in layer.weights]
            kernel, bias = (rng.standard_normal(shape) for shape in shapes)
            kernel *= np.sqrt(2 / np.prod(kernel.shape[:3]))
            layer.set_weights([kernel, 0.1 * bias])
    return model
