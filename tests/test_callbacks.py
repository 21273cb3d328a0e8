"""Trainings that survive, and what they show.

The promises P40 to P45 are tried at a twentieth of their counts within this process;
in full, in processes that die, where KERAS_FCN_FAULTS is "full"
(benchmarks/fault_training.py). As a program this file trains: see `Trainings`.
"""

import contextlib
import hashlib
import io
import itertools
import json
import os
import pathlib
import pickle
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import types
import zipfile

import keras
import numpy as np
import pytest
from keras import layers, ops
from PIL import Image, ImageDraw, ImageFont

from keras_fcn import callbacks, images
from keras_fcn.callbacks import Averages, Divergence, Log, Snapshots, averaged, restore
from keras_fcn.datasets.batches import Batches
from keras_fcn.labels import VOID, LabelSet, voc_colormap
from keras_fcn.models import fcn
from keras_fcn.training import compile_modern

FULL = os.environ.get("KERAS_FCN_FAULTS") == "full"
EPOCHS, STEPS = 3, 5
LAST = (EPOCHS, 0)


class Invented:
    """A source of ten small pictures."""

    ids = [str(i) for i in range(2 * STEPS)]
    label_sets = {"": LabelSet(("sky", "road", "tree"), voc_colormap(3))}

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        rng = np.random.default_rng(index)
        shape = (12, 14, 3)
        return rng.integers(0, 256, shape, np.uint8), self.labels(index)

    def labels(self, index):
        return np.random.default_rng(index).integers(0, 3, (12, 14), np.uint8)


def data():
    """Batches in an order, and with changes, of each epoch's own."""
    augmentation = {"scale": (0.7, 1.5), "mirror": True, "color": (0.2, 0.2, 0.2)}
    return Batches(Invented(), batch_size=2, crop=(8, 8), seed=3, **augmentation)


def validation():
    rng = np.random.default_rng(0)
    return rng.uniform(0, 255, (2, 8, 8, 3)), rng.integers(0, 3, (2, 8, 8))


def net(seed=0):
    """A net that draws random numbers while it is trained."""
    keras.utils.set_random_seed(seed)
    image = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 255)(image)
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="conv")(x)
    x = layers.Dropout(0.5, seed=7, name="drop")(x)
    model = keras.Model(image, layers.Conv2D(3, 1, name="score")(x))
    compile_modern(model, EPOCHS * STEPS, learning_rate=0.01, averaging=0.9)
    return model


def train(folder, *, epochs=EPOCHS, minutes=0.0, before=(), after=(), validate=True):
    """Trains what is left to train, and returns the model."""
    model, batches = net(), data()
    snapshots = Snapshots(folder / "state", batches, minutes=minutes)
    for first, last in snapshots.stretches(model, epochs):
        log = Log(folder / "log.csv")
        model.fit(
            batches,
            initial_epoch=first,
            epochs=last,
            shuffle=False,
            verbose=0,
            validation_data=validation() if validate else None,
            callbacks=[
                *before,
                Averages(),
                Divergence(batches),
                log,
                snapshots,
                *after,
            ],
        )
    return model


class Fault(keras.callbacks.Callback):
    """Does something at the begin or the end of the n-th batch, counted from now.

    Args:
        strike: What to do.
        n: From 0.
        moment: "begin", "end" or "validation".
    """

    def __init__(self, strike, n, moment="begin"):
        super().__init__()
        self.strike, self.n, self.moment, self.done = strike, n, moment, 0

    def on_train_batch_begin(self, batch, logs=None):
        if self.moment == "begin" and self.done == self.n:
            self.strike()

    def on_train_batch_end(self, batch, logs=None):
        if self.moment == "end" and self.done == self.n:
            self.strike()
        self.done += 1

    def on_test_begin(self, logs=None):
        if self.moment == "validation" and self.done > self.n:
            self.strike()


class Killed(BaseException):
    """What stands for kill -9 within a process."""


def killed():
    raise Killed


def fault_of(kind, n, moment):
    """A `Fault` that kills (in a program: really), or sends a signal, once or twice."""
    if kind == "kill":
        strike = killed
    else:
        number, times = getattr(signal, kind[0]), kind[1]

        def strike():
            for _ in range(times):
                os.kill(os.getpid(), number)

    return Fault(strike, n, moment)


