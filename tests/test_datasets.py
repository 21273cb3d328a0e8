import contextlib
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import archives_made
import keras
import numpy as np
import pytest
from archives_made import VOC
from PIL import ExifTags, Image
from servers import Server

if keras.backend.backend() != "tensorflow":
    pytest.skip("TFDS and its builders know no backend", allow_module_level=True)

import tensorflow_datasets as tfds

from keras_fcn import files, labels
from keras_fcn.datasets import (
    archives,
    building,
    camvid,
    catalog,
    matlab,
    nyudv2,
    pascal_context,
    sbd,
    siftflow,
    voc,
)

ROOT = pathlib.Path(__file__).parent.parent
FULL = os.environ.get("KERAS_FCN_FAULTS") == "full"
NAMES = list(archives_made.LAYOUTS)

# {name: {head: training labels}} of the raw labels `archives_made.RAW`, by hand.
EXPECTED = {
    "voc2011": {"": [0, 1, 15, 20, 255]},
    "voc2012": {"": [0, 1, 15, 20, 255]},
    "sbd": {"": [0, 1, 15, 20]},
    "nyudv2": {"": [255, 0, 1, 39]},
    "siftflow": {"sem": [255, 0, 1, 32], "geo": [255, 255, 0, 1, 2]},
    "pascal-context": {"": [0, 0, 1, 52, 28, 11, 59, 0]},
    "camvid": {"": [0, 1, 10, 255]},
}


@pytest.fixture(scope="module")
def reader():
    """One reader of .mat files for all builds: starting it takes a second."""
    with matlab.Reader() as reader:
        yield reader


def invent(name, folder, patch, reader):
    """Makes a data set's archives, and lets the catalogue know their builder."""
    folder.mkdir(exist_ok=True)
    invented = archives_made.make(name, folder)
    dataset = catalog.DATASETS[name]
    module = sys.modules[f"keras_fcn.datasets.{dataset.module}"]
    patch.setattr(module, dataset.builder, invented.builder)
    patch.setattr(matlab, "Reader", lambda: contextlib.nullcontext(reader))
    return invented


@pytest.fixture
def made(tmp_path, monkeypatch, reader):
    """Makes archives that a test may spoil."""
    return lambda name: invent(name, tmp_path / "tables", monkeypatch, reader)


@pytest.fixture(scope="module", params=NAMES)
def prepared(request, tmp_path_factory, reader):
    """Each data set, prepared once: (name, what was made, data_dir)."""
    name, root = request.param, tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        invented = invent(name, root / "tables", patch, reader)
        build(name, invented, root)
    return name, invented, root / "data"


def build(name, made, root):
    """Writes the archives of `made` and builds the data set."""
    folder = made.write(root / "archives")
    return catalog.prepare(name, data_dir=root / "data", manual_dir=folder)


def remains(root):
    """What there is of data sets, whole or not."""
    return [
        path
        for path in (root / "data").rglob("*")
        if path.name.startswith(("incomplete.", "1.0.0", "unpacked"))
    ]


# What comes out


def test_known_raw_labels_come_out_as_the_training_labels(prepared):
    name, invented, data = prepared
    for split in invented.splits:
        source = catalog.load(name, split, data_dir=data)
        for i in range(len(source)):
            _, labels = source[i]
            labels = labels if isinstance(labels, dict) else {"": labels}
            assert labels.keys() == EXPECTED[name].keys()
            for head, expected in EXPECTED[name].items():
                assert labels[head].dtype == np.uint8
                want = np.resize(expected, labels[head].shape)
                np.testing.assert_array_equal(labels[head], want)


def test_every_split_keeps_the_order_of_its_list(prepared):
    name, invented, data = prepared
    for split, ids in invented.splits.items():
        assert catalog.load(name, split, data_dir=data).ids == ids
        records = catalog._builder(name, data).as_data_source(split)
        assert [record["id"].decode() for record in records] == ids


