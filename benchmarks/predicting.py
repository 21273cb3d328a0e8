"""Measures how many images of 480 by 360 a net labels in a second, on each backend.

    python benchmarks/predicting.py [BACKEND...]

The nets that ship beside the paper's FCN-8s on VGG16 (drawn weights: the time is the
same). One image at a time through `keras_fcn.segment`, as `keras-fcn
predict` does, after one that is not counted. Prints the median of ten.
"""

import argparse
import statistics
import time

from running import on_backends

NETS = {
    "googlenet-4s": {"backbone": "googlenet", "stride": 4, "weights": "camvid"},
    "googlenet-8s": {"backbone": "googlenet", "stride": 8, "weights": "camvid"},
    "vgg16-8s": {"backbone": "vgg16", "stride": 8, "num_classes": 11},
}


def measure(_):
    """Prints images per second of each net on the backend of this process."""
    import keras
    import numpy as np

    import keras_fcn

    image = np.random.default_rng(0).integers(0, 256, (360, 480, 3)).astype(np.uint8)
    for name, arguments in NETS.items():
        model = keras_fcn.fcn(**arguments)
        keras_fcn.segment(model, image)
        seconds = []
        for _ in range(10):
            began = time.perf_counter()
            keras_fcn.segment(model, image)
            seconds.append(time.perf_counter() - began)
        rate = 1 / statistics.median(seconds)
        print(f"{keras.backend.backend():12}{name:13}{rate:6.2f}", flush=True)


def main():
    """Measures in a process for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    on_backends(measure, parser, f"{'backend':12}{'net':13}images per second")


if __name__ == "__main__":
    main()
