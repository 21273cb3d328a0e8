"""Against nets that are run, figures worked out by hand and the paper's Table 1."""

import functools

import keras
import numpy as np
import pytest

from keras_fcn import models, saving
from keras_fcn.backbones import BACKBONES
from keras_fcn.cli import main
from keras_fcn.features import Feature, add, average_pool, conv, crop_like, upsample
from keras_fcn.geometry import Grid
from keras_fcn.summary import summarize, totals


def build(backbone, stride=8, num_classes=2, **more):
    """A net whose weights are zero, of as few channels as there can be."""
    model = {"backbone": backbone, "stride": stride, "num_classes": num_classes}
    return models.build({"model": {**model, "width": 1e-6, **more}})


def full(builder, backbone, **more):
    """A net of full width, without its numbers."""
    model = {"builder": builder, "backbone": backbone, **more}
    entry = {"model": {"include_preprocessing": False, **model}}
    return models.skeleton(entry)


def by_name(rows):
    return {row.name: row for row in rows}


def places(row, axis=1):
    """On which pixels a row says that its cells are centred."""
    return row.grid.start + row.grid.stride * np.arange(row.shape[axis])


# Sizes and weights


NETS = {
    "alexnet-8s": functools.partial(build, "alexnet"),
    "vgg16-16s": functools.partial(build, "vgg16", 16, upsampling="learned"),
    "googlenet-4s": functools.partial(build, "googlenet", 4),
    "two heads": functools.partial(build, "alexnet", 16, {"sem": 5, "geo": 3}),
    "late fusion": functools.partial(build, "vgg16", 32, builder="late_fusion"),
    "normalised": functools.partial(build, "alexnet", 32, batch_norm=True),
}


@pytest.mark.parametrize("net", NETS)
def test_maps_are_as_large_as_those_of_a_picture_and_have_as_many_weights(net):
    model = NETS[net]()
    watch = keras.Model(model.input, {x.name: x.output for x in model.layers})
    pictures = {x.name: np.zeros((1, 45, 130, 3), "float32") for x in model.inputs}
    maps = watch.predict_on_batch(pictures if len(pictures) > 1 else pictures["image"])
    rows = summarize(model, 45, 130)
    assert [row.name for row in rows] == [layer.name for layer in model.layers]
    assert {row.name: row.shape for row in rows} == {
        name: array.shape[1:] for name, array in maps.items()
    }
    for row, layer in zip(rows, model.layers, strict=True):
        assert row.parameters == sum(array.size for array in layer.get_weights())
        assert row.kind in ("Input", type(layer).__name__)
    assert totals(rows)["parameters"] == sum(x.size for x in model.get_weights())


def test_a_picture_has_500_by_500_pixels_where_nobody_says():
    model = build("alexnet", 32)
    assert summarize(model) == summarize(model, 500, 500)


# Where cells lie, and what they see


def even(model):
    """Gives a net kernels that are means, which let light through from everywhere."""
    for layer in model.layers:
        if isinstance(layer, keras.layers.Conv2D):
            kernel, bias = layer.get_weights()
            kernel = np.full_like(kernel, 1 / kernel[..., 0].size)
            layer.set_weights([kernel, 0 * bias])
    return model


def light(model, width):
    """Lights one column of a dark picture after the other, and looks at all maps.

    Returns:
        {layer: (pixels, cells) booleans}: which columns of cells a column of pixels
        reaches.
    """
    brightest = {x.name: keras.ops.max(x.output, (1, 3)) for x in model.layers}
    watch = keras.Model(model.input, brightest)
    lights = np.eye(width, dtype="float32")[:, None, :, None].repeat(3, axis=-1)
    found = watch.predict(lights, batch_size=50, verbose=0)
    return {name: np.asarray(array) > 0 for name, array in found.items()}


def trunk(backbone, tap):
    """A backbone up to a tap, and the means of 3 by 3 cells of it."""
    image = Feature(keras.Input((None, None, 3), name="image"))
    x = BACKBONES[backbone](image, 1e-6, pad=40)[tap]
    return keras.Model(image.tensor, average_pool(x, 3, name="mean").tensor)


@pytest.mark.parametrize(
    ("backbone", "tap", "fields"),
    [
        ("alexnet", "pool2", {"conv1": 11, "pool1": 19, "norm1": 19, "mean": 99}),
        ("vgg16", "pool4", {"conv1_1": 3, "pool1": 6, "pool4": 100, "mean": 132}),
        (
            "googlenet",
            "pool3",
            {
                "inception_3a_1x1": 27,
                "inception_3a_3x3": 43,
                "inception_3a_5x5": 59,
                "inception_3a_pool": 43,
                "inception_3b_output": 91,
            },
        ),
    ],
)
def test_a_cell_sees_its_field_around_its_place_and_no_other_pixel(
    backbone, tap, fields
):
    model, width = even(trunk(backbone, tap)), 170
    rows = by_name(summarize(model, 1, width))
    assert {name: rows[name].field for name in fields} == fields
    for name, reached in light(model, width).items():
        looked = 0
        for cell, place in enumerate(places(rows[name])):
            first, last = (place + i * (rows[name].field - 1) / 2 for i in (-1, 1))
            if 0 <= first and last < width:
                seen = np.flatnonzero(reached[:, cell])
                np.testing.assert_array_equal(seen, np.arange(first, last + 1))
                looked += 1
        assert looked, name


