import functools
import json
import math
import os
import pathlib
import shlex

import archives_made
import keras
import numpy as np
import oracle
import pytest
from PIL import Image

from keras_fcn import (
    callbacks,
    cli,
    cli_data,
    files,
    images,
    metrics,
    models,
    saving,
    training,
    weights,
)
from keras_fcn.cli import main
from keras_fcn.datasets import batches as batches_module
from keras_fcn.datasets import camvid, catalog
from keras_fcn.datasets.batches import Batches
from keras_fcn.evaluation import segment
from keras_fcn.labels import LABEL_SETS, voc_colormap


@pytest.fixture
def street(tmp_path):
    """Two folders of four small pictures and masks: left half class 0, right half 1."""
    rng = np.random.default_rng(0)
    folders = tmp_path / "images", tmp_path / "masks"
    for folder in folders:
        folder.mkdir()
    for i in range(4):
        mask = np.zeros((40, 50), np.uint8)
        mask[:, 20 + i :] = 1
        mask[:3] = 9
        picture = rng.integers(0, 60, (40, 50, 3)) + 150 * mask[..., None].clip(0, 1)
        Image.fromarray(picture.astype(np.uint8)).save(folders[0] / f"{i}.png")
        Image.fromarray(mask).save(folders[1] / f"{i}.png")
    return [str(folder) for folder in folders]


@pytest.fixture
def checkpoint(tmp_path):
    model = models.fcn("alexnet", 8, 3, width=1 / 16)
    rng = np.random.default_rng(1)
    for variable in model.get_layer("score_fr").weights:
        variable.assign(rng.standard_normal(variable.shape))
    path = tmp_path / "net.h5"
    facts = {"labels": {"names": ["left", "right", "rest"]}}
    saving.save_checkpoint(model, path, facts=facts)
    return str(path)


@pytest.mark.parametrize(
    ("net", "layers", "millions", "field"),
    [
        ("alexnet-32s", 8, 57, 355),
        ("vgg16-32s", 16, 134, 404),
        ("googlenet-32s", 22, 6, 715),
        ("googlenet-4s", 22, 6, 715),
        ("vgg16-8s", 16, 134, 404),
    ],
)
def test_show_prints_the_papers_table_1(capsys, net, layers, millions, field):
    assert main(["show", net]) == 0
    out = capsys.readouterr().out
    assert f"convolution layers {layers} " in out
    assert f"({millions} M)" in out
    assert f"receptive field    {field} pixels" in out
    assert "max stride         32 pixels" in out
    assert ("says 907:" in out) == ("googlenet" in net)


def test_show_counts_multiply_adds_as_done_by_hand(capsys):
    main(["show", "alexnet-32s", "--size", "27", "27"])
    # 27 + 200 - 11 = 216 pixels, by 4: 55 by 55 cells of 96 channels
    assert f"{55 * 55 * 96 * 11 * 11 * 3:,}" in capsys.readouterr().out


def test_predict_writes_labels_colours_and_overlay_of_files_and_folders(
    tmp_path, capsys, street, checkpoint
):
    nested = tmp_path / "images" / "more"
    nested.mkdir()
    Image.new("L", (33, 17)).save(nested / "grey.jpg")
    output = tmp_path / "out"
    inputs = [street[0], "--checkpoint", checkpoint, "--output", str(output)]
    assert main(["predict", *inputs]) == 0
    for stem, size in (("0", (50, 40)), ("more/grey", (33, 17))):
        with Image.open(output / f"{stem}-labels.png") as labels:
            assert (labels.mode, labels.size) == ("P", size)
            found = np.asarray(labels)
            colors = np.asarray(labels.convert("RGB"))
        with Image.open(output / f"{stem}-color.png") as picture:
            np.testing.assert_array_equal(np.asarray(picture), colors)
        assert (output / f"{stem}-overlay.png").exists()
    model = models.load_checkpoint(checkpoint)
    with Image.open(nested / "grey.jpg") as picture:
        image = np.asarray(picture.convert("RGB"), "float32")
    logits = model.predict(image[None], verbose=0)
    np.testing.assert_array_equal(found, logits.argmax(-1)[0])
    commonest = ("left", "right", "rest")[np.bincount(found.ravel()).argmax()]
    assert f"grey.jpg: {commonest} " in capsys.readouterr().out


