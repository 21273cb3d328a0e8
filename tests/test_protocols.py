import datetime
import errno
import hashlib
import importlib.metadata
import json
import os
import re
import warnings

import keras
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from keras_fcn import cli_data, manifest, protocols, weights
from keras_fcn.datasets import catalog
from keras_fcn.datasets.catalog import DATASETS
from keras_fcn.evaluation import segment
from keras_fcn.labels import LABEL_SETS, VOID, LabelSet
from keras_fcn.layers import Preprocess
from keras_fcn.protocols import PROTOCOLS, Head, Protocol, judge

NAN = float("nan")


# The rules, each with a matrix worked out by hand: rows true, columns found


def test_plain_means_count_a_class_that_is_absent_and_found_but_none_that_is_neither():
    matrix = [
        [6, 2, 0, 0],
        [1, 4, 1, 0],
        [0, 0, 0, 0],  # absent, and found once
        [0, 0, 0, 0],  # neither
    ]
    found = judge(matrix, Head(), "abcd")
    assert found["classes"] == ["a", "b", "c", "d"]
    np.testing.assert_allclose(found["iou"], [6 / 9, 4 / 8, 0, NAN])
    np.testing.assert_allclose(found["accuracy"], [6 / 8, 4 / 6, NAN, NAN])
    assert found["pixel_accuracy"] == pytest.approx(10 / 14)
    assert found["mean_accuracy"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert found["mean_iou"] == pytest.approx((6 / 9 + 4 / 8 + 0) / 3)
    assert found["fw_iou"] == pytest.approx(8 / 14 * 6 / 9 + 6 / 14 * 4 / 8)
    assert "without" not in found


def matrix_of(names, counts):
    """A confusion matrix from `{(true, found): pixels}`."""
    matrix = np.zeros((len(names), len(names)), int)
    for (true, found), pixels in counts.items():
        matrix[names.index(true), names.index(found)] = pixels
    return matrix


def test_sift_flow_s_means_are_over_the_classes_of_the_truth():
    names = LABEL_SETS["siftflow-sem"].names
    counts = {
        ("sky", "sky"): 60,
        ("sky", "sea"): 10,
        ("sky", "moon"): 10,  # costs sky, and nothing else
        ("sea", "sea"): 20,
        ("sea", "sky"): 5,
        ("sand", "desert"): 15,
    }
    head = PROTOCOLS["siftflow"].heads["sem"]
    found = judge(matrix_of(names, counts), head, names)
    assert found["mean_accuracy"] == pytest.approx((60 / 80 + 20 / 25 + 0) / 3)
    assert found["mean_iou"] == pytest.approx((60 / 85 + 20 / 35 + 0) / 3)
    assert found["pixel_accuracy"] == pytest.approx(80 / 120)
    assert found["iou"][names.index("moon")] == 0
    plain = judge(matrix_of(names, counts), Head(), names)
    assert plain["mean_iou"] == pytest.approx((60 / 85 + 20 / 35 + 0 + 0 + 0) / 5)


def test_the_geometric_head_of_sift_flow_is_scored_by_its_pixel_accuracy():
    names = LABEL_SETS["siftflow-geo"].names
    head = PROTOCOLS["siftflow"].heads["geo"]
    found = judge([[7, 1, 0], [0, 5, 3], [1, 0, 9]], head, names)
    assert found["pixel_accuracy"] == pytest.approx(21 / 26)
    assert found.keys() == {"pixel_accuracy", "iou", "accuracy", "classes"}


def test_pascal_context_has_means_over_60_classes_and_over_59_from_the_same_counts():
    names = LABEL_SETS["pascal-context"].names
    counts = {
        ("background", "background"): 50,
        ("background", "sky"): 10,
        ("sky", "sky"): 30,
        ("sky", "background"): 10,
        ("wood", "wood"): 8,
        ("wood", "wall"): 2,
    }
    (head,) = PROTOCOLS["pascal-context"].heads.values()
    found = judge(matrix_of(names, counts), head, names)
    assert found["mean_accuracy"] == pytest.approx((50 / 60 + 30 / 40 + 8 / 10) / 3)
    assert found["mean_iou"] == pytest.approx((50 / 70 + 30 / 50 + 8 / 10 + 0) / 4)
    assert found["without"] == {
        "classes": ["background"],
        "mean_accuracy": pytest.approx((30 / 40 + 8 / 10) / 2),
        "mean_iou": pytest.approx((30 / 50 + 8 / 10 + 0) / 3),
    }


# The data sets


@pytest.mark.parametrize(
    ("name", "split", "images", "label_sets"),
    [
        ("voc2011", "seg11valid", 736, {"": "voc"}),
        ("voc2012", "val", 1449, {"": "voc"}),
        ("sbd", "val", 2857, {"": "voc"}),
        ("nyudv2", "test", 654, {"": "nyud"}),
        ("nyudv2-hha", "test", 654, {"": "nyud"}),
        ("nyudv2-depth", "test", 654, {"": "nyud"}),
        ("nyudv2-color-hha", "test", 654, {"": "nyud"}),
        ("siftflow", "test", 200, {"sem": "siftflow-sem", "geo": "siftflow-geo"}),
        ("pascal-context", "val", 5105, {"": "pascal-context"}),
        ("camvid", "val", 101, {"": "camvid"}),
    ],
)
def test_a_protocol_is_that_of_its_data_set(name, split, images, label_sets):
    protocol = protocols.find(name)
    assert (protocol.split, protocol.images) == (split, images)
    assert list(protocol.heads) == list(label_sets)
    for head, labels in label_sets.items():
        assert set(protocol.heads[head].without) <= set(LABEL_SETS[labels].names)
    for classes in re.findall(r"(\d+) classes", protocol.rule):
        sizes = [len(LABEL_SETS[labels].names) for labels in label_sets.values()]
        assert int(classes) in sizes


def test_the_catalogue_has_the_same_data_sets_splits_and_heads():
    assert DATASETS.keys() == PROTOCOLS.keys()
    for name, dataset in DATASETS.items():
        assert dataset.evaluate == PROTOCOLS[name].split
        assert list(dataset.labels) == list(PROTOCOLS[name].heads)


BLUE_FIRST = {
    "voc2011": [104.00699, 116.66877, 122.67892],
    "voc2012": [104.00699, 116.66877, 122.67892],
    "sbd": [104.00699, 116.66877, 122.67892],
    "nyudv2": [116.190, 97.203, 92.318],
    "siftflow": [114.578, 115.294, 108.353],
    "pascal-context": [104.007, 116.669, 122.679],
    "camvid": [104.00699, 116.66877, 122.67892],
}


def test_the_catalogue_names_a_net_whose_input_is_that_of_the_pictures():
    color = {name: {"channels": "BGR", "mean": m} for name, m in BLUE_FIRST.items()}
    hha = {"channels": "RGB", "mean": [132.431, 94.076, 118.477]}
    found = {
        name: dataset.net and manifest.checkpoint_info(dataset.net)
        for name, dataset in DATASETS.items()
    }
    assert found.pop("nyudv2-depth") is None
    assert {name: entry["input"] for name, entry in found.items()} == {
        **color,
        "nyudv2-hha": hha,
        "nyudv2-color-hha": {"color": color["nyudv2"], "hha": hha},
    }
    for name, entry in found.items():
        sets = {head: labels for head, (_, labels) in DATASETS[name].labels.items()}
        assert entry["labels"] == sets.get("", sets)


def test_a_data_set_of_more_pictures_than_names_is_refused():
    assert len(catalog.Source([{}, {}], ["a", "b"], DATASETS["camvid"])) == 2
    for ids in (["a"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="has 2 pictures and") as error:
            catalog.Source([{}, {}], ids, DATASETS["camvid"])
        assert str(error.value) == (
            f"The data set has 2 pictures and {len(ids)} names. Remove it and prepare "
            "it anew."
        )


def test_every_protocol_says_its_rule_and_whose_it_is():
    for protocol in PROTOCOLS.values():
        for text in (protocol.title, protocol.rule, protocol.source):
            assert text == text.strip() != ""


def test_an_unknown_data_set_is_answered_with_near_ones():
    with pytest.raises(ValueError, match="no protocol 'voc'; expected .*voc201"):
        protocols.find("voc")


# A record


class Source(list):
    """Samples as a list, with the classes of their labels."""

    label_sets = {"": LabelSet(("red", "green", "blue"), None)}


def highest():
    """A net that finds the class of the highest of red, green and blue."""
    image = keras.Input((None, None, 3))
    x = Preprocess("RGB", [0, 0, 0], name="preprocess")(image)
    score = keras.layers.Conv2D(3, 1, name="score")
    output = score(x)
    score.set_weights([np.eye(3).reshape(1, 1, 3, 3), np.zeros(3)])
    return keras.Model(image, output, name="highest")


@pytest.fixture(scope="module")
def model():
    return highest()


@pytest.fixture(scope="module")
def source():
    """Pictures of three sizes: 6 pixels are red, 4 found so, and 3 green, all found."""
    found = [[[0, 0, 0]], [[0], [1], [1], [1], [1]], [[1, 2]]]
    truth = [[[0, 0, 0]], [[0], [1], [1], [1], [0]], [[0, VOID]]]
    pictures = [np.uint8(np.eye(3)[x] * 200) for x in found]
    return Source(zip(pictures, map(np.uint8, truth), strict=True))


STREETS = Protocol("my streets", "val", 3)


@pytest.fixture(scope="module")
def record(model, source):
    return protocols.evaluate(STREETS, model, source)


def test_a_record_has_the_scores_and_the_counts_they_are_of(record):
    found = record["scores"]
    assert found["confusion_matrix"] == [[4, 2, 0], [0, 3, 0], [0, 0, 0]]
    assert found["classes"] == ["red", "green", "blue"]
    np.testing.assert_allclose(found["iou"], [4 / 6, 3 / 5, NAN])
    assert found["mean_iou"] == pytest.approx((4 / 6 + 3 / 5) / 2)
    assert found["pixel_accuracy"] == pytest.approx(7 / 9)
    assert (record["images"], record["expected_images"]) == (3, 3)
    assert (record["rule"], record["source"]) == (STREETS.rule, STREETS.source)


def test_classes_without_names_are_numbered(model, source):
    class Nameless(Source):
        label_sets = {"": LabelSet((), None)}

    found = protocols.evaluate(STREETS, model, Nameless(source))["scores"]
    assert found["classes"] == ["class 0", "class 1", "class 2"]


@pytest.mark.parametrize(
    ("data", "remark"),
    [
        ("voc2011", "SBD's train does not have"),
        ("voc2011/val", None),
        ("siftflow", "cow, desert and moon are absent"),
        ("siftflow/trainval", None),
    ],
)
def test_what_is_said_of_a_split_s_images_is_not_said_of_another(
    data, remark, model, source
):
    protocol = cli_data._protocol([data], source)
    plain = protocol._replace(heads=STREETS.heads, images=len(source))
    rule = protocols.evaluate(plain, model, source)["rule"]
    assert rule.startswith(protocol.rule)
    assert (remark in rule) if remark else rule == protocol.rule
    assert "SBD" not in protocol.rule
    assert "30" not in protocol.rule


def test_a_record_says_with_what_it_was_made(record):
    backend = keras.backend.backend()
    assert record["versions"] == {
        "keras_fcn": importlib.metadata.version("keras-fcn"),
        "keras": importlib.metadata.version("keras"),
        "backend": f"{backend} {importlib.metadata.version(backend)}",
        "numpy": importlib.metadata.version("numpy"),
    }
    date = datetime.datetime.fromisoformat(record["date"])
    age = datetime.datetime.now(datetime.UTC) - date
    assert datetime.timedelta() <= age < datetime.timedelta(hours=1)


def test_a_record_of_several_heads_has_each_by_its_own_rule(model, source):
    lowest = keras.layers.Rescaling(-1.0)(model.output)
    heads = keras.Model(model.input, {"sem": model.output, "geo": lowest})
    both = Source((x, {"geo": labels, "sem": labels}) for x, labels in source)
    both.label_sets = {
        "geo": LabelSet(("low", "middle", "high"), None),
        "sem": source.label_sets[""],
    }
    protocol = STREETS._replace(heads=PROTOCOLS["siftflow"].heads)
    scores = protocols.evaluate(protocol, heads, both)["scores"]
    assert list(scores) == ["sem", "geo"]
    assert scores["sem"]["classes"] == ["red", "green", "blue"]
    assert scores["geo"]["classes"] == ["low", "middle", "high"]
    assert scores["sem"]["confusion_matrix"] == [[4, 2, 0], [0, 3, 0], [0, 0, 0]]
    # The lowest of three, of which two are equal, is the first of these.
    assert scores["geo"]["confusion_matrix"] == [[2, 4, 0], [3, 0, 0], [0, 0, 0]]
    assert "mean_iou" in scores["sem"]
    assert "mean_iou" not in scores["geo"]


def test_a_record_of_many_sizes_is_reported_image_by_image(model, source):
    done = []
    protocols.evaluate(STREETS, model, source, progress=done.append)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("images", [2, 5])
def test_other_images_than_the_protocol_s_are_warned_of_and_recorded(
    model, source, images
):
    protocol = STREETS._replace(images=images)
    said = f"my streets val has {images} images, but 3 were"
    with pytest.warns(UserWarning, match=said):
        record = protocols.evaluate(protocol, model, source)
    assert (record["images"], record["expected_images"]) == (3, images)
    assert protocols.what(record) == f"my streets val, 3 of {images} images"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        protocols.evaluate(STREETS, model, source)


@pytest.mark.parametrize(
    ("name", "heads", "words"),
    [
        ("voc2011", {"": "voc"}, "highest has classes: 3; expected 21, those of VOC"),
        ("siftflow", {"sem": "siftflow-sem", "geo": "siftflow-geo"}, "33 sem, 3 geo"),
        ("camvid", {"sem": "siftflow-geo"}, "has classes: 3; expected 3 sem"),
        ("pascal-context", {"": "siftflow-geo"}, "are horizontal, sky, vertical; exp"),
        ("siftflow", {"": "siftflow-geo"}, "expected those that the protocol of SIFT"),
    ],
)
def test_nets_and_data_that_a_protocol_does_not_fit_are_refused(
    name, heads, words, model, source
):
    other = Source(source)
    other.label_sets = {head: LABEL_SETS[labels] for head, labels in heads.items()}
    with pytest.raises(ValueError, match=words):
        protocols.evaluate(PROTOCOLS[name], model, other)


# Which weights


def test_a_fingerprint_is_that_of_the_numbers_by_name():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, name="one")])
    kernel, bias = np.float32([[1], [-2]]), np.float32([0.5])
    model.layers[0].set_weights([kernel, bias])
    text = b"one/bias float32 (1,)\n" + bias.tobytes()
    text += b"one/kernel float32 (2, 1)\n" + kernel.tobytes()
    assert protocols.fingerprint(model) == hashlib.sha256(text).hexdigest()


