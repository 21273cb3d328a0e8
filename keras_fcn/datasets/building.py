"""What the TFDS builders share: where archives come from, and what is checked.

An archive is looked for in TFDS's `manual_dir` and among its downloads. If somebody has
published a hash of it, it must agree, and what is missing is downloaded; of the others
nothing would tell a wrong file from the right one, so they are never downloaded. All
hashes stand in `checksums.tsv`.

Pictures are stored as they are, label maps as grey PNG files of training labels, 255
for void. Every picture and every label map is decoded once while a data set is built: a
file that is missing, damaged, of another size or with other labels ends the build,
which leaves nothing behind.
"""

import contextlib
import io
import os
import pathlib
import re
import shutil
import threading
import time
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from keras_fcn import images
from keras_fcn.datasets import archives, matlab
from keras_fcn.download import download, forget
from keras_fcn.files import ORPHAN_SECONDS, locked, measure
from keras_fcn.labels import VOID
from keras_fcn.progress import reporting

CHECKSUMS = pathlib.Path(__file__).with_name("checksums.tsv")
LISTS = pathlib.Path(__file__).with_name("lists")

# Well above what they hold: VOC 2012 has 2.0 GB in about 40,000 files.
MOST_FILES, MOST_BYTES = 100_000, 2**33

TOUCH_SECONDS = 600  # `sweep` of another build leaves alone what is touched so often
DEEP = 2  # folders below `manual_dir` in which unpacked data are looked for


class Archive(NamedTuple):
    """What is known of a file to fetch.

    Attributes:
        url: Where it was published.
        facts: Its `bytes`, `md5`, `sha1` and `sha256`, those that were published.
        file: Its name.
    """

    url: str
    facts: dict
    file: str

    @property
    def hashed(self):
        """Whether there is a hash to know it by."""
        return bool(self.facts.keys() - {"bytes"})


def read_archives(path=CHECKSUMS):
    """Reads the table of archives: `{file: Archive}`."""
    found = {}
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("#"):
            url, length, hashes, file = line.split("\t")
            facts = {"bytes": int(length)} if length else {}
            facts |= dict(entry.split(":") for entry in hashes.split())
            found[file] = Archive(url, facts, file)
    return found


def instructions(*files):
    """Says which archives to put into `manual_dir`, and where they are from."""
    known = read_archives()
    lines = [f"{file}, from {known[file].url}" for file in files]
    return "\n".join(["Put into the folder:", *lines])


def jpeg():
    """The feature of a picture whose file is stored as it is, such as a JPEG."""
    return tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg")


def png():
    """The feature of a picture of three channels, PNG."""
    return tfds.features.Image(shape=(None, None, 3), encoding_format="png")


def depth():
    """The feature of a depth map, PNG of 16 bits."""
    return tfds.features.Image(
        shape=(None, None, 1), dtype=np.uint16, encoding_format="png"
    )


def label_map():
    """The feature of training labels: grey PNG, 255 for void."""
    return tfds.features.Image(
        shape=(None, None, 1), encoding_format="png", use_colormap=True
    )


class SegmentationBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A TFDS builder of pictures with label maps.

    The examples keep the order of the published lists. The ids of a split are kept in
    `info.metadata["ids"]`, too, so that they are known without reading pictures.

    A subclass gives `splits` and `files`, and these:

    Attributes:
        FEATURES: `{name: function that makes the feature}`; `id` is added.
        TABLES: `{label feature: {raw label: training label}}`.
        COUNTS: `{split: pictures}` as published; None where nobody has.
        ARCHIVES: Names of the files that the data come in.
        HOMEPAGE: Of the data set.
        CITATION: BibTeX.
        CHECKSUMS: The table of archives.
    """

    VERSION = tfds.core.Version("1.0.0")
    CHECKSUMS = CHECKSUMS
    url_infos = None  # TFDS knows one hash a file; `find` checks all

    def splits(self, dl_manager):
        """Makes the data available: `{split: list of ids}`."""
        raise NotImplementedError

    def files(self, example_id):
        """Returns `{feature: path}` and `{label feature: (path, raw labels)}`."""
        raise NotImplementedError

    @property
    def counts(self):
        """The number of pictures that each split must have, as `COUNTS`."""
        return self.COUNTS

    @property
    def archives(self):
        """The names of the archives, as `ARCHIVES`."""
        return self.ARCHIVES

    def find(self, dl_manager, file):
        """Returns the path of an archive, and makes sure that it is the published one.

        Args:
            dl_manager: TFDS's.
            file: Name of the archive.

        Raises:
            OSError: If it is not there and cannot be downloaded.
            ValueError: If a hash differs.
        """
        archive = read_archives(self.CHECKSUMS)[file]
        if self.has(dl_manager, file):
            path = next(x for x in self._places(dl_manager, file) if x.is_file())
            check(path, archive)
            return path
        if not archive.hashed:
            raise FileNotFoundError(
                f"{self.name} needs {file}. It is not downloaded here, as nobody has "
                "published a hash by which to tell a wrong file. Fetch it from "
                f"{archive.url} and pass the folder that holds it, or what it holds, "
                "as manual_dir."
            )
        return fetch(archive, pathlib.Path(dl_manager.download_dir))

    def has(self, dl_manager, file):
        """Returns whether an archive is there, be it the published one or not."""
        return any(path.is_file() for path in self._places(dl_manager, file))

    def _places(self, dl_manager, file):
        folders = manual_dir(dl_manager), pathlib.Path(dl_manager.download_dir)
        return [folder / file for folder in folders if folder]

    def unpack(self, dl_manager, file, prefixes=("",)):
        """Unpacks those files of an archive whose names begin with one of `prefixes`.

        Returns:
            The folder; it lies in the data set being built and ends with the build.
        """
        path = self.find(dl_manager, file)
        folder = pathlib.Path(self.data_path) / f"unpacked-{file}"
        with reporting(f"unpacking {file}") as report:
            archives.extract(
                path,
                folder,
                prefixes=prefixes,
                most_files=MOST_FILES,
                most_bytes=MOST_BYTES,
                progress=report,
            )
        self._stack.callback(shutil.rmtree, folder)
        self._unpacked[str(folder)] = str(path)
        return folder

    def locate(self, dl_manager, file, *markers):
        """Finds data whose archive has no hash: packed, or unpacked in `manual_dir`.

        Args:
            dl_manager: TFDS's.
            file: Name of the archive.
            markers: Paths of which the folder to be found holds one.

        Returns:
            The folder.
        """
        manual = manual_dir(dl_manager)
        if manual and not (manual / file).is_file():
            if folder := _holder(manual, markers):
                return folder
        unpacked = self.unpack(dl_manager, file)
        if folder := _holder(unpacked, markers):
            return folder
        raise ValueError(f"`{unpacked}` holds no {' or '.join(markers)}.")

    def reader(self):
        """Returns a `matlab.Reader` that ends with the build."""
        return self._stack.enter_context(matlab.Reader())

    def _info(self):
        features = {name: make() for name, make in self.FEATURES.items()}
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.__doc__,
            features=tfds.features.FeaturesDict(
                {**features, "id": tfds.features.Text()}
            ),
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            metadata=tfds.core.MetadataDict(ids={}),
            disable_shuffling=True,
        )

    def _download_and_prepare(self, dl_manager, download_config):
        self._unpacked = {}  # {folder: archive}
        sweep(pathlib.Path(self.data_path).parent)
        with _touched(self.data_path), contextlib.ExitStack() as self._stack:
            super()._download_and_prepare(dl_manager, download_config)

    def _split_generators(self, dl_manager):
        with self._sources_named():
            splits = self.splits(dl_manager)
            for split, ids in splits.items():
                check_ids(split, ids, self.counts[split])
        return {
            split: self._generate_examples(split, ids) for split, ids in splits.items()
        }

    def _generate_examples(self, split, ids):
        written = self.info.metadata["ids"][split] = []
        for place, example_id in enumerate(ids):
            with self._sources_named():
                example = self._example(example_id)
            yield place, example
            written.append(example_id)

    def _example(self, example_id):
        pictures, labels = self.files(example_id)
        example, sizes = {"id": example_id}, {}
        for feature, path in pictures.items():
            modes = _modes(self.info.features[feature])
            example[feature], sizes[path] = read_picture(path, modes)
        for feature, (path, raw) in labels.items():
            example[feature] = encode(translate(path, raw, self.TABLES[feature]))
            sizes[path] = raw.shape
        (first, size), *others = sizes.items()
        for path, other in others:
            if other != size:
                raise ValueError(
                    f"`{path}` is {other[0]} x {other[1]}, but `{first}` is {size[0]} "
                    f"x {size[1]} (height x width)."
                )
        return example

    @contextlib.contextmanager
    def _sources_named(self):
        """Names archives in place of folders that end with the build, and a remedy."""
        try:
            yield
        except ValueError as error:
            text = str(error)
            for folder, archive in self._unpacked.items():
                text = text.replace(folder, archive)
            known = read_archives(self.CHECKSUMS)
            urls = " and ".join(known[file].url for file in self.archives)
            raise ValueError(
                f"{self.name} is not built: {text} The data are not as they were "
                f"published; fetch them anew, from {urls}."
            ) from error


def manual_dir(dl_manager):
    """Returns TFDS's `manual_dir`; None if it is not there, or empty."""
    try:
        return pathlib.Path(dl_manager.manual_dir)
    except AssertionError:  # TFDS's way to say so
        return None


def check(path, archive):
    """Makes sure that a file agrees with all that was published of it.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it does not agree.
    """
    if not archive.facts:
        return
    found = measure(path, archive.facts.keys() - {"bytes"})
    wrong = {key for key, value in archive.facts.items() if found[key] != value}
    if wrong:
        facts = ", ".join(
            f"{key} {found[key]}, expected {archive.facts[key]}"
            for key in sorted(wrong)
        )
        raise ValueError(
            f"`{path}` is not the file that was published at {archive.url}: {facts}."
        )


