"""Recipes: losses and optimizers for `model.compile`, then plain `model.fit`."""

import difflib
import math
import numbers
from collections.abc import Mapping
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_fcn import devices
from keras_fcn.labels import VOID
from keras_fcn.metrics import SegmentationScores, without_channel
from keras_fcn.weights import check_functional, to_numpy, unshare


@keras.saving.register_keras_serializable("keras_fcn")
class WeightedCrossentropy(keras.losses.Loss):
    """The cross-entropy over the pixels of a batch, weighted by their classes.

    The sum of weight times cross-entropy, divided by the sum of the weights, of the
    whole batch where several devices share it (see `devices`); with
    `reduction="sum"`, not divided, as the reference's heavy learning has it.

    Args:
        weights: One number per class; all 1 if None.
        void: The label to ignore. A batch of nothing else has loss 0.
        jaccard: Factor of 1 - mean IU, with probabilities in place of decisions, which
            is added: to it a thin class is as much as a large one. Over the classes in
            the batch (Rahman & Wang, 2016, equation 3). Not with `reduction="sum"`.
        name: Of the loss.

    Raises:
        ValueError: If a weight is no number from 0, or `jaccard` is below 0, or above
            it with `reduction="sum"`.
    """

    def __init__(
        self,
        weights=None,
        void=VOID,
        jaccard=0.0,
        name="weighted_crossentropy",
        **kwargs,
    ):
        super().__init__(name=name, **kwargs)  # Keras' own reduction and dtype
        if jaccard < 0 or (jaccard and self.reduction == "sum"):
            raise ValueError(
                f"`jaccard` is {jaccard}, with reduction {self.reduction!r}; expected "
                "a factor from 0, and 0 where losses are summed."
            )
        self.weights = None if weights is None else _checked(weights)
        self.void = void
        self.jaccard = jaccard

    def call(self, y_true, y_pred):
        """Returns numbers whose mean, or sum, is the loss, (batch, height, width).

        Args:
            y_true: (batch, height, width) labels, or with a last axis of 1. With a
                label that is neither a class nor void the loss is NaN, on every
                backend and device.
            y_pred: (batch, height, width, classes) logits.

        Raises:
            ValueError: If there is not one label for each pixel, as of one-hot labels.
        """
        labels = without_channel(y_true, y_pred)
        truth = ops.cast(labels, "int32")
        known = (truth >= 0) & (truth < y_pred.shape[-1])
        known = known & (ops.cast(truth, labels.dtype) == labels)
        counts = truth != self.void
        truth = ops.where(counts & known, truth, 0)
        weight = ops.cast(counts, y_pred.dtype)
        if self.weights is not None:
            table = ops.convert_to_tensor(self.weights, y_pred.dtype)
            weight = weight * ops.take(table, truth)
        loss = ops.sparse_categorical_crossentropy(truth, y_pred, from_logits=True)
        loss = ops.where(known | ~counts, loss, math.nan)
        if self.reduction == "sum":
            return weight * loss
        mean = devices.mean(ops.mean(weight))
        loss = weight / ops.where(mean > 0, mean, 1) * loss
        if self.jaccard:
            loss = loss + self.jaccard * _jaccard_distance(truth, counts, y_pred)
        return loss

    def get_config(self):
        """Returns what rebuilds the loss."""
        names = ("weights", "void", "jaccard")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}


def _jaccard_distance(truth, counts, logits):
    counts = ops.cast(counts, logits.dtype)[..., None]
    truth = ops.one_hot(truth, logits.shape[-1], dtype=logits.dtype) * counts
    found = ops.softmax(logits) * counts
    both, true, positive = (_class_means(x) for x in (truth * found, truth, found))
    either = true + positive - both
    present = ops.cast(true > 0, logits.dtype)
    overlap = ops.sum(present * both / ops.where(present > 0, either, 1))
    classes = ops.sum(present)
    return ops.where(classes > 0, 1 - overlap / ops.maximum(classes, 1), 0)


def _class_means(x):
    """The mean of each class over all devices, its gradient that of this one's part."""
    here = ops.mean(x, axis=(0, 1, 2))
    return here + ops.stop_gradient(devices.mean(ops.stop_gradient(here)) - here)


def balanced_weights(counts, power=0.5):
    """Returns class weights (median / count) ^ power, 0 for classes without pixels.

    Args:
        counts: Pixels of each class in the training set, such as the first numbers of
            `keras_fcn.datasets.batches.label_counts`. The median is that of the
            classes with pixels.
        power: 1 is median frequency balancing (Eigen & Fergus, 2015, section 6.3.2),
            0.5 its square root, 0 none.

    Returns:
        A list of floats, one for each class in their order: 1 for one of the median.
    """
    counts = np.asarray(counts, "float64")
    present = counts > 0
    weights = np.zeros(len(counts))
    weights[present] = (np.median(counts[present]) / counts[present]) ** power
    return weights.tolist()


