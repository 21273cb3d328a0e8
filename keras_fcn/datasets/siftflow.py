"""SIFT Flow: outdoor pictures with semantic and geometric labels."""

from keras_fcn.datasets import building
from keras_fcn.labels import LABEL_SETS

FILE = "SiftFlowDataset.zip"
SCENES = "spatial_envelope_256x256_static_8outdoorcategories"
FIELD = "S"


class SiftFlow(building.SegmentationBuilder):
    """SIFT Flow: every picture has labels of 33 classes and of 3 geometric ones.

    The test split holds no cow, desert or moon.
    """

    FEATURES = {
        "image": building.jpeg,
        "semantic": building.label_map,
        "geometric": building.label_map,
    }
    TABLES = {
        "semantic": building.from_one(len(LABEL_SETS["siftflow-sem"].names)),
        "geometric": building.from_one(
            len(LABEL_SETS["siftflow-geo"].names), void=(-1, 0)
        ),
    }
    COUNTS = {"trainval": 2486, "test": 200}
    ARCHIVES = (FILE,)
    LISTS = building.LISTS
    HOMEPAGE = "http://www.cs.unc.edu/~jtighe/Papers/ECCV10/"
    CITATION = """@article{liu2011nonparametric,
  author = {Liu, Ce and Yuen, Jenny and Torralba, Antonio},
  title = {Nonparametric Scene Parsing via Label Transfer},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume = {33}, number = {12}, pages = {2368--2382}, year = {2011}
}
@inproceedings{tighe2010superparsing,
  author = {Tighe, Joseph and Lazebnik, Svetlana},
  title = {SuperParsing: Scalable Nonparametric Image Parsing with Superpixels},
  booktitle = {European Conference on Computer Vision (ECCV)}, year = {2010}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = building.instructions(FILE)

    def splits(self, dl_manager):
        """Finds the data: `{split: list of ids}`."""
        self._root = self.locate(dl_manager, FILE, f"SemanticLabels/{SCENES}")
        self._reader = self.reader()
        return {
            split: building.read_ids(self.LISTS / f"sift-flow-{split}.txt")
            for split in self.counts
        }

    def files(self, example_id):
        """Returns the files of an example."""
        labels = {}
        for feature, folder in (
            ("semantic", "SemanticLabels"),
            ("geometric", "GeoLabels"),
        ):
            mask = self._root / folder / SCENES / f"{example_id}.mat"
            raw = self._reader.read(building.existing(mask), FIELD)
            labels[feature] = mask, raw
        return {"image": self._root / "Images" / SCENES / f"{example_id}.jpg"}, labels
