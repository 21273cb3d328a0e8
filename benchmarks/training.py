"""How long a step of training takes, on each backend.

    python benchmarks/training.py [BACKEND...] --batch-norm --precision mixed_bfloat16

FCN on GoogLeNet for 11 classes, on one batch of noise over and over: without reading.
It is compiled by `compile_modern` as for the nets that ship (docs/camvid.md): with a
Jaccard loss, and with --batch-norm without the average of weights. Prints the median
of ten steps after three that are not counted, in seconds.
"""

import argparse
import statistics
import time

from running import on_backends

from keras_fcn.cli_data import PRECISIONS


def measure(options):
    """Prints the seconds of a step on the backend of this process."""
    import keras
    import numpy as np

    import keras_fcn

    keras.config.set_dtype_policy(options.precision)
    model = keras_fcn.fcn(
        "googlenet", options.stride, 11, batch_norm=options.batch_norm
    )
    averaging = None if options.batch_norm else 0.1
    keras_fcn.compile_modern(model, 1000, jaccard=1.0, averaging=averaging)
    random = np.random.default_rng(0)
    shape = (options.batch_size, options.crop, options.crop)
    pictures = random.integers(0, 256, (*shape, 3)).astype("float32")
    labels = random.integers(0, 11, shape).astype("uint8")
    seconds = []
    for _ in range(13):
        began = time.perf_counter()
        model.train_on_batch(pictures, labels)
        seconds.append(time.perf_counter() - began)
    step = statistics.median(seconds[3:])
    print(f"{keras.backend.backend():12}{step:8.3f}", flush=True)


def main():
    """Measures in a process for each backend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch-norm", action="store_true")
    parser.add_argument("--precision", choices=PRECISIONS, default=PRECISIONS[0])
    on_backends(measure, parser, f"{'backend':12}seconds a step")


if __name__ == "__main__":
    main()
