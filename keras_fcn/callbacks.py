"""What `fit` calls: trainings that end in time, and show how they go.

```python
callbacks = [
    Averages(),
    Divergence(batches),
    Log("run/log.csv"),
    snapshots,  # how `fit` is called with it: `keras_fcn.snapshots`
    ProgressBar(batches, epochs=60),
]
```

What writes an epoch's results stands before `keras_fcn.snapshots.Snapshots`: a training
that goes on from the end of an epoch has them all.
"""

import atexit
import contextlib
import csv
import io
import math
import pathlib

import keras
import numpy as np
from keras import ops, tree
from PIL import Image, ImageDraw, ImageFont

from keras_fcn import images, progress
from keras_fcn.files import write_bytes
from keras_fcn.snapshots import first_batch, moment
from keras_fcn.weights import to_numpy, unshare

_PANEL = 480  # pixels, the longest side of a picture in an overlay


@contextlib.contextmanager
def averaged(model):
    """Puts the averages of its weights into a model, as long as the block lasts.

    Args:
        model: Compiled; without averages (`use_ema`) in its optimizer it stays as it
            is.

    Yields:
        Nothing. The weights as they were come back at the end, be it by an error.
    """
    trained = [to_numpy(variable) for variable in model.trainable_variables]
    model.optimizer.finalize_variable_values(model.trainable_variables)
    unshare(model.trainable_variables)  # or validation would free the averages
    try:
        yield
    finally:
        for variable, array in zip(model.trainable_variables, trained, strict=True):
            variable.assign(array)


class Averages(keras.callbacks.Callback):
    """Scores the moving averages (EMA) of the weights wherever `fit` validates.

    They are what `fit` leaves in the model at its end. `keras.callbacks.SwapEMAWeights`
    means the same, but on TensorFlow it swaps by adding and subtracting: the training
    goes on with weights that are rounded anew at each validation.
    """

    def on_test_begin(self, logs=None):
        """Puts the averages into the model."""
        self._block = contextlib.ExitStack()
        self._block.enter_context(averaged(self.model))

    def on_test_end(self, logs=None):
        """Puts the weights back."""
        _ = self.model  # on JAX it takes over the numbers of the last batch, now
        self._block.close()

    def on_train_end(self, logs=None):
        """Leaves the averages in the model and in the optimizer, one copy each."""
        unshare(self.model.trainable_variables)


class Divergence(keras.callbacks.Callback):
    """Ends a training with an error at the batch after which a number is not finite.

    The loss is looked at, and the weights: a gradient of NaN may have a loss that is
    finite. `keras.callbacks.TerminateOnNaN` looks at the loss alone: it sees such a
    gradient a batch later, or not at all after the last one, and lets `fit` end well.

    To look takes a sum over all weights, and waits for the batch.

    Args:
        batches: As in `keras_fcn.snapshots.Snapshots`: of an epoch that is entered
            half-way the message counts the batches before.

    Raises:
        ValueError: Out of `fit`, with the epoch and the batch, both from 1.
    """

    def __init__(self, batches=None):
        super().__init__()
        self.batches = batches

    def on_epoch_begin(self, epoch, logs=None):
        """Notes the epoch, for the message."""
        self._epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        """Looks at the loss so far in the epoch, and at the weights.

        Args:
            batch: From 0, since `fit` entered the epoch.
            logs: Of Keras, with the loss.

        Raises:
            ValueError: If the loss or a weight is NaN or infinite.
        """
        found = float((logs or {}).get("loss", 0)), float(_sum(self.model))
        if not all(map(math.isfinite, found)):
            what = "weights are" if math.isfinite(found[0]) else "loss is"
            place = moment(self._epoch, first_batch(self.batches) + batch + 1)
            raise ValueError(
                f"The {what} not finite after {place}; expected numbers. Train with a "
                "lower learning rate, from the last snapshot or anew."
            )


def _sum(model):
    # One number to fetch. It is not finite if a weight is not.
    sums = [ops.sum(ops.cast(v, "float32")) for v in model.trainable_variables]
    return ops.stop_gradient(sum(sums))