def test_pictures_are_stored_byte_by_byte_as_they_came(prepared):
    name, invented, data = prepared
    split = next(iter(invented.splits))
    raw = dict.fromkeys(invented.pictures, tfds.decode.SkipDecoding())
    first = catalog._builder(name, data).as_data_source(split, decoders=raw)[0]
    for kind, (archive, member) in invented.pictures.items():
        assert first[kind] == invented.files[archive][member]


def test_nothing_of_an_archive_stays_but_the_data_set(prepared):
    name, _, data = prepared
    folder = pathlib.Path(catalog._builder(name, data).data_dir)
    kinds = {path.name.split("-")[0] for path in folder.iterdir()}
    known = {folder.relative_to(data).parts[0], "dataset_info.json", "features.json"}
    assert kinds == known | {"metadata.json"}
    assert [path for path in data.rglob("incomplete*")] == []


def test_label_maps_are_stored_as_plain_grey_png(made, tmp_path):
    # A decoder that does not know palettes would read VOC's 15 as 147, if it were one.
    build("voc2012", made("voc2012"), tmp_path)
    builder = catalog._builder("voc2012", tmp_path / "data")
    raw = {"label": tfds.decode.SkipDecoding()}
    for example in builder.as_data_source("train", decoders=raw):
        image = Image.open(io.BytesIO(example["label"]))
        assert (image.format, image.mode) == ("PNG", "L")
        assert set(np.unique(image)) == set(VOC)


def test_exif_turns_are_ignored_as_the_label_maps_ignore_them(made, tmp_path):
    invented = made("voc2012")
    archive, member = invented.pictures["image"]
    upright = Image.open(io.BytesIO(invented.files[archive][member]))
    turned = io.BytesIO()
    exif = upright.getexif()
    exif[ExifTags.Base.Orientation] = 6
    upright.save(turned, "JPEG", exif=exif)
    expected = np.array(Image.open(turned))  # Pillow leaves them to its users
    invented.files[archive][member] = turned.getvalue()
    build("voc2012", invented, tmp_path)
    picture, labels = catalog.load("voc2012", "train", data_dir=tmp_path / "data")[0]
    np.testing.assert_array_equal(picture, expected)
    assert picture.shape[:2] == labels.shape == (6, 8)


def test_splits_add_up_in_order(made, tmp_path):
    build("nyudv2", made("nyudv2"), tmp_path)
    source = catalog.load("nyudv2", "train+val", data_dir=tmp_path / "data")
    assert source.ids == ["5449", "5003", "5010"]
    sizes = [source[i][0].shape[:2] for i in range(3)]
    assert sizes == [(6, 8), (7, 9), (8, 10)]


def test_depth_is_millimetres_and_hha_is_not_reversed(made, tmp_path):
    build("nyudv2", made("nyudv2"), tmp_path)
    names = "nyudv2", "nyudv2-hha", "nyudv2-depth", "nyudv2-color-hha"
    (color, labels), (hha, _), (stacked, _), (both, _) = (
        catalog.load(name, "train", data_dir=tmp_path / "data")[0] for name in names
    )
    assert stacked.dtype == np.float32
    np.testing.assert_array_equal(stacked[..., :3], color)
    depth = 1000 + 10 * np.arange(6 * 8).reshape(6, 8)
    np.testing.assert_array_equal(stacked[..., 3], depth)
    noise = np.random.default_rng(50).integers(0, 256, (6, 8, 3), np.uint8)
    np.testing.assert_array_equal(hha, noise)
    assert both.keys() == {"color", "hha"}
    np.testing.assert_array_equal(both["color"], color)
    np.testing.assert_array_equal(both["hha"], hha)
    assert labels.shape == (6, 8)


def test_a_source_tells_its_label_sets_and_its_end(made, tmp_path):
    build("siftflow", made("siftflow"), tmp_path)
    source = catalog.load("siftflow", data_dir=tmp_path / "data")
    assert source.ids == ["coast_natu975"]
    assert {head: len(each.names) for head, each in source.label_sets.items()} == {
        "sem": 33,
        "geo": 3,
    }
    _, labels = source[0]
    for head, each in source.labels(0).items():
        np.testing.assert_array_equal(each, labels[head])
    assert len(list(source)) == 1  # Python's own loop ends, at an IndexError
    with pytest.raises(IndexError, match="no picture -1: there are 1"):
        source[-1]


