from fractions import Fraction

import numpy as np
import pytest

from keras_fcn.geometry import Grid, bilinear_kernel_size

GRIDS = [Grid(), Grid(4, -95), Grid(16, -91.5), Grid(0.5, 0.25)]
WINDOWS = [(1, 1, 0), (2, 2, 0), (3, 1, 1), (3, 2, 0), (7, 2, 35), (11, 4, 100)]
FACTORS = (32, 16, 8, 4, 2)

# (kernel, stride, pad) of every step of the nets, and centre and spacing of the result
# as derived by hand, without this package.
VGG16 = {
    "conv1_1": ((3, 1, 100), (-99, 1)),
    "conv1_2": ((3, 1, 1), (-99, 1)),
    "pool1": ((2, 2, 0), (-98.5, 2)),
    "pool2": ((2, 2, 0), (-97.5, 4)),
    "pool3": ((2, 2, 0), (-95.5, 8)),
    "pool4": ((2, 2, 0), (-91.5, 16)),
    "pool5": ((2, 2, 0), (-83.5, 32)),
    "fc6": ((7, 1, 0), (12.5, 32)),
    "fc7": ((1, 1, 0), (12.5, 32)),
}
ALEXNET = {
    "conv1": ((11, 4, 100), (-95, 4)),
    "pool1": ((3, 2, 0), (-91, 8)),
    "conv2": ((5, 1, 2), (-91, 8)),
    "pool2": ((3, 2, 0), (-83, 16)),
    "conv5": ((3, 1, 1), (-83, 16)),
    "pool5": ((3, 2, 0), (-67, 32)),
    "fc6": ((6, 1, 0), (13, 32)),
    "fc7": ((1, 1, 0), (13, 32)),
}


def googlenet(pad):
    return {
        "conv1": ((7, 2, pad), (3 - pad, 2)),
        "pool1": ((3, 2, 0), (5 - pad, 4)),
        "pool2": ((3, 2, 0), (9 - pad, 8)),
        "pool3": ((3, 2, 0), (17 - pad, 16)),
        "pool4": ((3, 2, 0), (33 - pad, 32)),
        "inception_pool": ((3, 1, 1), (33 - pad, 32)),
    }


def walk(net):
    """The grid after each layer of a table, by name."""
    grids, grid = {}, Grid()
    for name, (window, _) in net.items():
        grid = grids[name] = grid.window(*window)
    return grids


def coordinate_map(kernel, stride, pad):
    """Caffe's rule for a convolution: cell = scale * pixel + shift."""
    scale = Fraction(1, stride)
    return scale, scale * (pad - Fraction(kernel - 1, 2))


# Laws


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("first", WINDOWS)
@pytest.mark.parametrize("second", WINDOWS)
def test_two_windows_are_one_larger_window(grid, first, second):
    (k, s, p), (kk, ss, pp) = first, second
    once = grid.window(k + (kk - 1) * s, s * ss, p + s * pp)
    assert grid.window(*first).window(*second) == once


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("pad", [0, 1, 35, 100])
def test_pads_add_up_and_cropping_takes_them_back(grid, pad):
    padded = grid.window(1, pad=pad)
    assert padded.window(3, 2, 7) == grid.window(3, 2, pad + 7)
    assert padded.crop(pad) == grid
    assert padded.offset(grid) == pad


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("parity", [0, 1])
def test_upsampling_inverts_the_window_of_its_kernel(grid, factor, parity):
    kernel = 2 * factor - parity
    assert grid.window(kernel, factor).upsample(kernel, factor) == grid
    assert grid.upsample(kernel, factor).window(kernel, factor) == grid


@pytest.mark.parametrize("grid", GRIDS)
def test_crops_add_up_and_are_what_offset_returns(grid):
    assert grid.crop(5).crop(4) == grid.crop(9)
    assert [grid.offset(grid.crop(offset)) for offset in (0, 1, 19)] == [0, 1, 19]


@pytest.mark.parametrize("window", WINDOWS)
def test_a_cell_lies_on_the_mean_of_the_pixels_in_its_window(window):
    kernel, stride, pad = window
    grid = Grid().window(*window)
    for i in range(4):
        pixels = np.arange(kernel) + i * stride - pad
        assert grid.start + grid.stride * i == pixels.mean()


@pytest.mark.parametrize("net", [VGG16, ALEXNET, googlenet(35)])
def test_a_grid_is_the_inverse_of_the_coordinate_map_of_caffe(net):
    scale, shift = Fraction(1), Fraction(0)
    for name, (window, _) in net.items():
        a, b = coordinate_map(*window)
        scale, shift = a * scale, a * shift + b
        grid = walk(net)[name]
        assert (grid.stride, grid.start) == (1 / scale, -shift / scale)