def test_a_fingerprint_is_of_frozen_weights_and_averages_too():
    layer = keras.layers.BatchNormalization(name="norm")
    model = keras.Sequential([keras.Input((2,)), layer])
    before = protocols.fingerprint(model)
    layer.trainable = False
    assert protocols.fingerprint(model) == before
    layer.moving_mean.assign([0, 1])
    assert protocols.fingerprint(model) != before


def test_a_fingerprint_survives_a_file_and_no_change(tmp_path, model):
    again, before = highest(), protocols.fingerprint(model)
    bias = again.get_layer("score").bias
    bias.assign(np.float32([0, 0, 1e-6]))
    assert protocols.fingerprint(again) != before
    weights.save(model, tmp_path / "net.h5")
    weights.load(again, tmp_path / "net.h5")
    assert protocols.fingerprint(again) == before


def test_a_record_names_the_weights_and_their_file(tmp_path, model, source):
    path = tmp_path / "net.h5"
    weights.save(model, path)
    record = protocols.evaluate(STREETS, model, source, weights=path)
    assert record["weights"]["sha256"] == protocols.fingerprint(model)
    assert record["weights"]["file"] == {
        "name": "net.h5",
        "bytes": path.stat().st_size,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert protocols.evaluate(STREETS, model, source)["weights"]["file"] is None


def test_weights_that_cannot_be_read_stop_before_the_evaluation(
    tmp_path, model, source
):
    done, missing = [], tmp_path / "missing.h5"
    with pytest.raises(OSError, match=r"missing\.h5"):
        protocols.evaluate(
            STREETS, model, source, weights=missing, progress=done.append
        )
    assert done == []


# What is made of it


def test_a_record_reads_back_as_it_was_but_null_for_nan(tmp_path, record):
    def refuse(constant):
        raise AssertionError(constant)

    protocols.write(tmp_path / "a.json", record)
    text = (tmp_path / "a.json").read_text("utf-8")
    found = json.loads(text, parse_constant=refuse)
    assert found["scores"]["iou"] == [4 / 6, 3 / 5, None]
    for known in (found, record):
        assert protocols.summary(known) == protocols.summary(record)
    scores = {**found.pop("scores"), "iou": None, "accuracy": None}
    assert scores == {**record["scores"], "iou": None, "accuracy": None}
    assert found == {key: record[key] for key in found}
    assert found.keys() == record.keys() - {"scores"}


@pytest.mark.parametrize(
    "write",
    [
        lambda path, record: protocols.write(path, record),
        lambda path, record: protocols.draw(record, path),
    ],
)
def test_a_record_that_cannot_be_written_leaves_the_earlier(
    write, record, tmp_path, monkeypatch
):
    def fail(source, target):
        raise OSError(errno.EIO, "in the middle")

    (tmp_path / "file").write_bytes(b"before")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="in the middle"):
        write(tmp_path / "file", record)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


