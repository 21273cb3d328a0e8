"""Every entry of the manifest, against the prototxts and data layers it speaks of."""

import functools
import hashlib
import re
from urllib.parse import urlsplit

import keras
import pytest

from keras_fcn import manifest, models, weights
from keras_fcn.labels import LABEL_SETS
from keras_fcn.layers import Preprocess
from keras_fcn.manifest import checkpoint_info, list_checkpoints

NAMES = list_checkpoints()
SHIPPED = [name for name in NAMES if "file" in checkpoint_info(name)]

SCORES = {"pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou"}
ACCURACIES = {"top1_accuracy", "top5_accuracy"}
ORIGINS = {"file", "hub", "caffemodel"}
# {table: (required, optional)}
FIELDS = {
    "": (
        {"model", "input", "parameters", "license", "trained_on", "source"}
        | {"published", "measured"},
        {"labels", "keras", "drop", "command"} | ORIGINS,
    ),
    "model": (
        {"backbone"},
        {"builder", "stride", "num_classes", "skips", "skip_scales"},
    ),
    "file": ({"name", "bytes", "sha256"}, set()),
    "hub": ({"repo", "revision", "file", "bytes", "sha256"}, set()),
    "caffemodel": ({"url"}, {"bytes", "sha256", "sha1", "md5"}),
    "keras": ({"url", "md5"}, set()),
    "published": ({"split", "source"}, SCORES | ACCURACIES),
    "measured": ({"split", "version"}, SCORES | ACCURACIES),
}
HEX_DIGITS = {"sha256": 64, "sha1": 40, "md5": 32, "revision": 40}

# Kernels and biases, counted from the prototxts of shelhamer/fcn.berkeleyvision.org and
# BVLC/caffe: without the frozen upsampling and without GoogLeNet's auxiliary heads.
PARAMETERS = {
    "vgg16-32s-voc": 134_346_581,
    "vgg16-16s-voc": 134_357_354,
    "vgg16-8s-voc": 134_362_751,
    "vgg16-8s-atonce-voc": 134_362_751,
    "alexnet-32s-voc": 56_954_261,
    "vgg16-32s-nyud": 134_424_424,
    "vgg16-32s-nyud-hha": 134_424_424,
    "vgg16-32s-nyud-color-hha": 268_848_848,
    "vgg16-32s-siftflow": 134_408_036,
    "vgg16-16s-siftflow": 134_426_504,
    "vgg16-8s-siftflow": 134_435_756,
    "vgg16-32s-pascal-context": 134_506_364,
    "vgg16-16s-pascal-context": 134_537_144,
    "vgg16-8s-pascal-context": 134_552_564,
    "vgg16-imagenet": 138_357_544,
    "alexnet-imagenet": 60_965_224,
    "googlenet-imagenet": 6_998_552,
    "googlenet-8s-camvid": 5_973_552 + 11 * (1024 + 832 + 480 + 3),  # trunk, scores
    "googlenet-4s-camvid": 5_973_552 + 11 * (1024 + 832 + 480 + 192 + 4),
}
# By the end of the name: *_layers.py, net.py and infer.py of the reference, the gist of
# VGG16, train_val.prototxt of bvlc_googlenet.
INPUTS = {
    "-voc": ("BGR", [104.00699, 116.66877, 122.67892]),
    "-nyud": ("BGR", [116.190, 97.203, 92.318]),
    "-nyud-hha": ("RGB", [132.431, 94.076, 118.477]),
    "-siftflow": ("BGR", [114.578, 115.294, 108.353]),
    "-pascal-context": ("BGR", [104.007, 116.669, 122.679]),
    "vgg16-imagenet": ("BGR", [103.939, 116.779, 123.68]),
    "alexnet-imagenet": ("BGR", [104.00698793, 116.66876762, 122.67891434]),
    "googlenet-imagenet": ("BGR", [104, 117, 123]),
    "-camvid": ("BGR", [104.00699, 116.66877, 122.67892]),  # ours, as for VOC
}
HEADS = {
    "-voc": 21,
    "-nyud": 40,
    "-hha": 40,
    "-siftflow": {"sem": 33, "geo": 3},
    "-pascal-context": 60,
    "-imagenet": 1000,
    "-camvid": 11,
}
WIDTH = 1 / 4  # at which no layer of any backbone has its channels rounded


@functools.cache
def net(name):
    entry = checkpoint_info(name)
    entry["model"]["width"] = WIDTH
    return models.build(entry)


