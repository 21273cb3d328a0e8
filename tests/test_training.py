import keras
import numpy as np
import oracle
import pytest
from keras import layers, ops

from keras_fcn import metrics, models
from keras_fcn.training import (
    RECIPES,
    WeightedCrossentropy,
    adjust_logits,
    balanced_weights,
    compile_modern,
    compile_reference,
)

VOID = 255


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


@pytest.mark.parametrize("label", [3, 254, -1, 0.5, 1 / 255, np.nan])
@pytest.mark.parametrize("reduction", ["sum", "sum_over_batch_size"])
def test_a_label_that_is_no_class_is_not_taken_for_one_or_for_void(label, reduction):
    truth, logits = batch()
    truth = truth.astype("float32")
    truth[0, 0, 0] = label
    loss = WeightedCrossentropy([1, 2, 3], reduction=reduction)
    assert np.isnan(float(loss(truth, logits)))


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


@pytest.mark.parametrize("arguments", [{"weights": [1, 2, 3]}, {"jaccard": 1.0}])
def test_a_batch_of_nothing_but_void_has_no_loss_and_teaches_nothing(arguments):
    model = linear()
    model.compile(keras.optimizers.SGD(1.0), WeightedCrossentropy(**arguments))
    before = [read(v) for v in model.weights]
    pictures = np.random.default_rng(0).uniform(0, 255, (2, 4, 5, 3))
    history = model.fit(pictures, np.full((2, 4, 5), VOID), verbose=0).history
    assert history["loss"] == [0.0]
    for variable, then in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(read(variable), then)


@pytest.mark.parametrize("seed", range(3))
def test_the_jaccard_distance_is_that_of_probabilities_class_by_class(seed):
    truth, logits = batch(seed, classes=4)
    truth[truth == 2] = VOID  # a class that is not there
    odds = np.exp(logits.astype("float64"))
    found = odds / odds.sum(axis=-1, keepdims=True)
    overlaps = []
    for label in (0, 1, 3):
        both = either = 0.0
        for place in np.argwhere(truth != VOID):
            share, right = found[(*place, label)], truth[tuple(place)] == label
            both += share * right
            either += share + right - share * right
        overlaps.append(both / either)
    plain, more = (WeightedCrossentropy(jaccard=x)(truth, logits) for x in (0, 0.5))
    expected = 0.5 * (1 - np.mean(overlaps))
    assert float(more) - float(plain) == pytest.approx(expected, rel=1e-4)


def test_of_a_net_that_is_sure_the_jaccard_distance_is_one_minus_its_mean_iou():
    truth, logits = batch(shape=(1, 40, 50))
    sure = 1000 * np.eye(3, dtype="float32")[logits.argmax(-1)]
    plain, more = (WeightedCrossentropy(jaccard=x)(truth, sure) for x in (0, 1e4))
    matrix = metrics.confusion_matrix(truth, logits.argmax(-1), 3)
    expected = 1 - metrics.scores(matrix)["mean_iou"]
    assert (float(more) - float(plain)) / 1e4 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    "arguments", [{"jaccard": -1}, {"jaccard": 1.0, "reduction": "sum"}]
)
def test_a_jaccard_distance_that_makes_no_sense_is_refused(arguments):
    with pytest.raises(ValueError, match="a factor from 0, and 0 where losses are sum"):
        WeightedCrossentropy(**arguments)


def test_a_loss_is_rebuilt_from_its_configuration():
    loss = WeightedCrossentropy([1, 2, 3], void=0, jaccard=0.5, name="mine")
    config = keras.saving.serialize_keras_object(loss)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == loss.get_config()
    assert (again.weights, again.void, again.name) == ([1, 2, 3], 0, "mine")
    assert again.jaccard == 0.5


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


def test_a_net_with_averages_may_be_fitted_again_and_saved(tmp_path):
    model = linear()
    compile_modern(model, 4)
    pictures = np.random.default_rng(0).normal(size=(2, 2, 2, 3))
    truth = np.array([[[0, 1], [2, 0]], [[1, 2], [0, 1]]])
    losses = [model.fit(pictures, truth, verbose=0).history["loss"] for _ in range(3)]
    assert losses[2] < losses[1] < losses[0]
    model.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras")
    assert again.fit(pictures, truth, verbose=0).history["loss"] < losses[2]


