"""What ends a training in time, and what shows how it goes."""

import io
import struct
import sys
import types

import keras
import numpy as np
import pytest
from keras import layers, ops
from PIL import Image, ImageDraw, ImageFont
from trainings import LAST, Invented, file_of, net, read, take, train, validation

from keras_fcn import callbacks, images
from keras_fcn.callbacks import Averages, Divergence, Log, averaged
from keras_fcn.datasets.batches import Batches
from keras_fcn.labels import VOID, LabelSet, voc_colormap
from keras_fcn.snapshots import Snapshots, positions, restore

pytestmark = pytest.mark.usefixtures("_signals")

# Averages


def test_the_averages_are_validated_and_left_and_not_what_a_training_goes_on_with(
    whole, target, tmp_path
):
    folder, weights = whole
    take(whole, tmp_path, LAST)
    restore(target, tmp_path)
    raw = [read(v) for v in target.weights]
    with averaged(target):
        for variable, expected, then in zip(target.weights, weights, raw, strict=True):
            np.testing.assert_array_equal(read(variable), expected)
            assert np.any(then != expected)
        loss = target.evaluate(*validation(), verbose=0)[0]
    assert loss == callbacks.read_log(folder / "log.csv")[-1]["val_loss"]
    for variable, then in zip(target.weights, raw, strict=True):
        np.testing.assert_array_equal(read(variable), then)


def test_a_validation_does_not_change_the_training(whole, tmp_path):
    train(tmp_path, validate=False)
    for at in positions(tmp_path / "state"):
        path = file_of(tmp_path / "state", *at)
        assert path.read_bytes() == (whole[0] / "all" / path.name).read_bytes()


def test_what_fit_leaves_can_be_evaluated_and_restored(tmp_path):
    model, snapshots = net(), Snapshots(tmp_path)
    model.fit(*validation(), verbose=0, callbacks=[Averages(), snapshots])
    model.evaluate(*validation(), verbose=0)
    assert restore(model, tmp_path) == (1, 0)


# Ending in time


class Poisoned(keras.losses.Loss):
    """A loss that is NaN at label 200, and whose gradient alone is so at label 201."""

    def call(self, y_true, y_pred):
        y_true = ops.cast(y_true, "float32")
        mean = ops.mean(y_pred)
        zero = ops.where(ops.any(y_true == 201), mean - ops.stop_gradient(mean), 1.0)
        loss = mean + ops.sqrt(zero)  # whose slope at 0 is infinite
        return ops.where(ops.any(y_true == 200), np.nan, loss)


class Poison(Invented):
    """A source one of whose pictures or labels is poison."""

    def __init__(self, kind, at):
        self.kind, self.at = kind, at

    def __getitem__(self, index):
        picture, labels = super().__getitem__(index)
        if index == self.at:
            picture = np.float32(picture)
            picture[...] = np.nan if self.kind == "input" else picture
            labels = {"loss": labels * 0 + 200, "gradient": labels * 0 + 201}.get(
                self.kind, labels
            )
        return picture, np.uint8(labels)


@pytest.mark.parametrize("kind", ["loss", "gradient", "input"])
def test_a_training_that_diverges_ends_at_that_batch_with_its_last_good_snapshot(
    kind, faults, tmp_path
):
    pictures = keras.Input((None, None, 3))
    model = keras.Model(pictures, layers.Conv2D(3, 1, name="score")(pictures))
    start = [read(v) for v in model.weights]

    def check(step):
        folder = tmp_path / str(step)
        for variable, array in zip(model.weights, start, strict=True):
            variable.assign(array)
        model.compile(keras.optimizers.SGD(1e-6, momentum=0.9), Poisoned())
        batches = Batches(Poison(kind, step), batch_size=1, shuffle=False)
        looked, snapshots = [Divergence(batches)], Snapshots(folder, batches, minutes=0)
        place = rf"after batch {step + 1} of epoch 1; expected"
        with pytest.raises(ValueError, match=place):
            model.fit(batches, shuffle=False, verbose=0, callbacks=[*looked, snapshots])
        if step:
            # Entered there, the epoch diverges at the same batch.
            assert restore(model, folder, batches) == (0, step)
            with pytest.raises(ValueError, match=place):
                model.fit(batches, shuffle=False, verbose=0, callbacks=looked)
            assert restore(model, folder) == (0, step)
            assert all(np.isfinite(read(v)).all() for v in model.weights)

    faults(44, [(step,) for step in range(10)], check, few=[(2,), (9,)])


# What it shows


def callback(made, model=None, **params):
    made.set_model(model)
    made.set_params(params)
    return made


