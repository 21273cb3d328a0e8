"""Steps on two devices are those on one. This file is also the program that is run.

On a CPU: two forced host devices on JAX, two logical devices on TensorFlow, two
processes on PyTorch.
"""

import functools
import os
import pathlib
import pickle
import re
import signal
import subprocess
import sys
import time
import warnings

import keras
import numpy as np
import pictures
import pytest
from keras import layers, ops, tree
from PIL import Image

from keras_fcn import cli, cli_train, devices, models
from keras_fcn.cli import main
from keras_fcn.datasets.batches import Batches
from keras_fcn.metrics import SegmentationScores
from keras_fcn.snapshots import Snapshots, restore
from keras_fcn.training import CaffeSGD, WeightedCrossentropy, compile_modern

VOID = 255
CLASSES = 3
STEPS = 4
ROOT = pathlib.Path(__file__).parent.parent
TIME_LIMIT = 600  # seconds
TWO_DEVICES = "--xla_force_host_platform_device_count=2"

torch_only = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="the others run in one process"
)


# What is trained


def source():
    """Four pictures of noise, each with as many void pixels as the others."""
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 256, (4, 7, 6, 3), np.uint8)
    labels = rng.integers(0, CLASSES, (4, 7, 6), np.uint8)
    for mask in labels:
        mask.flat[rng.permutation(mask.size)[:9]] = VOID
    return list(zip(pictures, labels, strict=True))


def batches(pictures):
    """One batch an epoch: a step."""
    return Batches(pictures, batch_size=4, shuffle=False, shard=devices.shard())


def net(heads=("",), dropout=0.0, regularizer=None):
    image = keras.Input((None, None, 3))
    x = layers.Rescaling(1 / 64, -2)(image)
    x = layers.Conv2D(
        4, 3, activation="relu", padding="same", kernel_regularizer=regularizer
    )(x)
    x = layers.Dropout(dropout, seed=1)(x)
    scores = {head: layers.Conv2D(CLASSES, 1, name=f"score{head}")(x) for head in heads}
    return keras.Model(image, scores if len(heads) > 1 else scores[heads[0]])


def summed():
    """Two heads whose losses are summed over all pixels, and a penalty on weights."""
    model = net(("_sem", "_geo"), regularizer=keras.regularizers.L2(0.1))
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=VOID, reduction="sum"
    )
    model.compile(CaffeSGD(1e-4, 0.9), {"_sem": loss, "_geo": loss})
    return model


def modern():
    """A gradient that is clipped, averages, masks, and a decay of the weights."""
    model = net()
    compile_modern(model, STEPS, learning_rate=0.01, jaccard=2.0)
    return model


def accumulating():
    model = net()
    model.compile(
        CaffeSGD(0.1, 0.9, gradient_accumulation_steps=2),
        WeightedCrossentropy(),
        metrics=[SegmentationScores(CLASSES), SegmentationScores(CLASSES, "fw_iou")],
    )
    return model


def uneven():
    """A mean over the pixels of one class, of which each device has another number."""
    model = net()
    model.compile(
        keras.optimizers.SGD(0.1, clipnorm=0.01), WeightedCrossentropy([0, 1, 0])
    )
    return model


CASES = {f.__name__: f for f in (summed, modern, accumulating, uneven)}


def train(case):
    """Returns the weights before the first step and after each, and all numbers."""
    keras.utils.set_random_seed(1)
    model, pictures = CASES[case](), source()
    if isinstance(model.output, dict):
        pictures = [(x, dict.fromkeys(model.output, y)) for x, y in pictures]
    for _ in range(2):  # the second time changes nothing
        devices.distribute(model)
    steps = [weights(model)]
    keep = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: steps.append(weights(model))
    )
    history = model.fit(
        devices.fill(batches(pictures)),
        epochs=STEPS,
        shuffle=False,
        verbose=0,
        callbacks=[keep],
        validation_data=devices.fill(Batches(pictures[:3])),
        validation_freq=STEPS,
    ).history
    steps.append(weights(model))  # the averages, if there are any
    answers = tree.flatten(model.predict_on_batch(np.float32(pictures[0][0])[None]))
    return {"steps": np.stack(steps), "answer": answers[0], **history}


def weights(model):
    return np.concatenate(
        [np.ravel(ops.convert_to_numpy(v)) for v in model.trainable_variables]
    )