# What the reference nets have


@pytest.mark.parametrize(
    "net",
    [VGG16, ALEXNET, *map(googlenet, (3, 35, 100))],
    ids=["vgg16", "alexnet", "googlenet-3", "googlenet-35", "googlenet-100"],
)
def test_the_layers_of_the_nets_lie_where_the_hand_put_them(net):
    found = {name: (grid.start, grid.stride) for name, grid in walk(net).items()}
    assert found == {name: place for name, (_, place) in net.items()}


def offsets(net, taps):
    """Kernels, crops of the taps and crop to the image, as the decoder takes them."""
    *skips, coarsest = (walk(net)[tap] for tap in taps)
    grid, kernels, crops = coarsest, [], []
    for skip in [*reversed(skips), Grid()]:
        factor = int(grid.stride / skip.stride)
        kernels.append(bilinear_kernel_size(grid, factor, skip))
        up = grid.upsample(kernels[-1], factor)
        last = skip == Grid()
        crops.append(up.offset(skip) if last else skip.offset(up))
        grid = up
    return kernels, crops


@pytest.mark.parametrize(
    ("taps", "kernels", "crops"),
    [
        (["fc7"], [64], [19]),
        (["pool4", "fc7"], [4, 32], [5, 27]),
        (["pool3", "pool4", "fc7"], [4, 4, 16], [5, 9, 31]),
        (["pool2", "pool3", "pool4", "fc7"], [4, 4, 4, 8], [5, 9, 17, 33]),
    ],
)
def test_vgg16_has_even_kernels_and_the_crops_of_the_reference(taps, kernels, crops):
    assert offsets(VGG16, taps) == (kernels, crops)


@pytest.mark.parametrize(
    ("taps", "kernels", "crops"),
    [
        (["fc7"], [63], [18]),
        (["pool2", "fc7"], [3, 31], [5, 18]),
        (["pool1", "pool2", "fc7"], [3, 3, 15], [5, 10, 18]),
        (["conv1", "pool1", "pool2", "fc7"], [3, 3, 3, 7], [5, 10, 20, 18]),
    ],
)
def test_alexnet_has_odd_kernels_and_the_crops_of_the_reference(taps, kernels, crops):
    assert offsets(ALEXNET, taps) == (kernels, crops)


@pytest.mark.parametrize("pad", [3, 35, 100])
@pytest.mark.parametrize("skips", range(4))
def test_googlenet_crops_its_pad_less_two_at_the_image_and_nothing_else(pad, skips):
    taps = ["pool1", "pool2", "pool3"][3 - skips :]
    kernels, crops = offsets(googlenet(pad), [*taps, "pool4"])
    assert kernels == [3] * skips + [2 * (32 >> skips) - 1]
    assert crops == [0] * skips + [pad - 2]


@pytest.mark.parametrize("factor", FACTORS)
def test_the_parity_of_a_kernel_is_that_of_the_half_pixel(factor):
    assert bilinear_kernel_size(Grid(factor, 12.5), factor, Grid()) == 2 * factor
    assert bilinear_kernel_size(Grid(factor, 13), factor, Grid()) == 2 * factor - 1


# Errors


@pytest.mark.parametrize(
    ("grid", "onto", "cells"),
    [
        (Grid(2, 0), Grid(4, 8), "4.0"),
        (Grid(4, 8), Grid(4, 0), "-2.0"),
        (Grid(4, 4), Grid(4, 0), "-1.0"),
        (Grid(1, -18.5), Grid(), "18.5"),
    ],
    ids=["strides differ", "negative", "just negative", "between two cells"],
)
def test_a_crop_that_is_not_whole_cells_is_refused(grid, onto, cells):
    with pytest.raises(ValueError, match="cannot be cropped") as error:
        grid.offset(onto)
    assert str(error.value) == (
        f"A map on {grid} cannot be cropped onto {onto}: expected equal strides and a "
        f"whole offset of at least 0 cells, got {cells}. Choose another kernel parity "
        "or more padding at the image."
    )


@pytest.mark.parametrize("start", [0.25, 0.75, 1 / 3])
def test_a_quarter_of_a_cell_has_no_bilinear_kernel(start):
    with pytest.raises(ValueError, match="No bilinear kernel") as error:
        bilinear_kernel_size(Grid(32, start), 32, Grid())
    assert str(error.value) == (
        f"No bilinear kernel upsamples Grid(stride=32, start={start}) by 32 onto whole "
        "cells of Grid(stride=1.0, start=0.0). Pad the image so that the two grids "
        "differ by a multiple of half a cell."
    )
