"""How long a step of training takes, on each backend.

    python benchmarks/training.py [BACKEND...] --batch-norm --precision mixed_bfloat16

FCN on GoogLeNet for 11 classes, compiled by `compile_modern`, on one batch of noise
over and over: without reading. Prints the median of ten steps after three that are not
counted, in seconds.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

BACKENDS = ("tensorflow", "jax", "torch")


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
    parser.add_argument("backends", nargs="*", default=BACKENDS)
    parser.add_argument("--stride", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=6)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch-norm", action="store_true")
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return measure(options)
    print(f"{'backend':12}{'seconds a step'}")
    for backend in options.backends:
        environment = {**os.environ, "KERAS_BACKEND": backend}
        command = [sys.executable, *sys.argv, "--one"]
        subprocess.run(command, env=environment, check=True)


if __name__ == "__main__":
    main()