def test_a_log_has_one_line_an_epoch_in_order_whatever_is_trained_again(tmp_path):
    log = Log(tmp_path / "new" / "log.csv")
    log.on_epoch_end(0, {"loss": 0.1, "mean_iou": 1})
    log.on_epoch_end(1, {"loss": 0.2, "mean_iou": 2, "val_loss": 0.3})
    log.on_epoch_end(2, {"loss": 0.4, "mean_iou": 3})
    log.on_epoch_end(1, {"loss": 1 / 3, "mean_iou": 4, "val_loss": 0.5})
    assert log.path.read_text().splitlines() == [
        "epoch,loss,mean_iou,val_loss",
        "1,0.1,1.0,",
        f"2,{1 / 3!r},4.0,0.5",
    ]
    assert callbacks.read_log(log.path) == [
        {"epoch": 1, "loss": 0.1, "mean_iou": 1.0},
        {"epoch": 2, "loss": 1 / 3, "mean_iou": 4.0, "val_loss": 0.5},
    ]


def test_a_log_may_hold_numbers_that_are_none(tmp_path):
    Log(tmp_path / "log.csv").on_epoch_end(0, {"mean_iou": np.float32("nan")})
    assert np.isnan(callbacks.read_log(tmp_path / "log.csv")[0]["mean_iou"])


@pytest.mark.parametrize(
    "text", ["loss\n0.5\n", "epoch,loss\none,0.5\n", "epoch,loss\n1,0.5,0.6\n", "a\0"]
)
def test_a_log_does_not_replace_a_file_of_another_kind(text, tmp_path):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(ValueError, match="log.csv is no log of a training"):
        Log(tmp_path / "log.csv").on_epoch_end(0, {"loss": 0.5})
    assert (tmp_path / "log.csv").read_text() == text