def test_evaluate_agrees_with_counting_by_hand(tmp_path, street, checkpoint):
    file = tmp_path / "scores.json"
    options = ["--checkpoint", checkpoint, "--relabel", "9=255", "--json", str(file)]
    assert main(["evaluate", *street, *options]) == 0
    model = models.load_checkpoint(checkpoint)
    hits = total = 0
    for i in range(4):
        with Image.open(f"{street[0]}/{i}.png") as picture:
            image = np.asarray(picture, "float32")
        with Image.open(f"{street[1]}/{i}.png") as mask:
            truth = np.asarray(mask)
        found = model.predict(image[None], verbose=0).argmax(-1)[0]
        hits += ((found == truth) & (truth != 9)).sum()
        total += (truth != 9).sum()
    result = json.loads(file.read_text())
    assert result["scores"]["pixel_accuracy"] == pytest.approx(hits / total)
    assert result["images"] == 4
    assert result["scores"]["accuracy"][2] is None  # class 2 does not occur
    assert result["weights"]["file"]["sha256"] == files.measure(checkpoint)["sha256"]


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_net_of_centred_data_is_shown_no_pictures(command, tmp_path, capsys, street):
    path = str(tmp_path / "plain.h5")
    net = models.fcn("alexnet", 32, 3, width=1 / 16, include_preprocessing=False)
    net.get_layer("score_fr").bias.assign([0, 1, 0])
    saving.save_checkpoint(net, path)
    data = street[:1] if command == "predict" else [*street, "--relabel", "9=255"]
    assert main([command, *data, "--checkpoint", path]) == 2
    assert "plain.h5 is without preprocessing; expected" in capsys.readouterr().err


def test_a_net_that_finds_one_class_everywhere_is_warned_of(tmp_path, capsys, street):
    model = models.fcn("googlenet", 32, 3, width=1 / 16)
    model.get_layer("score_fr").bias.assign([0, 1, 0])  # its kernel is zero
    path = str(tmp_path / "net.h5")
    saving.save_checkpoint(model, path)
    assert main(["evaluate", *street, "--relabel", "9=255", "--checkpoint", path]) == 0
    warnings = [x for x in capsys.readouterr().err.splitlines() if "warning" in x]
    assert len(warnings) == 1
    assert warnings[0].startswith("keras-fcn: warning: fcn32s_googlenet finds class 1 ")


# The net of the fewest layers, which JAX compiles soonest.
SMALL = ["--backbone", "alexnet", "--crop", "32"]


@pytest.fixture
def _thin(monkeypatch):
    """Nets of a sixteenth of the channels: full ones would take minutes."""
    for name in ("fcn", "late_fusion"):
        full = getattr(models, name)
        monkeypatch.setattr(models, name, functools.partial(full, width=1 / 16))


@pytest.mark.usefixtures("_thin")
def test_a_stopped_training_goes_on_where_it_was_if_it_is_asked_to(
    tmp_path, capsys, street, monkeypatch
):
    output = tmp_path / "run"
    options = ["train", *street, "--relabel", "9=255", "--output", str(output)]
    options += ["--classes", "left", "right", *SMALL, "--epochs", "2"]
    options += ["--validation", *street]
    with monkeypatch.context() as stopping:
        stopping.setattr(callbacks, "Divergence", _Stop)
        with pytest.raises(_Killed):
            main(options)
    assert [path.name for path in (output / "state").iterdir()] == [
        "epoch-0001-batch-000000.npz"
    ]
    assert not (output / "model.h5").exists()
    assert main(options) == 2
    assert "--resume" in capsys.readouterr().err
    fit, fitted = keras.Model.fit, []

    def watched(model, *arguments, **named):
        fitted.append((named["initial_epoch"], named["epochs"]))
        return fit(model, *arguments, **named)

    monkeypatch.setattr(keras.Model, "fit", watched)
    assert main([*options, "--resume"]) == 0
    assert fitted == [(1, 2)]
    labels = weights.metadata(output / "model.h5")["labels"]
    assert labels["palette"] == voc_colormap(2).tolist()


