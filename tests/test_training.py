import io
import os
import pickle
import resource
import shutil
import subprocess
import sys
import time
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops
from PIL import Image

from keras_fcn.datasets.folder import FolderBatches
from keras_fcn.datasets.folder import pairs as find_pairs
from keras_fcn.models import fcn
from keras_fcn.training import (
    Snapshots,
    WeightedCrossentropy,
    balanced_weights,
    compile_modern,
    restore,
)

VOID = 255
EPOCHS = 4


def read(variable):
    return ops.convert_to_numpy(variable.value)


def batch(seed=0, shape=(2, 4, 5), classes=3, void=0.3):
    """Random labels, some void, and logits."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, shape)
    truth[rng.random(shape) < void] = VOID
    return truth, rng.standard_normal((*shape, classes)).astype("float32")


def transcribed(truth, logits, weights=None, pixel_weights=None):
    """Sum of weight times -log softmax, over the sum of weights, pixel by pixel."""
    total = share = 0.0
    for place in np.ndindex(truth.shape):
        if truth[place] != VOID:
            scores = logits[place].astype("float64")
            weight = weights[truth[place]] if weights else 1.0
            loss = np.log(np.exp(scores).sum()) - scores[truth[place]]
            pixel = 1.0 if pixel_weights is None else pixel_weights[place]
            total, share = total + weight * loss * pixel, share + weight
    return total / share


# The loss


@pytest.mark.parametrize("weights", [None, [1, 2.5, 0.25], [0, 1, 3]])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "int64", "float32"])
@pytest.mark.parametrize("shape", [(2, 4, 5), (2, 4, 5, 1), (3, 3, 3, 1)])
def test_the_loss_is_the_weighted_mean_over_pixels(weights, dtype, shape):
    truth, logits = batch(shape=shape[:3])
    found = WeightedCrossentropy(weights)(truth.reshape(shape).astype(dtype), logits)
    assert float(found) == pytest.approx(transcribed(truth, logits, weights), rel=1e-5)


def test_sample_weights_multiply_the_loss_of_their_pixels():
    truth, logits = batch()
    weights, each = [1, 2.5, 0.25], np.random.default_rng(1).random(truth.shape)
    found = WeightedCrossentropy(weights)(truth, logits, sample_weight=each)
    expected = transcribed(truth, logits, weights, each)
    assert float(found) == pytest.approx(expected, rel=1e-5)


def test_a_class_of_weight_zero_is_void():
    truth, logits = batch()
    without = WeightedCrossentropy()(np.where(truth == 1, VOID, truth), logits)
    found = WeightedCrossentropy([1, 0, 1])(truth, logits)
    assert float(found) == pytest.approx(float(without), rel=1e-6)


def test_the_scale_of_the_weights_does_not_matter():
    truth, logits = batch()
    small, large = (
        WeightedCrossentropy([scale, 3 * scale, 2 * scale])(truth, logits)
        for scale in (1e-9, 1e9)
    )
    assert float(small) == pytest.approx(float(large), rel=1e-5)


def linear(classes=3):
    image = keras.Input((None, None, 3))
    return keras.Model(image, layers.Conv2D(classes, 1, name="score")(image))


def test_a_batch_of_nothing_but_void_has_no_loss_and_teaches_nothing():
    model = linear()
    model.compile(keras.optimizers.SGD(1.0), WeightedCrossentropy([1, 2, 3]))
    before = [read(v) for v in model.weights]
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 4, 5, 3))
    history = model.fit(pictures, np.full((2, 4, 5), VOID), verbose=0).history
    assert history["loss"] == [0.0]
    for variable, then in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(read(variable), then)


def test_a_loss_is_rebuilt_from_its_configuration():
    loss = WeightedCrossentropy([1, 2, 3], void=0, name="mine")
    config = keras.saving.serialize_keras_object(loss)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == loss.get_config()
    assert (again.weights, again.void, again.name) == ([1, 2, 3], 0, "mine")


# Weights and rates


def test_balanced_weights_are_the_median_over_the_count_and_nothing_for_nothing():
    counts = [10, 0, 40, 160]
    assert balanced_weights(counts, power=1) == [4, 0, 1, 0.25]
    assert balanced_weights(counts) == [2, 0, 1, 0.5]
    assert balanced_weights(counts, power=0) == [1, 0, 1, 1]


def test_the_rate_climbs_for_a_twentieth_of_the_steps_and_then_falls_to_zero():
    model = linear()
    compile_modern(model, 80, learning_rate=0.01)
    schedule = model.optimizer._learning_rate
    rates = [float(schedule(step)) for step in range(81)]
    assert rates[0] == pytest.approx(0.0025)
    assert rates[4] == max(rates) == pytest.approx(0.01)
    assert np.all(np.diff(rates[:5]) > 0)
    assert np.all(np.diff(rates[4:]) < 0)
    assert rates[80] == pytest.approx(0, abs=1e-9)


def test_weights_decay_and_biases_do_not():
    model = linear()
    model.get_layer("score").bias.assign([1, 2, 3])
    compile_modern(model, 20, learning_rate=0.1, weight_decay=0.5, averaging=None)
    before = [read(v) for v in model.weights]
    pictures, truth = np.zeros((1, 2, 2, 3)), np.full((1, 2, 2), VOID)
    model.fit(pictures, truth, verbose=0)  # a batch that teaches nothing
    kernel, bias = (read(v) for v in model.weights)
    np.testing.assert_allclose(kernel, before[0] * (1 - 0.1 * 0.5), rtol=1e-5)
    np.testing.assert_array_equal(bias, before[1])


def test_the_average_forgets_where_a_training_began_be_it_ever_so_short():
    for steps in (10, 500, 4000):
        model = linear()
        compile_modern(model, steps)
        assert model.optimizer.ema_momentum**steps < np.exp(-9.9)


# Going on


def net(seed=0):
    """A net that draws random numbers while it is trained."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 255)(image)
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="conv1")(x)
    x = layers.Dropout(0.5, seed=7, name="drop1")(x)
    x = layers.Conv2D(6, 3, padding="same", activation="relu", name="conv2")(x)
    x = layers.Dropout(0.3, seed=8, name="drop2")(x)
    model = keras.Model(image, layers.Conv2D(3, 1, name="score")(x))
    compile_modern(model, EPOCHS * 3, learning_rate=0.01, averaging=0.9)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Five pictures and their masks."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for kind, shape in {"images": (12, 14, 3), "masks": (12, 14)}.items():
        (folder / kind).mkdir()
        for i in range(5):
            pixels = rng.integers(0, 3 if kind == "masks" else 256, shape)
            Image.fromarray(pixels.astype("uint8")).save(folder / kind / f"{i}.png")
    return folder