def test_a_saved_training_goes_on_with_what_decays(tmp_path):
    image = keras.Input((None, None, 3))
    x = layers.BatchNormalization(name="norm")(layers.Conv2D(3, 1, name="a")(image))
    model = keras.Model(image, layers.Conv2D(3, 1, name="score")(x))
    model.get_layer("a").bias.assign([1, 2, 3])
    compile_modern(model, 40, learning_rate=0.1, weight_decay=0.5, averaging=None)
    nothing = np.zeros((1, 2, 2, 3)), np.full((1, 2, 2), VOID)
    model.train_on_batch(*nothing)
    model.save(tmp_path / "net.keras")
    again = keras.models.load_model(tmp_path / "net.keras")
    before = [read(v) for v in again.trainable_variables]
    again.train_on_batch(*nothing)
    for variable, was in zip(again.trainable_variables, before, strict=True):
        decays = variable.name == "kernel"
        np.testing.assert_array_equal(read(variable) != was, decays and was != 0)


def test_what_decays_may_be_chosen_after_compiling():
    model = linear()
    model.get_layer("score").bias.assign([1, 2, 3])
    compile_modern(model, 20, learning_rate=0.1, weight_decay=0.5, averaging=None)
    model.optimizer.exclude_from_weight_decay(var_names=["kernel"])
    before = [read(v) for v in model.weights]
    model.fit(np.zeros((1, 2, 2, 3)), np.full((1, 2, 2), VOID), verbose=0)
    kernel, bias = (read(v) for v in model.weights)
    np.testing.assert_array_equal(kernel, before[0])
    np.testing.assert_allclose(bias, before[1] * (1 - 0.1 * 0.5), rtol=1e-5)


def test_one_hot_labels_are_told_from_labels():
    truth, logits = batch()
    one_hot = np.eye(3)[truth % 3]
    for take in (WeightedCrossentropy(), metrics.SegmentationScores(3).update_state):
        with pytest.raises(ValueError, match="5, 3. were given.*take the argmax"):
            take(one_hot, logits)


def test_a_net_that_does_not_say_what_it_takes_is_not_compiled():
    with pytest.raises(ValueError, match="Sequential .* expected a functional net"):
        compile_modern(keras.Sequential([layers.Conv2D(3, 1)]), 9)


def test_the_recipe_for_peoples_own_data_is_what_it_says_it_is():
    model = linear()
    compile_modern(model, 1000, class_weights=[1, 2, 3], jaccard=0.5)
    optimizer = model.optimizer
    assert (model.loss.weights, model.loss.jaccard) == ([1, 2, 3], 0.5)
    assert optimizer.global_clipnorm == 1
    assert optimizer.weight_decay == 0.05
    assert optimizer.use_ema
    assert optimizer.ema_momentum == pytest.approx(0.99)  # back over 100 steps
    rates = [float(optimizer._learning_rate(step)) for step in (0, 49, 50, 525, 1000)]
    expected = [6e-4 / 50, 6e-4, 6e-4, 3e-4, 0]
    np.testing.assert_allclose(rates, expected, rtol=0.03, atol=1e-9)


@pytest.mark.parametrize("void", [0, 2])
def test_void_may_be_another_label(void):
    truth, logits = batch(void=0)
    marked = np.where(truth == void, VOID, truth)
    expected = float(WeightedCrossentropy()(marked, logits))
    found = float(WeightedCrossentropy(void=void)(truth, logits))
    assert found == pytest.approx(expected, rel=1e-6)
    metric = metrics.SegmentationScores(3, void=void)
    metric.update_state(truth, logits)
    np.testing.assert_array_equal(
        metric.matrix(), metrics.confusion_matrix(marked, logits.argmax(-1), 3)
    )


def test_the_average_forgets_where_a_training_began_be_it_ever_so_short():
    for steps in (100, 500, 4000):
        model = linear()
        compile_modern(model, steps)
        # Its time constant is a tenth of the steps: what began counts e^-10.
        kept = steps * np.log(model.optimizer.ema_momentum)
        assert -10.6 < kept < -9.9
    model = linear()
    compile_modern(model, 10)  # the last step alone
    assert model.optimizer.ema_momentum == 0


