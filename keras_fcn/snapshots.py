"""Snapshots of a training, from which it goes on after any stop as if there were none.

```python
snapshots = Snapshots("run/state", batches)
for first, last in snapshots.stretches(model, epochs=60):
    model.fit(
        batches,
        initial_epoch=first,
        epochs=last,
        shuffle=False,
        callbacks=[snapshots],
    )
```

does the same whether it is run once, or stopped anywhere and run again.
"""

import hashlib
import pathlib
import re
import signal
import threading
import time
import warnings
import zipfile
import zlib

import keras
import numpy as np

from keras_fcn.files import replacing
from keras_fcn.weights import assign_all, to_numpy

# What NumPy's and Python's readers of .npz files raise on damaged ones.
_DAMAGE = (
    AttributeError,
    EOFError,
    KeyError,
    MemoryError,
    NotImplementedError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    zipfile.BadZipFile,
    zlib.error,
)
_NAME = re.compile(r"epoch-(\d+)-batch-(\d+)\.npz")
_DEFAULT_HANDLERS = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
}


class Snapshots(keras.callbacks.Callback):
    """Writes the whole state of a training: at each epoch's end, and in between.

    Weights, optimizer, seeds of Dropout, scores so far, epoch and batch: what
    `restore` needs so that the training goes on as if it had never stopped. In between
    is every so many minutes, and when the process is told to end by SIGINT (Ctrl-C) or
    SIGTERM: these wait for the batch to end, the first of which is compiled and may
    take long; then `fit` raises `KeyboardInterrupt` or `SystemExit(143)`. In a
    validation nothing is written: the training goes on from the snapshot before. Nor
    does kill -9 harm the files.

    The two newest files are kept, `epoch-0003-batch-000120.npz` being 120 batches into
    the fourth epoch. Each appears whole or not at all, and holds a hash of its content.

    Args:
        folder: Of the files, for them alone; it need not exist.
        batches: What `fit` is given: a `keras_fcn.datasets.batches.Batches`, or any
            data set that has its `seek` and `first`. Without it only whole epochs are
            written, for there is no way back into the middle of one.
        minutes: Between two snapshots within an epoch.

    Raises:
        ValueError: Out of `fit`, if a number of the state is not finite, or if an epoch
            that is entered half-way has other scores than the snapshot.
        OSError: Out of `fit`, if a snapshot cannot be written.
    """

    def __init__(self, folder, batches=None, *, minutes=10):
        super().__init__()
        self.folder, self.batches = pathlib.Path(folder), batches
        self.minutes = minutes
        self._handlers = {}

    def stretches(self, model, epochs):
        """Restores the training and yields what to call `fit` with, until it is done.

        An epoch that was left half-way is a stretch of its own, for Keras knows epochs
        of one length only. A training without snapshots begins at the beginning.

        Args:
            model: As in `restore`.
            epochs: Of the whole training.

        Yields:
            `initial_epoch` and `epochs` for `fit`, which needs `shuffle=False` and
            these `Snapshots` among its callbacks.

        Raises:
            ValueError: As in `restore`; or if `fit` did not write snapshots here.
            OSError: As in `restore`.
        """
        if not positions(self.folder):
            if self.batches is not None:
                self.batches.seek(0)
            yield 0, epochs
            return
        epoch, batch = restore(model, self.folder, self.batches)
        if batch:
            yield epoch, epoch + 1
            if model.stop_training:
                return
            # `fit` ends with averages in the model: back to what they are made of.
            if restore(model, self.folder, self.batches) != (epoch + 1, 0):
                raise ValueError(
                    f"{self.folder} has no snapshot of the end of epoch {epoch + 1}, "
                    "which `fit` has just trained; expected these Snapshots among its "
                    "callbacks."
                )
            epoch += 1
        yield epoch, max(epoch, epochs)

    def on_train_begin(self, logs=None):
        """Minds signals, where Python delivers them: in the main thread."""
        self.on_train_end()  # if a `fit` before this one has raised
        self._written, self._signal = time.monotonic(), None
        if threading.current_thread() is threading.main_thread():
            self._handlers = {
                number: signal.signal(number, self._on_signal)
                for number in (signal.SIGINT, signal.SIGTERM)
                # A shell has what runs in the background ignore Ctrl-C.
                if signal.getsignal(number) is not signal.SIG_IGN
            }

    def on_train_end(self, logs=None):
        """Leaves signals to whom they belonged before."""
        for number, handler in self._handlers.items():
            if signal.getsignal(number) == self._on_signal:
                signal.signal(number, handler)
        self._handlers = {}

    def on_epoch_begin(self, epoch, logs=None):
        """Goes on with the scores of an epoch that is entered half-way.

        Raises:
            ValueError: If the model follows others than the snapshot has.
            OSError: If the snapshot cannot be read.
        """
        self._epoch, self._ended = epoch, True
        first = first_batch(self.batches)
        path = _path(self.folder, epoch, first)
        if first and path.exists():
            _restore_scores(self.model, path, self.batches.batch(epoch, first))

    def on_train_batch_end(self, batch, logs=None):
        """Writes a snapshot if it is time, or if the process is told to end.

        Raises:
            ValueError: As in `on_epoch_end`.
            OSError: As in `on_epoch_end`.
            KeyboardInterrupt: If SIGINT came, in this batch or before.
            SystemExit: If SIGTERM did, with status 143.
        """
        due = time.monotonic() - self._written >= 60 * self.minutes
        last = batch + 1 == self.params["steps"]  # what follows it is the epoch's end
        self._ended = last or self.params["steps"] is None
        if last or not (due or self._signal or self._is_cut_short()):
            return
        if self.batches is not None:
            self._write(self._epoch, self.batches.first + batch + 1)
        self._end_if_told()

    def on_test_batch_end(self, batch, logs=None):
        """Ends the process if it is told to: a validation may take long.

        Raises:
            KeyboardInterrupt: As in `on_train_batch_end`.
            SystemExit: As in `on_train_batch_end`.
        """
        if self._handlers:  # it is a validation within `fit`
            self._end_if_told()

    def on_epoch_end(self, epoch, logs=None):
        """Writes the state after `epoch`, unless `stop_training` has cut it short.

        Raises:
            ValueError: If a number in it is not finite: the training has diverged.
                The snapshots before are kept.
            OSError: If it cannot be written; the snapshots before are kept.
            KeyboardInterrupt: As in `on_train_batch_end`, once it is written.
            SystemExit: As in `on_train_batch_end`, once it is written.
        """
        if not self._is_cut_short():
            self._write(epoch + 1, 0)
        self._end_if_told()

    def _on_signal(self, number, frame):
        # Raised here, an error would find weights half-way through a step.
        self._signal = self._signal or number
        while frame and not self._is_fit(frame):
            frame = frame.f_back
        if not frame:  # `fit` has raised, of which it tells no callback
            signal.signal(number, self._handlers.pop(number, _DEFAULT_HANDLERS[number]))
            signal.raise_signal(number)

    def _is_fit(self, frame):
        """Whether a frame is Keras' `fit` with this callback."""
        given = frame.f_locals.get("callbacks") if frame.f_code.co_name == "fit" else ()
        given = getattr(given, "callbacks", given)
        return isinstance(given, list | tuple) and self in given

    def _is_cut_short(self):
        """Whether `stop_training` ends an epoch before its last batch."""
        return self.model.stop_training and not self._ended

    def _end_if_told(self):
        if self._signal:
            self.on_train_end()
            if self._signal == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self._signal)

    def _write(self, epoch, batch):
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.part"):  # of a training that was killed
            part.unlink()
        path, digest = _path(self.folder, epoch, batch), hashlib.sha256()
        with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
            for name, array in self._arrays(epoch, batch):
                _hash(digest, name, array)
                _write_array(archive, name, array)
            _write_array(archive, "sha256", np.frombuffer(digest.digest(), np.uint8))
        upto = [at for at in positions(self.folder) if at <= (epoch, batch)]
        for position in upto[:-2]:
            _path(self.folder, *position).unlink()
        self._written = time.monotonic()

    def _arrays(self, epoch, batch):
        """Yields names and arrays, one at a time: together they are large."""
        model = self.model
        steps = 0 if self.batches is None else len(self.batches) + self.batches.first
        yield "position", np.array([epoch, batch, steps])
        for i, variable in enumerate(_state(model)):
            array = to_numpy(variable)
            if not np.isfinite(array).all():
                raise ValueError(
                    f"After {moment(epoch, batch)} {variable.path} is not finite; "
                    f"expected numbers, so the snapshots in {self.folder} stay as they "
                    "were. Train with a lower learning rate."
                )
            yield str(i), array
        for i, variable in enumerate(model.metrics_variables if batch else ()):
            yield f"score-{i}", to_numpy(variable)


