"""Trainings of a small net that are stopped, and what they leave.

As a program this file trains: see `Trainings`.
"""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
from keras import layers, ops

from keras_fcn.callbacks import Averages, Divergence, Log
from keras_fcn.datasets.batches import Batches
from keras_fcn.labels import LabelSet, voc_colormap
from keras_fcn.snapshots import Snapshots, positions
from keras_fcn.training import compile_modern

EPOCHS, STEPS = 3, 5
FULL = os.environ.get("KERAS_FCN_FAULTS") == "full"
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
    return positions(folder / "state")[-1:]


def read(variable):
    return ops.convert_to_numpy(variable.value)


def state(model):
    return [read(v).tobytes() for v in (*model.variables, *model.optimizer.variables)]


def uninterrupted(folder):
    """A training that nothing stops: its folder, of all its files, and its weights."""
    (folder / "all").mkdir()

    class Copies(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            for path in (folder / "state").glob("*.npz"):
                shutil.copy(path, folder / "all" / path.name)

        on_train_end = on_test_begin = on_epoch_begin = on_train_batch_begin

    model = train(folder, after=[Copies()])
    assert len(list((folder / "all").iterdir())) == EPOCHS * STEPS
    return folder, [read(v) for v in model.weights]


def file_of(folder, epoch, batch):
    """The path of a snapshot."""
    return folder / f"epoch-{epoch:04}-batch-{batch:06}.npz"


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


def same_as_whole(folder, whole, model=None):
    """Checks that all that a training has written so far is what `whole` wrote."""
    for at in positions(folder / "state"):
        path = file_of(folder / "state", *at)
        assert path.read_bytes() == (whole[0] / "all" / path.name).read_bytes(), at
    if (folder / "log.csv").exists():
        log = (folder / "log.csv").read_bytes()
        assert (whole[0] / "log.csv").read_bytes().startswith(log)
    if model:
        for variable, expected in zip(model.weights, whole[1], strict=True):
            np.testing.assert_array_equal(read(variable), expected)


def take(whole, folder, *positions):
    """Copies snapshots of the training that nothing stopped."""
    folder.mkdir(exist_ok=True)
    for at in positions:
        path = file_of(folder, *at)
        shutil.copy(whole[0] / "all" / path.name, path)


if __name__ == "__main__":
    serve()
