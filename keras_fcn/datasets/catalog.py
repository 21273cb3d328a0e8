"""The data sets that nets are trained and evaluated on, prepared once and then sources.

TensorFlow Datasets (TFDS) builds and keeps them, as ArrayRecord files, which allow
random access; neither takes TensorFlow. What a source is, `batches` says.
"""

import contextlib
import difflib
import importlib
import io
import pathlib
import sys
from typing import NamedTuple

import numpy as np
from PIL import Image

from keras_fcn.labels import LABEL_SETS

FORMAT = "array_record"


class Dataset(NamedTuple):
    """Says which of a TFDS data set's features a net sees, and which it learns.

    Attributes:
        module: Of the builder, in `keras_fcn.datasets`.
        builder: Its class.
        config: Its configuration, or None.
        inputs: A feature; several, whose channels are put together as float32; or a
            dict of either by stream.
        labels: `{head: (feature, name of the label set)}`; of one head, `""`.
        train: The split that the reference trains on.
        evaluate: The split that it evaluates on.
        net: A checkpoint in the manifest that was trained on it, whose `input` says
            what preprocessing its pictures are given; None for that of `fcn`.
    """

    module: str
    builder: str
    config: str | None
    inputs: str | tuple | dict
    labels: dict
    train: str
    evaluate: str
    net: str | None


def _nyudv2(inputs, net):
    labels = {"": ("label", "nyud")}
    splits = "train+val", "test"
    return Dataset("nyudv2", "Nyudv2Seg", None, inputs, labels, *splits, net)


_VOC = {"": ("label", "voc")}
_SIFT_FLOW = {"sem": ("semantic", "siftflow-sem"), "geo": ("geometric", "siftflow-geo")}
_CONTEXT = {"": ("label", "pascal-context")}
_CAMVID = {"": ("label", "camvid")}

DATASETS = {
    "voc2011": Dataset(
        *("voc", "VocSegmentation", "2011"),
        *("image", _VOC, "train", "seg11valid", "vgg16-8s-voc"),
    ),
    "voc2012": Dataset(
        *("voc", "VocSegmentation", "2012"),
        *("image", _VOC, "train", "val", "vgg16-8s-voc"),
    ),
    "sbd": Dataset(
        *("sbd", "Sbd", None),
        *("image", _VOC, "train", "val", "vgg16-8s-voc"),
    ),
    "nyudv2": _nyudv2("image", "vgg16-32s-nyud"),
    "nyudv2-hha": _nyudv2("hha", "vgg16-32s-nyud-hha"),
    "nyudv2-depth": _nyudv2(("image", "depth"), None),
    "nyudv2-color-hha": _nyudv2(
        {"color": "image", "hha": "hha"}, "vgg16-32s-nyud-color-hha"
    ),
    "siftflow": Dataset(
        *("siftflow", "SiftFlow", None),
        *("image", _SIFT_FLOW, "trainval", "test", "vgg16-8s-siftflow"),
    ),
    "pascal-context": Dataset(
        *("pascal_context", "PascalContext", None),
        *("image", _CONTEXT, "train", "val", "vgg16-8s-pascal-context"),
    ),
    "camvid": Dataset(
        *("camvid", "Camvid", None),
        *("image", _CAMVID, "train", "val", "googlenet-4s-camvid"),
    ),
}


def prepare(name, *, data_dir=None, manual_dir=None):
    """Builds a data set from its archives, unless that has been done.

    Archives that are not in `manual_dir` are downloaded if a hash of them has been
    published; `keras_fcn/datasets/checksums.tsv` has them all. The disk needs room for
    what the archives hold, twice. A build that ends early leaves no data set.

    Args:
        name: A key of `DATASETS`.
        data_dir: Folder of all data sets; by default TFDS's, `~/tensorflow_datasets` or
            what the environment variable `TFDS_DATA_DIR` says.
        manual_dir: Folder with archives that you have fetched.

    Returns:
        The folder of the data set.

    Raises:
        ValueError: If there is no such data set, an archive has another hash, or the
            data are not as published: the file is named, and what to do.
        OSError: If an archive is missing, or the disk is full.
    """
    builder = _builder(name, data_dir)
    if manual_dir is not None and not pathlib.Path(manual_dir).is_dir():
        raise FileNotFoundError(
            f"`{manual_dir}` is no folder; expected one that holds the archives."
        )
    config = _tfds().download.DownloadConfig(
        manual_dir=manual_dir, try_download_gcs=False
    )
    with contextlib.redirect_stdout(sys.stderr):  # TFDS prints what it does
        builder.download_and_prepare(download_config=config, file_format=FORMAT)
    return pathlib.Path(builder.data_dir)


