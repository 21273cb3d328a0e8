"""PASCAL-Context: every pixel of VOC 2010's pictures labelled."""

from keras_fcn.datasets import building
from keras_fcn.labels import LABEL_SETS

PICTURES, LABELS = "VOCtrainval_03-May-2010.tar", "trainval.tar.gz"
ROOT = "VOCdevkit/VOC2010/"
FIELD = "LabelMap"
RAW_NAMES = building.LISTS / "pascal-context-459.txt"
# What the data set calls classes of ours (pascalcontext_layers.py).
RAW_NAME = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}


def table():
    """Maps the 459 raw labels to 60: by name; 0 and all others are background."""
    names = RAW_NAMES.read_text("utf-8").splitlines()
    found = dict.fromkeys(range(len(names) + 1), 0)
    classes = LABEL_SETS["pascal-context"].names
    for label, name in enumerate(classes[1:], start=1):
        found[1 + names.index(RAW_NAME.get(name, name))] = label
    return found


class PascalContext(building.SegmentationBuilder):
    """PASCAL-Context: 59 classes, and background as the 60th.

    Class 0 is all that is none of the 59, unlabelled pixels among it: the reference
    trains it as a class, and nothing is void. A mean over 59 classes leaves it out, one
    over 60 does not, so that the two are not to be compared.
    """

    FEATURES = {"image": building.jpeg, "label": building.label_map}
    TABLES = {"label": table()}
    COUNTS = {"train": None, "val": 5105}
    ARCHIVES = (PICTURES, LABELS)
    HOMEPAGE = "https://www.cs.stanford.edu/~roozbeh/pascal-context/"
    CITATION = """@inproceedings{mottaghi2014role,
  author = {Mottaghi, Roozbeh and Chen, Xianjie and Liu, Xiaobai and Cho, Nam-Gyu and
            Lee, Seong-Whan and Fidler, Sanja and Urtasun, Raquel and Yuille, Alan},
  title = {The Role of Context for Object Detection and Semantic Segmentation in the
           Wild},
  booktitle = {Computer Vision and Pattern Recognition (CVPR)}, year = {2014}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = building.instructions(PICTURES, LABELS)

    def splits(self, dl_manager):
        """Finds the labels and unpacks the pictures: `{split: list of ids}`."""
        self._labels = self.locate(dl_manager, LABELS, "trainval") / "trainval"
        parts = ("JPEGImages/", "ImageSets/Main/")
        prefixes = [ROOT + part for part in parts]
        self._root = self.unpack(dl_manager, PICTURES, prefixes) / ROOT
        self._reader = self.reader()
        lists = self._root / "ImageSets" / "Main"
        return {
            split: building.read_ids(lists / f"{split}.txt") for split in self.counts
        }

    def files(self, example_id):
        """Returns the files of an example."""
        mask = building.existing(self._labels / f"{example_id}.mat")
        return (
            {"image": self._root / "JPEGImages" / f"{example_id}.jpg"},
            {"label": (mask, self._reader.read(mask, FIELD))},
        )
