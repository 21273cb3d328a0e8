"""Scores checkpoints on pictures that were taken, as it were, in other conditions.

    python benchmarks/robustness.py IMAGES MASKS CHECKPOINT... --relabel 11=255

Prints the mean IU of each checkpoint under each condition. A change of light is that of
the pictures; a change of size is one of pictures and masks, whose pixels are then the
nearest ones. `keras-fcn evaluate` gives the first row.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image, ImageFilter
from running import one_sentence

from keras_fcn import load_checkpoint, metrics, segment
from keras_fcn.cli_data import add_relabel
from keras_fcn.datasets import folder
from keras_fcn.progress import track


def light(red, green, blue):
    """Multiplies the channels."""
    factors = np.float32([red, green, blue])
    return lambda image: np.uint8(np.clip(image * factors, 0, 255))


def blurred(image):
    """A Gaussian of 1.5 pixels."""
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(1.5)))


def noisy(image):
    """Noise of 10 grey levels, the same for each picture."""
    noise = np.random.default_rng(0).standard_normal(image.shape)
    return np.uint8(np.clip(image + 10 * noise, 0, 255))


def flat(image):
    """Half the contrast."""
    return np.uint8(image.mean() + (np.float32(image) - image.mean()) / 2)


# How a picture is changed, and by which factor its size and that of its mask.
CONDITIONS = {
    "as it is": (lambda image: image, 1),
    "half as bright": (light(0.5, 0.5, 0.5), 1),
    "1.5 times as bright": (light(1.5, 1.5, 1.5), 1),
    "blue light": (light(0.8, 1.0, 1.2), 1),
    "red light": (light(1.2, 1.0, 0.8), 1),
    "half the contrast": (flat, 1),
    "blurred by 1.5 pixels": (blurred, 1),
    "noise of 10 grey levels": (noisy, 1),
    "0.7 times the size": (lambda image: image, 0.7),
    "1.4 times the size": (lambda image: image, 1.4),
}


def resized(array, factor, resample):
    """Returns an image or a mask of another size."""
    size = [round(length * factor) for length in array.shape[1::-1]]
    return np.asarray(Image.fromarray(array).resize(size, resample))


def mean_iou(model, source, change, factor, name):
    """Returns the mean IU of a net over a source, a share."""
    classes = model.output.shape[-1]
    matrix = np.zeros((classes, classes), int)
    for i in track(range(len(source)), name):
        image, truth = source[i]
        image = change(image)
        if factor != 1:
            image = resized(image, factor, Image.Resampling.BICUBIC)
            truth = resized(truth, factor, Image.Resampling.NEAREST)
        matrix += metrics.confusion_matrix(truth, segment(model, image), classes)
    return metrics.scores(matrix)["mean_iou"]


def main():
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("images", type=pathlib.Path)
    parser.add_argument("masks", type=pathlib.Path)
    parser.add_argument("checkpoints", nargs="+", metavar="checkpoint")
    add_relabel(parser)
    with one_sentence():
        score(parser.parse_args())


def score(options):
    """Does what the command line asks for, row by row."""
    models = {name: load_checkpoint(name) for name in options.checkpoints}
    pairs = folder.pairs(options.images, options.masks)
    print(f"| | {' | '.join(map(str, models))} |\n|---|{'---|' * len(models)}")
    for condition, (change, factor) in CONDITIONS.items():
        scores = []
        for model in models.values():
            classes = model.output.shape[-1]
            source = folder.Folder(pairs, classes, relabel=dict(options.relabel))
            scores.append(mean_iou(model, source, change, factor, condition))
        row = " | ".join(f"{100 * score:.1f}" for score in scores)
        print(f"| {condition} | {row} |", flush=True)


if __name__ == "__main__":
    main()