def data(folder):
    """Three batches an epoch, in an order and with changes of its own."""
    return FolderBatches(
        find_pairs(folder / "images", folder / "masks"),
        3,
        batch_size=2,
        crop=(8, 8),
        scale=(0.7, 1.5),
        mirror=True,
        color=(0.2, 0.2, 0.2),
        seed=3,
    )


def validation(seed=0):
    truth, logits = batch(seed)
    return 255 * np.abs(logits), truth


def train(model, folder, path, first=0, epochs=EPOCHS, callbacks=()):
    batches = data(folder)
    batches.seek(first)
    return model.fit(
        batches,
        initial_epoch=first,
        epochs=epochs,
        shuffle=False,
        verbose=0,
        callbacks=[*callbacks, Snapshots(path)],
        validation_data=validation(),
    )


class Copies(keras.callbacks.Callback):
    """Keeps the snapshot of every epoch. Runs after `Snapshots`: pass it the last."""

    def __init__(self, path, folder):
        super().__init__()
        self.path, self.folder = path, folder

    def on_epoch_begin(self, epoch, logs=None):
        if self.path.exists():
            shutil.copy(self.path, self.folder / f"{epoch}.npz")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A training of all epochs: its files, scores, and the weights it ends with."""
    files = tmp_path_factory.mktemp("whole")
    model, path = net(), files / "state.npz"
    callbacks = [Copies(path, files), keras.callbacks.SwapEMAWeights()]
    history = train(model, folder, path, callbacks=callbacks).history
    return files, history, [read(v) for v in model.weights]


@pytest.mark.parametrize("epoch", range(1, EPOCHS))
def test_a_training_that_was_stopped_goes_on_as_if_it_had_not(
    epoch, folder, whole, tmp_path
):
    files, history, weights = whole
    model, path = net(seed=epoch), tmp_path / "state.npz"
    assert restore(model, files / f"{epoch}.npz") == epoch
    callbacks = [keras.callbacks.SwapEMAWeights()]
    again = train(model, folder, path, epoch, callbacks=callbacks).history
    for name, values in again.items():
        assert values == history[name][epoch:], name
    for variable, expected in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(read(variable), expected)
    assert path.read_bytes() == (files / "state.npz").read_bytes()


def test_a_training_that_ended_goes_on_as_if_longer(folder, whole, tmp_path):
    files, _, weights = whole
    model, path = net(), tmp_path / "state.npz"
    train(model, folder, path, epochs=2, callbacks=[keras.callbacks.SwapEMAWeights()])
    assert restore(model, path) == 2  # `fit` has left the averages in the model
    train(model, folder, path, 2, callbacks=[keras.callbacks.SwapEMAWeights()])
    for variable, expected in zip(model.weights, weights, strict=True):
        np.testing.assert_array_equal(read(variable), expected)


def test_a_net_of_this_package_goes_on_as_if_it_had_not_stopped(folder, tmp_path):
    def build(seed):
        keras.utils.set_random_seed(seed)
        model = fcn("alexnet", 32, 3, width=1 / 64)
        compile_modern(model, 6)
        return model

    pictures, truth = np.ones((2, 20, 20, 3)), np.ones((2, 20, 20), int)
    fit = {"x": pictures, "y": truth, "batch_size": 1, "shuffle": False, "verbose": 0}
    first, second = build(0), build(1)
    first.fit(**fit, epochs=1, callbacks=[Snapshots(tmp_path / "1.npz")])
    restore(first, tmp_path / "1.npz")
    first.fit(**fit, initial_epoch=1, epochs=3, callbacks=[Snapshots(tmp_path / "a")])
    restore(second, tmp_path / "1.npz")
    second.fit(**fit, initial_epoch=1, epochs=3, callbacks=[Snapshots(tmp_path / "b")])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_averages_are_what_fit_leaves_and_not_what_it_goes_on_with(whole):
    files, _, weights = whole
    model = net()
    restore(model, files / "state.npz")
    raw = [read(v) for v in model.weights]
    averages = model.optimizer._model_variables_moving_average
    for expected, variable, then in zip(weights, averages, raw, strict=True):
        np.testing.assert_array_equal(read(variable), expected)
        assert np.any(then != expected)


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_the_state_under_other_precisions_comes_back(policy, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        models = net(), net(seed=1)
    finally:
        keras.config.set_dtype_policy(before)
    pictures, truth = validation()
    models[0].fit(pictures, truth, verbose=0, callbacks=[Snapshots(tmp_path / "a")])
    assert restore(models[1], tmp_path / "a") == 1
    restore(models[0], tmp_path / "a")  # `fit` has left the averages in the model
    for one, other in zip(*(m.variables for m in models), strict=False):
        if "metric" not in one.path:
            np.testing.assert_array_equal(read(one), read(other))


# Files of state


@pytest.fixture
def snapshot(whole, tmp_path):
    shutil.copy(whole[0] / "state.npz", tmp_path / "state.npz")
    return tmp_path / "state.npz"


@pytest.fixture(scope="module")
def target():
    model = net(seed=9)
    model.optimizer.build(model.trainable_variables)
    return model


def state(model):
    return [read(v).tobytes() for v in (*model.variables, *model.optimizer.variables)]


def refused(model, path, match=None):
    before = state(model)
    with pytest.raises(ValueError, match=match) as caught:
        restore(model, path)
    assert str(path) in str(caught.value)
    assert state(model) == before


class Code:
    def __reduce__(self):
        return os.mkdir, ("run",)


def changed(**arrays):
    """A change of a snapshot's arrays; None takes one away."""

    def change(path):
        with np.load(path) as file:
            kept = {**dict(file), **arrays}
        np.savez(path, **{k: v for k, v in kept.items() if v is not None})
        path.with_suffix(".npz").replace(path)

    return change