def position(folder):
    """The position of the newest snapshot."""
    return callbacks.positions(folder / "state")[-1:]


def read(variable):
    return ops.convert_to_numpy(variable.value)


def state(model):
    return [read(v).tobytes() for v in (*model.variables, *model.optimizer.variables)]


@pytest.fixture(autouse=True)
def _handlers():
    """Gives the signals back to pytest, as a `fit` that is cut off does not."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A training that nothing stops: a folder of all its files, and its weights."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "all").mkdir()

    class Copies(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            for path in (folder / "state").glob("*.npz"):
                shutil.copy(path, folder / "all" / path.name)

        on_train_end = on_test_begin = on_epoch_begin = on_train_batch_begin

    model = train(folder, after=[Copies()])
    assert len(list((folder / "all").iterdir())) == EPOCHS * STEPS
    return folder, [read(v) for v in model.weights]


class Trainings:
    """A process that has Keras imported, and forks a training for each order."""

    def __init__(self):
        root = pathlib.Path(__file__).parent.parent
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, folder, minutes, fault=None, kill=None):
        """Trains, and returns how the process ended: a status, or minus a signal.

        Args:
            folder: Of the training.
            minutes: Of `Snapshots`.
            fault: Arguments of `fault_of`.
            kill: (signal, seconds after the begin of `fit`) to send one from outside.

        Returns:
            The status, and the seconds between the signal from outside and the end.
        """
        order = {"folder": str(folder), "minutes": minutes, "fault": fault}
        print(json.dumps(order), file=self.process.stdin, flush=True)
        pid, sent = int(self.process.stdout.readline()), None
        line = self.process.stdout.readline()
        if line == "training\n":
            if kill:
                time.sleep(kill[1])
                sent = time.monotonic()
                with contextlib.suppress(ProcessLookupError):  # it was faster
                    os.kill(pid, getattr(signal, kill[0]))
            line = self.process.stdout.readline()
        return int(line), sent and time.monotonic() - sent

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def trainings():
    if not FULL:
        yield None
        return
    server = Trainings()
    yield server
    server.close()


def serve():
    """Forks a training for each line of standard input; prints how it goes."""
    for line in sys.stdin:
        order = json.loads(line)
        if pid := os.fork():
            print(pid, flush=True)
            _, status = os.waitpid(pid, 0)
            print(os.waitstatus_to_exitcode(status), flush=True)
            continue
        os.close(0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        work(order)


def work(order):
    global killed

    def killed():
        os.kill(os.getpid(), signal.SIGKILL)

    class Begins(keras.callbacks.Callback):
        said = False

        def on_train_begin(self, logs=None):
            if not self.said:
                print("training", flush=True)
            self.said = True

    fault = [fault_of(*order["fault"])] if order["fault"] else []
    try:
        train(
            pathlib.Path(order["folder"]),
            minutes=order["minutes"],
            before=fault,
            after=[Begins()],
        )
    except KeyboardInterrupt:
        os._exit(130)  # as keras_fcn.cli does, and a shell says
    except SystemExit as error:
        os._exit(error.code)
    except OSError as error:
        print(error, file=sys.stderr)
        os._exit(2)
    os._exit(0)


# Going on


def same_as_whole(folder, whole, model=None):
    """Checks that all that a training has written so far is what `whole` wrote."""
    for at in callbacks.positions(folder / "state"):
        path = callbacks._path(folder / "state", *at)
        assert path.read_bytes() == (whole[0] / "all" / path.name).read_bytes(), at
    if (folder / "log.csv").exists():
        log = (folder / "log.csv").read_bytes()
        assert (whole[0] / "log.csv").read_bytes().startswith(log)
    if model:
        for variable, expected in zip(model.weights, whole[1], strict=True):
            np.testing.assert_array_equal(read(variable), expected)


def killings():
    """Fifty kills: batches further on, moment, and minutes between snapshots."""
    rng = random.Random(40)
    moments = ["begin", "end", "validation"]
    return [
        (rng.randrange(STEPS), rng.choice(moments), rng.choice([0, 0.0005, 1]))
        for _ in range(50)
    ]


def test_killed_at_any_batch_a_training_goes_on_as_if_it_had_not_been(
    faults, whole, trainings, tmp_path
):
    names = itertools.count()
    folder = tmp_path / "first"

    def check(n, moment, minutes):
        # Kill upon kill, of one training; when it comes to its end, of another.
        nonlocal folder
        if position(folder) == [LAST]:
            folder = tmp_path / str(next(names))
        model = None
        if trainings:
            trainings.run(folder, minutes, ("kill", n, moment))
        else:
            with contextlib.suppress(Killed):
                model = train(
                    folder, minutes=minutes, before=[fault_of("kill", n, moment)]
                )
        same_as_whole(folder, whole, model)

    few = [(3, "begin", 0), (1, "end", 1), (2, "begin", 0)]
    faults(40, killings(), check, few)
    if trainings:
        assert trainings.run(folder, 1) == (0, None)
        same_as_whole(folder, whole)
    same_as_whole(folder, whole, train(folder))
    assert (folder / "log.csv").read_bytes() == (whole[0] / "log.csv").read_bytes()
    assert position(folder) == [LAST]


def test_a_training_that_ended_goes_on_as_if_longer(whole, tmp_path):
    train(tmp_path, epochs=2)
    same_as_whole(tmp_path, whole, train(tmp_path))


def test_a_training_that_is_done_leaves_the_averages_and_nothing_else(whole, tmp_path):
    take(whole, tmp_path / "state", (2, 4), LAST)
    before = contents(tmp_path / "state")
    same_as_whole(tmp_path, whole, train(tmp_path))
    assert contents(tmp_path / "state") == before


def test_a_training_without_snapshots_begins_at_the_beginning(tmp_path):
    batches = data()
    batches.seek(2, 3)
    snapshots = Snapshots(tmp_path / "none", batches)
    assert list(snapshots.stretches(net(), 7)) == [(0, 7)]
    assert (batches.epoch, batches.first) == (0, 0)


def test_an_epoch_that_was_left_half_way_is_a_stretch_of_its_own(whole, tmp_path):
    take(whole, tmp_path, (1, 2))
    batches, snapshots = data(), Snapshots(tmp_path)
    snapshots.batches = batches
    stretches = snapshots.stretches(net(), 3)
    assert next(stretches) == (1, 2)
    assert (batches.epoch, batches.first) == (1, 2)
    take(whole, tmp_path, (2, 0))
    assert next(stretches) == (2, 3)
    assert (batches.epoch, batches.first) == (2, 0)


def test_what_is_written_in_an_epoch_entered_half_way_counts_from_its_begin(
    whole, tmp_path
):
    take(whole, tmp_path / "state", (1, 2))
    with pytest.raises(Killed):
        train(tmp_path, before=[fault_of("kill", 1, "begin")])
    assert position(tmp_path) == [(1, 3)]
    same_as_whole(tmp_path, whole)


def test_a_training_that_was_told_to_stop_half_way_is_not_gone_on_with(whole, tmp_path):
    take(whole, tmp_path, (1, 2))
    model = net()
    stretches = Snapshots(tmp_path, data()).stretches(model, 3)
    assert next(stretches) == (1, 2)
    model.stop_training = True  # as a callback does
    take(whole, tmp_path, (2, 0))
    assert list(stretches) == []


@pytest.mark.parametrize("first", [True, False])
def test_an_epoch_that_is_cut_short_does_not_count_as_a_whole_one(
    first, whole, tmp_path
):
    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.model.stop_training = batch == 2

    more = {"before" if first else "after": [Stop()]}
    train(tmp_path, minutes=1e9, **more)
    # One that stops after these callbacks have had their turn leaves what there was.
    assert position(tmp_path) == ([(0, 3)] if first else [])
    same_as_whole(tmp_path, whole, train(tmp_path))


def test_a_fit_without_the_snapshots_is_found_out(whole, tmp_path):
    take(whole, tmp_path, (1, 2))
    stretches = Snapshots(tmp_path, data()).stretches(net(), 3)
    next(stretches)
    with pytest.raises(ValueError, match="no snapshot of the end of epoch 2"):
        next(stretches)


def test_a_net_of_this_package_goes_on_as_if_it_had_not_stopped(tmp_path):
    def build(seed):
        keras.utils.set_random_seed(seed)
        model = fcn("alexnet", 32, 3, width=1 / 64)
        compile_modern(model, 6)
        return model

    pictures, truth = np.ones((2, 20, 20, 3)), np.ones((2, 20, 20), int)
    fit = {"x": pictures, "y": truth, "batch_size": 1, "shuffle": False, "verbose": 0}
    first, second = build(0), build(1)
    first.fit(**fit, epochs=1, callbacks=[Snapshots(tmp_path / "1")])
    ends = []
    for name, model in ("a", first), ("b", second):
        assert restore(model, tmp_path / "1") == (1, 0)
        folder = tmp_path / name
        model.fit(**fit, initial_epoch=1, epochs=2, callbacks=[Snapshots(folder)])
        ends.append(callbacks._path(folder, 2, 0).read_bytes())
    assert ends[0] == ends[1]


@pytest.mark.parametrize("policy", ["mixed_float16", "bfloat16"])
def test_the_state_under_other_precisions_comes_back(policy, tmp_path):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        models = net(), net(seed=1)
    finally:
        keras.config.set_dtype_policy(before)
    shown = [Averages(), Divergence(), Snapshots(tmp_path)]
    data = dict(zip("xy", validation(), strict=True))
    models[0].fit(**data, verbose=0, callbacks=shown, validation_data=validation())
    for model in models:  # `fit` has left the averages in the first
        assert restore(model, tmp_path) == (1, 0)
    for one, other in zip(*(m.variables for m in models), strict=False):
        if "metric" not in one.path:
            np.testing.assert_array_equal(read(one), read(other))


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
    for at in callbacks.positions(tmp_path / "state"):
        path = callbacks._path(tmp_path / "state", *at)
        assert path.read_bytes() == (whole[0] / "all" / path.name).read_bytes()


def test_what_fit_leaves_can_be_evaluated_and_restored(tmp_path):
    model, snapshots = net(), Snapshots(tmp_path)
    model.fit(*validation(), verbose=0, callbacks=[Averages(), snapshots])
    model.evaluate(*validation(), verbose=0)
    assert restore(model, tmp_path) == (1, 0)


# Files of state


def take(whole, folder, *positions):
    """Copies snapshots of the training that nothing stopped."""
    folder.mkdir(exist_ok=True)
    for at in positions:
        path = callbacks._path(folder, *at)
        shutil.copy(whole[0] / "all" / path.name, path)


@pytest.fixture
def folder(whole, tmp_path):
    """The last two snapshots of a training."""
    take(whole, tmp_path / "state", (2, 4), LAST)
    return tmp_path / "state"


@pytest.fixture(scope="module")
def target():
    model = net(seed=9)
    model.optimizer.build(model.trainable_variables)
    return model


@pytest.fixture(scope="module")
def states(whole, target, tmp_path_factory):
    """What those two restore."""
    found = {}
    for at in ((2, 4), LAST):
        folder = tmp_path_factory.mktemp("one")
        take(whole, folder, at)
        assert restore(target, folder) == at
        found[at] = state(target)
    return found


def refused(model, folder, match=None, error=ValueError):
    before = state(model)
    with pytest.raises(error, match=match) as caught:
        restore(model, folder)
    assert str(folder) in str(caught.value)
    assert state(model) == before


class Code:
    def __reduce__(self):
        return os.mkdir, ("run",)


def changed(**arrays):
    """A change of a snapshot's arrays; None takes one away."""

    def change(path):
        with np.load(path) as file:
            kept = {**dict(file), **arrays}
        with path.open("wb") as file:
            np.savez(file, **{k: v for k, v in kept.items() if v is not None})

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
    "no hash": changed(sha256=None),
    "no position": changed(position=None),
    "another position": changed(position=np.array([1, 0, 0])),
    "an array too few": changed(**{"0": None}),
    "an array too many": changed(**{"999": np.ones(3)}),
    "an array of texts": changed(**{"1": np.array(["a"] * 4)}),
    "an array of another shape": changed(**{"1": np.ones((1, 4))}),
    "arrays that changed places": lambda path: changed(
        **{"1": np.load(path)["3"], "3": np.load(path)["1"]}
    )(path),
    "a shape beyond the memory": changed(
        **{"1": np.lib.stride_tricks.as_strided(np.ones(1), (2**20, 2), (0, 0))}
    ),
}