@pytest.mark.usefixtures("_thin")
def test_a_training_leaves_model_scores_logs_curves_and_overlays(tmp_path, street):
    output = tmp_path / "run"
    options = ["train", *street, "--relabel", "9=255", "--output", str(output)]
    options += ["--classes", "left", "right", *SMALL, "--epochs", "1"]
    assert main([*options, "--validation", *street]) == 0
    longer = [*options[:-1], "2", "--validation", *street]
    assert main([*longer, "--resume"]) == 0
    notes = (output / "command.sh").read_text().splitlines()
    assert [shlex.split(note) for note in notes[1::2]] == [
        ["keras-fcn", *options, "--validation", *street],
        ["keras-fcn", *longer, "--resume"],
    ]
    assert all(f", keras {keras.__version__}, " in note for note in notes[::2])
    assert main([*longer, "--resume", "--stride", "16"]) == 2  # another net
    assert (output / "command.sh").read_text().splitlines() == notes
    entry = weights.metadata(output / "model.h5")
    assert entry["labels"]["names"] == ["left", "right"]
    rows = (output / "log.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "1", "2"]
    assert {"loss", "mean_iou", "val_mean_iou"} <= set(rows[0].split(","))
    result = json.loads((output / "scores.json").read_text())
    assert result["images"] == 4
    overlays = ("overlays/epoch-0001.png", "overlays/epoch-0002.png")
    for picture in ("curves.png", "confusion.png", *overlays):
        with Image.open(output / picture) as image:
            assert image.width > 100
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    again = ["evaluate", *street, "--relabel", "9=255", "--json", str(tmp_path / "j")]
    again += ["--picture", str(tmp_path / "c.png")]
    assert main([*again, "--checkpoint", str(output / "model.h5")]) == 0
    drawn = [
        path.read_bytes() for path in (tmp_path / "c.png", output / "confusion.png")
    ]
    assert drawn[0] == drawn[1]
    again = json.loads((tmp_path / "j").read_text())
    assert again["scores"] == result["scores"]


@pytest.mark.usefixtures("_thin")
def test_a_training_takes_out_of_the_logits_what_balance_added(tmp_path, street):
    options = ["train", *street, "--relabel", "9=255", "--output", str(tmp_path / "o")]
    options += ["--classes", "left", "right", *SMALL, "--epochs", "1", "--stride", "32"]
    options += ["--balance", "1"]
    written = []
    for more in ([], ["--resume", "--adjust", "1"]):  # the training is done: no other
        assert main([*options, *more]) == 0
        written.append(weights.read_arrays(tmp_path / "o" / "model.h5"))
    shift = [a - b for a, b in zip(*(w["score_fr/bias"] for w in written), strict=True)]
    left, right = 20 + 21 + 22 + 23, 30 + 29 + 28 + 27  # columns, in `street`
    assert shift[1] - shift[0] == pytest.approx(np.log(left / right), abs=1e-5)


@pytest.mark.usefixtures("_thin")
def test_a_normalised_training_writes_a_plain_net_and_can_start_from_one(
    tmp_path, street
):
    options = ["train", *street, "--relabel", "9=255", "--classes", "left", "right"]
    options += [*SMALL, "--epochs", "1", "--batch-norm", "--jaccard", "0.5"]
    options += ["--tint", "0.1", "--blur", "1", "--noise", "5", "--cutmix", "0.5"]
    first, second = tmp_path / "first", tmp_path / "second"
    assert main([*options, "--output", str(first), "--validation", *street]) == 0
    entry = weights.metadata(first / "model.h5")
    assert not entry["model"]["batch_norm"]
    assert not any("_bn" in name for name in weights.read_arrays(first / "model.h5"))
    last = (first / "log.csv").read_text().splitlines()
    found = dict(zip(last[0].split(","), last[-1].split(","), strict=True))
    scores = json.loads((first / "scores.json").read_text())["scores"]
    assert float(found["val_mean_iou"]) == pytest.approx(scores["mean_iou"], abs=1e-3)
    init = ["--init", str(first / "model.h5"), "--output", str(second)]
    assert main([*options, *init]) == 0


class _Killed(BaseException):
    pass


class _Stop(keras.callbacks.Callback):
    def __init__(self, batches):
        super().__init__()

    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 1:
            raise _Killed


def test_after_ctrl_c_the_exit_status_is_that_of_a_signal(monkeypatch, capsys, street):
    def stopped(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_data, "check_data", stopped)
    assert main(["check-data", *street]) == 130
    assert capsys.readouterr().err == "keras-fcn: stopped.\n"


@pytest.fixture
def drawn(tmp_path, street):
    """A net that finds no class everywhere in the street, and its checkpoint."""
    model = oracle.draw(models.fcn("alexnet", 8, 3, width=1 / 16))
    [logits] = model.predict(images.read_image(f"{street[0]}/0.png")[None], verbose=0)
    bias = model.get_layer("score_fr").bias
    bias.assign(weights.to_numpy(bias) - logits.mean(axis=(0, 1)) - [60, 0, 0])
    path = str(tmp_path / "drawn.h5")
    facts = {"labels": {"names": ["left", "right", "rest"]}}
    saving.save_checkpoint(model, path, facts=facts)
    return model, path


def test_the_shares_that_predict_prints_are_those_of_the_masks(
    tmp_path, capsys, street, drawn
):
    output = tmp_path / "out"
    asked = ["--checkpoint", drawn[1], "--output", str(output)]
    assert main(["predict", street[0], *asked]) == 0
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith(street[0])]
    said = dict(line.split(": ") for line in lines)
    assert len(said) == len(lines) == 4
    for source, text in said.items():
        shares = dict(share.removesuffix("%").split() for share in text.split(", "))
        shares = {name: int(percent) for name, percent in shares.items()}
        with Image.open(output / f"{pathlib.Path(source).stem}-labels.png") as mask:
            pixels = np.asarray(mask)
        for label, name in enumerate(("left", "right", "rest")):
            exact = 100 * (pixels == label).sum() / (40 * 50)
            assert shares[name] == pytest.approx(exact, abs=0.51)
        assert len(shares) == 3
        assert sum(shares.values()) == pytest.approx(100, abs=1)
        assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_the_looks_asked_for_are_taken(tmp_path, street, drawn):
    model, checkpoint = drawn
    looks = {"mirror": True, "scales": (1, 1.5)}
    asked = ["--checkpoint", checkpoint, "--mirror", "--scales", "1", "1.5"]
    file, output = tmp_path / "scores.json", tmp_path / "out"
    data = [*street, "--relabel", "9=255"]
    assert main(["evaluate", *data, *asked, "--json", str(file)]) == 0
    assert main(["predict", street[0], *asked, "--output", str(output)]) == 0
    matrix, once = np.zeros((3, 3), int), np.zeros((3, 3), int)
    for i in range(4):
        picture, truth = f"{street[0]}/{i}.png", f"{street[1]}/{i}.png"
        truth = images.read_labels(truth)
        truth[truth == 9] = 255
        found = segment(model, picture, **looks)
        matrix += metrics.confusion_matrix(truth, found, 3)
        once += metrics.confusion_matrix(truth, segment(model, picture), 3)
        written = images.read_labels(output / f"{i}-labels.png")
        np.testing.assert_array_equal(written, found)
    expected, other = (metrics.scores(x)["mean_iou"] for x in (matrix, once))
    assert expected != other
    assert json.loads(file.read_text())["scores"]["mean_iou"] == expected