@pytest.mark.parametrize(
    ("looks", "said"),
    [
        ({"mirror": True, "scales": [1]}, ", mirror images, too"),
        ({"mirror": False, "scales": [0.75, 1.0]}, ", scales 0.75 1"),
        ({"mirror": True, "scales": [2]}, ", mirror images, too, scales 2"),
        ({"mirror": False, "scales": np.float32([1, 0.5])}, ", scales 1 0.5"),
    ],
)
def test_a_record_says_how_often_the_net_looked(looks, said, record, model, source):
    found = protocols.evaluate(STREETS, model, source, **looks)
    expected = {**looks, "scales": list(map(float, looks["scales"]))}
    assert json.loads(json.dumps(found["looks"])) == expected
    assert protocols.what(found) == f"my streets val, 3 images{said}"


@pytest.mark.parametrize("looks", [{"mirror": True}, {"scales": (1, 1.5)}])
def test_the_counts_of_a_record_are_those_of_its_looks(looks):
    image = keras.Input((None, None, 3))
    x = Preprocess("RGB", [128, 128, 128], name="preprocess")(image)
    net = keras.Model(image, keras.layers.Conv2D(3, 5, padding="same", name="s")(x))
    rng = np.random.default_rng(0)
    net.get_layer("s").set_weights([rng.standard_normal((5, 5, 3, 3)), np.zeros(3)])
    picture = rng.integers(0, 256, (30, 40, 3)).astype("uint8")
    truth = segment(net, picture)
    source, protocol = Source([(picture, truth)]), STREETS._replace(images=1)
    once = protocols.evaluate(protocol, net, source)
    assert once["looks"] == {"mirror": False, "scales": [1]}
    assert once["scores"]["pixel_accuracy"] == 1
    expected = np.zeros((3, 3), int)
    np.add.at(expected, (truth, segment(net, picture, **looks)), 1)
    assert 0 < np.trace(expected) < expected.sum()
    scores = protocols.evaluate(protocol, net, source, **looks)["scores"]
    np.testing.assert_array_equal(scores["confusion_matrix"], expected)