def test_threads_read_the_same(made, tmp_path):
    build("voc2011", made("voc2011"), tmp_path)
    source = catalog.load("voc2011", "train+val", data_dir=tmp_path / "data")
    alone = [source[i] for i in range(len(source))]
    wrong = []

    def read():
        for k in range(100):
            i = k % len(source)
            same = map(np.array_equal, source[i], alone[i])
            wrong.extend([i] if not all(same) else [])

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_pascal_context_numbers_are_those_of_the_reference():
    # 60 outputs and the raw label of each (data/pascal-context of the reference).
    raw = [
        *(2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347),
        *(368, 416, 427, 9, 18, 22, 33, 44, 46, 68, 80, 85, 104, 115, 144, 158, 159),
        *(162, 187, 189, 220, 232, 259, 260, 105, 296, 355, 295, 324, 326, 349, 354),
        *(360, 366, 19, 415, 420, 424, 440, 445, 454, 458),
    ]
    table = pascal_context.table()
    assert [table[label] for label in raw] == list(range(1, 60))
    assert len(table) == 460
    assert sum(label == 0 for label in table.values()) == 460 - 59


def test_the_shipped_lists_are_those_of_the_reference():
    expected = {
        "nyud-train": (381, "bb81542035299d06fe9fb9f03398824fb4861252"),
        "nyud-val": (414, "48e9b1cd3804d68e4897c3422031e665f8097078"),
        "nyud-test": (654, "ea2a0e505c795dfe044f047e0f508b12e1453fad"),
        "sift-flow-trainval": (2486, "4080a5599e4e46699456a62dcd04d92b389416c8"),
        "sift-flow-test": (200, "6cf0a53f63d7c3c8bb135ffe2d87ef433693fb69"),
        "pascal-seg11valid": (736, "dc143d96cbef27941a92fe028359eb919ded5723"),
    }
    for name, (count, sha1) in expected.items():
        path = building.LISTS / f"{name}.txt"
        assert len(building.read_ids(path)) == count
        assert hashlib.sha1(path.read_bytes()).hexdigest() == sha1


def test_the_counts_are_the_published_ones():
    assert voc.VocSegmentation.COUNTS == {
        "2011": {"train": 1112, "val": 1111, "seg11valid": 736},
        "2012": {"train": 1464, "val": 1449},
    }
    assert sbd.Sbd.COUNTS == {"train": 8498, "val": 2857}
    assert nyudv2.Nyudv2Seg.COUNTS == {"train": 381, "val": 414, "test": 654}
    assert siftflow.SiftFlow.COUNTS == {"trainval": 2486, "test": 200}
    assert pascal_context.PascalContext.COUNTS == {"train": None, "val": 5105}
    assert camvid.Camvid.COUNTS == {"train": 367, "val": 101, "test": 233}


def test_every_data_set_of_the_catalogue_has_its_splits_and_label_sets():
    for name, dataset in catalog.DATASETS.items():
        module = sys.modules[f"keras_fcn.datasets.{dataset.module}"]
        counts = getattr(module, dataset.builder).COUNTS
        counts = counts[dataset.config] if dataset.config else counts
        assert {*dataset.train.split("+"), dataset.evaluate} <= counts.keys(), name
        for _, label_set in dataset.labels.values():
            assert label_set in labels.LABEL_SETS


# CamVid's two layouts