def test_a_second_prediction_leaves_out_what_the_first_one_wrote(street, checkpoint):
    folder = pathlib.Path(street[0])
    (folder / ".hidden.png").write_bytes(b"no picture")
    (folder / "LOUD.JPG").write_bytes((folder / "0.png").read_bytes())
    asked = ["--checkpoint", checkpoint, "--output", str(folder / "out")]
    written = []
    for _ in range(2):
        assert main(["predict", str(folder), *asked]) == 0
        written.append(sorted(path.name for path in (folder / "out").iterdir()))
    assert written[0] == written[1]
    assert len(written[0]) == 5 * 3
    assert "LOUD-labels.png" in written[0]


def test_a_prediction_replaces_nothing_that_lies_beside_its_pictures(
    street, checkpoint, capsys, monkeypatch
):
    monkeypatch.chdir(street[0])
    own, drawn = pathlib.Path("0-labels.png"), pathlib.Path("1-color.png")
    for path in (own, drawn):
        path.write_bytes(b"by hand")
    for inputs, path in (("0.png", own), ("1.png", drawn)):
        asked = ["predict", inputs, "--checkpoint", checkpoint, "--output", "."]
        assert main(asked) == 2
        assert f"error: {path} exists, where pictures lie" in capsys.readouterr().err
        assert path.read_bytes() == b"by hand"
    assert main([*asked[:1], "2.png", *asked[2:]]) == 0
    assert pathlib.Path("2-labels.png").exists()