def test_of_nothing_but_void_every_score_is_absent(model, source):
    void = Source((x, np.full_like(labels, VOID)) for x, labels in source)
    record = protocols.evaluate(STREETS, model, void)
    assert "mean IU absent" in protocols.summary(record)


def test_a_picture_has_a_row_for_each_class_of_the_truth(record, tmp_path):
    """Where cells are dark: those of a row's shares, not of a column's."""
    counts = [[0, 0, 9], [0, 0, 5], [0, 0, 0]]
    scores = {**record["scores"], "confusion_matrix": counts}
    protocols.draw({**record, "scores": scores}, tmp_path / "one.png")
    with Image.open(tmp_path / "one.png") as picture:
        pixels = np.asarray(picture.convert("RGB"), int)
    dark = (pixels[..., 2] < 120) & (pixels[..., 2] > pixels[..., 0] + 60)  # blue
    rows, columns = np.nonzero(dark)
    height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
    assert height == pytest.approx(2 * width, abs=3)  # two whole rows, one column
    assert width > 20


@pytest.fixture
def figures(monkeypatch):
    """Matplotlib's figures of all pictures that are drawn."""
    drawn, write = [], FigureCanvasAgg.print_png

    def print_png(canvas, *arguments):
        drawn.append(canvas.figure)
        write(canvas, *arguments)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", print_png)
    return drawn


