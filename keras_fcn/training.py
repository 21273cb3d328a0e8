"""Recipes: losses and optimizers for `model.compile`, then plain `model.fit`."""

import difflib
import pathlib
import zipfile
import zlib
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fcn import progress
from keras_fcn.files import replacing
from keras_fcn.labels import VOID
from keras_fcn.metrics import SegmentationScores
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


@keras.saving.register_keras_serializable("keras_fcn")
class WeightedCrossentropy(keras.losses.Loss):
    """The mean cross-entropy over the pixels of a batch, weighted by their classes.

    The sum of weight times cross-entropy, divided by the sum of the weights.

    Args:
        weights: One number per class; all 1 if None.
        void: The label to ignore. A batch of nothing else has loss 0.
        name: Of the loss.
    """

    def __init__(self, weights=None, void=VOID, name="weighted_crossentropy", **kwargs):
        super().__init__(name=name, **kwargs)  # Keras' own reduction and dtype
        self.weights = None if weights is None else [float(w) for w in weights]
        self.void = void

    def call(self, y_true, y_pred):
        """Returns numbers whose mean is the loss, (batch, height, width).

        Args:
            y_true: (batch, height, width) labels, or with a last axis of 1.
            y_pred: (batch, height, width, classes) logits.
        """
        if len(y_true.shape) == len(y_pred.shape):
            y_true = ops.squeeze(y_true, axis=-1)
        truth = ops.cast(y_true, "int32")
        counts = truth != self.void
        truth = ops.where(counts, truth, 0)
        weight = ops.cast(counts, y_pred.dtype)
        if self.weights is not None:
            table = ops.convert_to_tensor(self.weights, y_pred.dtype)
            weight = weight * ops.take(table, truth)
        loss = ops.sparse_categorical_crossentropy(truth, y_pred, from_logits=True)
        mean = ops.mean(weight)
        return weight / ops.where(mean > 0, mean, 1) * loss

    def get_config(self):
        """Returns what rebuilds the loss."""
        return {**super().get_config(), "weights": self.weights, "void": self.void}


def balanced_weights(counts, power=0.5):
    """Returns class weights (median / count) ^ power, 0 for classes without pixels.

    Args:
        counts: Pixels of each class in the training set.
        power: 1 is median frequency balancing (Eigen & Fergus, 2015, section 6.3.2),
            0.5 its square root, 0 none.
    """
    counts = np.asarray(counts, "float64")
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = (np.median(counts[present]) / counts[present]) ** power
    return weights.tolist()


class Recipe(NamedTuple):
    """How a reference net was trained: its solver.prototxt and solve.py.

    One image a step, at its own size, drawn at random with replacement.

    Args:
        learning_rate: Fixed. That of biases is twice as high.
        iterations: Steps that solve.py runs.
        start: The checkpoint whose weights the training begins with, by `transplant`.
        momentum: Of `CaffeSGD`.
        accumulate: Steps whose gradients are averaged before one update.
        normalize: Whether the loss is the mean over the pixels that count, not their
            sum.
    """

    learning_rate: float
    iterations: int
    start: str
    momentum: float = 0.99
    accumulate: int = 1
    normalize: bool = False


# By the folder of shelhamer/fcn.berkeleyvision.org that holds solver and nets.
RECIPES = {
    "voc-fcn32s": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "voc-fcn16s": Recipe(1e-12, 100_000, "vgg16-32s-voc"),
    "voc-fcn8s": Recipe(1e-14, 100_000, "vgg16-16s-voc"),
    "voc-fcn8s-atonce": Recipe(1e-10, 300_000, "vgg16-imagenet"),
    "voc-fcn-alexnet": Recipe(1e-4, 100_000, "alexnet-imagenet", 0.9, 20, True),
    "nyud-fcn32s-color": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "nyud-fcn32s-hha": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "nyud-fcn32s-color-d": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    # Both streams: of the colour net after 28,000 steps and the HHA net after 60,000.
    "nyud-fcn32s-color-hha": Recipe(1e-12, 100_000, "vgg16-32s-nyud"),
    "siftflow-fcn32s": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "siftflow-fcn16s": Recipe(1e-12, 100_000, "vgg16-32s-siftflow"),
    "siftflow-fcn8s": Recipe(1e-12, 100_000, "vgg16-16s-siftflow"),
    "pascalcontext-fcn32s": Recipe(1e-10, 400_000, "vgg16-imagenet"),
    "pascalcontext-fcn16s": Recipe(1e-12, 400_000, "vgg16-32s-pascal-context"),
    "pascalcontext-fcn8s": Recipe(1e-14, 400_000, "vgg16-16s-pascal-context"),
}
WEIGHT_DECAY = 5e-4  # of every solver

