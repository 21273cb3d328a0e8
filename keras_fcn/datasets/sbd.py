"""SBD, the Semantic Boundaries Dataset: VOC's pictures, many more of them labelled."""

from keras_fcn.datasets import building
from keras_fcn.labels import LABEL_SETS

FILE, ROOT = "benchmark.tgz", "benchmark_RELEASE/dataset/"
FIELD = "GTcls.Segmentation"


class Sbd(building.SegmentationBuilder):
    """SBD, semantic segmentation: the 21 classes of VOC, background among them.

    What the VOC nets are trained on. The training split holds pictures of VOC's `val`:
    evaluate on `seg11valid` of `voc_segmentation`.
    """

    FEATURES = {"image": building.jpeg, "label": building.label_map}
    TABLES = {"label": building.from_background(len(LABEL_SETS["voc"].names))}
    COUNTS = {"train": 8498, "val": 2857}
    ARCHIVES = (FILE,)
    HOMEPAGE = "http://home.bharathh.info/pubs/codes/SBD/download.html"
    CITATION = """@inproceedings{hariharan2011semantic,
  author = {Hariharan, Bharath and Arbelaez, Pablo and Bourdev, Lubomir and
            Maji, Subhransu and Malik, Jitendra},
  title = {Semantic Contours from Inverse Detectors},
  booktitle = {International Conference on Computer Vision (ICCV)}, year = {2011}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = building.instructions(FILE)

    def splits(self, dl_manager):
        """Unpacks the archive: `{split: list of ids}`."""
        parts = ("img/", "cls/", "train.txt", "val.txt")
        prefixes = [ROOT + part for part in parts]
        self._root = self.unpack(dl_manager, FILE, prefixes) / ROOT
        self._reader = self.reader()
        return {
            split: building.read_ids(self._root / f"{split}.txt")
            for split in self.counts
        }

    def files(self, example_id):
        """Returns the files of an example."""
        mask = building.existing(self._root / "cls" / f"{example_id}.mat")
        return (
            {"image": self._root / "img" / f"{example_id}.jpg"},
            {"label": (mask, self._reader.read(mask, FIELD))},
        )