class Log(keras.callbacks.Callback):
    """Keeps a CSV file of every epoch's numbers: one line an epoch, in order.

    The first column, `epoch`, counts from 1; a number that an epoch does not have is
    left empty. The file is written anew after each epoch, in one move, and whatever is
    trained again replaces what it says of that epoch and of later ones. After a kill
    `keras.callbacks.CSVLogger` says things twice, or appends to half a line.

    Args:
        path: The file.
    """

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the file.

        Raises:
            ValueError: If the file that is there is no such log.
            OSError: If it cannot be written; it keeps what it holds.
        """
        rows = read_log(self.path) if self.path.exists() else []
        rows = [row for row in rows if row["epoch"] <= epoch]
        rows.append({"epoch": epoch + 1, **{k: float(v) for k, v in logs.items()}})
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, text.getvalue().encode())


def read_log(path):
    """Reads what `Log` wrote.

    Args:
        path: The file.

    Returns:
        A list of dicts, one an epoch: `epoch`, an integer from 1, and those numbers
        that the epoch has.

    Raises:
        ValueError: If it is no such file.
        OSError: If it cannot be read.
    """
    text = pathlib.Path(path).read_bytes().decode(errors="replace")
    try:
        lines = csv.DictReader(io.StringIO(text), strict=True)
        if text and "epoch" not in lines.fieldnames:
            raise ValueError("no column is named epoch")
        return [
            {"epoch": int(row.pop("epoch"))}
            | {k: float(v) for k, v in row.items() if v}
            for row in lines
        ]
    except (AttributeError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(
            f"{path} is no log of a training ({error!r}); expected lines of numbers, "
            "the first named epoch. Take it away, or write to another file."
        ) from error


class ProgressBar(keras.callbacks.Callback):
    """Shows where a training is, its scores so far, and the time that is left.

    Above the bar each epoch leaves a line of its numbers, those of the validation too;
    where the output is no terminal there is this line alone. The scores beside the bar
    are those of the epoch so far. A `fit` that raises tells no callback: then
    `on_train_end()` closes the bar, or the next `fit`.

    Args:
        batches: As in `Divergence`.
        epochs: Of the whole training; those of `fit` if None.
        console: A `rich.console.Console`; standard error if None.
    """

    def __init__(self, batches=None, *, epochs=None, console=None):
        super().__init__()
        from rich.console import Console

        self.epochs, self.batches = epochs, batches
        self.console = console or Console(stderr=True)
        self._validation, self.bar = {"total": None}, None

    def on_train_begin(self, logs=None):
        """Opens the bar, and closes one that a `fit` before this has left."""
        from rich.progress import MofNCompleteColumn, TimeElapsedColumn

        self.on_train_end()
        columns = MofNCompleteColumn(), TimeElapsedColumn()
        self.bar = progress.bar("{task.fields[scores]}", *columns, console=self.console)
        self.task = self.bar.add_task("Training", total=None, scores="")
        self.bar.start()
        atexit.register(self.bar.stop)  # else an error would leave no cursor

    def on_epoch_begin(self, epoch, logs=None):
        """Counts on from the batches of the epochs before."""
        first = first_batch(self.batches)
        epochs, steps = self.epochs or self.params["epochs"], self.params["steps"]
        known = {"description": f"Epoch {epoch + 1} of {epochs}"}
        if steps:
            steps += first
            known |= {"total": epochs * steps, "completed": epoch * steps + first}
        self.bar.update(self.task, **known)

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar by a batch, and shows the scores after it."""
        self.bar.update(self.task, advance=1, scores=_numbers(logs))

    def on_test_begin(self, logs=None):
        """Opens a second bar, as long as the validation before."""
        self._validating = self.bar.add_task(
            "Validation", scores="", **self._validation
        )

    def on_test_batch_end(self, batch, logs=None):
        """Moves it by a batch, and shows the validation's scores after it."""
        self._validation = {"total": batch + 1}
        self.bar.update(self._validating, completed=batch + 1, scores=_numbers(logs))

    def on_test_end(self, logs=None):
        """Takes the second bar away."""
        self.bar.remove_task(self._validating)

    def on_epoch_end(self, epoch, logs=None):
        """Prints the epoch's numbers above the bar."""
        line = f"epoch {epoch + 1:3}  {_numbers(logs)}"
        self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, logs=None):
        """Closes the bar, if there is one."""
        if self.bar:
            self.bar.stop()
            atexit.unregister(self.bar.stop)


def _numbers(logs):
    return "  ".join(f"{name} {float(v):.4f}" for name, v in (logs or {}).items())