def test_camvid_is_taken_from_a_folder_of_images_and_labels(made, tmp_path):
    invented = made("camvid")
    for (archive, member), place in [
        (invented.pictures["image"], "train/images/0001TP_006690.png"),
        (invented.labels["label"], "train/labels/0001TP_006690.png"),
    ]:
        content = invented.files[archive][member]
        archives_made.unpack({place: content}, tmp_path / "own")
    invented.write(tmp_path / "elsewhere")
    invented.builder.COUNTS["train"] = 1
    data = tmp_path / "data"
    catalog.prepare("camvid", data_dir=data, manual_dir=tmp_path / "own")
    assert catalog._builder("camvid", data).info.splits.keys() == {"train"}
    _, labels = catalog.load("camvid", "train", data_dir=data)[0]
    np.testing.assert_array_equal(labels, np.resize([0, 1, 10, 255], (6, 8)))
    with pytest.raises(
        ValueError, match="camvid has no split val .*; expected train, .* remove"
    ):
        catalog.load("camvid", data_dir=data)


def test_two_builds_at_once_download_an_archive_once(tmp_path):
    server, content = Server(), os.urandom(300_000)
    server.files["/a.tar"], server.pace = content, 0.02
    sha256 = hashlib.sha256(content).hexdigest()
    archive = building.Archive(f"{server.url}/a.tar", {"sha256": sha256}, "a.tar")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: building.fetch(archive, tmp_path), range(4)))
    assert found == [tmp_path / "a.tar"] * 4
    assert found[0].read_bytes() == content
    assert len(server.gets()) == 1
    server.shutdown()


@pytest.mark.parametrize("name", ["nyudv2", "siftflow", "camvid"])
def test_what_has_no_hash_may_lie_unpacked(name, made, tmp_path):
    invented = made(name)
    invented.write(tmp_path / "elsewhere")
    (members,) = invented.files.values()
    archives_made.unpack(members, tmp_path / "own")
    data, own = tmp_path / "data", tmp_path / "own"
    catalog.prepare(name, data_dir=data, manual_dir=own)
    split, ids = next(iter(invented.splits.items()))
    assert catalog.load(name, split, data_dir=data).ids == ids
    assert sorted(own.rglob("*")) == sorted(
        {own / path for member in members for path in _with_parents(member)}
    )


def _with_parents(member):
    path = pathlib.PurePosixPath(member)
    return [path, *path.parents[:-1]]


# Archives


def test_an_archive_with_another_hash_is_refused(made, tmp_path):
    invented = made("sbd")
    folder = invented.write(tmp_path / "archives")
    path = folder / "benchmark.tgz"
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes() + b"\0")
    other = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match="not the file that was published") as error:
        catalog.prepare("sbd", data_dir=tmp_path / "data", manual_dir=folder)
    for fact in (str(path), found, other, "http://127.0.0.1:9/benchmark.tgz"):
        assert fact in str(error.value)
    assert remains(tmp_path) == []