def sealed(path, **arrays):
    """Changes a snapshot's arrays, and its hash accordingly."""
    with np.load(path) as file:
        kept = {**dict(file), **arrays}
    del kept["sha256"]
    kept = {name: array for name, array in kept.items() if array is not None}
    digest = hashlib.sha256()
    for name, array in kept.items():
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    with path.open("wb") as file:
        np.savez(file, **kept, sha256=np.frombuffer(digest.digest(), np.uint8))


@pytest.mark.parametrize(
    "arrays",
    [
        {"position": None},
        {"position": np.array(["a", "b", "c"])},
        {"position": np.array([2, 4, STEPS])},
        {"position": np.array(3)},
    ],
)
def test_a_hash_alone_makes_no_snapshot(arrays, folder, target, states):
    sealed(callbacks._path(folder, *LAST), **arrays)
    assert goes_back(target, folder, states)


@pytest.mark.parametrize(
    "arrays",
    [{}, {"1": np.array(["a"] * 4)}, {"1": np.ones((1, 4))}, {"999": np.ones(3)}],
)
def test_arrays_with_a_hash_are_of_this_net_or_refused(arrays, folder, target, states):
    sealed(callbacks._path(folder, *LAST), **arrays)
    if arrays:
        refused(target, folder, "of another net or optimizer")
    else:
        assert restore(target, folder) == LAST
        assert state(target) == states[LAST]