def parameters_at_full_width(model):
    """Counts what convolutions would hold at width 1, from their kernels at WIDTH."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            height, width, inputs, outputs = layer.kernel.shape
            inputs = inputs if inputs == 3 else inputs / WIDTH  # the image's stay
            is_score = layer.activation is keras.activations.linear
            outputs = outputs if is_score else outputs / WIDTH  # the classes stay
            total += (height * width * inputs + 1) * outputs
    return total


def check_fields(table, kind):
    required, optional = FIELDS[kind]
    assert required <= set(table), kind
    assert set(table) <= required | optional, kind


def test_the_manifest_has_the_published_checkpoints_and_their_classifiers():
    assert set(PARAMETERS) <= set(NAMES)


def test_the_readme_of_the_manifest_lists_its_fields():
    readme = (manifest.folder() / "README.md").read_text("utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", readme, flags=re.MULTILINE)
    required, optional = FIELDS[""]
    assert sorted(listed) == sorted(required | optional)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_has_all_fields_that_it_needs_and_no_others(name):
    entry = checkpoint_info(name)
    check_fields(entry, "")
    for kind in ("model", *(ORIGINS & set(entry))):
        check_fields(entry[kind], kind)
    for kind in ("published", "measured"):
        if entry[kind]:
            check_fields(entry[kind], kind)
    assert ORIGINS & set(entry)
    assert all(entry[field] for field in ("license", "trained_on", "source"))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_backbone_stride_and_tag(name):
    model = checkpoint_info(name)["model"]
    builder = model.get("builder", "fcn")
    assert builder in ("fcn", "late_fusion", "classifier")
    assert ("stride" in model) == (builder != "classifier")
    stride = f"{model['stride']}s-" if "stride" in model else ""
    assert re.fullmatch(rf"{model['backbone']}-{stride}[a-z]+(-[a-z]+)*", name)


@pytest.mark.parametrize("name", NAMES)
def test_an_entry_names_its_classes_once(name):
    entry = checkpoint_info(name)
    assert ("labels" in entry) != ("num_classes" in entry["model"])
    labels = entry.get("labels", {})
    for label_set in labels.values() if isinstance(labels, dict) else [labels]:
        assert label_set in LABEL_SETS


@pytest.mark.parametrize("name", NAMES)
def test_hashes_and_lengths_look_like_such(name):
    entry = checkpoint_info(name)
    for origin in ORIGINS & set(entry):
        for field, digits in HEX_DIGITS.items():
            value = entry[origin].get(field, "0" * digits)
            assert re.fullmatch(rf"[0-9a-f]{{{digits}}}", value), field
        assert type(entry[origin].get("bytes", 1)) is int
        assert entry[origin].get("bytes", 1) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_caffemodel_is_fetched_from_a_plain_host(name):
    entry = checkpoint_info(name)
    url = urlsplit(entry.get("caffemodel", {"url": "http://a.b/x.caffemodel"})["url"])
    assert url.scheme in ("http", "https")
    assert re.fullmatch(r"([a-z0-9-]+\.)+[a-z]+", url.netloc)  # no user, no port
    assert re.fullmatch(r"(/[\w~.-]+)*/[\w-]+\.caffemodel", url.path)
    assert url.query == url.fragment == ""


def test_no_two_checkpoints_share_a_file():
    entries = [checkpoint_info(name) for name in NAMES]
    urls = [entry["caffemodel"]["url"] for entry in entries if "caffemodel" in entry]
    assert len(set(urls)) == len(urls)


@pytest.mark.parametrize("name", NAMES)
def test_scores_are_in_percent(name):
    entry = checkpoint_info(name)
    for kind in ("published", "measured"):
        scores = {key: entry[kind].get(key) for key in SCORES | ACCURACIES}
        found = [score for score in scores.values() if score is not None]
        assert all(1 < score < 100 for score in found)
        assert bool(entry[kind]) == bool(found)


@pytest.mark.parametrize(
    ("name", "split", "mean_iou"),
    [
        ("vgg16-32s-voc", "seg11valid", 63.6),
        ("vgg16-16s-voc", "seg11valid", 65.0),
        ("vgg16-8s-voc", "seg11valid", 65.5),
        ("vgg16-8s-atonce-voc", "seg11valid", 65.4),
        ("alexnet-32s-voc", "seg11valid", 48.0),
    ],
)
def test_published_scores_are_those_of_the_references_readme(name, split, mean_iou):
    published = checkpoint_info(name)["published"]
    assert (published["split"], published["mean_iou"]) == (split, mean_iou)


@pytest.mark.parametrize(
    ("name", "scores"),
    [  # pixel accuracy, mean accuracy, mean IU, f.w. IU
        ("vgg16-32s-voc", (90.4810, 76.4824, 63.6261, 83.4580)),
        ("vgg16-16s-voc", (90.9971, 78.0710, 65.0050, 84.2614)),
        ("vgg16-8s-voc", (91.2212, 77.6146, 65.5126, 84.5445)),
        ("vgg16-8s-atonce-voc", (91.1288, 78.4979, 65.3998, 84.4326)),
    ],
)
def test_published_scores_round_what_others_measured_of_the_same_files(name, scores):
    # The README of wkentaro/fcn, which evaluated the files in Chainer.
    published = checkpoint_info(name)["published"]
    order = ("pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou")
    expected = pytest.approx(scores, abs=0.05)
    assert tuple(published[score] for score in order) == expected


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_was_trained_from_one_that_exists(name):
    trained_on = checkpoint_info(name)["trained_on"]
    origins = re.findall(r"\b(?:alexnet|vgg16|googlenet)-[\w-]+", trained_on)
    assert set(origins) <= set(NAMES) - {name}


@pytest.mark.parametrize("name", NAMES)
def test_the_net_of_an_entry_has_its_heads(name):
    (expected,) = [heads for end, heads in HEADS.items() if name.endswith(end)]
    outputs = net(name).output
    if isinstance(expected, dict):
        assert {head: output.shape[-1] for head, output in outputs.items()} == expected
    else:
        assert outputs.shape[-1] == expected
    assert manifest.num_classes(checkpoint_info(name)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_parameters_are_those_of_the_net_at_full_width(name):
    entry, model = checkpoint_info(name), net(name)
    convolutions = [x for x in model.layers if isinstance(x, keras.layers.Conv2D)]
    assert model.count_params() == sum(x.count_params() for x in convolutions)
    assert parameters_at_full_width(model) == entry["parameters"]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_those_of_the_prototxt(name):
    assert checkpoint_info(name)["parameters"] == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_a_net_is_fed_what_the_reference_fed_it(name):
    fed = {
        layer.name: (layer.channels, layer.mean)
        for layer in net(name).layers
        if isinstance(layer, Preprocess)
    }
    if name.endswith("-color-hha"):
        color, hha = INPUTS["-nyud"], INPUTS["-nyud-hha"]
        assert fed == {"preprocesscolor": color, "preprocesshha": hha}
    else:
        (expected,) = [value for end, value in INPUTS.items() if name.endswith(end)]
        assert fed == {"preprocess": expected}


@pytest.mark.parametrize("name", NAMES)
def test_only_the_at_once_net_scales_its_skips(name):
    scales = {
        layer.name: layer.scale
        for layer in net(name).layers
        if isinstance(layer, keras.layers.Rescaling)
    }
    at_once = {"scale_pool4": 0.01, "scale_pool3": 0.0001}
    assert scales == (at_once if "atonce" in name else {})


def test_layers_are_dropped_only_where_the_reference_has_more_than_the_net():
    drops = {name: checkpoint_info(name).get("drop") for name in NAMES}
    heads = [
        f"loss{i}/{layer}" for i in (1, 2) for layer in ("conv", "fc", "classifier")
    ]
    assert {name: drop for name, drop in drops.items() if drop} == {
        "googlenet-imagenet": heads
    }


@pytest.mark.parametrize("backbone", ["alexnet", "vgg16", "googlenet"])
def test_checkpoints_are_listed_by_backbone(backbone):
    expected = [name for name in NAMES if name.startswith(backbone)]
    assert list_checkpoints(backbone=backbone) == expected != []


def test_checkpoint_info_is_a_copy_through_and_through():
    entry = checkpoint_info("vgg16-8s-voc")
    entry["input"]["mean"][0] = 0
    entry["published"].clear()
    entry["more"] = 1
    assert checkpoint_info("vgg16-8s-voc")["input"]["mean"] == INPUTS["-voc"][1]
    assert checkpoint_info("vgg16-8s-voc")["published"]
    assert "more" not in checkpoint_info("vgg16-8s-voc")


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("vgg16-8s-vok", "vgg16-8s-voc"),
        ("vgg16-8s-context", "vgg16-8s-pascal-context"),
        ("alexnet-imagnet", "alexnet-imagenet"),
        (None, "vgg16-8s-voc"),  # near nothing: all are listed
    ],
)
def test_an_unknown_name_is_answered_with_near_ones(wrong, near):
    with pytest.raises(ValueError, match=rf"no checkpoint {wrong!r}.* {near}\b"):
        checkpoint_info(wrong)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_file_that_ships_is_what_the_manifest_says(name):
    entry, path = checkpoint_info(name), manifest.shipped(name)
    assert path.stat().st_size == entry["file"]["bytes"]
    facts = weights.metadata(path)
    assert entry["model"].items() <= facts["model"].items()
    assert entry["input"] == facts["input"]
    assert entry["labels"] == facts["labels"]


def test_a_shipped_file_of_other_content_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "net.h5"
    path.write_bytes(b"weights")
    sha256 = hashlib.sha256(b"weights").hexdigest()
    table = {"net": {"file": {"name": "net.h5", "bytes": 7, "sha256": sha256}}}
    monkeypatch.setattr(manifest, "folder", lambda: tmp_path)
    monkeypatch.setattr(manifest, "_table", lambda: table)
    assert manifest.shipped("net") == path
    path.write_bytes(b"weighst")
    with pytest.raises(ValueError, match=rf"net\.h5 .*expected {sha256}"):
        manifest.shipped("net")


def test_a_backbone_that_no_checkpoint_has_is_an_error():
    with pytest.raises(ValueError, match="'vgg61' was given; expected .*'vgg16'"):
        manifest.list_checkpoints("vgg61")


def test_a_package_without_its_table_says_where_it_looked(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "_HERE", tmp_path / "keras_fcn")
    with pytest.raises(FileNotFoundError, match=rf"neither in {tmp_path}.* again"):
        manifest.folder()
    for place in (tmp_path, tmp_path / "keras_fcn"):  # a checkout, a wheel before it
        (place / "weights_manifest").mkdir(parents=True)
        (place / "weights_manifest" / "checkpoints.toml").touch()
        assert manifest.folder() == place / "weights_manifest"
