"""PASCAL VOC 2011 and 2012, segmentation."""

import tensorflow_datasets as tfds

from keras_fcn import images
from keras_fcn.datasets import building, sbd
from keras_fcn.labels import LABEL_SETS

FILES = {
    "2011": "VOCtrainval_25-May-2011.tar",
    "2012": "VOCtrainval_11-May-2012.tar",
}
ROOTS = {
    "2011": "TrainVal/VOCdevkit/VOC2011/",
    "2012": "VOCdevkit/VOC2012/",
}
CITATION = """@article{everingham2015pascal,
  author = {Everingham, Mark and Eslami, S. M. Ali and Van Gool, Luc and
            Williams, Christopher K. I. and Winn, John and Zisserman, Andrew},
  title = {The PASCAL Visual Object Classes Challenge: A Retrospective},
  journal = {International Journal of Computer Vision},
  volume = {111}, number = {1}, pages = {98--136}, year = {2015}
}"""


class VocSegmentation(building.SegmentationBuilder):
    """PASCAL VOC, semantic segmentation: 21 classes, background among them.

    255 is the band around objects, and what was too difficult. `seg11valid`, of 2011,
    is the part of `val` that SBD's training split does not hold: what nets are
    evaluated on that were trained on SBD (Long et al., 2015, section 4.1).
    """

    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="2011", description="The challenge of 2011."),
        tfds.core.BuilderConfig(name="2012", description="The challenge of 2012."),
    ]
    FEATURES = {"image": building.jpeg, "label": building.label_map}
    TABLES = {"label": building.from_background(len(LABEL_SETS["voc"].names))}
    COUNTS = {
        "2011": {"train": 1112, "val": 1111, "seg11valid": 736},
        "2012": {"train": 1464, "val": 1449},
    }
    # Shipped, because SBD's list would be another 1.4 GB to fetch. Where SBD's archive
    # is at hand, the split is computed from it, and must be this one.
    SEG11VALID = building.LISTS / "pascal-seg11valid.txt"
    HOMEPAGE = "http://host.robots.ox.ac.uk/pascal/VOC/"
    CITATION = CITATION
    MANUAL_DOWNLOAD_INSTRUCTIONS = building.instructions(*FILES.values())

    @property
    def archives(self):
        """The archive of the year."""
        return (FILES[self.builder_config.name],)

    @property
    def counts(self):
        """Pictures of each split."""
        return self.COUNTS[self.builder_config.name]

    def splits(self, dl_manager):
        """Unpacks the archive: `{split: list of ids}`."""
        year = self.builder_config.name
        parts = ("JPEGImages/", "SegmentationClass/", "ImageSets/Segmentation/")
        prefixes = [ROOTS[year] + part for part in parts]
        self._root = self.unpack(dl_manager, FILES[year], prefixes) / ROOTS[year]
        lists = self._root / "ImageSets" / "Segmentation"
        found = {
            split: building.read_ids(lists / f"{split}.txt")
            for split in ("train", "val")
        }
        if year == "2011":
            found["seg11valid"] = building.read_ids(self.SEG11VALID)
            if lost := set(found["seg11valid"]) - set(found["val"]):
                raise ValueError(
                    f"`{lists / 'val.txt'}` lacks {len(lost)} pictures of seg11valid, "
                    f"such as {min(lost)}."
                )
            if self.has(dl_manager, sbd.FILE):
                self._compute(dl_manager, found)
        return found

    def _compute(self, dl_manager, found):
        """Computes seg11valid, and makes sure that it is the published one."""
        member = f"{sbd.ROOT}train.txt"
        train = building.read_ids(self.unpack(dl_manager, sbd.FILE, [member]) / member)
        computed = set(found["val"]) - set(train)
        if computed != set(found["seg11valid"]):
            raise ValueError(
                f"val without SBD's train has {len(computed)} pictures, which are not "
                f"the {len(found['seg11valid'])} of seg11valid."
            )

    def files(self, example_id):
        """Returns the files of an example."""
        mask = self._root / "SegmentationClass" / f"{example_id}.png"
        return (
            {"image": self._root / "JPEGImages" / f"{example_id}.jpg"},
            {"label": (mask, images.read_labels(building.existing(mask)))},
        )