FOREIGN = {
    "nothing": lambda path: path.write_bytes(b""),
    "a text": lambda path: path.write_text("no snapshot"),
    "one array": lambda path: np.save(path.open("wb"), np.ones(3)),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Code())),
    "an archive of a pickle": changed(**{"0": np.array(Code(), object)}),
    "an archive of nothing": lambda path: zipfile.ZipFile(path, "w").close(),
    "an archive of texts": lambda path: zipfile.ZipFile(path, "w").writestr(
        "0.npy", "a"
    ),
    "other weights": lambda path: np.savez(path, epoch=1, **{"0": np.ones(3)}),
    "no epoch": changed(epoch=None),
    "several epochs": changed(epoch=np.array([1, 2])),
    "a text for an epoch": changed(epoch=np.array("1")),
    "an array too few": changed(**{"0": None}),
    "an array too many": changed(**{"999": np.ones(3)}),
    "an array of texts": changed(**{"1": np.array(["a"] * 6)}),
    "an array of another shape": changed(**{"1": np.ones((1, 6))}),
    "a shape beyond the memory": changed(
        **{"1": np.lib.stride_tricks.as_strided(np.ones(1), (2**20, 2), (0, 0))}
    ),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_is_no_snapshot_of_this_training_is_refused(
    foreign, snapshot, target, monkeypatch
):
    monkeypatch.chdir(snapshot.parent)
    FOREIGN[foreign](snapshot)
    refused(target, snapshot, "no snapshot, or is damaged|of another net or optimizer")
    assert not os.path.exists("run")