def steps(kernel, learned):
    """Two convolutions of stride 2 and their score, upsampled onto the image."""
    image = Feature(keras.Input((None, None, 3), name="image"))
    x = conv(image, 3, kernel, stride=2, pad=15, name="first", activation=None)
    x = conv(x, 3, 5, stride=2, pad=2, name="second", activation=None)
    x = upsample(x, 4, image, name="up", learned=learned)
    return even(keras.Model(image.tensor, crop_like(x, image, name="score").tensor))


STEPS = pytest.mark.parametrize(
    ("kernel", "learned", "width"), [(3, False, 7), (3, True, 7), (4, False, 8)]
)


@STEPS
def test_an_upsampled_cell_sees_what_two_coarse_ones_do(kernel, learned, width):
    model = steps(kernel, learned)
    assert model.get_layer("up").kernel_size in (width, (width, width))
    rows = by_name(summarize(model, 1, 60))
    reached = light(model, 60)
    for name in ("up", "score"):
        inside = [i for i, place in enumerate(places(rows[name])) if 20 < place < 40]
        spans = [np.ptp(np.flatnonzero(reached[name][:, i])) + 1 for i in inside]
        assert max(spans) == rows[name].field == kernel + 2 * 4 + 4


def ladder(kernel, learned):
    """Scores of stride 8, upsampled onto those of 4, of 2 and onto the image."""
    image = Feature(keras.Input((None, None, 3), name="image"))
    taps = [image]
    for i, pad in enumerate((30, 0, 0)):
        name = f"conv{i}"
        taps.append(
            conv(taps[-1], 3, kernel, stride=2, pad=pad, name=name, activation=None)
        )
    *finer, x = taps
    for i, tap in reversed(list(enumerate(finer))):
        x = upsample(x, 2, tap, name=f"up{i}", learned=learned)
        if i:
            skip = crop_like(tap, x, name=f"skip{i}")
            x = add(crop_like(x, skip, name=f"up{i}c"), skip, name=f"fuse{i}")
    return even(keras.Model(image.tensor, crop_like(x, image, name="score").tensor))


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("kernel", [3, 4, 5, 7])
def test_cells_that_are_upsampled_thrice_see_as_far_as_the_widest_of_them(
    kernel, learned
):
    model, width = ladder(kernel, learned), 120
    rows = by_name(summarize(model, 1, width))
    reached = light(model, width)
    for name in ("up2", "fuse2", "up1", "fuse1", "up0", "score"):
        spans = [
            np.ptp(np.flatnonzero(reached[name][:, cell])) + 1
            for cell, place in enumerate(places(rows[name]))
            if 45 < place < 75
        ]
        assert max(spans) == rows[name].field, name


