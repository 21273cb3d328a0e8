"""Where the cells of a feature map lie on the image (Long et al., 2015, section 3)."""

from typing import NamedTuple


class Grid(NamedTuple):
    """The places of a map's cells: cell `i` is centred on pixel `start + stride * i`.

    Both axes are alike. The image itself is `Grid()`.

    Args:
        stride: Pixels per cell.
        start: Pixel on which cell 0 is centred.
    """

    stride: float = 1.0
    start: float = 0.0

    def window(self, kernel, stride=1, pad=0):
        """Returns the grid after a convolution or pooling."""
        shift = (kernel - 1) / 2 - pad
        return Grid(self.stride * stride, self.start + self.stride * shift)

    def upsample(self, kernel, factor):
        """Returns the grid after a transposed convolution, the inverse of `window`."""
        fine = self.stride / factor
        return Grid(fine, self.start - fine * (kernel - 1) / 2)

    def crop(self, offset):
        """Returns the grid after dropping `offset` cells at the top and the left."""
        return Grid(self.stride, self.start + self.stride * offset)

    def offset(self, onto):
        """Returns how many cells to drop so that cell 0 lies on cell 0 of `onto`.

        Args:
            onto: The `Grid` to land on, of the same stride.

        Raises:
            ValueError: If the strides differ, or if the offset is negative or falls
                between two cells.
        """
        cells = (onto.start - self.start) / self.stride
        if self.stride != onto.stride or cells < 0 or cells != int(cells):
            raise ValueError(
                f"A map on {self} cannot be cropped onto {onto}: expected equal "
                f"strides and a whole offset of at least 0 cells, got {cells}. Choose "
                "another kernel parity or more padding at the image."
            )
        return int(cells)


def bilinear_kernel_size(grid, factor, onto):
    """Returns the width of the bilinear kernel that upsamples `grid` onto `onto`.

    A kernel for factor f is 2f or 2f - 1 wide. The one that puts its cells on whole
    cells of `onto` is taken: 2f for VGG16, 2f - 1 for AlexNet and GoogLeNet.

    Args:
        grid: The `Grid` of the coarse map.
        factor: Cells of the fine map per cell of the coarse one.
        onto: The `Grid` that the fine map is to be compared with.

    Raises:
        ValueError: If neither lands on whole cells.
    """
    for kernel in (2 * factor, 2 * factor - 1):
        fine = grid.upsample(kernel, factor)
        if ((onto.start - fine.start) / onto.stride).is_integer():
            return kernel
    raise ValueError(
        f"No bilinear kernel upsamples {grid} by {factor} onto whole cells of {onto}. "
        "Pad the image so that the two grids differ by a multiple of half a cell."
    )