def test_a_picture_names_the_truth_at_its_rows_and_what_was_found_at_its_columns(
    figures, tmp_path
):
    counts = {"sem": [[9, 1, 0], [0, 0, 4], [0, 0, 0]], "geo": [[1, 2], [997, 3]]}
    names = {"sem": ["sky", "sea", "sand"], "geo": ["near", "far"]}
    scores = {
        head: {"classes": names[head], "confusion_matrix": counts[head]}
        for head in counts
    }
    protocols.draw({"scores": scores["sem"]}, tmp_path / "one.png")
    protocols.draw({"scores": scores}, tmp_path / "two.png")
    [plain], axes = (figure.axes for figure in figures)
    assert (plain.get_xlabel(), plain.get_ylabel()) == ("found", "truth")
    assert [x.get_ylabel() for x in axes] == ["truth, sem", "truth, geo"]
    for matrix, head in zip([plain, *axes], ["sem", "sem", "geo"], strict=True):
        for axis in (matrix.xaxis, matrix.yaxis):
            assert list(axis.get_ticklocs()) == list(range(len(names[head])))
            assert [tick.get_text() for tick in axis.get_ticklabels()] == names[head]
    # Percent of each row, from half of one on, at (column, row).
    written = [{x.get_position(): x.get_text() for x in each.texts} for each in axes]
    assert written[0] == {(0, 0): "90", (1, 0): "10", (2, 1): "100"}
    assert written[1] == {(0, 0): "33", (1, 0): "67", (0, 1): "100"}