# Multipliers of learning rate and decay, (kernel, bias). In the net of FCN-AlexNet no
# layer of the trunk has any, so Caffe's own hold: 1.
SCORE_FACTORS = ((1, 1), (2, 0))
PLAIN_FACTORS = ((1, 1), (1, 1))


@keras.saving.register_keras_serializable("keras_fcn")
class CaffeSGD(keras.optimizers.SGD):
    """Caffe's SGD (src/caffe/solvers/sgd_solver.cpp), for `model.compile`.

    With the multipliers r and d of a weight w, its gradient g and the velocity v:
    v <- momentum v + r learning_rate (g + d decay w), then w <- w - v. The decay is
    part of the gradient and so of the momentum, which it is not in `SGD` and `AdamW`.
    `gradient_accumulation_steps` is `iter_size`: the mean of so many gradients, to
    which the decay is added once.

    Args:
        learning_rate: Fixed, or a schedule.
        momentum: 0 to 1.
        decay: Of weights whose multiplier is not 0.
        factors: `{layer: ((rate, decay), (rate, decay))}`, the multipliers of the
            kernel and the bias of layers that have others than `default_factors`. A
            rate of 0 keeps a layer as it is.
        default_factors: Of all other layers; biases of the reference nets learn twice
            as fast and do not decay.
        name: Of the optimizer.
        kwargs: Keras' own, as in `keras.optimizers.SGD`.
    """

    def __init__(
        self,
        learning_rate=1e-10,
        momentum=0.99,
        decay=WEIGHT_DECAY,
        factors=None,
        default_factors=SCORE_FACTORS,
        name="caffe_sgd",
        **kwargs,  # Keras' own: name, gradient_accumulation_steps ...
    ):
        super().__init__(learning_rate, momentum, name=name, **kwargs)
        self.decay = decay
        self.factors = factors or {}
        self.default_factors = default_factors

    def update_step(self, gradient, variable, learning_rate):
        """Changes one variable."""
        rate, decay = self._factors_of(variable)
        if rate == 0:
            return
        gradient = ops.cast(gradient, variable.dtype)
        if decay:
            gradient = gradient + decay * self.decay * ops.convert_to_tensor(variable)
        super().update_step(gradient, variable, learning_rate * rate)

    def _factors_of(self, variable):
        # TensorFlow passes its own variable, which does not know its layer.
        known = self._trainable_variables[self._get_variable_index(variable)]
        *_, layer, kind = ["", *known.path.split("/")]
        return self.factors.get(layer, self.default_factors)[kind == "bias"]

    def get_config(self):
        """Returns what rebuilds the optimizer."""
        own = {"decay": self.decay, "factors": self.factors}
        config = {**super().get_config(), **own}
        config["default_factors"] = self.default_factors
        del config["nesterov"]
        return config


