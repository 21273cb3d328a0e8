"""How fast pictures are read, beside how fast a net takes them.

    python benchmarks/feeding.py IMAGES MASKS --relabel 11=255  # KERAS_BACKEND=jax ...

The first rows are ways of reading, by two threads and nothing beside them. The last two
are a training of FCN-8s on GoogLeNet with batches of 6 windows of 256 by 256 pixels: on
one batch over and over, and on batches that are read ahead of it. Reading keeps up if
these two are alike.
"""

import argparse
import itertools
import time

import keras
import numpy as np
from running import one_sentence

import keras_fcn
from keras_fcn import cli_data
from keras_fcn.datasets.batches import Batches
from keras_fcn.datasets.folder import Folder, pairs

WINDOW = {"crop": (256, 256), "scale": (0.7, 2), "mirror": True, "color": (0.4,) * 3}
WAYS = {
    "whole pictures, one by one": {"batch_size": 1},
    "windows, augmented": {"batch_size": 6, **WINDOW},
    "windows, augmented, cached": {"batch_size": 6, **WINDOW, "cache": True},
}
SECONDS = 10


def endless(batches):
    """Goes through the epochs, one after the other."""
    for epoch in itertools.count():
        batches.seek(epoch)
        yield from batches


def rate(batches):
    """Pictures a second, over and over through the epochs."""
    for _ in batches:  # fills a cache
        pass
    read, began = 0, time.perf_counter()
    for pictures, _ in endless(batches):
        read += len(pictures)
        if time.perf_counter() - began > SECONDS:
            return read / (time.perf_counter() - began)


def main():
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images")
    parser.add_argument("masks")
    cli_data.add_relabel(parser)
    options = parser.parse_args()
    with one_sentence():
        found = pairs(options.images, options.masks)[:120]
        source = Folder(found, 255, relabel=dict(options.relabel))
    for name, how in WAYS.items():
        print(f"{name:32} {rate(Batches(source, **how)):8.1f} pictures/s", flush=True)
    model = keras_fcn.fcn("googlenet", 8, 11)
    keras_fcn.compile_modern(model, 1000)
    batches = Batches(source, **WAYS["windows, augmented"])
    one = batches.batch(0, 0)
    backend = keras.backend.backend()
    for name, stream in (
        (f"training, one batch, {backend}", itertools.repeat(one, 8)),
        (f"training, read ahead, {backend}", itertools.islice(endless(batches), 8)),
    ):
        ends = []
        for pictures, labels in stream:
            model.train_on_batch(pictures, np.where(labels < 11, labels, 255))
            ends.append(time.perf_counter())
        seconds = (ends[-1] - ends[1]) / (len(ends) - 2)  # the first ones compile
        print(f"{name:32} {6 / seconds:8.1f} pictures/s", flush=True)


if __name__ == "__main__":
    main()
