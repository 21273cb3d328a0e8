"""The reference recipes, against recorded traces of real Caffe's solver and NumPy."""

import re

import keras
import numpy as np
import oracle
import pytest
from golden import golden

import keras_fcn
from keras_fcn import manifest, models
from keras_fcn.training import (
    PLAIN_FACTORS,
    RECIPES,
    SCORE_FACTORS,
    CaffeSGD,
    find_recipe,
    fix_trunk,
)

TRACES = {
    "trace-vgg16-16s": ("voc-fcn16s", {"backbone": "vgg16", "stride": 16}),
    "trace-alexnet-32s": ("voc-fcn-alexnet", {"backbone": "alexnet", "stride": 32}),
}


# Of the solver.prototxt files and solve.py: the rate, the updates, what it starts from.
SOLVERS = """
voc-fcn32s            1e-10  25 x 4000  vgg16-imagenet
voc-fcn16s            1e-12  25 x 4000  vgg16-32s-voc
voc-fcn8s             1e-14  25 x 4000  vgg16-16s-voc
voc-fcn8s-atonce      1e-10  75 x 4000  vgg16-imagenet
voc-fcn-alexnet       1e-4   25 x 4000  alexnet-imagenet
nyud-fcn32s-color     1e-10  50 x 2000  vgg16-imagenet
nyud-fcn32s-hha       1e-10  50 x 2000  vgg16-imagenet
nyud-fcn32s-color-d   1e-10  50 x 2000  vgg16-imagenet
nyud-fcn32s-color-hha 1e-12  50 x 2000  vgg16-32s-nyud
siftflow-fcn32s       1e-10  50 x 2000  vgg16-imagenet
siftflow-fcn16s       1e-12  50 x 2000  vgg16-32s-siftflow
siftflow-fcn8s        1e-12  50 x 2000  vgg16-16s-siftflow
pascalcontext-fcn32s  1e-10  50 x 8000  vgg16-imagenet
pascalcontext-fcn16s  1e-12  50 x 8000  vgg16-32s-pascal-context
pascalcontext-fcn8s   1e-14  50 x 8000  vgg16-16s-pascal-context
"""


def test_the_recipes_are_those_of_the_solvers():
    lines = [line.split() for line in SOLVERS.strip().splitlines()]
    assert {name for name, *_ in lines} == set(RECIPES)
    for name, rate, times, _, updates, start in lines:
        recipe = RECIPES[name]
        assert recipe.learning_rate == float(rate)
        assert recipe.iterations == int(times) * int(updates)
        assert recipe.start == start
        accumulated = name == "voc-fcn-alexnet"
        assert recipe.accumulate == (20 if accumulated else 1)
        assert recipe.momentum == (0.9 if accumulated else 0.99)
        assert recipe.normalize == accumulated
    assert CaffeSGD().decay == 5e-4


def test_a_recipe_says_of_its_net_what_the_manifest_says_of_the_one_trained_by_it():
    tags = {"pascalcontext": "pascal-context"}
    early = "nyud-fcn32s-color-d"  # of which there are no weights
    for name, recipe in RECIPES.items():
        data, _, net = name.partition("-")
        kind = "atonce-" if "atonce" in net else ""
        stream = {"fcn32s-hha": "-hha", "fcn32s-color-hha": "-color-hha"}.get(net, "")
        stride = re.search(r"(\d+)s", net + "32s")[1]
        backbone = "alexnet" if "alexnet" in net else "vgg16"
        trained = f"{backbone}-{stride}s-{kind}{tags.get(data, data)}{stream}"
        if name != early:
            model = manifest.checkpoint_info(trained)["model"]
            assert model["backbone"] == recipe.backbone
            assert model["stride"] == recipe.stride
            assert model.get("skip_scales") == recipe.skip_scales
    assert (RECIPES[early].backbone, RECIPES[early].stride) == ("vgg16", 32)