def compile_reference(model, name):
    """Compiles a net as the reference trained it; then `model.fit` on single images.

    ```python
    model = keras_fcn.FCN32s(weights="imagenet", num_classes=21)
    keras_fcn.compile_reference(model, "voc-fcn32s")
    model.fit(batches, epochs=1, steps_per_epoch=RECIPES["voc-fcn32s"].iterations)
    ```

    Learned upsampling is trained like the kernels; the reference's was fixed.

    Args:
        model: A net that `fcn` or `late_fusion` built. The losses of several heads are
            added.
        name: A key of `RECIPES`, such as "voc-fcn8s".

    Raises:
        ValueError: If there is no such recipe.
    """
    if name not in RECIPES:
        near = difflib.get_close_matches(str(name), RECIPES, n=3, cutoff=0.3)
        raise ValueError(
            f"There is no recipe {name!r}; expected one of keras_fcn.training.RECIPES, "
            f"such as {', '.join(near or RECIPES)}."
        )
    recipe = RECIPES[name]
    optimizer = CaffeSGD(
        recipe.learning_rate,
        recipe.momentum,
        default_factors=PLAIN_FACTORS if name == "voc-fcn-alexnet" else SCORE_FACTORS,
        factors={
            layer.name: SCORE_FACTORS
            for layer in model.layers
            if layer.name.startswith("score_")
        },
        gradient_accumulation_steps=recipe.accumulate
        if recipe.accumulate > 1
        else None,
    )

    def loss():
        if recipe.normalize:
            return WeightedCrossentropy()
        return keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, ignore_class=VOID, reduction="sum"
        )

    heads = isinstance(model.output, dict)
    model.compile(
        optimizer, {head: loss() for head in model.output} if heads else loss()
    )