def fetch(archive, folder):
    """Downloads an archive; goes on where an earlier call was cut.

    Returns:
        The path of the verified file.

    Raises:
        OSError: If it cannot be had.
        ValueError: If a hash differs: the file is removed.
    """
    path, part = folder / archive.file, folder / f"{archive.file}.part"
    with locked(folder / f".{archive.file}.lock", archive.file):
        if path.exists():  # another process has brought it meanwhile
            check(path, archive)
            return path
        try:
            download(archive.url, part)
        except OSError as error:
            raise OSError(
                f"{error}. Or fetch {archive.file} by other means, and pass the folder "
                "that holds it as manual_dir."
            ) from error
        try:
            check(part, archive)
            os.replace(part, path)
        finally:
            forget(part)
    return path


@contextlib.contextmanager
def _touched(folder):
    """Renews a folder's time for as long as the block lasts, which may be hours."""
    ended = threading.Event()

    def touch():
        while not ended.wait(TOUCH_SECONDS):
            os.utime(folder)

    thread = threading.Thread(target=touch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def sweep(folder):
    """Removes what builds that were killed have left in a folder of data sets."""
    for orphan in folder.glob("incomplete.*"):  # TFDS's name for unfinished ones
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
            if time.time() - orphan.stat().st_mtime > ORPHAN_SECONDS:
                shutil.rmtree(orphan, ignore_errors=True)


def existing(path):
    """Returns the path of a file.

    Raises:
        ValueError: If it is missing: then data are not complete.
    """
    if not path.is_file():
        raise ValueError(f"`{path}` is missing.")
    return path


def read_ids(path):
    """Reads a list of ids, one a line.

    Raises:
        ValueError: If it is missing, or if a line is no id.
    """
    ids = existing(path).read_text("utf-8", errors="replace").split()
    for example_id in ids:
        if not re.fullmatch("[A-Za-z0-9_]+", example_id):  # they become file names
            raise ValueError(f"`{path}` holds {example_id!r}, which is no id.")
    return ids


def check_ids(split, ids, count):
    """Makes sure that a split has as many pictures as published, each once.

    Raises:
        ValueError: If not.
    """
    if count is not None and len(ids) != count:
        raise ValueError(f"Split {split} has {len(ids)} pictures, expected {count}.")
    if len(set(ids)) != len(ids):
        raise ValueError(f"Split {split} has a picture twice.")


def read_picture(path, modes):
    """Reads a picture's file, and makes sure that it can be decoded.

    Args:
        path: Of the picture.
        modes: Pillow's modes that are expected.

    Returns:
        The file's bytes and (height, width). EXIF turns are ignored, as by the
        reference's reader: the label maps do not follow them.

    Raises:
        ValueError: If it is missing, damaged or of another mode.
    """
    images.read_image(existing(path))
    data = path.read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        if picture.mode not in modes:
            raise ValueError(
                f"`{path}` holds {picture.mode} pixels, expected {' or '.join(modes)}."
            )
        return data, picture.size[::-1]


def translate(path, raw, table):
    """Turns raw labels into training labels.

    Args:
        path: Of the file they are from.
        raw: (height, width) integers.
        table: `{raw label: training label}`.

    Returns:
        (height, width) uint8.

    Raises:
        ValueError: If there are other labels.
    """
    low, high = min(table), max(table)
    targets = np.full(high - low + 1, -1)
    targets[np.array(list(table)) - low] = list(table.values())
    known = raw.min() >= low and raw.max() <= high
    labels = targets[raw - low] if known else None
    if not known or labels.min() < 0:
        stray = sorted(set(np.unique(raw).tolist()) - table.keys())
        more = f" and {len(stray) - 5} more" if len(stray) > 5 else ""
        raise ValueError(
            f"`{path}` holds the labels {', '.join(map(str, stray[:5]))}{more}, which "
            f"are none of the {len(table)} of this data set."
        )
    return labels.astype(np.uint8)


def encode(labels):
    """Encodes labels, (height, width) uint8, as a grey PNG file."""
    content = io.BytesIO()
    Image.fromarray(labels).save(content, "PNG")
    return content.getvalue()


def from_one(num_classes, void=(0,)):
    """The table of raw labels that count from 1."""
    return {raw: VOID for raw in void} | {i + 1: i for i in range(num_classes)}


def from_background(num_classes):
    """The table of raw labels that are training labels, 255 for void."""
    return {i: i for i in range(num_classes)} | {VOID: VOID}


def _modes(feature):
    """Returns the modes, as Pillow calls them, that a picture may have."""
    if feature.np_dtype == np.uint16:
        return ("I;16",)
    return ("RGB", "L") if feature.encoding_format == "jpeg" else ("RGB",)


def _holder(folder, markers):
    """The nearest folder that holds a marker, in `folder` or a little below."""
    for level in range(DEEP + 1):
        for candidate in sorted(folder.glob("*/" * level) if level else [folder]):
            if any((candidate / marker).exists() for marker in markers):
                return candidate
    return None
