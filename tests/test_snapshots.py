"""Trainings that go on after any stop.

The promises P40 to P43 and P45 are tried at a twentieth of their counts within this
process; in full, in processes that die, where KERAS_FCN_FAULTS is "full"
(benchmarks/fault_training.py).
"""

import contextlib
import hashlib
import io
import itertools
import os
import pickle
import random
import resource
import signal
import struct
import subprocess
import time
import types
import zipfile

import keras
import numpy as np
import pytest
from keras import layers
from trainings import (
    EPOCHS,
    FULL,
    LAST,
    STEPS,
    Fault,
    Invented,
    Killed,
    Trainings,
    data,
    fault_of,
    file_of,
    net,
    position,
    read,
    same_as_whole,
    state,
    take,
    train,
    validation,
)

from keras_fcn import snapshots as snapshots_module
from keras_fcn.callbacks import Averages, Divergence
from keras_fcn.datasets.batches import Batches
from keras_fcn.models import fcn
from keras_fcn.snapshots import Snapshots, positions, restore
from keras_fcn.training import compile_modern

pytestmark = pytest.mark.usefixtures("_signals")


@pytest.fixture(scope="module")
def trainings():
    if not FULL:
        yield None
        return
    server = Trainings()
    yield server
    server.close()


# Going on


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
        ends.append(file_of(folder, 2, 0).read_bytes())
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


@pytest.fixture
def folder(whole, tmp_path):
    """The last two snapshots of a training."""
    take(whole, tmp_path / "state", (2, 4), LAST)
    return tmp_path / "state"


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
    sealed(file_of(folder, *LAST), **arrays)
    assert goes_back(target, folder, states)


@pytest.mark.parametrize(
    "arrays",
    [{}, {"1": np.array(["a"] * 4)}, {"1": np.ones((1, 4))}, {"999": np.ones(3)}],
)
def test_arrays_with_a_hash_are_of_this_net_or_refused(arrays, folder, target, states):
    sealed(file_of(folder, *LAST), **arrays)
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
    newest, before = (str(file_of(folder, *p)) for p in (LAST, (2, 4)))
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
    path = file_of(folder, *LAST)
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
    path = file_of(folder, *LAST)
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
    assert positions(folder) == [LAST, (EPOCHS + 1, 0)]


def test_snapshots_of_what_is_trained_again_are_left(folder, target):
    save(target, folder, epoch=0)
    assert positions(folder) == [(1, 0), (2, 4), LAST]


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
        assert caught.value.filename == str(file_of(folder, EPOCHS + 1, 0))
        assert contents(folder) == before


def test_a_full_disk_ends_a_training_whose_earlier_snapshot_loads(
    faults, whole, target, trainings, tmp_path
):
    page = 4096  # bytes, of which such a disk is made
    size = file_of(whole[0] / "all", 0, 1).stat().st_size // page + 1

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
        first = (positions(tmp_path / "state") or [(0, 0)])[-1][0]
        child = os.fork()
        if child == 0:
            # A fork had better not use the backend.
            snapshots_module.to_numpy = lambda variable: variable.value
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
        if last == 1 and not positions(tmp_path / "state"):
            return  # killed at the first one, there need not be any
        with warnings_of() as said:
            _, arrays = snapshots_module._newest(tmp_path / "state")
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
    path = file_of(folder, *LAST)
    with np.load(path, allow_pickle=False) as file:
        assert file["position"].tolist() == [EPOCHS, 0, STEPS]
        assert file["0"].shape == (3, 3, 3, 4)
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert archive.testzip() is None


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
    snapshots = Snapshots(tmp_path)
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
    monkeypatch.setattr(snapshots_module, "time", clock)

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
    assert positions(tmp_path) == [(1, 0)]
    with pytest.raises(SystemExit):
        model.fit(**data, callbacks=[fault_of(("SIGTERM", 1), 0, "begin"), snapshots])
    assert positions(tmp_path) == [(1, 0)]


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
