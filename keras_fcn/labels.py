"""Class names, colours and the void label of every label set, in output order.

The index of a name is what argmax returns for that class, so void has none. The
names are those of the data sets' own files, spelling included. CamVid's colours are
SegNet's (Badrinarayanan et al., 2017); all others follow the PASCAL VOC colour map, as
the reference draws them. Where the raw labels count from 1, class `i` has the
colour of raw label `i + 1`, so that black stays void's or the background's.
"""

from typing import NamedTuple

import numpy as np

VOID = 255


class LabelSet(NamedTuple):
    """Names the classes of a data set and gives each a colour.

    Attributes:
        names: The class names, in output order.
        palette: (classes, 3) uint8, RGB; read-only.
    """

    names: tuple[str, ...]
    palette: np.ndarray


def voc_colormap(n=256):
    """Computes the first `n` colours of the PASCAL VOC colour map.

    Bits 0, 1, 2 of the index are the highest bits of red, green and blue, bits 3, 4, 5
    the second highest, and so on (VOC development kit, VOClabelcolormap.m).

    Args:
        n: Number of colours.

    Returns:
        (n, 3) uint8, RGB.
    """
    bits = np.arange(n)[:, None] >> np.arange(24) & 1
    return np.packbits(bits.reshape(n, 8, 3), axis=1)[:, 0]


def _names(text):
    return tuple(name.strip() for name in text.split(","))


_VOC = _names("""
    background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair,
    cow, diningtable, dog, horse, motorbike, person, pottedplant, sheep, sofa, train,
    tvmonitor""")

_NYUD = _names("""
    wall, floor, cabinet, bed, chair, sofa, table, door, window, bookshelf,
    picture, counter, blinds, desk, shelves, curtain, dresser, pillow, mirror,
    floor mat, clothes, ceiling, books, refridgerator, television, paper, towel,
    shower curtain, box, whiteboard, person, night stand, toilet, sink, lamp, bathtub,
    bag, otherstructure, otherfurniture, otherprop""")

_SIFTFLOW_SEM = _names("""
    awning, balcony, bird, boat, bridge, building, bus, car, cow, crosswalk,
    desert, door, fence, field, grass, moon, mountain, person, plant, pole,
    river, road, rock, sand, sea, sidewalk, sign, sky, staircase, streetlight,
    sun, tree, window""")

_SIFTFLOW_GEO = _names("sky, horizontal, vertical")

_PASCAL_CONTEXT = _VOC + _names("""
    bag, bed, bench, book, building, cabinet, ceiling, clothes, computer,
    cup, door, fence, floor, flower, food, grass, ground, keyboard, light,
    mountain, mouse, curtain, platform, sign, plate, road, rock, shelves, sidewalk,
    sky, snow, bedcloth, track, tree, truck, wall, water, window, wood""")

_CAMVID = {
    "sky": (128, 128, 128),
    "building": (128, 0, 0),
    "pole": (192, 192, 128),
    "road": (128, 64, 128),
    "pavement": (60, 40, 222),
    "tree": (128, 128, 0),
    "sign": (192, 128, 128),
    "fence": (64, 64, 128),
    "car": (64, 0, 128),
    "pedestrian": (64, 64, 0),
    "bicyclist": (0, 128, 192),
}


def _label_set(names, palette):
    palette = np.array(palette, np.uint8)
    palette.flags.writeable = False  # shared by all who import it
    return LabelSet(tuple(names), palette)


def _from_background(names):
    return _label_set(names, voc_colormap(len(names)))


def _from_one(names):
    return _label_set(names, voc_colormap(len(names) + 1)[1:])


LABEL_SETS = {
    "voc": _from_background(_VOC),
    "nyud": _from_one(_NYUD),
    "siftflow-sem": _from_one(_SIFTFLOW_SEM),
    "siftflow-geo": _from_one(_SIFTFLOW_GEO),
    "pascal-context": _from_background(_PASCAL_CONTEXT),
    "camvid": _label_set(_CAMVID, list(_CAMVID.values())),
}
