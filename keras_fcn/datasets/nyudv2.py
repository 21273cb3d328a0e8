"""NYUDv2: indoor pictures with depth, and 40 classes (Gupta et al., 2013)."""

from keras_fcn.datasets import building
from keras_fcn.labels import LABEL_SETS

FILE = "nyud.tar.gz"
FIELD = "segmentation"


class Nyudv2Seg(building.SegmentationBuilder):
    """NYUDv2 as prepared for the reference: 40 classes, pictures of 560 x 425.

    `depth` is in-filled, in millimetres; `hha` holds disparity, height above ground and
    angle with gravity, in this order (Gupta et al., 2014). The nets are trained on
    `train` and `val` together.
    """

    FEATURES = {
        "image": building.png,
        "depth": building.depth,
        "hha": building.png,
        "label": building.label_map,
    }
    TABLES = {"label": building.from_one(len(LABEL_SETS["nyud"].names))}
    COUNTS = {"train": 381, "val": 414, "test": 654}
    ARCHIVES = (FILE,)
    LISTS = building.LISTS
    HOMEPAGE = "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html"
    CITATION = """@inproceedings{silberman2012indoor,
  author = {Silberman, Nathan and Hoiem, Derek and Kohli, Pushmeet and Fergus, Rob},
  title = {Indoor Segmentation and Support Inference from {RGBD} Images},
  booktitle = {European Conference on Computer Vision (ECCV)}, year = {2012}
}
@inproceedings{gupta2013perceptual,
  author = {Gupta, Saurabh and Arbelaez, Pablo and Malik, Jitendra},
  title = {Perceptual Organization and Recognition of Indoor Scenes from {RGB-D}
           Images},
  booktitle = {Computer Vision and Pattern Recognition (CVPR)}, year = {2013}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = building.instructions(FILE)

    def splits(self, dl_manager):
        """Finds the data: `{split: list of ids}`."""
        self._root = self.locate(dl_manager, FILE, "data/hha")
        self._reader = self.reader()
        return {
            split: building.read_ids(self.LISTS / f"nyud-{split}.txt")
            for split in self.counts
        }

    def files(self, example_id):
        """Returns the files of an example."""
        mask = self._root / "segmentation" / f"img_{example_id}.mat"
        raw = self._reader.read(building.existing(mask), FIELD)
        folders = {"image": "images", "depth": "depth", "hha": "hha"}
        pictures = {
            feature: self._root / "data" / folder / f"img_{example_id}.png"
            for feature, folder in folders.items()
        }
        return pictures, {"label": (mask, raw)}