@pytest.mark.parametrize(
    ("name", "upsampling"),
    [
        ("trace-vgg16-16s", "bilinear"),
        ("trace-alexnet-32s", "bilinear"),
        pytest.param("trace-vgg16-16s", "learned", marks=pytest.mark.slow),
        pytest.param("trace-alexnet-32s", "learned", marks=pytest.mark.slow),
    ],
)
def test_a_training_goes_as_it_went_in_real_caffe(name, upsampling):
    case = golden.load(name)
    recipe, net = TRACES[name]
    net = {**net, "width": case["width"], "include_preprocessing": False}
    model = models.build(
        {"model": {**net, "num_classes": 21, "upsampling": upsampling}}
    )
    start = golden.weights(case, trace=True)
    if upsampling == "bilinear":
        start = {layer: blobs for layer, blobs in start.items() if "up" not in layer}
    oracle.fill(model, start)
    frozen = {}
    for layer in model.layers:
        if isinstance(layer, keras.layers.Dropout):
            layer.rate = 0  # the traces have none
        if isinstance(layer, keras.layers.Conv2DTranspose):
            frozen[layer.name] = ((0, 0), (0, 0))
    keras_fcn.compile_reference(model, recipe, scores=())
    wanted = model.optimizer.get_config() | {
        "learning_rate": case["lr"],
        "momentum": case["momentum"],
        "decay": case["decay"],
        "gradient_accumulation_steps": None,
    }
    assert wanted["momentum"] == RECIPES[recipe].momentum
    wanted["factors"] = wanted["factors"] | frozen
    model.compile(CaffeSGD.from_config(wanted), model.loss)
    recorded, losses = np.load(golden.HERE / f"{name}.npz"), []
    for step in range(case["steps"]):
        data, label = golden.example(case, step % case["images"])
        losses.append(model.train_on_batch(oracle.to_keras(data), label[0]))
    np.testing.assert_allclose(losses, recorded["losses"], rtol=1e-5)
    for layer, blobs in start.items():
        if layer in frozen:
            continue
        weights = model.get_layer(layer).weights
        for i, (before, weight) in enumerate(zip(blobs, weights, strict=True)):
            after = keras.ops.convert_to_numpy(weight)
            if after.ndim == 4:
                after = after.transpose(3, 2, 0, 1)
            index = recorded[f"{layer}.{i}.index"]
            change = recorded[f"{layer}.{i}.value"] - before.ravel()[index]
            found = after.ravel()[index] - before.ravel()[index]
            assert np.abs(change).max() > 0
            np.testing.assert_allclose(
                found, change, rtol=0, atol=0.03 * np.abs(change).max(), err_msg=layer
            )
    for layer in frozen:
        kernel = keras.ops.convert_to_numpy(model.get_layer(layer).kernel)
        np.testing.assert_array_equal(kernel.transpose(3, 2, 0, 1), start[layer][0])


FACTORS = {"first": ((1, 1), (2, 0)), "second": ((10, 0.5), (0, 1))}


@pytest.mark.parametrize(
    ("momentum", "accumulate"), [(0.0, None), (0.9, None), (0.99, None), (0.9, 4)]
)
def test_twenty_steps_are_those_of_caffes_solver_in_numpy(momentum, accumulate):
    rng = np.random.default_rng(0)
    model = keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.Dense(2, name="second"),
            keras.layers.Dense(2, name="third"),
        ]
    )
    variables = model.trainable_variables
    for variable in variables:
        variable.assign(rng.standard_normal(variable.shape))
    optimizer = CaffeSGD(
        0.01,
        momentum,
        decay=0.02,
        factors=FACTORS,
        default_factors=PLAIN_FACTORS,
        gradient_accumulation_steps=accumulate,
    )
    optimizer.build(variables)
    state = [[np.float64(v), np.zeros(v.shape), np.zeros(v.shape)] for v in variables]
    for step in range(1, 20 + 1):
        gradients = [rng.standard_normal(v.shape).astype("float32") for v in variables]
        optimizer.apply([keras.ops.convert_to_tensor(g) for g in gradients])
        for variable, gradient, held in zip(variables, gradients, state, strict=True):
            weight, velocity, total = held
            total += gradient
            if step % (accumulate or 1):
                continue
            layer, kind = variable.path.split("/")[-2:]
            rate, decay = FACTORS.get(layer, PLAIN_FACTORS)[kind == "bias"]
            diff = total / (accumulate or 1) + decay * 0.02 * weight
            velocity[...] = momentum * velocity + rate * 0.01 * diff
            held[0] = weight - velocity
            total[...] = 0
    for variable, (weight, _, _) in zip(variables, state, strict=True):
        found = keras.ops.convert_to_numpy(variable)
        np.testing.assert_allclose(
            found, weight, rtol=0, atol=1e-6 * np.abs(weight).max()
        )


def test_the_optimizer_of_caffe_is_rebuilt_from_what_it_says():
    optimizer = CaffeSGD(0.5, 0.25, decay=0.125, factors=FACTORS)
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    assert type(again) is CaffeSGD


def test_biases_learn_twice_as_fast_and_in_alexnet_those_of_the_scores_only():
    for name, trunk in (
        ("voc-fcn8s", SCORE_FACTORS),
        ("voc-fcn-alexnet", PLAIN_FACTORS),
    ):
        backbone = "alexnet" if "alexnet" in name else "vgg16"
        model = keras_fcn.fcn(backbone, 8, width=1 / 64)
        keras_fcn.compile_reference(model, name)
        model.optimizer.build(model.trainable_variables)
        found = {
            layer.name: tuple(
                tuple(model.optimizer._factors_of(weight)) for weight in layer.weights
            )
            for layer in model.layers
            if layer.weights
        }
        scores = {layer for layer in found if layer.startswith("score_")}
        assert len(scores) == 3
        assert {found[layer] for layer in scores} == {SCORE_FACTORS}
        assert {found[layer] for layer in found.keys() - scores} == {trunk}