class TensorBoard(keras.callbacks.Callback):
    """Writes every epoch's numbers to event files, for `tensorboard --logdir`.

    `keras.callbacks.TensorBoard` does so with TensorFlow alone; this takes the package
    tensorboardX. `loss` and `val_loss` share a chart, as `loss/train` and
    `loss/validation`. After a stop, what is trained again replaces what was there.

    Args:
        folder: Of the files.
    """

    def __init__(self, folder):
        super().__init__()
        self.folder, self.writer = str(folder), None

    def on_epoch_begin(self, epoch, logs=None):
        """Opens the files at the first epoch, whose number only this tells."""
        if self.writer is None:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(self.folder, purge_step=epoch + 1)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the numbers."""
        for name, value in (logs or {}).items():
            kind = "validation" if name.startswith("val_") else "train"
            tag = f"{name.removeprefix('val_')}/{kind}"
            self.writer.add_scalar(tag, float(value), epoch + 1)
        self.writer.flush()

    def picture(self, name, picture, epoch):
        """Writes a picture, (height, width, 3) uint8 RGB, of an epoch from 0."""
        self.writer.add_image(name, picture, epoch + 1, dataformats="HWC")

    def on_train_end(self, logs=None):
        """Closes the files, if there was an epoch."""
        if self.writer is not None:
            self.writer.close()
        self.writer = None


class Overlays(keras.callbacks.Callback):
    """Shows after each epoch what the net makes of a few pictures.

    Picture, truth and prediction side by side, a picture a row, with a legend. The net
    is that of the averages of the weights.

    Args:
        source: A sequence of (picture, labels), as in `keras_fcn.datasets.batches`.
        folder: For `epoch-0001.png` and so on, with the head's name if heads have any.
        count: Pictures, evenly spread over the source.
        board: A `TensorBoard` to show them on, too; it stands before this one.
    """

    def __init__(self, source, folder, *, count=4, board=None):
        super().__init__()
        self.source, self.folder, self.board = source, pathlib.Path(folder), board
        places = np.linspace(0, len(source) - 1, min(count, len(source)))
        self.samples = [source[int(place)] for place in places]

    def on_epoch_end(self, epoch, logs=None):
        """Writes the pictures.

        Raises:
            OSError: If they cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with averaged(self.model):
            found = [_predicted(self.model, inputs) for inputs, _ in self.samples]
        for head, label_set in self.source.label_sets.items():
            rows = [
                (_picture(inputs), _of_head(labels, head), _of_head(prediction, head))
                for (inputs, labels), prediction in zip(
                    self.samples, found, strict=True
                )
            ]
            sheet = compare(rows, label_set)
            stem = f"epoch-{epoch + 1:04}" + (f"-{head}" if head else "")
            images.save_image(self.folder / f"{stem}.png", sheet)
            if self.board:
                self.board.picture(head or "segmentation", sheet, epoch)


def compare(rows, label_set):
    """Lays pictures, their true labels and those predicted side by side.

    Args:
        rows: List of (picture, truth, prediction): RGB, 0-255, and label maps.
        label_set: The `keras_fcn.labels.LabelSet` of the labels.

    Returns:
        (height, width, 3) uint8, RGB, with a legend if the label set has names.

    Raises:
        ValueError: As in `keras_fcn.images.overlay` and `legend`, such as for labels
            that are not as large as their picture, or have no name.
    """
    palette, gap = label_set.palette, 8
    strips = [
        [
            _shrunk(picture),
            *(_shrunk(images.overlay(picture, x, palette)) for x in maps),
        ]
        for picture, *maps in rows
    ]
    cell = [max(panel.size[side] for panel in sum(strips, [])) + gap for side in (0, 1)]
    font = ImageFont.load_default(size=16)
    top = 24  # pixels, for the titles
    sheet = Image.new(
        "RGB", (3 * cell[0] - gap, top + len(rows) * cell[1] - gap), "white"
    )
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(("picture", "truth", "prediction")):
        draw.text((column * cell[0], 2), title, "black", font)
        for row, strip in enumerate(strips):
            sheet.paste(strip[column], (column * cell[0], top + row * cell[1]))
    if not label_set.names:
        return np.array(sheet)
    occurring = np.concatenate([np.unique(x) for _, *maps in rows for x in maps])
    return images.legend(np.array(sheet), label_set.names, palette, occurring)


def _shrunk(picture):
    image = Image.fromarray(picture)
    image.thumbnail((_PANEL, _PANEL))
    return image


def _predicted(model, inputs):
    batch = tree.map_structure(lambda x: np.float32(x)[None], inputs)
    labels = images.decode_segmentation(model.predict_on_batch(batch))
    return tree.map_structure(lambda x: x[0], labels)


def _picture(inputs):
    """What there is to see of a net's inputs: colour, without depth or HHA."""
    array = inputs["color"] if isinstance(inputs, dict) else inputs
    return np.uint8(array[..., :3])


def _of_head(labels, head):
    return labels[head] if head else labels


def curves(log, path):
    """Draws what `Log` wrote, training against validation over the epochs, as a PNG.

    Takes the package matplotlib.

    Args:
        log: The CSV file.
        path: The picture; 1,000 pixels wide.

    Raises:
        ValueError: If the log is no such file, or empty.
        OSError: If it cannot be read or the picture not be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows = read_log(log)
    names = dict.fromkeys(n.removeprefix("val_") for row in rows for n in row)
    names.pop("epoch", None)
    if not names:
        raise ValueError(f"{log} has no numbers to draw; expected an epoch at least.")
    columns = min(3, len(names))
    lines = math.ceil(len(names) / columns)
    figure = Figure(figsize=(10, 3.5 * lines), dpi=100, layout="constrained")
    for place, name in enumerate(names, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for key, label, style in (
            (name, "training", {"color": "tab:blue", "marker": "."}),
            (f"val_{name}", "validation", {"color": "tab:orange", "marker": "o"}),
        ):
            points = [(row["epoch"], row[key]) for row in rows if key in row]
            if points:
                axes.plot(*zip(*points, strict=True), label=label, **style)
        axes.set_xlabel("epoch")
        axes.set_ylabel(name.replace("_", " "))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    picture = io.BytesIO()
    FigureCanvasAgg(figure).print_png(picture)
    write_bytes(path, picture.getbuffer())