@pytest.mark.parametrize("stride", [32, 16, 8, 4])
def test_adjusted_logits_are_lower_by_a_share_of_the_log_of_the_weights(stride):
    model = oracle.draw(models.fcn("googlenet", stride, 3, width=1e-6))
    pictures = np.random.default_rng(0).uniform(0, 255, (1, 21, 34, 3))
    before = model.predict_on_batch(pictures)
    adjust_logits(model, [2.0, 0.0, 0.25], 0.5)
    shift = [0.5 * np.log(2), 0, 0.5 * np.log(0.25)]
    found = before - model.predict_on_batch(pictures)
    np.testing.assert_allclose(
        found, np.broadcast_to(shift, found.shape), atol=1e-5 * np.abs(before).max()
    )


@pytest.mark.parametrize(
    ("classes", "weights"),
    [
        (3, [1, 2]),
        (3, [1, -2, 1]),
        (3, {0: 1, 1: 2, 2: 3}),
        ({"a": 3, "b": 2}, [1, 2, 3]),
    ],
)
def test_weights_of_other_classes_adjust_nothing(classes, weights):
    model = models.fcn("alexnet", 32, classes, width=1e-6)
    with pytest.raises(ValueError, match="a net of one head|a list of numbers from 0"):
        adjust_logits(model, weights)


@pytest.mark.parametrize("classes", [1, 256, {"a": 3, "b": 1}])
@pytest.mark.parametrize("compile", [compile_modern, compile_reference])
def test_one_class_and_more_than_labels_have_room_for_are_not_trained(classes, compile):
    model = models.fcn("alexnet", 32, classes, width=1e-6)
    how = 10 if compile is compile_modern else "fcn32s"
    with pytest.raises(ValueError, match=r"tells \d+ classes apart; expected 2 to 255"):
        compile(model, how)


def test_two_streams_that_are_averaged_are_not_adjusted():
    model = models.late_fusion("alexnet", 32, 3, width=1e-6)
    with pytest.raises(ValueError, match="has two streams.*expected a net of one"):
        adjust_logits(model, [1, 2, 3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 0}, "steps=0 was given; expected 1 or more"),
        ({"steps": 9, "learning_rate": -1}, "learning_rate=-1 .* above 0"),
        ({"steps": 9, "class_weights": [1, -1, 1]}, "a list of numbers from 0"),
        ({"steps": 9, "class_weights": [1, np.inf, 1]}, "a list of numbers from 0"),
        ({"steps": 9, "class_weights": {0: 1, 1: 9, 2: 1}}, "a list of numbers from 0"),
        ({"steps": 9, "class_weights": [1, 1]}, "2 class weights .*; expected 3"),
    ],
)
def test_what_no_net_is_trained_by_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        compile_modern(models.fcn("googlenet", 32, 3, width=1 / 16), **arguments)


def test_the_reference_s_recipe_has_a_rate_and_a_weight_for_each_class():
    net = models.fcn("googlenet", 32, {"sem": 3, "geo": 2}, width=1 / 16)
    weights = {"sem": [1, 1, 1], "geo": [1, 1, 1]}
    with pytest.raises(ValueError, match="3 class weights .* for geo; expected 2"):
        compile_reference(net, "siftflow-fcn32s", class_weights=weights)
    partly = {"sem": [1, 2, 1], "geo": None}
    compile_reference(net, "siftflow-fcn32s", class_weights=partly)
    assert net.loss["sem"].weights == [1, 2, 1]
    assert net.loss["geo"].weights is None
    for wrong in ([1, 1, 1], {"sem": [1, 1, 1]}, {**weights, "more": [1]}):
        with pytest.raises(ValueError, match="heads sem, geo; expected a dict"):
            compile_reference(net, "siftflow-fcn32s", class_weights=wrong)
    recipe = RECIPES["voc-fcn32s"]
    schedule = keras.optimizers.schedules.CosineDecay(1e-10, 9)
    compile_reference(net, recipe._replace(learning_rate=schedule))
    recipe = recipe._replace(learning_rate=0)
    with pytest.raises(ValueError, match="learning_rate=0 was given"):
        compile_reference(net, recipe)