def test_the_losses_of_two_heads_are_added():
    model = keras_fcn.fcn("vgg16", 32, {"sem": 5, "geo": 3}, width=1 / 64)
    keras_fcn.compile_reference(model, "siftflow-fcn32s")
    picture = np.zeros((1, 30, 20, 3), "float32")
    truth = {"sem": np.full((1, 30, 20), 2), "geo": np.full((1, 30, 20), 1)}
    truth["geo"][:, :10] = 255
    loss = model.evaluate(picture, truth, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(600 * np.log(5) + 400 * np.log(3), rel=1e-5)


def test_classes_weigh_as_much_as_they_are_told():
    model = keras_fcn.fcn("vgg16", 32, {"sem": 5, "geo": 3}, width=1 / 64)
    weights = {"sem": [0, 0, 7, 0, 0], "geo": [1, 0.5, 1]}
    keras_fcn.compile_reference(model, "siftflow-fcn32s", class_weights=weights)
    picture = np.zeros((1, 30, 20, 3), "float32")
    truth = {"sem": np.full((1, 30, 20), 2), "geo": np.full((1, 30, 20), 1)}
    truth["sem"][:, :10] = 4
    loss = model.evaluate(picture, truth, verbose=0, return_dict=True)["loss"]
    expected = 7 * 400 * np.log(5) + 0.5 * 600 * np.log(3)
    assert loss == pytest.approx(expected, rel=1e-5)


def test_a_fixed_trunk_stays_as_it_was_and_the_scores_learn():
    model = keras_fcn.fcn("vgg16", 32, 3, width=1 / 64)
    fix_trunk(model)
    recipe = RECIPES["voc-fcn32s"]._replace(learning_rate=1e-3)
    keras_fcn.compile_reference(model, recipe)
    before = {w.path: keras.ops.convert_to_numpy(w) for w in model.weights}
    picture = np.random.default_rng(0).uniform(0, 255, (1, 40, 30, 3)).astype("float32")
    model.train_on_batch(picture, np.ones((1, 40, 30), "int32"))
    changed = {
        weight.path
        for weight in model.weights
        if (keras.ops.convert_to_numpy(weight) != before[weight.path]).any()
    }
    changed = {path for path in changed if "seed" not in path}
    assert changed == {"score_fr/kernel", "score_fr/bias"}


def test_accumulated_learning_is_one_line():
    model = keras_fcn.fcn("vgg16", 32, 3, width=1 / 64)
    recipe = RECIPES["voc-fcn32s"]._replace(
        learning_rate=1e-4, momentum=0.9, accumulate=20, normalize=True
    )
    keras_fcn.compile_reference(model, recipe)
    optimizer = model.optimizer
    assert optimizer.gradient_accumulation_steps == 20
    assert (float(optimizer.learning_rate), optimizer.momentum) == (
        pytest.approx(1e-4),
        0.9,
    )
    picture = np.zeros((1, 40, 30, 3), "float32")
    truth = np.full((1, 40, 30), 255)
    truth[0, 0, :7] = 2
    loss = model.evaluate(picture, truth, verbose=0, return_dict=True)["loss"]
    assert loss == pytest.approx(np.log(3), rel=1e-5)  # the mean of seven pixels


@pytest.mark.parametrize("accumulate", [1, 20])
def test_a_loss_is_a_mean_where_the_recipe_says_so_however_many_are_accumulated(
    accumulate,
):
    model = keras_fcn.fcn("alexnet", 32, 3, width=1 / 64)
    picture, truth = np.zeros((1, 40, 30, 3), "float32"), np.full((1, 40, 30), 255)
    truth[0, 0, :7] = 2
    for normalize, pixels in ((False, 7), (True, 1)):
        recipe = RECIPES["voc-fcn32s"]._replace(
            accumulate=accumulate, normalize=normalize
        )
        keras_fcn.compile_reference(model, recipe)
        loss = model.evaluate(picture, truth, verbose=0, return_dict=True)["loss"]
        assert loss == pytest.approx(pixels * np.log(3), rel=1e-5)


def test_every_recipe_begins_with_a_checkpoint_that_exists():
    known = manifest.list_checkpoints()
    for name, recipe in RECIPES.items():
        assert recipe.start in known, name


def test_an_unknown_recipe_is_an_error_that_names_near_ones():
    model = keras_fcn.fcn("vgg16", 32, 2, width=1 / 64)
    with pytest.raises(ValueError, match="no recipe 'voc-fcn9s'.*voc-fcn8s"):
        keras_fcn.compile_reference(model, "voc-fcn9s")


def test_a_recipe_of_no_data_set_is_that_of_voc():
    found = {name: find_recipe(name.removeprefix("voc-")) for name in RECIPES}
    assert found == RECIPES
    model = keras_fcn.fcn("vgg16", 8, 2, width=1 / 64)
    keras_fcn.compile_reference(model, "fcn8s")
    assert float(model.optimizer.learning_rate) == pytest.approx(1e-14)