def adjust_logits(model, class_weights, share=0.5):
    """Takes a share of what class weights added to a trained net's logits out of them.

    Under the weights w a class is learned as if it were w times as frequent, and so its
    logit is higher by log w: thin classes are found where they are and where they are
    not, and IU counts both. (Menon et al., 2021, "Long-tail learning via logit
    adjustment", from the other side.) What is subtracted, share times log w, goes into
    the bias of the finest score layer.

    Args:
        model: A net that `fcn` built with one head, and "bilinear" upsampling: with
            "learned" the upsampling may scale what is subtracted.
        class_weights: One number per class, as the net was trained with; classes of
            weight 0 stay as they are.
        share: 0 for nothing, 1 for the frequencies of the classes themselves.

    Raises:
        ValueError: If the net is another one, or has another number of classes.
    """
    scores = [
        layer
        for layer in model.layers
        if isinstance(layer, keras.layers.Conv2D) and layer.name.startswith("score_")
    ]
    weights = np.asarray(_checked(class_weights))
    heads = model.output if isinstance(model.output, dict) else {"": model.output}
    found = [logits.shape[-1] for logits in heads.values()]
    if len(model.inputs) > 1:
        raise ValueError(
            f"{model.name} has two streams, whose scores are averaged; expected a net "
            "of one stream, whose finest score layer can be adjusted."
        )
    if found != [weights.size]:
        raise ValueError(
            f"The class weights {weights.tolist()} were given for {model.name}, whose "
            f"heads tell {' and '.join(map(str, found))} classes apart; expected a net "
            "of one head and a weight for each class."
        )
    finest = scores[-1].bias
    shift = np.log(weights, where=weights > 0, out=np.zeros_like(weights))
    finest.assign(to_numpy(finest) - share * shift)


# Multipliers of learning rate and decay, (kernel, bias). In the net of FCN-AlexNet no
# layer of the trunk has any, so Caffe's own hold: 1.
SCORE_FACTORS = ((1, 1), (2, 0))
PLAIN_FACTORS = ((1, 1), (1, 1))
AT_ONCE = {"pool4": 1e-2, "pool3": 1e-4}  # what taps are multiplied by
ACCUMULATED = {"momentum": 0.9, "accumulate": 20, "normalize": True}


class Recipe(NamedTuple):
    """How a reference net was trained: its solver.prototxt and solve.py.

    One image a batch, at its own size, drawn at random with replacement. This is heavy
    learning; the accumulated one of CVPR 2015, section 4.3, for VGG16 is

    ```python
    recipe = RECIPES["voc-fcn32s"]._replace(learning_rate=1e-4, **ACCUMULATED)
    ```

    Args:
        learning_rate: Fixed. That of biases is twice as high.
        iterations: Updates that solve.py makes, each after `accumulate` batches.
        start: The checkpoint whose weights the training begins with, by `transplant`.
        stride: Pixels per cell of the finest prediction of the net.
        skip_scales: Of the net, as in `fcn`.
        momentum: Of `CaffeSGD`.
        accumulate: Batches whose gradients are averaged before one update.
        normalize: Whether the loss is the mean over the pixels that count, not their
            sum.
        trunk: Multipliers of the layers that are no score layers.
    """

    learning_rate: float
    iterations: int
    start: str
    stride: int = 32
    skip_scales: dict | None = None
    momentum: float = 0.99
    accumulate: int = 1
    normalize: bool = False
    trunk: tuple = SCORE_FACTORS

    @property
    def backbone(self):
        """That of the net, which is the one that it starts from."""
        return self.start.partition("-")[0]

    @property
    def steps(self):
        """Batches that the whole training sees: the steps of `fit`."""
        return self.iterations * self.accumulate


