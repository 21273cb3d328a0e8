"""Nets that are written to a file, and built from it again."""

import functools
import re

import keras
import numpy as np
import oracle
import pytest
from nets import assert_close, build, layers_of, pictures, predict

from keras_fcn import (
    manifest,
    models,
    saving,
    weights,
)

HHA = {"channels": "RGB", "mean": [132.431, 94.076, 118.477]}
NETS = {
    "alexnet-32s": {"backbone": "alexnet", "stride": 32},
    "alexnet-4s": {"backbone": "alexnet", "stride": 4, "upsampling": "learned"},
    "vgg16-32s-depth": {"stride": 32, "input_channels": 4},
    "vgg16-16s-heads": {"stride": 16, "num_classes": {"sem": 5, "geo": 3}},
    "vgg16-8s-atonce": {"stride": 8, "skip_scales": {"pool4": 1e-2, "pool3": 1e-4}},
    "vgg16-8s-atonce-heads": {
        "num_classes": {"sem": 5, "geo": 3},
        "skip_scales": {"pool4": 1e-2, "pool3": 1e-4},
    },
    "vgg16-4s": {"stride": 4, "upsampling": "learned"},
    "googlenet-16s": {"backbone": "googlenet", "stride": 16, "upsampling": "learned"},
    "googlenet-8s-5": {
        "backbone": "googlenet",
        "input_channels": 5,
        "include_preprocessing": False,
    },
    "googlenet-4s-head": {
        "backbone": "googlenet",
        "stride": 4,
        "num_classes": {"sem": 5},
    },
    "googlenet-4s-last": {
        "backbone": "googlenet",
        "stride": 4,
        "skips": ["conv2", "inception_3b", "inception_4e"],
    },
    "googlenet-8s-mixed": {"backbone": "googlenet", "skips": ["pool2", "inception_4e"]},
    "vgg16-4s-last-heads": {
        "stride": 4,
        "num_classes": {"a": 5, "3_a": 3},  # which ends as conv4_3 does
        "skips": ["conv3_3", "conv4_3", "conv5_3"],
        "skip_scales": {"conv4_3": 0.1},
    },
    "alexnet-third": {"backbone": "alexnet", "width": 1 / 3, "stride": 32},
    "vgg16-tenth": {"width": 0.1, "stride": 32},
    "late-fusion-16s": {"builder": "late_fusion", "stride": 16},
    "late-fusion-alexnet-8s": {
        "builder": "late_fusion",
        "backbone": "alexnet",
        "upsampling": "learned",
        "include_preprocessing": False,
    },
    "googlenet-16s-normalised": {
        "backbone": "googlenet",
        "stride": 16,
        "batch_norm": True,
    },
    "googlenet-fiftieth": {"backbone": "googlenet", "width": 0.02, "stride": 32},
}