def test_check_data_says_what_looks_wrong(capsys, street):
    assert main(["check-data", *street]) == 1
    out = capsys.readouterr().out
    assert "4 pairs" in out
    assert "warning" in out
    assert main(["check-data", *street, "--relabel", "9=255"]) == 0
    out = capsys.readouterr().out
    assert "  255          600    7.50%       4  void" in out
    assert "nothing looks wrong" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["predict", "nowhere.jpg"], "nowhere.jpg"),
        (["predict", "{images}", "--checkpoint", "vgg16-8s-vok"], "vgg16-8s-vok"),
        (["predict", "{images}", "--checkpoint", "nowhere.h5"], "nowhere.h5"),
        (["show", "vgg16-7s"], "vgg16-8s"),
        (["evaluate", "{images}", "{masks}", "--checkpoint", "{net}"], "label 9"),
        (["evaluate", "{images}", "nowhere", "--checkpoint", "{net}"], "nowhere"),
        (["train", "{images}", "{masks}", "--output", "o", "--labels", "x"], "camvid"),
        (["train", "{images}", "{masks}", "--output", "o", "--resume"], "no state"),
        (
            ["train", "{images}", "{masks}", "--output", "o", "--classes", "a", "b"],
            "label 9",
        ),
        (["train", "camvid", "--output", "o", "--classes", "a"], "leave it out"),
        (
            ["train", "camvid", "--output", "o", "--balance", "0", "--adjust", "1"],
            "is 0",
        ),
        (
            "train camvid --output o --adjust 1 --upsampling learned".split(),
            "--upsampling learned",
        ),
        (["train", "camvit", "--output", "o"], "expected camvid"),
        (
            ["train", "camvid", "--output", "o", "--batch-norm", "--devices", "2"],
            "--batch-norm",
        ),
        (["train", "{images}", "--output", "o"], "a folder of masks"),
        (["train", "camvid", "--output", "o", "--relabel", "11=255"], "--relabel"),
        (["evaluate", "camvid", "--data-dir", "none"], "keras-fcn prepare camvid"),
        (["predict", "{images}", "--output", "{net}"], "is a file; expected a folder"),
        (["predict", "{images}", "--output", ""], "--output is empty; expected"),
        (["predict", "{images}", "--output", "{images}"], "images is the folder "),
        (["predict", "{images}", "--output", "."], "--output . encloses the folder "),
        (["predict", "nowhere"], "nor a folder; expected image files, and folders of"),
        (["predict", ""], "An input is empty; expected image files"),
        (["train", "{images}", "{masks}", "--output", ""], "--output is empty"),
        (["train", "camvid", "--output", "{net}"], "is a file; expected a folder"),
        (["evaluate", "camvid", "--json", "{images}"], "images cannot be written"),
        (["evaluate", "camvid", "--json", "no/where.json"], "no/where.json cannot be"),
        (["evaluate", "camvid", "--picture", "x.jpg"], "a name that ends in .png"),
        (
            "convert {net} --output o --backbone vgg16 --classifier".split(),
            "o: expected a name that ends in .h5 or .hdf5",
        ),
        (
            "convert {net} --output no/where.h5 --checkpoint vgg16-8s-voc".split(),
            "no/where.h5 cannot be written; expected a file's name",
        ),
        (
            "convert {net} --output {images} --checkpoint vgg16-8s-voc".split(),
            "images cannot be written; expected a file's name",
        ),
        (
            "convert absent --output o.h5 --checkpoint vgg16-8s-voc".split(),
            "absent is not a file; expected trained weights",
        ),
        (["check-data", "{images}", "nowhere"], "`nowhere` is no folder; expected"),
        (["evaluate", "camvid", "--json", ""], "cannot be written; expected a file's"),
        (
            ["predict", "{images}", "--checkpoint", "{run}"],
            "is a folder; expected a checkpoint's name or file. Name the file, {run}/m",
        ),
        (["show", "{run}"], "Name the file, {run}/model.h5"),
        (
            ["train", "{images}", "{masks}", "--output", "o", "--init", "run"],
            "file, ru",
        ),
        (
            "train {images} {masks} --relabel 9=255 --output o --validation .".split(),
            "--validation is .; expected a folder of images and a folder of masks",
        ),
        (
            ["upper-bound", "{masks}", "--factors", "4", "0"],
            "--factors 4 0 was given; expected each factor to be 1 pixel or more",
        ),
        (
            ["upper-bound", "{masks}", "--relabel", "9=255", "1=0", "9=1"],
            "--relabel replaces 9 twice; expected each label once",
        ),
        (
            ["train", "{images}", "{masks}", "--output", "{masks}"],
            "masks is a folder of the data",
        ),
        (
            "train camvid --output {images} --validation {images} {masks}".split(),
            "images is a folder of the data",
        ),
        (["predict", "{images}", "--checkpoint", "vgg16-imagenet"], "is a classifier"),
        (
            ["evaluate", "{images}", "{masks}", "--checkpoint", "vgg16-imagenet"],
            "is a classifier; expected one that labels",
        ),
    ],
)
def test_errors_are_one_sentence_and_exit_status_2(
    capsys, tmp_path, monkeypatch, street, checkpoint, arguments, words
):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    (run / "model.h5").write_bytes(pathlib.Path(checkpoint).read_bytes())
    known = {"images": street[0], "masks": street[1], "net": checkpoint, "run": run}
    status = main([argument.format(**known) for argument in arguments])
    captured = capsys.readouterr()
    assert status == 2
    assert captured.err.startswith("keras-fcn: error: ")
    assert words.format(**known) in captured.err
    assert "Traceback" not in captured.err


@pytest.mark.parametrize(
    "arguments",
    ["evaluate camvid --json shut/a", "evaluate camvid --picture shut/a.png"]
    + ["predict x.png --output shut", "train camvid --output shut/new"],
)
def test_a_folder_that_may_not_be_written_to_is_refused_before_any_work(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    shut = tmp_path / "shut"
    shut.mkdir()
    monkeypatch.setattr(os, "access", lambda path, _: not shut.samefile(path))
    assert main(arguments.split()) == 2
    assert "cannot be written, as nothing may be in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--epochs 0", "0 was given; expected 1 or more"),
        ("--epochs many", "invalid int value: 'many'"),
        ("--batch-size -2", "-2 was given; expected 1 or more"),
        ("--crop -5", "-5 was given; expected 0 or more"),
        ("--jitter -4", "-4 was given; expected 0 or more"),
        ("--learning-rate -1", "-1 was given; expected a finite number above 0"),
        ("--learning-rate 0", "0 was given; expected a finite number above 0"),
        ("--learning-rate nan", "nan was given; expected a finite number above 0"),
        ("--learning-rate inf", "inf was given; expected a finite number above 0"),
        ("--scale 1 inf", "inf was given; expected a finite number above 0"),
        ("--scale 0 1", "0 was given; expected a finite number above 0"),
        ("--noise inf", "inf was given; expected 0 or more, and finite"),
        ("--skip-scales pool3=nan", "'pool3=nan' is not of the form name=number"),
        ("--skip-scales pool3=1,pool3=2", "name=number, each name once"),
        ("--balance nan", "nan was given; expected 0 or more"),
        ("--adjust 3", "3 was given; expected 0 to 1"),
        ("--seed -1", "-1 was given; expected 0 to 4294967295"),
        ("--seed 4294967296", "4294967296 was given; expected 0 to 4294967295"),
        ("--devices 0", "0 was given; expected 1 or more"),
        ("--precision int8", "choose from"),
    ],
)
def test_numbers_of_a_training_are_judged_before_anything_is_read(
    capsys, option, words
):
    with pytest.raises(SystemExit, match="2"):
        main(["train", "nowhere", "--output", "o", *option.split()])
    assert words in capsys.readouterr().err