def goes_back(target, folder, states):
    """Whether the newest was found to be damaged; else it is as it was."""
    with warnings_of() as said:
        at = restore(target, folder)
    assert state(target) == states[at]
    newest, before = (str(callbacks._path(folder, *p)) for p in (LAST, (2, 4)))
    assert (at == (2, 4)) == bool(said)
    assert all(newest in text and text.endswith(f"{before}.") for text in said)
    return bool(said)


@contextlib.contextmanager
def warnings_of():
    """Collects the texts of the warnings of a block."""
    import warnings

    texts = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield texts
    texts += [str(w.message) for w in caught if w.category is UserWarning]


def damages():
    """A hundred flips, a hundred truncations, and what is no snapshot."""
    flips = [("flip", i) for i in range(100)]
    cuts = [("cut", i) for i in range(100)]
    return flips + cuts + [("foreign", kind) for kind in FOREIGN]


def test_of_a_damaged_snapshot_the_one_before_is_taken(
    faults, folder, target, states, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = callbacks._path(folder, *LAST)
    content = path.read_bytes()

    def check(kind, which):
        damaged = bytearray(content)
        if kind == "flip":
            rng = random.Random(which)
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del damaged[len(content) * which // 100 :]
        path.write_bytes(damaged)
        if kind == "foreign":
            FOREIGN[which](path)
        # Some bits of a zip file's directory say nothing.
        assert goes_back(target, folder, states) or kind == "flip"
        assert not os.path.exists("run")

    cases = damages()
    faults(43, cases, check, few=cases[:5] + cases[100:200:20] + cases[200:])


def test_most_flips_are_found(folder, target, states):
    path = callbacks._path(folder, *LAST)
    content, found = path.read_bytes(), 0
    for at in range(0, len(content), len(content) // 20):
        path.write_bytes(content[:at] + bytes([content[at] ^ 8]) + content[at + 1 :])
        found += goes_back(target, folder, states)
    assert found >= 15


def test_if_all_snapshots_are_damaged_nothing_is_restored(folder, target):
    for path in folder.iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    refused(target, folder, "start anew")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_without_a_snapshot_there_is_an_os_error(name, tmp_path, target):
    (tmp_path / "empty").mkdir()
    refused(target, tmp_path / name, "holds no snapshot", FileNotFoundError)


def test_the_snapshot_of_another_net_or_optimizer_is_refused(folder):
    image = keras.Input((None, None, 3))
    others = keras.Model(image, layers.Conv2D(3, 1)(image)), net()
    compile_modern(others[0], 5)
    others[1].compile("sgd", "mse")
    for model in others:
        model.optimizer.build(model.trainable_variables)
        refused(model, folder, "of another net or optimizer; expected")


def test_the_middle_of_an_epoch_of_another_length_is_refused(whole, target, tmp_path):
    take(whole, tmp_path, (1, 2))
    batches, before = Batches(Invented(), batch_size=5), state(target)
    with pytest.raises(ValueError, match="2 batches into an epoch of 5; expected an"):
        restore(target, tmp_path, batches)
    assert state(target) == before


def test_the_middle_of_an_epoch_with_other_scores_is_refused(whole, tmp_path):
    take(whole, tmp_path / "state", (1, 2))
    model, batches = net(), data()
    compile_modern(model, EPOCHS * STEPS, scores=(), averaging=0.9)
    snapshots = Snapshots(tmp_path / "state", batches)
    fit = {"epochs": 2, "shuffle": False, "verbose": 0, "callbacks": [snapshots]}
    restore(model, tmp_path / "state", batches)
    with pytest.raises(ValueError, match="has other scores half-way through"):
        model.fit(batches, initial_epoch=1, **fit)


def test_a_restoration_that_fails_half_way_is_undone(folder, target, monkeypatch):
    before, assign, calls = state(target), keras.Variable.assign, []

    def fail(variable, value):
        calls.append(variable)
        if len(calls) == 9:
            raise MemoryError
        return assign(variable, value)

    monkeypatch.setattr(keras.Variable, "assign", fail)
    with pytest.raises(MemoryError):
        restore(target, folder)
    assert state(target) == before


def save(model, folder, epoch=EPOCHS):
    """Writes the state after an epoch, counted from 0."""
    callback = Snapshots(folder)
    callback.set_model(model)
    callback.on_train_begin()
    callback.on_epoch_end(epoch)
    callback.on_train_end()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_two_newest_snapshots_are_kept(folder, target):
    save(target, folder)
    assert callbacks.positions(folder) == [LAST, (EPOCHS + 1, 0)]


def test_snapshots_of_what_is_trained_again_are_left(folder, target):
    save(target, folder, epoch=0)
    assert callbacks.positions(folder) == [(1, 0), (2, 4), LAST]


def test_what_a_killed_training_left_of_a_snapshot_is_removed(folder, target):
    (folder / ".epoch-0003-batch-000000.npz.12345678.part").write_bytes(b"half")
    save(target, folder)
    assert {path.suffix for path in folder.iterdir()} == {".npz"}


def test_a_state_that_is_not_finite_does_not_replace_a_good_one(folder):
    before, model = contents(folder), net()
    model.optimizer.build(model.trainable_variables)
    model.get_layer("conv").bias.assign([1, 2, np.nan, 4])
    with pytest.raises(ValueError, match=r"After epoch 4 conv/bias is not finite"):
        save(model, folder)
    assert contents(folder) == before


def test_a_file_that_may_not_grow_leaves_the_earlier_snapshots(folder, target):
    before, limits = contents(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    size = min(map(len, before.values()))
    for part in range(10):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size * part // 10, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large") as caught:
                save(target, folder)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert caught.value.filename == str(callbacks._path(folder, EPOCHS + 1, 0))
        assert contents(folder) == before


def test_a_full_disk_ends_a_training_whose_earlier_snapshot_loads(
    faults, whole, target, trainings, tmp_path
):
    page = 4096  # bytes, of which such a disk is made
    size = callbacks._path(whole[0] / "all", 0, 1).stat().st_size // page + 1

    def check(part):
        # Room for one snapshot and a part of the next one, up to almost three.
        room = page * round(np.linspace(size + 2, 3 * size - 1, 20)[part])
        options = ["-t", "tmpfs", "-o", f"size={room}", "tmpfs", str(tmp_path)]
        if os.getuid() or subprocess.run(["mount", *options], check=False).returncode:
            pytest.skip("A full disk takes a small one, which only root can mount.")
        try:
            if trainings:
                status, _ = trainings.run(tmp_path, 0)
                assert status == 2
            else:
                with pytest.raises(OSError, match="No space left on device.*are free"):
                    train(tmp_path)
            same_as_whole(tmp_path, whole)
            assert [restore(target, tmp_path / "state")] == position(tmp_path)
        finally:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)

    faults(42, [(part,) for part in range(20)], check)


def stand_in(number):
    """What has as much of a model as `Snapshots` asks for, 2 MB, all one number."""
    variable = types.SimpleNamespace(value=np.full(500_000, number, np.float32))
    part = types.SimpleNamespace(variables=[variable])
    return types.SimpleNamespace(layers=[part], optimizer=part, metrics_variables=[])


@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX's: it only writes
def test_killed_while_it_writes_a_process_leaves_the_last_snapshot_or_the_one_before(
    faults, tmp_path
):
    chance = random.Random(41)
    begun = tmp_path / "begun"

    def check(case):
        begun.write_bytes(bytes(8))
        first = (callbacks.positions(tmp_path / "state") or [(0, 0)])[-1][0]
        child = os.fork()
        if child == 0:
            # A fork had better not use the backend.
            callbacks.to_numpy = lambda variable: variable.value
            snapshots = Snapshots(tmp_path / "state")
            file = os.open(begun, os.O_WRONLY)
            for epoch in itertools.count(first):
                snapshots.set_model(stand_in(epoch + 1))
                os.pwrite(file, struct.pack("q", epoch + 1), 0)
                snapshots._write(epoch + 1, 0)
        while begun.read_bytes() == bytes(8):
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        last = struct.unpack("q", begun.read_bytes())[0]
        if last == 1 and not callbacks.positions(tmp_path / "state"):
            return  # killed at the first one, there need not be any
        with warnings_of() as said:
            _, arrays = callbacks._newest(tmp_path / "state")
        assert not said
        epoch = arrays["position"][0]
        assert epoch in (last, last - 1)
        assert np.all(arrays["0"] == epoch)

    faults(41, [(i,) for i in range(200)], check)
    stood = Snapshots(tmp_path / "state")
    for epoch in (10_000, 10_001):
        stood.set_model(stand_in(epoch))
        stood._write(epoch, 0)
    assert len(list((tmp_path / "state").iterdir())) == 2  # of all that was left


def test_a_snapshot_holds_plain_arrays_that_numpy_reads(folder):
    path = callbacks._path(folder, *LAST)
    with np.load(path, allow_pickle=False) as file:
        assert file["position"].tolist() == [EPOCHS, 0, STEPS]
        assert file["0"].shape == (3, 3, 3, 4)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert archive.testzip() is None


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


@pytest.mark.parametrize(
    ("name", "times", "error"),
    [("SIGINT", 2, KeyboardInterrupt), ("SIGTERM", 1, SystemExit)],
)
def test_told_to_end_a_training_writes_a_snapshot_and_ends(
    name, times, error, whole, tmp_path
):
    before = signal.getsignal(getattr(signal, name))
    fault = fault_of((name, times), 7, "begin")
    with pytest.raises(error) as caught:
        train(tmp_path, minutes=60, before=[fault])
    assert getattr(caught.value, "code", None) in (None, 143)
    assert position(tmp_path) == [(1, 3)]
    same_as_whole(tmp_path, whole)
    assert signal.getsignal(getattr(signal, name)) is before


def test_told_to_end_in_a_validation_a_training_ends(whole, tmp_path):
    fault = fault_of(("SIGTERM", 1), 5, "validation")
    with pytest.raises(SystemExit) as caught:
        train(tmp_path, before=[fault])
    assert caught.value.code == 143
    assert position(tmp_path) == [(1, 4)]
    same_as_whole(tmp_path, whole, train(tmp_path))


def test_told_to_end_within_the_last_batch_a_training_ends_with_the_epoch(tmp_path):
    fault = fault_of(("SIGTERM", 1), 4, "begin")
    with pytest.raises(SystemExit):
        train(tmp_path, before=[fault], validate=False)
    assert position(tmp_path) == [(1, 0)]


def test_a_signal_that_the_process_ignores_stays_ignored(tmp_path):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    snapshots = callback(Snapshots(tmp_path))
    snapshots.on_train_begin()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) == snapshots._on_signal
    snapshots.on_train_end()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_after_a_fit_that_raised_a_signal_does_what_it_did_before(name, tmp_path):
    number, received = getattr(signal, name), []
    signal.signal(number, lambda number, _: received.append(number))
    model, again = net(), Snapshots(tmp_path / "again")
    data = dict(zip("xy", validation(), strict=True), batch_size=1, verbose=0)
    for snapshots in (Snapshots(tmp_path / "first"), again, again):
        fault = Fault(lambda: [][0], 0)
        with pytest.raises(IndexError):
            model.fit(**data, callbacks=[snapshots, fault])
    model.fit(**data, callbacks=[Snapshots(tmp_path / "good")])

    def fit():  # no model's
        signal.raise_signal(number)

    for count in (1, 2):
        fit()
        assert received == [number] * count
    model.fit(**data, callbacks=[again])  # and a fit that ends leaves it as it was
    signal.raise_signal(number)
    assert received == [number] * 3


def left_by_a_failed_fit(model, data, folder):
    left = Snapshots(folder)
    with pytest.raises(IndexError):
        model.fit(**data, callbacks=[left, Fault(lambda: [][0], 0)])
    return left


def test_within_a_fit_without_it_a_callback_that_was_left_minds_no_signal(tmp_path):
    received, model = [], net()
    signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    data = dict(zip("xy", validation(), strict=True), batch_size=1, verbose=0)
    left_by_a_failed_fit(model, data, tmp_path)
    told = Fault(lambda: signal.raise_signal(signal.SIGINT), 0)
    model.fit(**data, callbacks=[told])
    assert received == [signal.SIGINT]


def test_a_handler_of_one_s_own_outlives_what_a_failed_fit_left(tmp_path):
    model = net()
    data = dict(zip("xy", validation(), strict=True), batch_size=1, verbose=0)
    left = left_by_a_failed_fit(model, data, tmp_path)
    own = [].append
    signal.signal(signal.SIGINT, own)
    model.fit(**data, callbacks=[left])
    assert signal.getsignal(signal.SIGINT) is own


def test_callbacks_that_failed_and_then_ended_leave_ctrl_c_alone(tmp_path):
    model = net()
    data = dict(zip("xy", validation(), strict=True), batch_size=1, verbose=0)
    both = [left_by_a_failed_fit(model, data, tmp_path / name) for name in "ab"]
    for each in both:
        model.fit(**data, callbacks=[each])
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


class Clock(keras.callbacks.Callback):
    """A clock on which each batch takes as long as is said, and nothing else does."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds, self.now = iter(seconds), 7200

    def monotonic(self):
        return self.now

    def on_train_batch_begin(self, batch, logs=None):
        self.now += next(self.seconds)


def test_within_an_epoch_a_snapshot_is_written_ten_minutes_after_the_last_one(
    tmp_path, monkeypatch
):
    #              the third is due    | so is the fourth, not the first
    seconds = [300, 299, 1, 599, 400] + [200, 399, 0, 1, 599]
    clock, seen = Clock(seconds), []
    monkeypatch.setattr(callbacks, "time", clock)

    class Seen(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.extend(at for at in position(tmp_path) if at not in seen)

    batches = data()
    shown = [clock, Snapshots(tmp_path / "state", batches), Seen()]
    net().fit(batches, epochs=2, shuffle=False, verbose=0, callbacks=shown)
    assert seen == [(0, 3), (1, 0), (1, 4)]


def test_without_batches_whole_epochs_are_written(tmp_path):
    model, snapshots = net(), Snapshots(tmp_path, minutes=0)
    data = dict(zip("xy", validation(), strict=True), batch_size=1, verbose=0)
    model.fit(**data, epochs=1, callbacks=[Averages(), snapshots])
    assert callbacks.positions(tmp_path) == [(1, 0)]
    with pytest.raises(SystemExit):
        model.fit(**data, callbacks=[fault_of(("SIGTERM", 1), 0, "begin"), snapshots])
    assert callbacks.positions(tmp_path) == [(1, 0)]


@pytest.mark.skipif(not FULL, reason="takes processes: benchmarks/fault_training.py")
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_told_to_end_at_any_moment_a_process_ends_in_time_and_goes_on(
    name, code, faults, whole, trainings, tmp_path
):
    chance, ended = random.Random(name), []
    began = time.monotonic()
    (tmp_path / "timed").mkdir()
    assert trainings.run(tmp_path / "timed", 1, kill=("SIGCONT", 0))[0] == 0
    duration = time.monotonic() - began

    def check(case):
        folder = tmp_path / str(case)
        folder.mkdir()
        kill = (name, chance.uniform(0, duration / 2))
        status, seconds = trainings.run(folder, 1, kill=kill)
        assert status in (code, 0)  # 0: it was done
        assert seconds < 10
        ended.append(status)
        same_as_whole(folder, whole)
        assert trainings.run(folder, 1)[0] == 0
        same_as_whole(folder, whole)
        assert (folder / "log.csv").read_bytes() == (whole[0] / "log.csv").read_bytes()

    faults(45, [(i,) for i in range(20)], check)
    assert ended.count(code) >= 10


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


if __name__ == "__main__":
    serve()