def test_every_published_hash_is_checked(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    facts = {"bytes": 7}
    for kind in ("md5", "sha1", "sha256"):
        facts[kind] = hashlib.new(kind, b"content").hexdigest()
    building.check(path, building.Archive("url", facts, "file"))
    for key in facts:
        wrong = facts | {key: 8 if key == "bytes" else "0" * len(facts[key])}
        with pytest.raises(ValueError, match=f"{key} .* expected {wrong[key]}"):
            building.check(path, building.Archive("url", wrong, "file"))


def test_the_table_holds_what_was_published():
    table = building.read_archives()
    for builder in (
        voc.VocSegmentation,
        sbd.Sbd,
        nyudv2.Nyudv2Seg,
        siftflow.SiftFlow,
        pascal_context.PascalContext,
        camvid.Camvid,
    ):
        used = getattr(builder, "ARCHIVES", voc.FILES.values())
        assert set(used) <= table.keys()
    assert table["VOCtrainval_11-May-2012.tar"].facts == {
        "bytes": 1_999_639_040,
        "md5": "6cd6e144f989b92b3379bac3b3de84fd",
        "sha1": "4e443f8a2eca6b1dac8a6c57641b67dd40621a49",
        "sha256": "e14f763270cf193d0b5f74b169f44157a4b0c6efa708f4dd0ff78ee691763bcb",
    }
    hashed = {file for file, archive in table.items() if archive.hashed}
    assert hashed == {
        "VOCtrainval_11-May-2012.tar",
        "VOCtrainval_25-May-2011.tar",
        "VOCtrainval_03-May-2010.tar",
        "benchmark.tgz",
    }
    for archive in table.values():
        lengths = {"md5": 32, "sha1": 40, "sha256": 64}
        for kind, digest in archive.facts.items():
            assert kind == "bytes" or len(digest) == lengths[kind]


@pytest.mark.parametrize("name", ["nyudv2", "siftflow", "camvid", "pascal-context"])
def test_what_nobody_has_hashed_is_not_downloaded(name, tmp_path):
    with pytest.raises(FileNotFoundError, match="manual_dir") as error:
        catalog.prepare(name, data_dir=tmp_path / "data", manual_dir=tmp_path)
    *_, file = catalog._builder(name, tmp_path).archives
    archive = building.read_archives()[file]
    assert file in str(error.value)
    assert archive.url in str(error.value)
    assert remains(tmp_path) == []


def test_a_hashed_archive_is_downloaded_and_verified(made, tmp_path):
    invented = made("sbd")
    folder = invented.write(tmp_path / "archives")
    server = Server()
    server.files["/benchmark.tgz"] = (folder / "benchmark.tgz").read_bytes()
    table = invented.builder.CHECKSUMS
    table.write_text(table.read_text().replace("http://127.0.0.1:9", server.url))
    data = tmp_path / "data"
    try:
        server.files["/benchmark.tgz"] += b"\0"
        with pytest.raises(ValueError, match="not the file that was published"):
            catalog.prepare("sbd", data_dir=data)
        downloads = data / "downloads"
        left = [path for path in downloads.rglob("*") if path.is_file()]
        assert [path.name for path in left] == [".benchmark.tgz.lock"]
        assert not left[0].stat().st_size
        server.files["/benchmark.tgz"] = server.files["/benchmark.tgz"][:-1]
        catalog.prepare("sbd", data_dir=data)
    finally:
        server.shutdown()
        server.server_close()
    assert [path.name for path in downloads.glob("bench*")] == ["benchmark.tgz"]
    assert len(catalog.load("sbd", "train", data_dir=data)) == 2


# Data that are not complete


def of(invented, kind):
    return (invented.pictures | invented.labels)[kind]


def missing(invented, kind):
    archive, member = of(invented, kind)
    del invented.files[archive][member]


def empty(invented, kind):
    archive, member = of(invented, kind)
    invented.files[archive][member] = b""


def swapped(invented, kind):
    """A picture's file holds labels, the file of labels a picture."""
    others = invented.labels if kind in invented.pictures else invented.pictures
    other, source = next(iter(others.values()))
    archive, member = of(invented, kind)
    invented.files[archive][member] = invented.files[other][source]


def odd_size(invented, kind):
    """The file is another picture's, whose size is another."""
    archive, member = of(invented, kind)
    ids = list(invented.splits.values())[0]
    other = member.replace(ids[0], ids[1])
    invented.files[archive][member] = invented.files[archive][other]


FAULTS = [missing, empty, swapped, odd_size]
KINDS = dict.fromkeys(NAMES, ["image", "label"]) | {
    "nyudv2": ["image", "depth", "hha", "label"],
    "siftflow": ["image", "semantic", "geometric"],
}


def cases():
    """Every fault of every kind of file; by default of one kind, in turns."""
    for name, kinds in KINDS.items():
        for i, fault in enumerate(FAULTS, start=NAMES.index(name)):
            for kind in kinds if FULL else kinds[i % len(kinds) :][:1]:
                yield name, fault, kind


@pytest.mark.parametrize(("name", "fault", "kind"), list(cases()))
def test_data_at_fault_are_named_with_a_remedy_and_not_built(
    name, fault, kind, made, tmp_path
):
    invented = made(name)
    assert KINDS[name] == [*invented.pictures, *invented.labels]
    fault(invented, kind)
    with pytest.raises(ValueError, match="is not built") as error:
        build(name, invented, tmp_path)
    archive, member = of(invented, kind)
    sources = str(error.value).split("fetch them anew, from ")[1]
    assert pathlib.Path(member).stem in str(error.value)
    assert f"http://127.0.0.1:9/{archive}" in sources
    assert "unpacked" not in str(error.value)  # a folder that is gone
    assert remains(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=f"keras-fcn prepare {name}"):
        catalog.load(name, data_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("voc2011", [0, 21], "21"),
        ("sbd", [0, 254], "254"),
        ("nyudv2", [41], "41"),
        ("siftflow", [34, 0], "34"),
        ("geometric", [4, -2], "-2, 4"),
        ("pascal-context", [460], "460"),
        ("camvid", [12], "12"),
    ],
)
def test_labels_that_are_none_are_named(
    name, raw, expected, made, tmp_path, monkeypatch
):
    monkeypatch.setitem(archives_made.RAW, name, raw)
    name = "siftflow" if name == "geometric" else name
    with pytest.raises(
        ValueError, match=f"holds the labels {expected}, which are none"
    ):
        build(name, made(name), tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_split_of_another_length_is_not_built(name, made, tmp_path):
    invented = made(name)
    counts = invented.builder.COUNTS
    counts = counts[invented.config] if invented.config else counts
    split = next(iter(counts))
    counts[split] += 1
    with pytest.raises(ValueError, match=f"{split} has 2 pictures, expected 3"):
        build(name, invented, tmp_path)
    assert remains(tmp_path) == []


def test_an_id_is_never_a_path(made, tmp_path):
    invented = made("sbd")
    member = "benchmark_RELEASE/dataset/train.txt"
    invented.files["benchmark.tgz"][member] = b"2008_000002\n../2010_000004\n"
    with pytest.raises(ValueError, match=r"holds '../2010_000004', which is no id"):
        build("sbd", invented, tmp_path)


def test_seg11valid_must_be_part_of_val(made, tmp_path):
    invented = made("voc2011")
    invented.splits["seg11valid"][0] = "2008_000002"  # of train
    with pytest.raises(ValueError, match=r"lacks 1 pictures .* as 2008_000002"):
        build("voc2011", invented, tmp_path)


@pytest.mark.parametrize("fault", [False, True])
def test_seg11valid_is_val_without_what_sbd_trains_on(made, tmp_path, fault):
    invented = made("voc2011")
    val, valid = invented.splits["val"], invented.splits["seg11valid"]
    rest = [example_id for example_id in val if example_id not in valid]
    assert rest
    train = ["2007_000032", *rest] if not fault else ["2007_000032", *rest[1:]]
    member = "benchmark_RELEASE/dataset/train.txt"
    invented.files["benchmark.tgz"] = {member: "\n".join(train).encode()}
    if not fault:
        build("voc2011", invented, tmp_path)
        assert catalog.load("voc2011", data_dir=tmp_path / "data").ids == valid
        return
    with pytest.raises(ValueError, match=f"has {len(valid) + 1} pictures, which are"):
        build("voc2011", invented, tmp_path)
    assert not remains(tmp_path)


def test_data_of_another_format_are_not_read(made, tmp_path):
    invented = made("voc2012")
    folder = invented.write(tmp_path / "archives")
    builder = catalog._builder("voc2012", tmp_path / "data")
    config = tfds.download.DownloadConfig(manual_dir=folder)
    builder.download_and_prepare(download_config=config, file_format="tfrecord")
    with pytest.raises(
        ValueError, match="Remove it and run `keras-fcn prepare voc2012"
    ):
        catalog.load("voc2012", data_dir=tmp_path / "data")


def test_unknown_names_get_near_ones(tmp_path):
    with pytest.raises(ValueError, match="no data set 'sift-flow'; expected siftflow"):
        catalog.load("sift-flow")
    with pytest.raises(FileNotFoundError, match=r"none` is no folder"):
        catalog.prepare("sbd", data_dir=tmp_path, manual_dir=tmp_path / "none")


@pytest.mark.parametrize("module", ["tensorflow_datasets", "array_record"])
def test_a_library_that_is_missing_is_named(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)  # Python's sign for that
    with pytest.raises(OSError, match=rf"{module}.*pip install .\.\[datasets"):
        catalog.load("camvid")


# Builds that are killed


def test_what_killed_builds_have_left_is_swept_after_an_hour(made, tmp_path):
    invented = made("voc2012")
    family = tmp_path / "data" / "voc_segmentation" / "2012"
    for name, age in (
        ("incomplete.AAAAAA_1.0.0", 3700),
        ("incomplete.BBBBBB_1.0.0", 3500),
    ):
        (family / name / "unpacked-x").mkdir(parents=True)
        then = time.time() - age
        os.utime(family / name, (then, then))
    build("voc2012", invented, tmp_path)
    left = {path.name for path in family.iterdir() if path.is_dir()}
    assert left == {"1.0.0", "incomplete.BBBBBB_1.0.0"}


@pytest.mark.parametrize(
    "step", [(archives, "extract"), (building, "translate")], ids=["at first", "later"]
)
def test_a_build_that_takes_hours_is_not_swept_by_another(
    step, made, tmp_path, monkeypatch
):
    act = getattr(*step)

    def hours(*what, **how):
        """Does it after so long a time that another build may sweep."""
        [folder] = (tmp_path / "data").rglob("incomplete.*")
        then = time.time() - 3700
        os.utime(folder, (then, then))
        patience = time.monotonic() + 10
        while folder.stat().st_mtime < then + 60 and time.monotonic() < patience:
            time.sleep(0.01)
        building.sweep(folder.parent)
        assert folder.is_dir()
        return act(*what, **how)

    monkeypatch.setattr(building, "TOUCH_SECONDS", 0.01)
    monkeypatch.setattr(*step, hours)
    build("voc2012", made("voc2012"), tmp_path)
    assert len(catalog.load("voc2012", "train", data_dir=tmp_path / "data")) == 2


def test_a_folder_is_touched_well_before_it_would_be_swept():
    assert building.TOUCH_SECONDS < files.ORPHAN_SECONDS / 4


@pytest.mark.slow
def test_a_killed_build_leaves_no_data_set_and_the_next_one_is_the_same():
    pytest.importorskip("jax", reason="Keras' NumPy backend, which can fork, takes it")
    script = ROOT / "benchmarks" / "fault_datasets.py"
    done = subprocess.run(
        [sys.executable, str(script), "--kills", "2", "camvid"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "camvid" in done.stdout


# TFDS's own test of a builder


class Contract(tfds.testing.DatasetBuilderTestCase):
    """What TFDS expects of a builder, of archives made for the purpose."""

    NAME = None

    @classmethod
    def setUpClass(cls):
        cls.root = pathlib.Path(tfds.testing.make_tmp_dir())
        made = archives_made.make(cls.NAME, cls.root)
        cls.DATASET_CLASS = made.builder
        cls.EXAMPLE_DIR = made.write(cls.root / "archives")
        cls.SPLITS = {split: len(ids) for split, ids in made.splits.items()}
        cls.BUILDER_CONFIG_NAMES_TO_TEST = [made.config] if made.config else None
        super().setUpClass()


class VOC2011Test(Contract):
    NAME = "voc2011"
    OVERLAPPING_SPLITS = ["seg11valid"]


class VOC2012Test(Contract):
    NAME = "voc2012"


class SbdTest(Contract):
    NAME = "sbd"


class Nyudv2SegTest(Contract):
    NAME = "nyudv2"


class SiftFlowTest(Contract):
    NAME = "siftflow"


class PascalContextTest(Contract):
    NAME = "pascal-context"


class CamvidTest(Contract):
    NAME = "camvid"


del Contract  # is no test itself