def restore(model, folder, batches=None):
    """Puts a compiled model back to where `Snapshots` saw it last.

    What follows is bit for bit what it would have been (on one machine, and as far as
    the backend computes alike twice) if

    - the model is built and compiled with the arguments of the first run, and every
      random layer of it has a seed where Keras runs on PyTorch,
    - the data are those of that batch, and stay in their order: `fit(shuffle=False)`,
    - callbacks have no memory, as `EarlyStopping` and `ReduceLROnPlateau` have.

    A fixed learning rate is that of the snapshot, too: a training that diverged goes on
    with a lower one if that is assigned to `model.optimizer.learning_rate` after this.

    If the newest snapshot is damaged, the one before is taken, and a warning says so.
    `Snapshots.stretches` does all that it takes to go on within an epoch.

    Args:
        model: The model, built and compiled as it was then.
        folder: That of `Snapshots`.
        batches: What it is trained on, for `batches.seek(epoch, batch)`.

    Returns:
        The number of whole epochs that it has been trained for, and the number of
        batches after them.

    Raises:
        ValueError: If all snapshots are damaged, or if the newest is of another model,
            optimizer or number of batches; nothing is changed.
        OSError: If there is none, or if it cannot be read.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = {str(i): variable for i, variable in enumerate(_state(model))}
    path, arrays = _newest(pathlib.Path(folder))
    epoch, batch, steps = arrays.pop("position")
    wanted = {i: tuple(v.shape) for i, v in variables.items()}
    found = {i: array.shape for i, array in arrays.items() if array.dtype.kind in "fiu"}
    if {i: found[i] for i in found if i.isdecimal()} != wanted:
        raise ValueError(
            f"{path} is of another net or optimizer; expected {len(wanted)} arrays of "
            "this one's shapes. Pass the options of the first run, or start anew."
        )
    if batches is not None:
        batches.seek(epoch)
        if batch and len(batches) != steps:
            raise ValueError(
                f"{path} is {batch} batches into an epoch of {steps}; expected an "
                f"epoch of {len(batches)} batches. Pass the data and the batch size of "
                "the first run, or start anew."
            )
        batches.seek(epoch, batch)
    assign_all([(variable, arrays[i]) for i, variable in variables.items()])
    return epoch, batch


def _state(model):
    # Not `model.variables`: those of its metrics come into being with the first batch.
    layers = [v for layer in model.layers for v in layer.variables]
    return [*layers, *model.optimizer.variables]


def _path(folder, epoch, batch):
    return folder / f"epoch-{epoch:04}-batch-{batch:06}.npz"


def positions(folder):
    """Lists the (epoch, batch) of all snapshots, the newest last.

    Args:
        folder: Of `Snapshots`, a `pathlib.Path`; it need not exist.

    Returns:
        A sorted list of (epoch, batch): the number of whole epochs, and the number of
        batches after them, 0 at an epoch's end.
    """
    names = [path.name for path in folder.glob("*.npz")]
    return sorted(
        tuple(map(int, match.groups()))
        for match in map(_NAME.fullmatch, names)
        if match
    )


def _newest(folder):
    """Returns the newest snapshot that is not damaged: its path and its arrays."""
    damage = []
    for position in reversed(positions(folder)):
        path = _path(folder, *position)
        try:
            arrays = _read(path)
        except ValueError as error:
            damage.append(str(error))
            continue
        if damage:
            went_back = f"{' '.join(damage)} Going on from the one before, {path}."
            warnings.warn(went_back, stacklevel=3)
        return path, arrays
    if damage:
        raise ValueError(f"{' '.join(damage)} There is no other; start anew.")
    raise FileNotFoundError(
        f"{folder} holds no snapshot; expected a file such as "
        f"{_path(folder, 3, 0).name}. Pass the folder that Snapshots wrote to."
    )


def _read(path):
    with open(path, "rb") as file:  # what the system says against it is an OSError
        try:
            with np.load(file, allow_pickle=False) as archive:
                arrays = {name: np.asarray(archive[name]) for name in archive.files}
            digest, written = hashlib.sha256(), arrays.pop("sha256").tobytes()
            for name, array in arrays.items():
                _hash(digest, name, array)
            if written != digest.digest():
                raise ValueError("its content is not what its hash was made of")
            arrays["position"] = epoch, batch, _ = arrays["position"].tolist()
            if path != _path(path.parent, epoch, batch):
                raise ValueError("its name is not its own")
            return arrays
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is no snapshot, or is damaged ({error})."
            ) from error


def _hash(digest, name, array):
    digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1))


def _write_array(archive, name, array):
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def _restore_scores(model, path, batch):
    """Assigns what the metrics had counted when a snapshot within an epoch was made."""
    with np.load(path, allow_pickle=False) as archive:
        names = [name for name in archive.files if name.startswith("score-")]
        arrays = [archive[name] for name in names]
    if len(model.metrics_variables) != len(arrays):
        model.test_on_batch(*batch)  # on TensorFlow they come into being with a batch
    variables = model.metrics_variables
    if [tuple(v.shape) for v in variables] != [array.shape for array in arrays]:
        raise ValueError(
            f"{path} has other scores half-way through an epoch than the model; "
            "expected those of the first run. Compile the model with the same metrics."
        )
    assign_all(list(zip(variables, arrays, strict=True)))


def first_batch(batches):
    """Returns the batch that the epoch begins at, 0 for data that cannot be entered.

    Args:
        batches: As in `Snapshots`.
    """
    return 0 if batches is None else batches.first


def moment(epoch, batch):
    """Returns where a training is, in words for an error.

    Args:
        epoch: Whole epochs that are done.
        batch: Batches after them.
    """
    return f"batch {batch} of epoch {epoch + 1}" if batch else f"epoch {epoch}"