def test_what_cannot_be_read_does_not_keep_others_from_being_segmented(
    tmp_path, capsys, street, checkpoint
):
    images, output = pathlib.Path(street[0]), tmp_path / "out"
    for name in ("0-damaged.png", "z-damaged.png"):
        (images / name).write_bytes(b"\x89PNG")
    inputs = [street[0], "--checkpoint", checkpoint, "--output", str(output)]
    assert main(["predict", *inputs]) == 2
    said = capsys.readouterr()
    assert "Wrote labels" in said.out
    assert said.err.count("is empty, damaged or of another format") == 2
    assert all(name in said.err for name in ("0-damaged.png", "z-damaged.png"))
    written = {path.name for path in output.glob("*-labels.png")}
    sound = {path.stem for path in images.iterdir() if "damaged" not in path.name}
    assert written == {f"{stem}-labels.png" for stem in sound}
    assert main(["predict", str(images / "z-damaged.png"), *inputs[1:]]) == 2
    assert "Wrote" not in capsys.readouterr().out


class ResourceExhaustedError(Exception):
    """As TensorFlow's is called, which is no RuntimeError."""


def told_by_keras(error):
    """What Keras makes of an error whose class takes more than words, as NumPy's."""
    told = RuntimeError("Exception encountered when calling Functional.call().")
    told.__context__ = error
    return told


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        told_by_keras(MemoryError()),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
        ResourceExhaustedError("OOM when allocating tensor"),
    ],
    ids=["python", "numpy", "torch", "jax", "tensorflow"],
)
def test_a_picture_too_large_for_memory_does_not_keep_others_from_being_segmented(
    tmp_path, capsys, street, checkpoint, monkeypatch, error
):
    large = pathlib.Path(street[0], "1.png")
    Image.new("RGB", (70, 60)).save(large)

    def limited(model, picture, **looks):
        if picture.shape[0] == 60:
            raise error
        return segment(model, picture, **looks)

    monkeypatch.setattr(cli, "segment", limited)
    output = tmp_path / "out"
    asked = [street[0], "--checkpoint", checkpoint, "--output", str(output)]
    assert main(["predict", *asked]) == 2
    said = f"error: `{large}`, 60 x 70 pixels (height x width), does not fit into mem"
    assert said in capsys.readouterr().err
    written = sorted(path.name for path in output.glob("*-labels.png"))
    assert written == [f"{i}-labels.png" for i in (0, 2, 3)]


@pytest.mark.parametrize("error", [RuntimeError("a shape"), TypeError("out of memory")])
def test_no_other_error_is_taken_for_one_of_memory(
    tmp_path, street, checkpoint, monkeypatch, error
):
    def failing(*_, **__):
        raise error

    monkeypatch.setattr(cli, "segment", failing)
    output = tmp_path / "out"
    asked = [street[0], "--checkpoint", checkpoint, "--output", str(output)]
    with pytest.raises(type(error), match=str(error)):
        main(["predict", *asked])


def test_folders_that_are_called_like_pictures_are_none(
    tmp_path, street, checkpoint, capsys
):
    for folder in street:
        pathlib.Path(folder, "sub.png").mkdir()
    inside = pathlib.Path(street[0], "sub.png", "inside.png")
    Image.new("RGB", (9, 9)).save(inside)
    output = tmp_path / "out"
    asked = ["--checkpoint", checkpoint, "--output", str(output)]
    assert main(["predict", street[0], *asked]) == 0
    assert (output / "sub.png" / "inside-labels.png").exists()
    main(["check-data", *street])
    assert "sub.png" not in capsys.readouterr().out.replace(str(inside), "")


