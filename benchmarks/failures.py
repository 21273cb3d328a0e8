"""Draws the pictures of a data set at which a net is worst, and where it is wrong.

    python benchmarks/failures.py IMAGES MASKS CHECKPOINT failures.png --relabel 11=255

Each row is one picture: what the net says, and beside it, in red, the pixels where the
mask says otherwise (grey where it is void). The worst are those of the lowest pixel
accuracy, one of each third of the data, or of as many parts as --worst says: the
neighbours of a film look alike. With --with-images, the picture itself comes first.
"""

import argparse
import pathlib

import numpy as np
from PIL import Image
from running import one_sentence

from keras_fcn import cli_data, images, load_checkpoint, manifest, models, segment
from keras_fcn.datasets import folder
from keras_fcn.labels import VOID
from keras_fcn.progress import track

RIGHT, WRONG, UNKNOWN = (255, 255, 255), (200, 30, 30), (190, 190, 190)
GAP = 6  # pixels between panels


def accuracy(truth, found):
    """Returns the share of the pixels that are not void that are right."""
    known = truth != VOID
    return (truth == found)[known].mean() if known.any() else 1.0


def mistakes(truth, found):
    """Paints which pixels are right and which are not, (height, width, 3) uint8."""
    picture = np.where((truth == found)[..., None], np.uint8(RIGHT), np.uint8(WRONG))
    picture[truth == VOID] = UNKNOWN
    return picture


def tiled(rows):
    """Lays equally many panels a row beside and below each other, on white."""
    height, width = np.max([panel.shape[:2] for row in rows for panel in row], axis=0)
    size = (width + GAP) * len(rows[0]) - GAP, (height + GAP) * len(rows) - GAP
    canvas = Image.new("RGB", tuple(map(int, size)), "white")
    for (y, x), _ in np.ndenumerate(np.empty((len(rows), len(rows[0])))):
        place = int(x * (width + GAP)), int(y * (height + GAP))
        canvas.paste(Image.fromarray(rows[y][x]), place)
    return np.asarray(canvas)


def main():
    """Scores each picture by itself and draws the worst."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("images", type=pathlib.Path)
    add("masks", type=pathlib.Path)
    add("checkpoint")
    add("picture", type=pathlib.Path, help="what to write")
    add("--worst", type=int, default=3, help="how many, one of each such part (3)")
    add("--with-images", action="store_true", help="draw the pictures, too")
    cli_data.add_relabel(parser)
    with one_sentence():
        draw(parser.parse_args())


def draw(options):
    """Does what the command line asks for."""
    cli_data.check_file(options.picture, ".png")
    entry = models.checkpoint_entry(options.checkpoint)
    cli_data.check_labels_pictures(entry, options.checkpoint)
    sets = manifest.label_sets(entry)
    if len(sets) != 1 or options.worst < 1:
        raise ValueError(
            "Expected a checkpoint of one head with names, and --worst from 1."
        )
    [known] = sets.values()
    model = load_checkpoint(options.checkpoint)
    pairs = folder.pairs(options.images, options.masks)
    relabel = dict(options.relabel)
    source = folder.Folder(pairs, len(known.names), relabel=relabel)
    found = []
    for i in track(range(len(source)), "Segmenting"):
        image, truth = source[i]
        labels = segment(model, image)
        found.append((accuracy(truth, labels), i, labels))
    rows = []
    for part in np.array_split(np.arange(len(found)), min(options.worst, len(found))):
        share, i, labels = min((found[i] for i in part), key=lambda item: item[:2])
        image, truth = source[i]
        panels = [images.colorize(labels, known.palette), mistakes(truth, labels)]
        rows.append([image, *panels] if options.with_images else panels)
        print(f"{100 * share:.1f} % right: {pairs[i][0]}")
    images.save_image(options.picture, tiled(rows))


if __name__ == "__main__":
    main()
