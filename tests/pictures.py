"""Folders of invented pictures and masks."""

import numpy as np
from PIL import Image

from keras_fcn.datasets import folder


def write(root, pictures, suffix=".png"):
    """Writes {name: (image array, mask array or PIL image)} to the two folders."""
    folders = root / "images", root / "masks"
    for place in folders:
        place.mkdir(exist_ok=True)
    for name, (image, mask) in pictures.items():
        Image.fromarray(np.uint8(image)).save(folders[0] / f"{name}{suffix}")
        if not isinstance(mask, Image.Image):
            mask = Image.fromarray(np.asarray(mask))
        mask.save(folders[1] / f"{name}.png")
    return folders


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3))


def labels(height, width, *values):
    """A mask of horizontal bands of these labels."""
    return np.uint8(np.resize(np.repeat(values, width), (height, width)))


def numbered(root, count, height=4, width=6):
    """Pictures that differ, whose mask says which one it is."""
    return folder.pairs(
        *write(
            root,
            {
                f"{i:02}": (noise(height, width, i), labels(height, width, i))
                for i in range(count)
            },
        )
    )
