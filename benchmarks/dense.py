"""Counts what a score per pixel costs without upsampling (docs/dense.md).

    python benchmarks/dense.py  # 500 by 500 pixels; a minute, 2 GB

Multiply-adds of the convolutions, from their shapes, of the three classifiers: as they
are, run on all 32 x 32 shifts, and rarefied.
"""

from keras_fcn import models, summary
from keras_fcn.dense import rarefy

PIXELS, STRIDE = 500, 32


def multiply_adds(model, pixels):
    """Returns those of all convolutions, for a square picture."""
    return summary.totals(summary.summarize(model, pixels, pixels))["multiply_adds"]


def main():
    """Counts and prints."""
    for backbone in ("alexnet", "vgg16", "googlenet"):
        net = models.build({"model": {"builder": "classifier", "backbone": backbone}})
        plain = multiply_adds(net, PIXELS)
        shifted = STRIDE**2 * multiply_adds(net, PIXELS + STRIDE - 1)
        rarefied = multiply_adds(rarefy(net), PIXELS)
        print(
            f"{backbone:10} {plain / 1e9:6.1f} G multiply-adds; shift-and-stitch "
            f"{shifted / plain:6,.0f} times, rarefied {rarefied / plain:4.0f} times",
            flush=True,
        )


if __name__ == "__main__":
    main()