def test_the_picture_of_several_heads_is_as_many_times_as_high(model, source, tmp_path):
    heads = {"a": protocols.evaluate(STREETS, model, source)["scores"]}
    record = {"scores": heads}
    protocols.draw(record, tmp_path / "one.png")
    protocols.draw({"scores": {**heads, "b": heads["a"]}}, tmp_path / "two.png")
    with (
        Image.open(tmp_path / "one.png") as one,
        Image.open(tmp_path / "two.png") as two,
    ):
        assert two.size == (one.width, 2 * one.height)


def test_a_summary_says_each_class_and_all_means(record):
    lines = protocols.summary(record).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["red", "66.7"],
        ["green", "60.0"],
        ["blue", "absent"],
    ]
    assert lines[3] == (
        "pixel accuracy 77.78, mean accuracy 83.33, mean IU 63.33, f.w. IU 64.44"
    )
    assert lines[4] == "(my streets val, 3 images)"


def test_what_is_never_found_has_nought_and_is_not_absent(record):
    scores = judge([[0, 1], [0, 3]], Head(), "ab")
    lines = protocols.summary({**record, "scores": scores}).splitlines()
    assert [line.split() for line in lines[:2]] == [["a", "0.0"], ["b", "75.0"]]


def test_a_summary_has_second_means_and_heads(record):
    judged = judge([[4, 1], [2, 3]], Head(without=("a",)), "ab")
    text = protocols.summary({**record, "scores": {"sem": judged, "geo": judged}})
    assert text.startswith("sem:\n  a ")
    assert "\ngeo:\n  a " in text
    assert text.count("without a: mean accuracy 60.00, mean IU 50.00") == 2