@pytest.mark.parametrize("arguments", NETS.values(), ids=NETS)
def test_a_checkpoint_says_how_to_build_its_net(arguments, tmp_path):
    keras.utils.set_random_seed(1)  # of Dropout
    model = build(**arguments)
    saving.save_checkpoint(model, tmp_path / "net.h5")
    keras.utils.set_random_seed(1)
    again = models.load_checkpoint(tmp_path / "net.h5")
    assert again.get_config() == model.get_config()
    for one, other in zip(model.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_net_without_values_is_never_given_any(tmp_path, monkeypatch):
    mine = build("alexnet", 32)
    for kind in (keras.initializers.Zeros, keras.initializers.VarianceScaling):
        monkeypatch.setattr(kind, "__call__", lambda *_, **__: pytest.fail("was given"))
    full = models.skeleton({"model": {"backbone": "alexnet", "stride": 32}})
    assert full.count_params() > 56e6
    saving.save_checkpoint(mine, tmp_path / "net.h5")  # which looks at two of them
    with keras.StatelessScope():  # as `fit` has one
        pass


def one_convolution():
    x = keras.Input((None, None, 3))
    return keras.Model(x, keras.layers.Conv2D(3, 1)(x), name="mine")


@pytest.mark.parametrize(
    "make",
    [
        one_convolution,
        lambda: models.classifier("vgg16", 5, width=1e-6),
    ],
    ids=["mine", "classifier"],
)
def test_another_model_than_those_of_fcn_has_no_description(make):
    model = make()
    with pytest.raises(ValueError, match="no layers of an FCN") as error:
        saving.describe(model)
    assert str(error.value) == (
        f"The model {model.name!r} has no layers of an FCN; expected one that "
        "keras_fcn.fcn built. Write others with keras_fcn.weights.save."
    )


def test_the_weights_of_a_file_say_how_many_classes_there_are(tmp_path):
    path = tmp_path / "net.h5"
    model = build("alexnet", 32, 5)
    saving.save_checkpoint(model, path)
    again = models.fcn("alexnet", 32, weights=path, width=1 / 32)
    assert again.output_shape[-1] == 5
    with pytest.raises(ValueError, match="has 5 classes") as error:
        models.fcn("alexnet", 32, 7, weights=path, width=1 / 32)
    assert "num_classes=7" in str(error.value)
    assert "keras_fcn.transplant" in str(error.value)


def test_a_file_that_does_not_say_its_net_is_refused(tmp_path):
    path = tmp_path / "net.h5"
    weights.save(build("alexnet", 32), path)
    with pytest.raises(ValueError, match="does not say which net") as error:
        models.load_checkpoint(path)
    assert str(error.value) == (
        f"{path} does not say which net it is for; expected a file written by "
        "keras_fcn.save_checkpoint. Build the net and pass it as `weights=`."
    )


def save_thin(path, builder=models.fcn, **arguments):
    """A checkpoint whose scores are not zero, and the net."""
    model = builder("vgg16", 16, 3, width=1 / 32, **arguments)
    rng = np.random.default_rng(1)
    for layer in model.layers:
        if layer.name.startswith("score_") and layer.weights:
            layer.set_weights([rng.standard_normal(w.shape) for w in layer.weights])
    saving.save_checkpoint(model, path)
    return model


@pytest.mark.parametrize(
    "builder", [models.fcn, models.late_fusion], ids=lambda builder: builder.__name__
)
def test_a_net_fed_centred_data_gets_no_preprocessing_from_its_file(builder, tmp_path):
    path = str(tmp_path / "plain.h5")
    save_thin(path, builder, include_preprocessing=False)
    build = functools.partial(builder, "vgg16", 16, weights=path, width=1 / 32)
    with pytest.raises(ValueError, match="net without preprocessing; expected"):
        build()
    same = saving.describe(build(include_preprocessing=False))
    assert same == saving.describe(models.load_checkpoint(path))


def test_a_file_says_what_its_net_skips_from(tmp_path):
    path, skips = tmp_path / "net.h5", ("conv4_3", "conv5_3")
    model = build("vgg16", 8, skips=skips)
    saving.save_checkpoint(model, path)
    found = weights.metadata(path)["model"]
    assert found["skips"] == list(skips)
    again = models.fcn("vgg16", 8, weights=path, width=1 / 32)
    assert_close(predict(again, pictures()), predict(model, pictures()))
    models.fcn("vgg16", 8, weights=path, skips=("conv3_3", *skips), width=1 / 32)
    with pytest.raises(ValueError, match="skips") as error:
        models.fcn("vgg16", 8, weights=path, skips=["pool3", "conv5_3"])
    assert str(error.value) == (
        f"weights={path!r} was trained with skips={skips} but ('pool3', 'conv5_3') was "
        "given; leave skips out."
    )


@pytest.mark.parametrize("skips", [5, "pool4", {"pool4": 1}])
def test_skips_of_another_kind_in_a_file_are_refused(skips):
    with pytest.raises(ValueError, match="was given; expected a tuple of names"):
        models.build({"model": {"backbone": "vgg16", "stride": 16, "skips": skips}})


def test_a_file_of_the_paper_s_skips_takes_no_others(tmp_path):
    path = tmp_path / "net.h5"
    saving.save_checkpoint(build("vgg16", 16), path)
    assert weights.metadata(path)["model"]["skips"] is None
    with pytest.raises(ValueError, match="'pool4'[)] but [(]'conv5_3',[)] was given"):
        models.fcn("vgg16", 16, weights=path, skips=("conv5_3",), width=1 / 32)


def test_a_file_of_a_net_without_skip_scales_takes_none(tmp_path):
    path = str(tmp_path / "plain.h5")
    save_thin(path)
    with pytest.raises(ValueError, match="skip_scales=None but .* leave skip_scales"):
        models.fcn("vgg16", 16, weights=path, width=1 / 32, skip_scales={"pool4": 0.1})


@pytest.mark.parametrize(
    ("said", "fact"),
    [
        ({"skip_scales": {"pool4": 0.01}}, "skip_scales"),
        ({"include_preprocessing": False}, "include_preprocessing"),
        ({"preprocessing": HHA}, "input"),
    ],
)
def test_a_checkpoint_is_not_filled_from_a_file_of_another_net(said, fact, tmp_path):
    path, other = str(tmp_path / "net.h5"), str(tmp_path / "other.h5")
    picture = pictures()
    expected = predict(save_thin(path), picture)
    found = predict(models.load_checkpoint(path, weights=path), picture)
    np.testing.assert_array_equal(found, expected)
    save_thin(other, **said)
    with pytest.raises(ValueError, match=f"other.h5 says {fact} .*; expected"):
        models.load_checkpoint(path, weights=other)


def softened(model):
    return keras.layers.Softmax()(model.output["a"])


def with_weights(model):
    more = keras.layers.Conv2D(4, 1, name="more")
    return {**model.output, "b": more(model.output["a"])}


@pytest.mark.parametrize(
    "change",
    [
        softened,
        lambda model: model.output["a"],
        lambda model: model.get_layer("score_fr_a").output,
        lambda model: {**model.output, "c": softened(model)},
        lambda model: {"a": model.output["b"], "b": model.output["a"]},
        with_weights,
    ],
    ids=["softmax", "one head", "cells", "another head", "swapped", "more weights"],
)
def test_what_was_made_of_a_net_is_not_saved_as_that_net(change, tmp_path):
    model = models.fcn("alexnet", 16, {"a": 3, "b": 4}, width=1e-6)
    made = keras.Model(model.input, change(model))
    with pytest.raises(ValueError, match="has other (output|weights) than the net"):
        saving.save_checkpoint(made, tmp_path / "net.h5")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("norm", [False, True])
def test_a_clone_of_a_net_that_was_loaded_has_kernels_to_learn_with(norm, tmp_path):
    path = str(tmp_path / "net.h5")
    net = models.fcn("googlenet", 16, 3, width=1 / 16, batch_norm=norm)
    saving.save_checkpoint(net, path)
    clone = keras.models.clone_model(models.load_checkpoint(path))
    for layer in layers_of(clone, keras.layers.Conv2D):
        drawn = weights.to_numpy(layer.kernel).any()
        assert drawn == (not layer.name.startswith("score_")), layer.name


@pytest.mark.parametrize(
    "names",
    [
        ("a", "b_a"),
        ("bn", "bgrd"),
        ("fused", "fr"),
        ("score_fr", "color"),
        ("1", "1_1"),
    ],
)
@pytest.mark.parametrize("channels", [3, 4])
def test_a_net_is_built_again_whatever_its_heads_are_called(names, channels, tmp_path):
    heads = dict(zip(names, (3, 4), strict=True))
    scales = {"pool4": 0.5, "pool3": 0.25}
    arguments = {"skip_scales": scales, "input_channels": channels, "width": 1 / 64}
    model = oracle.draw(models.fcn("vgg16", 8, heads, **arguments))
    saving.save_checkpoint(model, tmp_path / "net.h5")
    again = models.load_checkpoint(str(tmp_path / "net.h5"))
    described = saving.describe(again)["model"]
    assert {name: described[name] for name in arguments} == arguments
    assert described["num_classes"] == heads
    assert not described["batch_norm"]
    picture = pictures(channels=channels)
    for head, logits in model.predict_on_batch(picture).items():
        np.testing.assert_array_equal(again.predict_on_batch(picture)[head], logits)


def test_numbers_of_numpy_build_a_net_that_can_be_saved(tmp_path):
    net = {"skip_scales": {"pool4": np.float32(0.01)}, "num_classes": np.int64(3)}
    hha = {"channels": "RGB", "mean": np.float32(HHA["mean"])}
    model = models.fcn("vgg16", 16, **net, preprocessing=hha, width=1 / 32)
    saving.save_checkpoint(model, tmp_path / "a.h5")
    again = saving.describe(models.load_checkpoint(str(tmp_path / "a.h5")))
    assert again == saving.describe(model)
    plain = {"include_preprocessing": False, "width": 1 / 32}
    model = models.fcn("vgg16", 32, 3, input_channels=np.int64(5), **plain)
    saving.save_checkpoint(model, tmp_path / "b.h5")
    assert models.load_checkpoint(str(tmp_path / "b.h5")).input_shape[-1] == 5


def test_a_file_in_a_folder_may_have_any_name(tmp_path):
    path = str(tmp_path / "mine.ckpt")
    save_thin(path)
    assert models.load_checkpoint(path).output_shape[-1] == 3


@pytest.mark.parametrize("name", ["mine", "mine.keras", "mine.H5"])
def test_a_path_that_no_name_leads_to_is_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build("vgg16", 32)
    with pytest.raises(ValueError, match=f"{name} was given; .* ends in .h5 or .hdf5"):
        saving.save_checkpoint(model, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("cityscapes", "'cityscapes' were given; expected one of voc, "),
        (["road", "rest"], "were given; expected one of voc, "),
        ({"names": []}, "were given; expected one of voc, "),
        ({"names": "abc"}, "were given; expected one of voc, "),
        ({"names": ["a", "b", "c"], "palette": [[1, 2, 3]]}, "as many colours"),
        ({"names": ["a", "b", "c"], "palette": [[1, 2, 300]] * 3}, "as many colours"),
        ({"names": ["road", "rest"]}, "name 2 classes; expected 3"),
        ("camvid", "name 11 classes; expected 3"),
        ({"a": {"names": ["x", "y", "z"]}}, "name {'a': 3} classes; expected 3"),
    ],
)
def test_labels_that_are_none_are_not_written(labels, message, tmp_path):
    model = models.fcn("vgg16", 32, 3, width=1 / 64)
    with pytest.raises(ValueError, match=re.escape(message)):
        saving.save_checkpoint(model, tmp_path / "a.h5", facts={"labels": labels})
    assert not list(tmp_path.iterdir())


def test_heads_may_have_labels_of_their_own(tmp_path):
    model = models.fcn("vgg16", 32, {"sem": 2, "geo": 3}, width=1 / 64)
    labels = {"sem": {"names": ["road", "rest"]}, "geo": "siftflow-geo"}
    path = str(tmp_path / "a.h5")
    saving.save_checkpoint(model, path, facts={"labels": labels})
    sets = manifest.label_sets(models.checkpoint_entry(path))
    assert {head: known.names for head, known in sets.items()} == {
        "sem": ("road", "rest"),
        "geo": ("sky", "horizontal", "vertical"),
    }