def resumed(folder):
    """Trains `modern` in two halves, as if stopped; returns its weights."""
    for first, last in ((0, STEPS // 2), (STEPS // 2, STEPS)):
        keras.utils.set_random_seed(1)
        model, data = modern(), batches(source())
        devices.distribute(model)
        if first:
            assert restore(model, folder, data) == (first, 0)
        model.fit(
            devices.fill(data),
            initial_epoch=first,
            epochs=last,
            shuffle=False,
            verbose=0,
            callbacks=[Snapshots(folder, data)] if devices.is_first() else [],
        )
        devices.wait()  # for the last snapshot
    return weights(model)


def masks():
    """Returns how many pictures of a step kept each number: 0, 1 or 2.

    And the seed after that, the mean over the devices.
    """
    ones = keras.Input((256,))
    kept = layers.Dropout(0.5, seed=1)(ones)
    sums = layers.Dense(1, use_bias=False, kernel_initializer="zeros")(kept)
    model = keras.Model(ones, sums)
    model.compile(keras.optimizers.SGD(1.0), lambda truth, found: -found)
    devices.distribute(model)
    _, processes = devices.shard()
    pictures = np.ones((2 // processes, 256), "float32")
    model.fit(pictures, pictures[:, :1], batch_size=2, verbose=0)
    (seed,) = model.non_trainable_variables
    state = devices.mean(ops.cast(seed.value, "float64"))
    return weights(model), ops.convert_to_numpy(state)[0]


def waited(folder):
    """Returns the share of devices that find the file for which they have waited."""
    if devices.is_first():
        time.sleep(1)
        (folder / "late").touch()
    devices.wait()
    found = float((folder / "late").exists())
    return ops.convert_to_numpy(devices.mean(ops.convert_to_tensor(found)))


# The programs


def all_cases(folder):
    found = {
        f"{case}.{name}": numbers
        for case in CASES
        for name, numbers in train(case).items()
    }
    found["resumed"] = resumed(folder / "state")
    found["masks"], found["seed"] = masks()
    found["waited"] = waited(folder)
    if devices.is_first():
        np.savez(folder / "two.npz", **found)


def fails(folder):
    if not devices.is_first():
        raise ValueError("The second one does not want to.")
    devices.wait()


def is_killed(folder):
    """The second process ends itself in the second step, as if memory were full."""

    def kill(epoch, logs):
        if epoch and not devices.is_first():
            os.kill(os.getpid(), signal.SIGKILL)

    note_process(folder)
    run_for_long([keras.callbacks.LambdaCallback(on_epoch_end=kill)])


def is_stopped(folder):
    print("This is", *devices.shard(), flush=True)
    note_process(folder)
    first = [Snapshots(folder / "state")] if devices.is_first() else []
    run_for_long(first)


def meets(folder):
    rank, processes = devices.shard()
    mean = devices.mean(ops.convert_to_tensor(float(rank)))
    (folder / str(rank)).write_text(f"{processes} {float(mean)}")


def note_process(folder):
    (folder / f"process-{os.getpid()}").touch()


def run_for_long(callbacks):
    model = modern()
    devices.distribute(model)
    model.fit(
        batches(source()), epochs=10**6, shuffle=False, verbose=0, callbacks=callbacks
    )


def start(*arguments, command=(), program=__file__):
    """Runs this file, or another, in a process of its own, in the other's folder."""
    environment = {
        **os.environ,
        "KERAS_BACKEND": keras.backend.backend(),
        "PYTHONPATH": str(ROOT),
        # What this process compiles with, too: other kernels round otherwise.
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {TWO_DEVICES}",
    }
    return subprocess.Popen(
        [sys.executable, *command, program, *map(str, arguments)],
        cwd=pathlib.Path(program).parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    """Returns the exit status of a process, and what it wrote."""
    try:
        out, errors = process.communicate(timeout=TIME_LIMIT)
    finally:
        process.kill()
    return process.returncode, out, errors


# One and two


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    status, _, errors = finish(start("all_cases", folder))
    assert status == 0, errors
    return np.load(folder / "two.npz")


@pytest.fixture(scope="module")
def one():
    """What one device makes of a case, once."""
    known = {}

    def of(case):
        if case not in known:
            known[case] = train(case)
        return known[case]

    return of


def assert_close(found, expected, start):
    change = np.abs(expected - start).max()
    assert np.abs(found - expected).max() <= 1e-5 * change


@pytest.mark.parametrize("case", CASES)
def test_steps_on_two_devices_are_those_on_one(case, one, two):
    expected, found = one(case)["steps"], two[f"{case}.steps"]
    np.testing.assert_array_equal(found[0], expected[0])
    for step in range(1, STEPS + 1):
        assert_close(found[step], expected[step], expected[0])
    assert_close(found[-1], expected[-1], expected[0])


@pytest.mark.parametrize("case", CASES)
def test_losses_and_scores_are_those_of_all_devices(case, one, two):
    for name, numbers in one(case).items():
        if name not in ("steps", "answer", "val_loss"):  # void pictures count there
            np.testing.assert_allclose(two[f"{case}.{name}"], numbers, rtol=1e-5)


def test_a_training_that_the_first_saved_goes_on_everywhere(one, two):
    steps = one("modern")["steps"]
    assert_close(two["resumed"], steps[-1], steps[0])


def test_dropout_draws_other_masks_on_each_device(two):
    kept, counts = np.unique(two["masks"].round(4), return_counts=True)
    np.testing.assert_array_equal(kept, [0, 1, 2])
    assert 90 < counts[1] < 166  # of 256, half of them: 128, standard deviation 8
    assert two["seed"] == 1  # as it was: what one device saves, all go on with


def test_what_the_first_writes_is_there_for_all_that_have_waited(two):
    assert two["waited"] == 1


@pytest.mark.parametrize("case", CASES)
def test_one_picture_has_one_answer(case, one, two):
    expected = one(case)["answer"]
    np.testing.assert_allclose(two[f"{case}.answer"], expected, rtol=1e-3, atol=1e-3)


# Processes


def left(folder):
    """Returns the processes that have noted themselves and have not ended."""
    numbers = [int(file.name.split("-")[1]) for file in folder.glob("process-*")]
    assert len(numbers) == 2
    return [number for number in numbers if lives(number)]


def lives(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def wait_for(condition):
    give_up = time.monotonic() + TIME_LIMIT
    while not condition() and time.monotonic() < give_up:
        time.sleep(0.1)
    assert condition()


@torch_only
def test_an_error_of_one_process_is_that_of_all(tmp_path):
    status, _, errors = finish(start("fails", tmp_path))
    assert status == 1
    assert errors.splitlines()[-1] == "ValueError: The second one does not want to."


@torch_only
def test_all_processes_end_when_one_is_killed(tmp_path):
    status, _, errors = finish(start("is_killed", tmp_path))
    assert status == 1
    assert "OSError: A process of 2 was ended by SIGKILL" in errors.splitlines()[-1]
    assert not left(tmp_path)


@torch_only
@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_the_first_process_may_save_when_all_are_to_stop(number, tmp_path):
    # A shell that starts pytest in the background lets it ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start("is_stopped", tmp_path)
    assert process.stdout.readline() == "This is 0 2\n"
    wait_for(lambda: any(tmp_path.glob("state/*.npz")))
    process.send_signal(number)
    status, out, _ = finish(process)
    # Python's own way to end by Ctrl-C is to die of the signal.
    assert status == {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143}[number]
    assert out == ""
    assert not left(tmp_path)
    assert restore(modern(), tmp_path / "state")[0] > 0


@torch_only
@pytest.mark.slow
def test_no_process_is_left_when_the_one_that_waits_is_killed(tmp_path):
    # As a shell starts what it does not wait for.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start("is_stopped", tmp_path)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    wait_for(lambda: any(tmp_path.glob("state/*.npz")))
    process.kill()
    wait_for(lambda: not left(tmp_path))


@torch_only
@pytest.mark.slow
def test_processes_that_torchrun_started_meet(tmp_path):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    status, _, errors = finish(start("meets", tmp_path, command=torchrun))
    assert status == 0, errors
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["2 0.5"] * 2


@pytest.mark.skipif(
    keras.backend.backend() == "torch", reason="makes as many processes as are wanted"
)
def test_more_devices_than_there_are_is_an_error():
    with pytest.raises(ValueError, match=r"99 devices .* at most \d+, as \w+ finds"):
        devices.run(source, 99)


LOGICAL_DEVICES = """
import keras
if keras.backend.backend() == "tensorflow":
    import tensorflow as tf
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(
        cpu, [tf.config.LogicalDeviceConfiguration()] * 2
    )
"""


@pytest.mark.slow
def test_the_script_of_the_docs_runs(tmp_path):
    page = (ROOT / "docs" / "devices.md").read_text()
    block, *_ = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    call = "devices.run(train, 2, 60, 8)"
    assert call in block
    block = block.replace(call, "devices.run(train, 2, 1, 2)").replace("256", "32")
    (tmp_path / "script.py").write_text(LOGICAL_DEVICES + block)
    rng = np.random.default_rng(0)
    for folder, shape, top in (("images", (40, 50, 3), 256), ("masks", (40, 50), 3)):
        (tmp_path / folder).mkdir()
        for i in range(3):
            array = rng.integers(0, top, shape, np.uint8)
            Image.fromarray(array).save(tmp_path / folder / f"{i}.png")
    status, _, errors = finish(start(program=tmp_path / "script.py"))
    assert status == 0, errors
    assert (tmp_path / "model.h5").exists()
    assert (tmp_path / "log.csv").read_text().count("\n") == 2  # header and epoch


# Without an engine


def test_no_devices_is_an_error():
    with pytest.raises(ValueError, match="0 devices were asked for; expected 1"):
        devices.run(source, 0)


def test_one_device_needs_no_engine():
    model, data, value = modern(), batches(source()), ops.ones(())
    assert devices.run(lambda x: x + 1, 1, 2) == 3
    assert (devices.count(), devices.shard(), devices.is_first()) == (1, (0, 1), True)
    assert devices.fill(data) is data
    assert devices.mean(value) is value
    before = dict(vars(model))
    devices.distribute(model)
    assert vars(model) == before


@pytest.fixture
def _two_devices(monkeypatch):
    monkeypatch.setattr(devices, "count", lambda: 2)


@pytest.mark.usefixtures("_two_devices")
def test_a_batch_is_shared_equally_or_not_at_all():
    assert devices.share(6) == 3
    with pytest.raises(ValueError, match="batch of 5 .* 2 devices; .* make it 4, say"):
        devices.share(5)
    with pytest.raises(ValueError, match="batch of 1 .* 2 devices; .* make it 2, say"):
        devices.share(1)


@pytest.mark.usefixtures("_two_devices")
@pytest.mark.parametrize("heads", [None, ("sem", "geo")])
def test_void_pictures_fill_up_what_does_not_divide(heads):
    pictures = source()[:3]
    if heads:
        pictures = [(x, dict.fromkeys(heads, y)) for x, y in pictures]
    plain = Batches(pictures, batch_size=2, shuffle=False)
    filled = devices.fill(plain)
    assert len(filled) == 2
    for found, expected in zip(
        tree.flatten(filled[0]), tree.flatten(plain.batch(0, 0)), strict=True
    ):
        np.testing.assert_array_equal(found, expected)
    image, labels = filled[1]
    assert image.shape == (2, 7, 6, 3)
    for mask in tree.flatten(labels):
        assert mask.dtype == np.int32
        np.testing.assert_array_equal(mask[0], source()[2][1])
        np.testing.assert_array_equal(mask[1], VOID)


# The command


@pytest.fixture
def numbered(tmp_path):
    """Folders of seven pictures and of masks, each of the label that is its number."""
    pictures.numbered(tmp_path, 7)
    return [str(tmp_path / "images"), str(tmp_path / "masks")]


@pytest.mark.parametrize(
    ("options", "number"), [([], 1), (["--devices", "2"], 2), (["--devices", "3"], 3)]
)
def test_a_command_runs_on_as_many_devices_as_it_is_told(
    options, number, numbered, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(devices, "run", lambda *what: asked.append(what))
    assert main(["train", *numbered, "--output", str(tmp_path / "run"), *options]) == 0
    [(function, asked_for, parsed)] = asked
    assert asked_for == number
    # As they come to another process, on PyTorch.
    again, passed = pickle.loads(pickle.dumps((function, parsed)))
    assert again is cli_train._train
    assert (passed.data, passed.devices) == (numbered, number)


class _Seen(BaseException):
    """Ends a training where all that was to be looked at has been."""


@pytest.fixture
def begun(numbered, tmp_path, monkeypatch):
    """Begins the training of a command on two devices, in any of their processes.

    Returns what came to pass, in order: the model that was made ready, and whether it
    was compiled; the model, and the arguments of its `fit`; "waited".
    """
    thin = functools.partial(models.fcn, width=1 / 64)
    options = "--backbone alexnet --stride 32 --batch-size 4 --crop 0 --balance 0"
    options = [*options.split(), "--devices", "2", "--validation", *numbered]

    def begin(rank, processes):
        seen, output = [], tmp_path / f"run-{rank}-{processes}"

        def wait():
            seen.append("waited")
            raise _Seen

        def ready(model):
            seen.append((model, model.compiled))

        def fit(model, data, **named):
            seen.append((model, data, named))

        with monkeypatch.context() as patch:
            patch.setattr(devices, "run", lambda do, number, *given: do(*given))
            patch.setattr(devices, "count", lambda: 2)
            patch.setattr(devices, "shard", lambda: (rank, processes))
            patch.setattr(devices, "is_first", lambda: rank == 0)
            patch.setattr(devices, "distribute", ready)
            patch.setattr(devices, "wait", wait)
            patch.setattr(models, "fcn", thin)
            patch.setattr(keras.Model, "fit", fit)
            with pytest.raises(_Seen):
                main(["train", *numbered, "--output", str(output), *options])
        return seen, output

    return begin


def test_a_process_of_a_command_warns_in_a_sentence_as_the_command_does(
    monkeypatch, capsys
):
    def share(batch_size):
        where = {"filename": devices.__file__, "lineno": 1}
        warnings.warn_explicit("The sky falls.", UserWarning, **where)
        raise _Seen

    monkeypatch.setattr(devices, "share", share)
    options = "train camvid --output o --batch-size 2 --devices 2".split()
    with pytest.raises(_Seen):
        cli_train._train(cli._parser().parse_args(options))
    assert capsys.readouterr().err == "keras-fcn: warning: The sky falls.\n"


def test_each_process_of_a_command_reads_its_part_of_each_batch(begun):
    fits = [begun(*process)[0][1] for process in ((0, 1), (0, 2), (1, 2))]
    (_, whole, _), *parts = fits
    for batch, count in enumerate((4, 2)):  # of the last three one has no partner
        pixels, labels = whole[batch]
        for rank, (_, part, _) in enumerate(parts):
            np.testing.assert_array_equal(part[batch][0], pixels[rank:count:2])
            np.testing.assert_array_equal(part[batch][1], labels[rank:count:2])
    numbers = [mask[0, 0] for batch in range(2) for mask in whole[batch][1]]
    assert sorted(numbers[:7]) == list(range(7))


def test_a_net_is_compiled_then_made_ready_then_trained_and_waited_for(begun):
    (ready, compiled), (trained, _, _), waited = begun(0, 1)[0]
    assert trained is ready
    assert compiled
    assert waited == "waited"


@pytest.mark.parametrize(("processes", "sizes"), [(1, (4, 2)), (2, (1, 1))])
def test_what_does_not_divide_is_filled_up_where_a_process_has_two_devices(
    begun, processes, sizes
):
    _, batches, named = begun(0, processes)[0][1]
    validated = named["validation_data"]
    assert (len(batches), len(validated)) == (2, 7)
    for (pixels, labels), size, real in zip(
        (batches[1], validated[0]), sizes, (3, 1), strict=True
    ):
        assert len(pixels) == len(labels) == size
        assert (labels[:real] != VOID).any(axis=(1, 2)).all()
        assert (labels[real:] == VOID).all()


def test_of_a_command_s_processes_the_first_alone_shows_and_writes(begun):
    shown = {"Log", "TensorBoard", "Overlays", "Snapshots", "ProgressBar"}
    for rank, more, files in ((0, shown, [".lock", "command.sh"]), (1, set(), [])):
        (_, (_, _, named), _), output = begun(rank, 2)
        names = {type(callback).__name__ for callback in named["callbacks"]}
        assert names == {"Averages", "Divergence"} | more
        assert sorted(path.name for path in output.glob("*")) == files


@pytest.mark.usefixtures("_two_devices")
def test_a_command_s_batch_that_does_not_divide_is_refused_before_data_are_read(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(devices, "run", lambda do, number, *given: do(*given))
    options = ["--output", str(tmp_path / "run"), "--batch-size", "5"]
    assert main(["train", "nowhere", "no masks", "--devices", "2", *options]) == 2
    assert "A batch of 5 was given for 2 devices" in capsys.readouterr().err


if __name__ == "__main__":
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        (cpu,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(
            cpu, [tf.config.LogicalDeviceConfiguration()] * 2
        )
    devices.run(globals()[sys.argv[1]], 2, pathlib.Path(sys.argv[2]))
