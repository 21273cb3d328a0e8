"""Label sets against the lists of their data sets, and VOC's colours as published."""

import numpy as np
import pytest

from keras_fcn.labels import LABEL_SETS, VOID, voc_colormap

COUNTS = {
    "voc": 21,
    "nyud": 40,
    "siftflow-sem": 33,
    "siftflow-geo": 3,
    "pascal-context": 60,
    "camvid": 11,
}


def test_the_label_sets_are_those_of_the_published_nets_and_camvid():
    assert {name: len(labels.names) for name, labels in LABEL_SETS.items()} == COUNTS


@pytest.mark.parametrize("labels", LABEL_SETS.values(), ids=LABEL_SETS)
def test_every_class_has_a_name_and_a_colour_of_its_own(labels):
    classes = len(labels.names)
    colors = {tuple(color) for color in labels.palette.tolist()}
    assert len(set(labels.names)) == classes == len(colors)
    assert all(name == name.strip().lower() != "" for name in labels.names)
    assert labels.palette.shape == (classes, 3)
    assert labels.palette.dtype == np.uint8
    assert (224, 224, 192) not in colors  # void's


# The 40 classes of Gupta et al., 2013, in the order of their file.
NYUD = """
wall; floor; cabinet; bed; chair; sofa; table; door; window; bookshelf; picture;
counter; blinds; desk; shelves; curtain; dresser; pillow; mirror; floor mat;
clothes; ceiling; books; refridgerator; television; paper; towel;
shower curtain; box; whiteboard; person; night stand; toilet; sink; lamp;
bathtub; bag; otherstructure; otherfurniture; otherprop
"""
CAMVID = "sky building pole road pavement tree sign fence car pedestrian bicyclist"


def test_classes_stand_in_the_order_of_their_data_sets():
    names = {name: list(labels.names) for name, labels in LABEL_SETS.items()}
    assert names["nyud"] == NYUD.strip().replace("\n", " ").split("; ")
    assert names["camvid"] == CAMVID.split()
    for alphabetical in (names["voc"][1:], names["siftflow-sem"]):
        assert alphabetical == sorted(alphabetical)


@pytest.mark.parametrize(
    ("label_set", "index", "name"),
    [
        ("voc", 0, "background"),
        ("voc", 15, "person"),
        ("voc", 20, "tvmonitor"),
        ("nyud", 0, "wall"),
        ("nyud", 19, "floor mat"),
        ("nyud", 23, "refridgerator"),
        ("nyud", 39, "otherprop"),
        ("siftflow-sem", 8, "cow"),  # 8, 10 and 15 are not in the test set
        ("siftflow-sem", 10, "desert"),
        ("siftflow-sem", 15, "moon"),
        ("siftflow-sem", 32, "window"),
        ("siftflow-geo", 0, "sky"),
        ("siftflow-geo", 2, "vertical"),
        ("pascal-context", 0, "background"),
        ("pascal-context", 20, "tvmonitor"),
        ("pascal-context", 42, "curtain"),  # the list is not alphabetical
        ("pascal-context", 44, "sign"),
        ("pascal-context", 45, "plate"),
        ("pascal-context", 52, "bedcloth"),
        ("pascal-context", 59, "wood"),
        ("camvid", 0, "sky"),
        ("camvid", 10, "bicyclist"),
    ],
)
def test_classes_stand_where_their_data_sets_number_them(label_set, index, name):
    assert LABEL_SETS[label_set].names[index] == name


@pytest.mark.parametrize(
    ("index", "color"),
    [
        (0, (0, 0, 0)),
        (1, (128, 0, 0)),
        (2, (0, 128, 0)),
        (15, (192, 128, 128)),
        (20, (0, 64, 128)),
        (VOID, (224, 224, 192)),
    ],
)
def test_the_voc_colormap_has_the_published_colours(index, color):
    assert tuple(voc_colormap()[index]) == color


def test_the_voc_colormap_gives_256_labels_256_colours():
    assert len(np.unique(voc_colormap(), axis=0)) == 256


@pytest.mark.parametrize("n", [0, 1, 21, 255])
def test_a_shorter_voc_colormap_is_the_beginning_of_the_whole(n):
    np.testing.assert_array_equal(voc_colormap(n), voc_colormap(256)[:n])


@pytest.mark.parametrize("label_set", ["nyud", "siftflow-sem", "siftflow-geo"])
def test_sets_without_background_have_no_black_class(label_set):
    assert LABEL_SETS[label_set].palette.any(axis=1).all()
    assert tuple(LABEL_SETS[label_set].palette[0]) == (128, 0, 0)  # raw label 1


def test_camvid_has_the_colours_of_segnet():
    # SegNet-Tutorial, Scripts/test_segmentation_camvid.py, without road markings.
    assert LABEL_SETS["camvid"].palette.tolist() == [
        [128, 128, 128],
        [128, 0, 0],
        [192, 192, 128],
        [128, 64, 128],
        [60, 40, 222],
        [128, 128, 0],
        [192, 128, 128],
        [64, 64, 128],
        [64, 0, 128],
        [64, 64, 0],
        [0, 128, 192],
    ]


def test_palettes_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        LABEL_SETS["voc"].palette[0] = 255