def test_a_net_of_several_heads_is_not_adjusted(tmp_path, monkeypatch, capsys):
    class Scenes(list):
        label_sets = dict.fromkeys(("sem", "geo"), LABEL_SETS["siftflow-geo"])

    scenes = Scenes([(np.zeros((8, 8, 3)), dict.fromkeys(("sem", "geo"), None))])
    monkeypatch.setattr(catalog, "load", lambda *_, **__: scenes)
    output = tmp_path / "run"
    arguments = ["train", "siftflow", "--output", str(output), "--adjust", "1"]
    assert main([*arguments, "--validation", "siftflow"]) == 2
    assert "several heads; leave it out" in capsys.readouterr().err
    assert not output.exists()


class Scenes(list):
    """A source of grey pictures in which all is of the first class."""

    def __init__(self, label_set, channels=3):
        picture = np.full((8, 8, channels), 99, "uint8" if channels == 3 else "float32")
        super().__init__([(picture, np.zeros((8, 8), "uint8"))] * 3)
        self.label_sets = {"": LABEL_SETS[label_set]}
        self.ids = ["a", "b", "c"]

    def labels(self, index):
        return self[index][1]


@pytest.mark.usefixtures("_thin")
def test_a_validation_of_other_classes_is_refused_before_training(
    tmp_path, monkeypatch, capsys
):
    def load(name, *_, **__):
        return Scenes("voc" if name == "voc2011" else "camvid")

    monkeypatch.setattr(catalog, "load", load)
    output = tmp_path / "run"
    arguments = ["train", "camvid", "--output", str(output), *SMALL]
    assert main([*arguments, "--validation", "voc2011"]) == 2
    assert "data have 21 classes; expected 11" in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.usefixtures("_thin")
@pytest.mark.parametrize(("data", "channels"), [("nyudv2-hha", 3), ("nyudv2-depth", 4)])
def test_what_is_no_colour_is_not_recoloured(
    data, channels, tmp_path, monkeypatch, capsys
):
    scenes, served = Scenes("nyud", channels), []
    monkeypatch.setattr(catalog, "load", lambda *_, **__: scenes)

    def batches(*arguments, **named):
        served.append(Batches(*arguments, **named))
        return served[-1]

    monkeypatch.setattr(batches_module, "Batches", batches)
    arguments = ["train", data, "--output", str(tmp_path / "o"), "--stride", "8"]
    arguments += [*SMALL, "--crop", "8", "--epochs", "1", "--scale", "1", "1"]
    assert main([*arguments, "--color", "0.2"]) == 2
    assert f"given for {data}, whose pictures are not RGB" in capsys.readouterr().err
    assert main([*arguments, "--noise", "3"]) == 2
    assert not served
    assert main([*arguments, "--validation", data]) == 0
    pictures, _ = served[1].batch(0, 0)  # the first was made to judge the options
    inside = [pictures[..., i] for i in range(channels)]
    assert all(set(np.unique(x)) == {99} for x in inside)


def test_a_scale_is_not_dropped_where_pictures_are_whole(tmp_path, capsys, street):
    arguments = ["train", *street, "--output", str(tmp_path / "o"), "--stride", "32"]
    arguments += ["--scale", "0.7", "2"]
    for whole in (["--crop", "0"], ["--recipe", "voc-fcn32s"]):
        assert main([*arguments, *whole]) == 2
        assert "`scale` is [0.7, 2.0] and `crop` None" in capsys.readouterr().err


@pytest.mark.usefixtures("_thin")
@pytest.mark.filterwarnings("ignore")  # TensorFlow's own, of what it was given
def test_a_damaged_picture_ends_a_training_in_one_sentence(tmp_path, capsys, street):
    order = Batches(range(4), seed=0).order(0)  # of which Keras reads two by itself
    sound = pathlib.Path(street[0], f"{order[-1]}.png")
    last = sound.with_suffix(".jpg")
    Image.open(sound).save(last)
    last.write_bytes(last.read_bytes()[:-150])  # its header is sound
    sound.unlink()
    output = tmp_path / "run"
    arguments = ["train", *street, "--relabel", "9=255", "--output", str(output)]
    assert main([*arguments, *SMALL, "--batch-size", "1", "--seed", "0"]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"keras-fcn: error: `{last}` cannot be decoded")