# By the folder of shelhamer/fcn.berkeleyvision.org that holds solver and nets.
RECIPES = {
    "voc-fcn32s": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "voc-fcn16s": Recipe(1e-12, 100_000, "vgg16-32s-voc", 16),
    "voc-fcn8s": Recipe(1e-14, 100_000, "vgg16-16s-voc", 8),
    "voc-fcn8s-atonce": Recipe(1e-10, 300_000, "vgg16-imagenet", 8, AT_ONCE),
    "voc-fcn-alexnet": Recipe(
        1e-4, 100_000, "alexnet-imagenet", trunk=PLAIN_FACTORS, **ACCUMULATED
    ),
    "nyud-fcn32s-color": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "nyud-fcn32s-hha": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "nyud-fcn32s-color-d": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    # Both streams: of the colour net after 28,000 steps and the HHA net after 60,000.
    "nyud-fcn32s-color-hha": Recipe(1e-12, 100_000, "vgg16-32s-nyud"),
    "siftflow-fcn32s": Recipe(1e-10, 100_000, "vgg16-imagenet"),
    "siftflow-fcn16s": Recipe(1e-12, 100_000, "vgg16-32s-siftflow", 16),
    "siftflow-fcn8s": Recipe(1e-12, 100_000, "vgg16-16s-siftflow", 8),
    "pascalcontext-fcn32s": Recipe(1e-10, 400_000, "vgg16-imagenet"),
    "pascalcontext-fcn16s": Recipe(1e-12, 400_000, "vgg16-32s-pascal-context", 16),
    "pascalcontext-fcn8s": Recipe(1e-14, 400_000, "vgg16-16s-pascal-context", 8),
}
WEIGHT_DECAY = 5e-4  # of every solver


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
        **kwargs,  # Keras' own, such as gradient_accumulation_steps
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


def find_recipe(name):
    """Returns a reference net's `Recipe`.

    Args:
        name: A key of `RECIPES`, such as "siftflow-fcn8s". Without a data set it is
            VOC's: "fcn8s" is "voc-fcn8s".

    Raises:
        ValueError: If there is none; names those that come near.
    """
    recipe = RECIPES.get(name, RECIPES.get(f"voc-{name}"))
    if recipe is None:
        near = difflib.get_close_matches(str(name), RECIPES, n=3, cutoff=0.3)
        raise ValueError(
            f"There is no recipe {name!r}; expected one of "
            f"keras_fcn.training.RECIPES, such as {', '.join(near or RECIPES)}."
        )
    return recipe


def compile_reference(
    model, recipe, *, class_weights=None, scores=("pixel_accuracy", "mean_iou")
):
    """Compiles a net as the reference trained it; then `model.fit` on single images.

    ```python
    model = keras_fcn.FCN32s(weights="imagenet", num_classes=21)
    keras_fcn.compile_reference(model, "fcn32s")
    epochs = math.ceil(RECIPES["voc-fcn32s"].steps / len(batches))
    model.fit(batches, epochs=epochs, shuffle=False)  # a `Batches` draws its own order
    ```

    Learned upsampling is trained like the kernels, but where a layer is not trainable:
    `model.get_layer("upscore8").trainable = False` first, for the fixed last one of
    CVPR 2015. The reference's is fixed throughout.

    Args:
        model: A net that `fcn` or `late_fusion` built. The losses of several heads are
            added.
        recipe: Of `find_recipe`, such as "fcn8s", or a `Recipe`.
        class_weights: One number per class, as `balanced_weights` gives, or a dict of
            them by head; None for none, as the reference (paper, section 4.3).
        scores: To follow, as in `SegmentationScores`.

    Raises:
        ValueError: If there is no such recipe or score, if the learning rate is not
            above 0, if the class weights are not as many as the classes, or if the net
            is not functional or tells 1 class apart or more than 255.
    """
    if not isinstance(recipe, Recipe):
        recipe = find_recipe(recipe)
    _check_rate(recipe.learning_rate)
    optimizer = CaffeSGD(
        recipe.learning_rate,
        recipe.momentum,
        default_factors=recipe.trunk,
        factors={
            layer.name: SCORE_FACTORS
            for layer in model.layers
            if layer.name.startswith("score_")
        },
        gradient_accumulation_steps=recipe.accumulate
        if recipe.accumulate > 1
        else None,
    )
    _compile(
        model,
        optimizer,
        class_weights,
        scores,
        reduction="sum_over_batch_size" if recipe.normalize else "sum",
    )


def fix_trunk(model):
    """Makes all layers but the score layers untrainable: the paper's FCN-32s-fixed.

    Before compiling, as Keras wants it.

    Args:
        model: A net that `fcn` or `late_fusion` built.
    """
    for layer in model.layers:
        if not layer.name.startswith("score_"):
            layer.trainable = False


@keras.saving.register_keras_serializable("keras_fcn")
class AveragingAdamW(keras.optimizers.AdamW):
    """AdamW that may be trained on with after `fit` left the averages in the weights.

    With Keras' own a second `fit` is an error on JAX: they are one array then. Biases,
    and what normalisation multiplies by and adds, do not decay.
    """

    def __init__(self, learning_rate=0.001, **kwargs):  # Keras' own
        super().__init__(learning_rate, **kwargs)
        self.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])

    def finalize_variable_values(self, var_list):
        """Puts the averages, if there are any, into the weights."""
        super().finalize_variable_values(var_list)
        if self.use_ema:
            unshare(var_list)