def test_a_missing_snapshot_is_an_os_error(tmp_path, target):
    with pytest.raises(FileNotFoundError, match="missing.npz"):
        restore(target, tmp_path / "missing.npz")


def test_the_snapshot_of_another_net_or_optimizer_is_refused(snapshot):
    others = linear(), net()
    compile_modern(others[0], 5)
    others[1].compile("sgd", "mse")
    for model in others:
        model.optimizer.build(model.trainable_variables)
        refused(model, snapshot, "of another net or optimizer; expected")


def test_truncated_snapshots_are_refused(snapshot, target):
    content = snapshot.read_bytes()
    for i in range(0, 100, 3):
        snapshot.write_bytes(content[: len(content) * i // 100])
        refused(target, snapshot, "is no snapshot, or is damaged")


def test_a_flipped_bit_is_found_or_does_not_matter(snapshot, target, tmp_path):
    content = snapshot.read_bytes()
    restore(target, snapshot)
    expected, rng = state(target), np.random.default_rng(0)
    for at in rng.integers(0, len(content), 100):
        flipped = bytearray(content)
        flipped[at] ^= 1 << rng.integers(8)
        snapshot.write_bytes(flipped)
        message = str(snapshot)
        try:
            assert restore(target, snapshot) == EPOCHS
        except ValueError as error:
            message = str(error)
        assert str(snapshot) in message
        assert state(target) == expected


def test_a_restoration_that_fails_half_way_is_undone(snapshot, target, monkeypatch):
    before, assign, calls = state(target), keras.Variable.assign, []

    def fail(variable, value):
        calls.append(variable)
        if len(calls) == 9:
            raise MemoryError
        return assign(variable, value)

    monkeypatch.setattr(keras.Variable, "assign", fail)
    with pytest.raises(MemoryError):
        restore(target, snapshot)
    assert state(target) == before


def save(model, path):
    callback = Snapshots(path)
    callback.set_model(model)
    callback.on_epoch_end(7)


def test_a_state_that_is_not_finite_does_not_replace_the_last_good_one(snapshot):
    content, model = snapshot.read_bytes(), net()
    model.optimizer.build(model.trainable_variables)
    model.get_layer("conv2").bias.assign([1, 2, 3, np.nan, 5, 6])
    with pytest.raises(ValueError, match=r"After epoch 8 conv2/bias is not finite"):
        save(model, snapshot)
    assert snapshot.read_bytes() == content
    assert list(snapshot.parent.iterdir()) == [snapshot]


def test_a_full_disk_leaves_the_last_snapshot(snapshot, target):
    content, limits = snapshot.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in range(0, len(content), len(content) // 10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                save(target, snapshot)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(snapshot)
        assert snapshot.read_bytes() == content
        assert list(snapshot.parent.iterdir()) == [snapshot]


def test_a_snapshot_holds_plain_arrays_that_numpy_reads(snapshot):
    with np.load(snapshot, allow_pickle=False) as file:
        assert int(file["epoch"]) == EPOCHS
        assert file["0"].shape == (3, 3, 3, 6)
    with zipfile.ZipFile(io.BytesIO(snapshot.read_bytes())) as archive:
        assert archive.testzip() is None


@pytest.mark.slow
def test_killed_at_any_moment_a_training_goes_on_as_if_it_had_not_been(
    folder, whole, tmp_path
):
    # As a program this file trains, from the last snapshot if there is one.
    def start(path):
        command = [sys.executable, __file__, folder, path]
        root = os.path.dirname(os.path.dirname(__file__))
        environment = {**os.environ, "PYTHONPATH": root}
        child = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE)
        child.stdout.readline()  # it begins to train
        return child

    child = start(tmp_path / "undisturbed.npz")
    begin = time.perf_counter()
    assert child.wait() == 0
    duration = time.perf_counter() - begin
    path, rng, model = tmp_path / "state.npz", np.random.default_rng(0), net()
    for _ in range(10):
        child = start(path)
        time.sleep(rng.uniform(0, duration))
        child.kill()
        child.wait()
        if path.exists() and restore(model, path) == EPOCHS:
            path.unlink()
    assert start(path).wait() == 0
    assert path.read_bytes() == (whole[0] / "state.npz").read_bytes()


if __name__ == "__main__":
    from pathlib import Path

    model, folder, path = net(), *map(Path, sys.argv[1:])
    first = restore(model, path) if path.exists() else 0
    print("training", flush=True)
    train(model, folder, path, first, callbacks=[keras.callbacks.SwapEMAWeights()])