def shown(terminal, epoch, first=0):
    """What a bar shows of two batches of an epoch, and a validation."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=150, color_system=None)
    batches = types.SimpleNamespace(first=first)
    bar = callbacks.ProgressBar(batches, epochs=30, console=console)
    callback(bar, epochs=epoch + 1, steps=10 - first)
    bar.on_train_begin()
    bar.on_epoch_begin(epoch)
    for batch in range(2):
        bar.on_train_batch_end(batch, {"loss": 0.25})
    bar.bar.refresh()
    bar.on_test_begin()
    bar.on_test_batch_end(0, {"mean_iou": 0.125})
    bar.bar.refresh()
    bar.on_test_end()
    bar.on_epoch_end(epoch, {"loss": 0.5})
    bar.on_train_end()
    return text.getvalue()


def test_a_bar_that_a_failed_fit_left_is_closed_by_the_next():
    from rich.console import Console

    console, before = Console(file=io.StringIO(), force_terminal=True), sys.stdout
    bar = callback(callbacks.ProgressBar(console=console))
    bar.on_train_end()  # of no training: nothing to close
    bar.on_train_begin()
    left = bar.bar
    assert left.live.is_started
    bar.on_train_begin()
    assert not left.live.is_started
    assert bar.bar.live.is_started
    bar.on_train_end()
    assert not bar.bar.live.is_started
    assert sys.stdout is before


def test_the_bar_shows_where_a_training_is_and_its_scores_so_far():
    text = shown(True, epoch=7, first=4)
    assert "Epoch 8 of 30" in text
    assert "76/300" in text  # seven epochs of ten, four before, two now
    assert "loss 0.2500" in text
    assert "Validation" in text
    assert "mean_iou 0.1250" in text
    assert "epoch   8  loss 0.5000" in text


def test_without_a_terminal_there_is_a_line_an_epoch():
    assert shown(False, epoch=7) == "epoch   8  loss 0.5000\n"


def events(folder):
    """Reads event files: {tag: [(step, value, or bytes of a picture)]}, and purges."""
    from tensorboardX.proto.event_pb2 import Event

    found, starts = {}, []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            length = struct.unpack("<Q", content[:8])[0]
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("session_log"):
                starts.append(event.step)
            for value in event.summary.value:
                kind = value.WhichOneof("value")
                item = value.image if kind == "image" else value.simple_value
                found.setdefault(value.tag, []).append((event.step, item))
    return found, starts


def test_a_board_has_every_number_of_every_epoch_and_forgets_what_comes_again(tmp_path):
    pytest.importorskip("tensorboardX")
    board = callback(callbacks.TensorBoard(tmp_path))
    for epoch in (4, 5):
        board.on_epoch_begin(epoch)
        board.on_epoch_end(epoch, {"loss": epoch / 8, "val_loss": 0.25})
    picture = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    board.picture("seen", picture, 5)
    board.on_train_end()
    found, starts = events(tmp_path)
    assert found["loss/train"] == [(5, 0.5), (6, 0.625)]
    assert found["loss/validation"] == [(5, 0.25), (6, 0.25)]
    [(step, image)] = found["seen"]
    with Image.open(io.BytesIO(image.encoded_image_string)) as seen:
        np.testing.assert_array_equal(np.asarray(seen), picture)
    assert (step, starts) == (6, [5])


class Scene(Invented):
    """Pictures with depth, and labels of two kinds."""

    label_sets = {
        "sem": Invented.label_sets[""],
        "geo": LabelSet(("far", "near"), voc_colormap(3)[1:]),
    }

    def __getitem__(self, index):
        picture, labels = super().__getitem__(index)
        depth = np.full((12, 14, 1), 2000, np.float32)
        picture = np.concatenate([picture, depth], axis=-1)
        return picture, {"sem": labels, "geo": labels % 2}


def assert_row(sheet, row, picture, truth, prediction, palette):
    """Checks the panels of a row, 12 x 14 pixels each."""
    wanted = [
        picture,
        *(images.overlay(picture, x, palette) for x in (truth, prediction)),
    ]
    for column, panel in enumerate(wanted):
        top, left = 24 + row * (12 + 8), column * (14 + 8)
        part = sheet[top : top + 12, left : left + 14]
        np.testing.assert_array_equal(part, panel)


def test_overlays_show_picture_truth_and_what_the_averages_predict(target, tmp_path):
    source = Invented()
    shown = callback(callbacks.Overlays(source, tmp_path / "new", count=2), target)
    shown.on_epoch_end(6)
    [path] = (tmp_path / "new").iterdir()
    assert path.name == "epoch-0007.png"
    sheet = images.read_image(path)
    palette = source.label_sets[""].palette
    with averaged(target):
        for row, index in enumerate((0, 9)):
            picture, labels = source[index]
            logits = target.predict_on_batch(np.float32(picture)[None])
            found = images.decode_segmentation(logits)[0]
            assert_row(sheet, row, picture, labels, found, palette)
    assert sheet.shape[1] > 3 * (14 + 8)  # a legend beside them


def test_overlays_of_several_heads_are_a_picture_each_and_on_the_board(tmp_path):
    image = keras.Input((None, None, 4))
    heads = {"sem": 3, "geo": 2}
    model = keras.Model(
        image,
        {head: layers.Conv2D(n, 1, name=head)(image) for head, n in heads.items()},
    )
    model.compile("sgd", {head: "mse" for head in heads})
    seen, source = [], Scene()
    board = types.SimpleNamespace(picture=lambda *what: seen.append(what))
    callback(callbacks.Overlays(source, tmp_path, board=board), model).on_epoch_end(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch-0001-geo.png",
        "epoch-0001-sem.png",
    ]
    assert [(name, epoch) for name, _, epoch in seen] == [("sem", 0), ("geo", 0)]
    for head, sheet, _ in seen:
        file = images.read_image(tmp_path / f"epoch-0001-{head}.png")
        np.testing.assert_array_equal(file, sheet)
        for row, index in enumerate((0, 3, 6, 9)):
            inputs, labels = source[index]
            logits = model.predict_on_batch(np.float32(inputs)[None])[head]
            found = images.decode_segmentation(logits)[0]
            palette = source.label_sets[head].palette
            picture = np.uint8(inputs[..., :3])
            assert_row(sheet, row, picture, labels[head], found, palette)


def test_a_net_of_one_head_is_on_the_board_as_its_segmentation(target, tmp_path):
    seen = []
    board = types.SimpleNamespace(picture=lambda *what: seen.append(what))
    overlays = callbacks.Overlays(Invented(), tmp_path, count=1, board=board)
    callback(overlays, target).on_epoch_end(4)
    [(name, sheet, epoch)] = seen
    assert (name, epoch) == ("segmentation", 4)
    np.testing.assert_array_equal(sheet, images.read_image(tmp_path / "epoch-0005.png"))


def ink(picture):
    """What is not white of a picture, without the white around it."""
    rows, columns = np.nonzero((picture != 255).any(axis=-1))
    return picture[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]


def word(text, size):
    """A word in black on white."""
    canvas = Image.new("RGB", (200, 40), "white")
    font = ImageFont.load_default(size)
    ImageDraw.Draw(canvas).text((10, 10), text, "black", font)
    return ink(np.array(canvas))


RED, BLUE, HALF_RED, HALF_BLUE = (200, 0, 0), (0, 0, 200), (100, 0, 0), (0, 0, 100)


def test_each_panel_stands_below_its_title_and_a_legend_beside_them_all():
    palette = np.array([(0, 200, 0), RED, (200, 200, 0), BLUE], np.uint8)
    label_set = LabelSet(("grass", "roof", "sand", "sea"), palette)
    picture = np.zeros((80, 100, 3), np.uint8)
    truth, prediction = np.full((2, 80, 100), VOID)
    truth[:, 50:], prediction[:, 50:] = 1, 3
    sheet = callbacks.compare([(picture, truth, prediction)] * 2, label_set)
    titles = [sheet[:24, left : left + 108] for left in (0, 108, 216)]
    for title, text in zip(titles, ("picture", "truth", "prediction"), strict=True):
        np.testing.assert_array_equal(ink(title), word(text, 16))
    for top in (24, 112):
        row = sheet[top : top + 80, :316]
        assert not row[:, :100].any()
        for left, color in ((108, HALF_RED), (216, HALF_BLUE)):
            assert not row[:, left : left + 50].any()
            assert (row[:, left + 50 : left + 100] == color).all()
        assert (row[:, [*range(100, 108), *range(208, 216)]] == 255).all()
    beside = sheet[:, 316:]
    tops = []
    for color, name in ((RED, "roof"), (BLUE, "sea")):
        rows, columns = np.nonzero((beside == color).all(axis=-1))
        line = beside[rows.min() - 4 : rows.max() + 4, columns.max() + 3 :]
        np.testing.assert_array_equal(ink(line), word(name, 14))
        tops.append(rows.min())
    assert tops == sorted(tops)
    for color in (palette[0], palette[2]):  # which are nowhere to be seen
        assert not (beside == color).all(axis=-1).any()


def test_large_pictures_are_shrunk_and_stay_in_proportion():
    picture = np.zeros((600, 1200, 3), np.uint8)
    labels = np.zeros((600, 1200), np.uint8)
    sheet = callbacks.compare([(picture, labels, labels)], LabelSet((), voc_colormap()))
    assert sheet.shape == (24 + 240, 3 * 480 + 2 * 8, 3)


def test_curves_are_drawn_of_what_there_is(tmp_path):
    pytest.importorskip("matplotlib")
    log = Log(tmp_path / "log.csv")
    for epoch in range(4):
        logs = {"loss": 1 / (epoch + 1), "mean_iou": epoch / 4}
        log.on_epoch_end(epoch, logs | ({"val_loss": 0.5} if epoch % 2 else {}))
    callbacks.curves(log.path, tmp_path / "curves.png")
    picture = images.read_image(tmp_path / "curves.png")
    assert picture.shape == (350, 1000, 3)
    blue, orange = [31, 119, 180], [255, 127, 14]  # of training and validation
    for color, halves in ((blue, [True, True]), (orange, [True, False])):
        drawn = (picture == color).all(axis=-1)
        assert [drawn[:, :500].any(), drawn[:, 500:].any()] == halves


def test_each_number_has_a_chart_of_its_own_training_against_validation(
    tmp_path, monkeypatch
):
    figure = pytest.importorskip("matplotlib.figure")
    figures = []

    class Kept(figure.Figure):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            figures.append(self)

    monkeypatch.setattr(figure, "Figure", Kept)
    log = Log(tmp_path / "log.csv")
    log.on_epoch_end(0, {"loss": 3.0, "mean_iou": 0.1, "pixel_accuracy": 0.4, "d": 7.0})
    log.on_epoch_end(1, {"loss": 2.0, "mean_iou": 0.2, "val_loss": 2.5})
    log.on_epoch_end(2, {"loss": 1.0, "mean_iou": 0.3, "val_loss": 1.5})
    callbacks.curves(log.path, tmp_path / "curves.png")
    [drawn] = figures
    charts = {axes.get_ylabel(): axes for axes in drawn.axes}
    assert list(charts) == ["loss", "mean iou", "pixel accuracy", "d"]
    assert {axes.get_xlabel() for axes in drawn.axes} == {"epoch"}
    found = {
        (name, text.get_text()): np.transpose(line.get_data()).tolist()
        for name, axes in charts.items()
        for line, text in zip(axes.lines, axes.get_legend().texts, strict=True)
    }
    assert found == {
        ("loss", "training"): [[1, 3], [2, 2], [3, 1]],
        ("loss", "validation"): [[2, 2.5], [3, 1.5]],
        ("mean iou", "training"): [[1, 0.1], [2, 0.2], [3, 0.3]],
        ("pixel accuracy", "training"): [[1, 0.4]],
        ("d", "training"): [[1, 7]],
    }
    _, validated = charts["loss"].lines
    assert validated.get_marker() == "o"  # or a single one could not be seen
    assert all(tick == round(tick) for tick in charts["loss"].get_xticks())
    # Three in a row, and the fourth below the first.
    places = [axes.get_subplotspec() for axes in drawn.axes]
    assert [(p.rowspan.start, p.colspan.start) for p in places] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
    ]
    assert images.read_image(tmp_path / "curves.png").shape == (700, 1000, 3)


def test_of_an_empty_log_no_curves_are_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "log.csv").write_text("epoch\n")
    with pytest.raises(ValueError, match="has no numbers to draw"):
        callbacks.curves(tmp_path / "log.csv", tmp_path / "curves.png")