@pytest.mark.usefixtures("_thin")
def test_a_training_that_does_not_fit_into_memory_says_what_to_make_smaller(
    tmp_path, capsys, street, monkeypatch
):
    def fit(*_, **__):
        raise error

    monkeypatch.setattr(keras.Model, "fit", fit)
    arguments = ["train", *street, "--relabel", "9=255", "--stride", "32", *SMALL]
    error = RuntimeError("CUDA out of memory. Tried to allocate 9 GiB.")
    assert main([*arguments, "--output", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert "--batch-size 6 and --crop 32 does not fit into memory; expected" in said
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        main([*arguments, "--output", str(tmp_path / "b")])


@pytest.mark.usefixtures("_thin")
def test_windows_that_no_memory_holds_are_too_large_in_a_sentence(
    tmp_path, capsys, street
):
    arguments = ["train", *street, "--relabel", "9=255", "--stride", "32", *SMALL]
    pixels = str(10**8)  # a side: 120 petabytes
    arguments += ["--crop", pixels, "--output", str(tmp_path / "o")]
    assert main(arguments) == 2
    assert f"--crop {pixels} does not fit into memory" in capsys.readouterr().err


@pytest.mark.usefixtures("_thin")
@pytest.mark.parametrize("accumulate", [1, 5])
def test_a_recipe_makes_as_many_updates_as_the_reference(
    accumulate, tmp_path, monkeypatch, street
):
    recipe = "voc-fcn-alexnet"
    known = training.RECIPES[recipe]._replace(accumulate=accumulate, iterations=9)
    monkeypatch.setitem(training.RECIPES, recipe, known)
    arguments = ["train", *street, "--relabel", "9=255", "--recipe", recipe]
    output = tmp_path / "run"
    arguments += ["--stride", "32", "--learning-rate", "1e-12"]
    assert main([*arguments, "--output", str(output)]) == 0
    rows = (output / "log.csv").read_text().splitlines()[1:]
    assert len(rows) == math.ceil(9 * accumulate / 4)


@pytest.mark.usefixtures("_thin")
def test_a_resumed_training_has_the_rate_that_it_is_given(
    tmp_path, monkeypatch, street
):
    rates = []

    class Averages(callbacks.Averages):
        def on_train_begin(self, logs=None):
            rates.append(float(self.model.optimizer.learning_rate))
            super().on_train_begin(logs)

    monkeypatch.setattr(callbacks, "Averages", Averages)
    output = tmp_path / "run"
    arguments = ["train", *street, "--relabel", "9=255", "--recipe", "voc-fcn-alexnet"]
    arguments += ["--output", str(output), "--stride", "32", "--epochs"]
    assert main([*arguments, "1", "--learning-rate", "1e-9"]) == 0
    assert main([*arguments, "2", "--learning-rate", "1e-11", "--resume"]) == 0
    assert rates == pytest.approx([1e-9, 1e-11])


def test_two_pictures_of_one_name_do_not_overwrite_each_other(
    tmp_path, capsys, checkpoint
):
    for name in ("a.png", "a.jpg"):
        Image.new("RGB", (9, 9)).save(tmp_path / name)
    inputs = [str(tmp_path / "a.png"), str(tmp_path / "a.jpg")]
    output = tmp_path / "out"
    options = ["--checkpoint", checkpoint, "--output", str(output)]
    assert main(["predict", *inputs, *options]) == 2
    assert "a.jpg" in capsys.readouterr().err
    assert not output.exists()


def test_prepare_takes_archives_of_one_folder_and_builds_in_another(
    tmp_path, capsys, monkeypatch
):
    invented = archives_made.make("camvid", tmp_path)
    monkeypatch.setattr(camvid, "Camvid", invented.builder)
    archives, data = invented.write(tmp_path / "archives"), tmp_path / "data"
    before = sorted(archives.rglob("*"))
    folders = ["--data-dir", str(data), "--manual-dir", str(archives)]
    assert main(["prepare", "camvid", *folders]) == 0
    said = capsys.readouterr().out.strip()
    assert said.startswith("camvid is in ")
    folder = pathlib.Path(said.removeprefix("camvid is in "))
    assert data in folder.parents
    assert (folder / "dataset_info.json").exists()
    for split, ids in invented.splits.items():
        assert catalog.load("camvid", split, data_dir=data).ids == ids
    assert sorted(archives.rglob("*")) == before


def test_list_writes_classes_as_convert_takes_them(capsys):
    assert main(["list", "--backbone", "vgg16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.split()}
    assert rows["vgg16-8s-voc"][:4] == ["134.4", "M", "21", "65.5"]
    assert rows["vgg16-8s-siftflow"] == ["134.4", "M", "sem=33,geo=3"]
    assert "googlenet-8s-camvid" not in rows


def test_a_net_of_two_heads_is_not_evaluated_on_one_folder_of_masks(capsys, street):
    assert main(["evaluate", *street, "--checkpoint", "vgg16-8s-siftflow"]) == 2
    assert "has the heads sem, geo; expected a net of one" in capsys.readouterr().err


def test_upper_bounds_fall_with_the_factor_and_are_whole_at_one(capsys, street):
    factors = ["--factors", "1", "4", "16"]
    assert main(["upper-bound", street[1], "--relabel", "9=255", *factors]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[0] for row in rows] == ["1", "4", "16"]
    assert rows[0][1:] == ["100.0"] * 4
    mean_iou = [float(row[3]) for row in rows]
    assert mean_iou == sorted(mean_iou, reverse=True)
    assert mean_iou[-1] < 95


def test_the_version_is_told_with_what_numbers_depend_on(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name in ("keras_fcn", f"keras {keras.__version__}", keras.backend.backend()):
        assert name in " ".join(said.split())