def compile_modern(
    model,
    steps,
    *,
    learning_rate=6e-4,
    weight_decay=0.05,
    class_weights=None,
    jaccard=0.0,
    averaging=0.1,
    scores=("pixel_accuracy", "mean_iou"),
):
    """Compiles a net for people's own data: AdamW, warm-up, cosine decay, averaging.

    Args:
        model: A net that `fcn` or `late_fusion` built. The losses of several heads are
            added.
        steps: Batches that the whole training will see.
        learning_rate: Its peak, after a twentieth of the steps.
        weight_decay: Of AdamW; biases and the scales and offsets of normalisation have
            none.
        class_weights: One number per class, as `balanced_weights` gives, or a dict of
            them by head; or None.
        jaccard: As in `WeightedCrossentropy`.
        averaging: How far back the exponential moving average (EMA) of the weights
            reaches that `fit` leaves in the model at its end, as a share of the steps:
            its momentum is 1 - 1 / (averaging * steps). None for none, as suits a net
            with batch normalisation, whose statistics are those of the weights
            themselves.
        scores: To follow, as in `SegmentationScores`.

    Raises:
        ValueError: If there is no step or no such score, if the learning rate is not
            above 0, if `jaccard` is below 0, if the class weights are not as many as
            the classes, or if the net is not functional or tells 1 class apart or more
            than 255.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} was given; expected 1 or more.")
    _check_rate(learning_rate)
    warmup = max(1, steps // 20)
    schedule = keras.optimizers.schedules.CosineDecay(
        learning_rate / warmup,
        max(1, steps - warmup),
        warmup_target=learning_rate,
        warmup_steps=warmup,
    )
    optimizer = AveragingAdamW(
        schedule,
        weight_decay=weight_decay,
        global_clipnorm=1.0,  # nets without normalisation: one bad batch is enough
        use_ema=averaging is not None,
        ema_momentum=1 - 1 / max(1, averaging * steps) if averaging else 0.0,
    )
    _compile(model, optimizer, class_weights, scores, jaccard=jaccard)


def _check_rate(learning_rate):
    if isinstance(learning_rate, numbers.Real) and not learning_rate > 0:
        raise ValueError(
            f"learning_rate={learning_rate} was given; expected a number above 0."
        )


def _checked(weights, heads=""):
    """Class weights as a list of numbers; `heads` is what else is expected."""
    numbers = None if isinstance(weights, Mapping) else [float(w) for w in weights]
    if numbers is None or not all(0 <= number < math.inf for number in numbers):
        raise ValueError(
            f"The class weights {weights} were given; expected a list of numbers from "
            f"0, one for each class in their order{heads}."
        )
    return numbers


def _check_heads(class_weights, heads):
    """Checks class weights against `{head: classes}`, the head "" for the only one."""
    by_head = class_weights if heads.keys() != {""} else {"": class_weights}
    given = set(by_head) if isinstance(by_head, Mapping) else None
    if given != set(heads):
        raise ValueError(
            f"The class weights {class_weights} were given for a net of the heads "
            f"{', '.join(heads)}; expected a dict of a list for each of them."
        )
    for head, classes in heads.items():
        if by_head[head] is None:
            continue
        found = len(_checked(by_head[head], ", or for several heads a dict of those"))
        if found != classes:
            raise ValueError(
                f"{found} class weights were given{head and f' for {head}'}; expected "
                f"{classes}, one for each class."
            )


def _compile(
    model,
    optimizer,
    class_weights,
    scores,
    *,
    jaccard=0.0,
    reduction="sum_over_batch_size",
):
    """Compiles a net of one head or several, each with its loss and scores."""
    check_functional(model)

    def each(make):
        """What `make` makes of each head's name and logits."""
        if isinstance(model.output, dict):
            return {head: make(head, logits) for head, logits in model.output.items()}
        return make(None, model.output)

    def loss(head, logits):
        weights = class_weights[head] if head and class_weights else class_weights
        return WeightedCrossentropy(weights, jaccard=jaccard, reduction=reduction)

    for logits in keras.tree.flatten(model.output):
        if not 2 <= logits.shape[-1] <= VOID:
            raise ValueError(
                f"{model.name} tells {logits.shape[-1]} classes apart; expected 2 to "
                f"{VOID}, for of one there is nothing to learn, and {VOID} is void."
            )

    def metrics(head, logits):
        return [SegmentationScores(logits.shape[-1], score) for score in scores]

    if class_weights is not None:
        classes = each(lambda head, logits: logits.shape[-1])
        _check_heads(
            class_weights, classes if isinstance(classes, dict) else {"": classes}
        )
    model.compile(optimizer, each(loss), metrics=each(metrics))