@STEPS
def test_a_picture_of_coordinates_comes_out_as_the_places_of_the_cells(
    kernel, learned, width
):
    model = steps(kernel, learned)
    watch = keras.Model(model.input, {x.name: x.output for x in model.layers})
    ramp = np.arange(80, dtype="float32")[:, None]
    maps = watch.predict_on_batch(np.broadcast_to(ramp, (1, 80, 80, 3)))
    rows = summarize(model, 80, 80)
    for row in rows:
        inside = (20 < places(row)) & (places(row) < 60)
        found = maps[row.name][0, row.shape[0] // 2, inside, 0]
        np.testing.assert_allclose(found, places(row)[inside], rtol=1e-5)
    strides = {row.name: row.grid.stride for row in rows}
    assert (strides["first"], strides["second"], strides["up"]) == (2, 4, 1)
    assert rows[-1].grid == Grid()


@pytest.mark.parametrize("net", NETS)
def test_maps_that_are_added_lie_on_one_grid_and_scores_on_the_image(net):
    model = NETS[net]()
    rows = by_name(summarize(model))
    for layer in model.layers:
        if isinstance(layer, (keras.layers.Add, keras.layers.Average)):
            parts = [tensor._keras_history.operation.name for tensor in layer.input]
            assert len({rows[name].grid for name in [*parts, layer.name]}) == 1
    scores = [
        rows[name] for name in ("score", "score_sem", "score_geo") if name in rows
    ]
    assert {row.grid for row in scores} == {Grid()}


# What the reference's tables say, by hand


def test_a_crop_sees_and_is_as_deep_as_what_it_is_cropped_from():
    rows = by_name(summarize(build("vgg16", 8)))
    found = {name: (row.field, row.depth) for name, row in rows.items()}
    assert found["pool3"] == (44, 7)
    assert found["score_pool3"] == found["score_pool3c"] == (44, 8)
    assert found["pool4"] == (100, 10)
    assert found["score_pool4"] == found["score_pool4c"] == (100, 11)
    assert found["score_fr"] == (404, 16)
    assert found["upscore2"] == found["upscore2c"] == found["fuse_pool4"]
    assert found["score"][1] == 16


def test_a_depth_is_that_of_the_longest_way():
    rows = by_name(summarize(build("googlenet", 32, upsampling="learned")))
    assert rows["conv2_3x3"].depth == 3
    for branch, depth in {"1x1": 4, "3x3": 5, "5x5_reduce": 4, "pool_proj": 4}.items():
        assert rows[f"inception_3a_{branch}"].depth == depth
    assert rows["inception_3a_output"].depth == 5
    assert rows["inception_5b_output"].depth == 21
    assert rows["score_fr"].depth == rows["score"].depth == 22


# At 500 by 300 pixels: cells along the sides, and the sizes of the reference's kernels.
ALEXNET = {
    "conv1": 173 * 123 * 96 * 3 * 11 * 11,
    "conv2": 86 * 61 * 256 * 48 * 5 * 5,  # in two groups, as two of the next three
    "conv3": 43 * 30 * 384 * 256 * 3 * 3,
    "conv4": 43 * 30 * 384 * 192 * 3 * 3,
    "conv5": 43 * 30 * 256 * 192 * 3 * 3,
    "fc6": 16 * 10 * 4096 * 256 * 6 * 6,
    "fc7": 16 * 10 * 4096 * 4096,
    "score_fr": 16 * 10 * 21 * 4096,
}


@pytest.mark.parametrize(
    ("upsampling", "work", "weights"),
    [
        # Two taps at each of 543 places in 10 columns, then at each of 351 in 543 rows.
        ("bilinear", (2 * 543 * 10 + 2 * 543 * 351) * 21, 0),
        # Each cell is scattered, by each of the kernel's numbers.
        ("learned", 16 * 10 * 21 * 21 * 63 * 63, 21 * 21 * 63 * 63),
    ],
)
def test_the_reference_s_alexnet_costs_what_its_kernels_and_sizes_say(
    upsampling, work, weights
):
    model = full("fcn", "alexnet", stride=32, upsampling=upsampling)
    rows = summarize(model, 500, 300)
    found = {row.name: row.multiply_adds for row in rows if row.multiply_adds}
    assert found == {**ALEXNET, "upscore": work}
    assert totals(rows) == {
        "conv_layers": 8,
        "parameters": 56_954_261 + weights,
        "receptive_field": 355,
        "max_stride": 32,
        "multiply_adds": sum(ALEXNET.values()) + work,
    }


def test_the_classifier_googlenet_is_that_of_the_paper_s_table_1():
    rows = summarize(full("classifier", "googlenet"), 224, 224)
    found = totals(rows)
    assert found.pop("multiply_adds") // 10**8 == 15  # Szegedy et al., 2015: 1.5 G
    assert found == {
        "conv_layers": 22,
        "parameters": 6_998_552,
        "receptive_field": 907,
        "max_stride": 32,
    }
    # With a pad of 3 pixels pool4 starts on pixel 30, and the mean is 7 cells wide.
    assert by_name(rows)["pool5_7x7_s1"].grid == Grid(32, 30 + 3 * 32)
    assert rows[-1].shape == (1, 1, 1000)


@pytest.mark.parametrize(
    ("net", "size", "layer"),
    [
        (functools.partial(build, "alexnet", 32), (0, 40), "preprocess"),
        (functools.partial(build, "alexnet", 32), (40, -1), "preprocess"),
        (functools.partial(full, "classifier", "vgg16"), (100, 223), "fc6"),
    ],
)
def test_a_picture_that_is_too_small_is_refused(net, size, layer):
    with pytest.raises(ValueError, match="take a larger image") as error:
        summarize(net(), *size)
    assert str(error.value) == (
        f"{layer} has no output at this image size; expected 1 by 1 cells at least: "
        "take a larger image."
    )


# On the command line


def test_show_prints_a_row_for_each_layer_and_the_totals(tmp_path, capsys):
    model = even(build("alexnet", 8, width=1 / 16))
    saving.save_checkpoint(model, tmp_path / "net.h5")
    assert main(["show", str(tmp_path / "net.h5"), "--size", "40", "170"]) == 0
    header, *lines = [x.split() for x in capsys.readouterr().out.splitlines()]
    assert header[:5] == ["layer", "kind", "height", "width", "channels"]
    assert header[5:] == ["stride", "start", "field", "parameters", "multiply-adds"]
    rows = summarize(model, 40, 170)
    for row, (name, kind, *numbers) in zip(rows, lines, strict=False):
        assert (name, kind) == (row.name, row.kind)
        numbers = [float(number.replace(",", "")) for number in numbers]
        assert numbers[:6] == [*row.shape, row.grid.stride, row.grid.start, row.field]
        assert numbers[6:] == [n for n in (row.parameters, row.multiply_adds) if n]
    said = [" ".join(line) for line in lines[len(rows) + 1 :]]
    found = totals(rows)
    assert said[0] == "fcn8s_alexnet at 40 x 170 pixels"
    assert said[2].startswith(f"parameters {found['parameters']:,} (0 M)")
    assert said[5] == f"multiply-adds {found['multiply_adds']:,}"