def load(name, split=None, *, data_dir=None):
    """Opens a prepared data set as a source.

    Args:
        name: A key of `DATASETS`.
        split: One of its splits, or several such as `"train+val"`; by default the one
            that the reference evaluates on. `DATASETS[name].train` is the one it trains
            on.
        data_dir: As in `prepare`.

    Returns:
        A `Source`.

    Raises:
        ValueError: If there is no such data set or split.
        OSError: If it is not prepared.
    """
    dataset, builder = _dataset(name), _builder(name, data_dir)
    if not builder.is_prepared():
        raise FileNotFoundError(
            f"{name} is not prepared in `{builder.data_dir}`. Run `keras-fcn prepare "
            f"{name}`, with --manual-dir FOLDER for archives that you have fetched."
        )
    ids = builder.info.metadata["ids"]
    split = split or dataset.evaluate
    if strange := set(split.split("+")) - set(ids):
        raise ValueError(
            f"{name} has no split {min(strange)} in `{builder.data_dir}`; expected "
            f"{', '.join(ids)}, or several with + between them. If it was prepared "
            "without, remove that folder and prepare it anew."
        )
    encoded = _tfds().decode.SkipDecoding()
    features = builder.info.features.keys() - {"id"}
    try:
        records = builder.as_data_source(
            split, decoders=dict.fromkeys(features, encoded)
        )
    except NotImplementedError:
        raise ValueError(
            f"`{builder.data_dir}` is no {FORMAT}: something else has prepared it. "
            f"Remove it and run `keras-fcn prepare {name}`."
        ) from None
    return Source(records, sum((ids[part] for part in split.split("+")), []), dataset)


class Source:
    """A split of a prepared data set: `source[i]` is a picture and its labels.

    Any number of threads may read. EXIF turns are ignored.

    Args:
        records: A sequence of `{feature: file content}`.
        ids: The names of the pictures, in order.
        dataset: A `Dataset`.

    Attributes:
        ids: List of strings.
        label_sets: `{head: LabelSet}`.
    """

    def __init__(self, records, ids, dataset):
        if len(records) != len(ids):
            raise ValueError(
                f"The data set has {len(records)} pictures and {len(ids)} names. "
                "Remove it and prepare it anew."
            )
        self.ids = list(ids)
        self.label_sets = {
            head: LABEL_SETS[label_set]
            for head, (_, label_set) in dataset.labels.items()
        }
        self._records, self._dataset = records, dataset

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        record = self._record(index)
        return _inputs(record, self._dataset.inputs), self._labels(record)

    def labels(self, index):
        """Reads the labels alone, (height, width) uint8, or a dict of them by head."""
        return self._labels(self._record(index))

    def _record(self, index):
        if not 0 <= index < len(self):
            raise IndexError(f"There is no picture {index}: there are {len(self)}.")
        return self._records[index]

    def _labels(self, record):
        found = {
            head: np.array(_open(record[feature]))
            for head, (feature, _) in self._dataset.labels.items()
        }
        return found.get("", found)


def _inputs(record, features):
    if isinstance(features, dict):
        return {stream: _inputs(record, each) for stream, each in features.items()}
    if isinstance(features, tuple):
        planes = [_inputs(record, feature) for feature in features]
        return np.concatenate(planes, axis=-1, dtype=np.float32)
    picture = _open(record[features])
    if features == "depth":
        return np.array(picture)[..., None]
    return np.array(picture.convert("RGB"))


def _open(content):
    return Image.open(io.BytesIO(content))


def _dataset(name):
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, cutoff=0.3) or DATASETS
        raise ValueError(f"There is no data set {name!r}; expected {', '.join(near)}.")
    return DATASETS[name]


def _builder(name, data_dir):
    dataset = _dataset(name)
    _tfds()
    module = importlib.import_module(f"keras_fcn.datasets.{dataset.module}")
    return getattr(module, dataset.builder)(data_dir=data_dir, config=dataset.config)


def _tfds():
    try:
        import array_record  # noqa: F401, which TFDS imports only once it is late
        import tensorflow_datasets
    except ModuleNotFoundError as error:
        raise OSError(
            f"Data sets take TensorFlow Datasets and ArrayRecord ({error}); install "
            'them with pip install ".[datasets]" in the checkout. There is no '
            "ArrayRecord for Windows."
        ) from error
    return tensorflow_datasets