def compile_modern(
    model,
    steps,
    *,
    learning_rate=6e-4,
    weight_decay=0.05,
    class_weights=None,
    averaging=0.1,
    scores=("pixel_accuracy", "mean_iou"),
):
    """Compiles a net for people's own data: AdamW, warm-up, cosine decay, averaging.

    Args:
        model: A net with one output.
        steps: Batches that the whole training will see.
        learning_rate: Its peak, after a twentieth of the steps.
        weight_decay: Of AdamW; biases have none.
        class_weights: One number per class, as `balanced_weights` gives; or None.
        averaging: The share of the steps over which the average of the weights reaches
            back that `fit` leaves in the model at its end: a momentum of
            1 - 1 / (averaging * steps). None for none.
        scores: To follow, as in `SegmentationScores`.
    """
    warmup = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / warmup,
        max(1, steps - warmup),
        warmup_target=learning_rate,
        warmup_steps=warmup,
    )
    optimizer = keras.optimizers.AdamW(
        schedule,
        weight_decay=weight_decay,
        global_clipnorm=1.0,  # nets without normalisation: one bad batch is enough
        use_ema=averaging is not None,
        ema_momentum=1 - 1 / max(1, averaging * steps) if averaging else 0.0,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    classes = model.output_shape[-1]
    model.compile(
        optimizer,
        WeightedCrossentropy(class_weights),
        metrics=[SegmentationScores(classes, score) for score in scores],
    )


class Snapshots(keras.callbacks.Callback):
    """Writes the whole state of a training to one file, each time an epoch ends.

    Weights, optimizer, seeds of Dropout and the epoch: what `restore` needs so that
    the training goes on as if it had never stopped. The file is replaced in one move.

    Pass it before `SwapEMAWeights(swap_on_epoch=True)`, which ends an epoch with other
    weights in the model than the training goes on with.

    Args:
        path: The .npz file.
    """

    def __init__(self, path):
        super().__init__()
        self.path = pathlib.Path(path)

    def on_epoch_end(self, epoch, logs=None):
        """Writes the state after `epoch`.

        Raises:
            ValueError: If a number in it is not finite: the training has diverged.
                The file keeps the state before that.
            OSError: If it cannot be written; the file keeps what it holds.
        """
        with replacing(self.path) as file, zipfile.ZipFile(file, "w") as archive:
            _write_array(archive, "epoch", np.array(epoch + 1))
            for i, variable in enumerate(_state(self.model)):
                array = to_numpy(variable)
                if not np.isfinite(array).all():
                    raise ValueError(
                        f"After epoch {epoch + 1} {variable.path} is not finite; "
                        f"expected numbers, so {self.path} stays as it was. Train with "
                        "a lower learning rate."
                    )
                _write_array(archive, str(i), array)


def _write_array(archive, name, array):
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


class ProgressBar(keras.callbacks.Callback):
    """Shows where a training is, with the last epoch's numbers, on one line.

    Where the output is no terminal it prints one line an epoch instead.

    Args:
        console: A `rich.console.Console`; standard error if None.
    """

    def __init__(self, console=None):
        super().__init__()
        from rich.console import Console

        self.console = console or Console(stderr=True)

    def on_train_begin(self, logs=None):
        """Opens the bar."""
        self.bar = progress.bar(console=self.console)
        self.task = self.bar.add_task("Training", total=None)
        self.bar.start()

    def on_epoch_begin(self, epoch, logs=None):
        """Counts on from the batches of the epochs before."""
        steps = self.params["steps"]
        total = (self.params["epochs"]) * steps
        name = f"Epoch {epoch + 1} of {self.params['epochs']}"
        self.bar.update(
            self.task, total=total, completed=epoch * steps, description=name
        )

    def on_train_batch_end(self, batch, logs=None):
        """Moves the bar."""
        self.bar.advance(self.task)

    def on_epoch_end(self, epoch, logs=None):
        """Prints the epoch's numbers above the bar."""
        numbers = "  ".join(f"{k} {float(v):.4f}" for k, v in (logs or {}).items())
        self.console.print(
            f"epoch {epoch + 1:3}  {numbers}", highlight=False, soft_wrap=True
        )

    def on_train_end(self, logs=None):
        """Closes the bar."""
        self.bar.stop()


def restore(model, path):
    """Puts a compiled model back to where `Snapshots` saw it last.

    What follows is bit for bit what it would have been (on one machine, and as far as
    the backend computes alike twice) if

    - the model is built and compiled with the arguments of the first run, and every
      random layer of it has a seed where Keras runs on PyTorch,
    - the data are those of the epoch: `batches.seek(epoch)`, `fit(shuffle=False)`,
    - callbacks have no memory, as `EarlyStopping` and `ReduceLROnPlateau` have.

    ```python
    epoch = restore(model, "state.npz")
    batches.seek(epoch)
    model.fit(batches, initial_epoch=epoch, epochs=100, shuffle=False)
    ```

    Args:
        model: The model, built and compiled as it was then.
        path: The .npz file.

    Returns:
        The number of epochs that it has been trained for, for `fit(initial_epoch=)`.

    Raises:
        ValueError: If the file is damaged, or of another model or optimizer; nothing is
            changed.
        OSError: If it cannot be read.
    """
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    variables = {str(i): variable for i, variable in enumerate(_state(model))}
    arrays = _read_arrays(path)
    wanted = {"epoch": (), **{i: tuple(v.shape) for i, v in variables.items()}}
    found = {i: array.shape for i, array in arrays.items() if array.dtype.kind in "fiu"}
    if found != wanted:
        raise ValueError(
            f"{path} is of another net or optimizer; expected {len(wanted)} arrays of "
            "this one's shapes. Pass the options of the first run, or start anew."
        )
    epoch = int(arrays["epoch"])
    assign_all([(variable, arrays.pop(i)) for i, variable in variables.items()])
    return epoch


def _read_arrays(path):
    with open(path, "rb") as file:  # what the system says against it is an OSError
        try:
            with np.load(file, allow_pickle=False) as archive:
                return {name: np.asarray(archive[name]) for name in archive.files}
        except _DAMAGE as error:
            raise ValueError(
                f"{path} is no snapshot, or is damaged ({error}); expected a file that "
                "Snapshots wrote. Use an earlier copy, or start anew."
            ) from error


def _state(model):
    # Not `model.variables`: those of its metrics come into being with the first batch.
    layers = [v for layer in model.layers for v in layer.variables]
    return [*layers, *model.optimizer.variables]
