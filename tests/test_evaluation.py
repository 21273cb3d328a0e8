import warnings

import keras
import numpy as np
import oracle
import pytest
from PIL import Image

from keras_fcn import evaluation, models
from keras_fcn.evaluation import evaluate, segment
from keras_fcn.layers import Preprocess

VOID = 255


def highest(extra=0):
    """Finds the class of the highest of red, green and blue, plus what blue gets."""
    image = keras.Input((None, None, 3))
    x = Preprocess("BGR", [0, 0, 0], name="preprocess")(image)
    score = keras.layers.Conv2D(3, 1, name="score")
    output = score(x)
    score.set_weights([np.eye(3)[::-1].reshape(1, 1, 3, 3), np.array([0, 0, extra])])
    return keras.Model(image, output, name="highest")


@pytest.fixture(scope="module")
def model():
    return highest()


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3)).astype("uint8")


def truths(pictures, seed=0):
    """What the net says of pictures, changed at random, partly to void."""
    rng = np.random.default_rng(seed)
    truth = pictures.argmax(-1)
    changed = rng.random(truth.shape) < 0.5
    return np.where(changed, rng.choice([0, 1, 2, VOID], truth.shape), truth)


# One picture


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 1), (31, 33), (40, 20)])
def test_a_picture_of_any_size_is_segmented_pixel_by_pixel(size, model):
    pixels = picture(*size)
    labels = segment(model, pixels)
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, pixels.argmax(-1))


def as_path(tmp_path, image):
    image.save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


@pytest.mark.parametrize(
    "give",
    [
        as_path,
        lambda folder, image: str(as_path(folder, image)),
        lambda folder, image: image,
        lambda folder, image: np.array(image),
    ],
    ids=["path", "text", "PIL image", "array"],
)
def test_a_picture_may_be_a_path_an_image_or_an_array(give, tmp_path, model):
    pixels = picture(12, 17)
    labels = segment(model, give(tmp_path, Image.fromarray(pixels)))
    np.testing.assert_array_equal(labels, pixels.argmax(-1))


def test_grey_pictures_have_three_equal_channels(model):
    np.testing.assert_array_equal(
        segment(model, picture(5, 6)[..., 0]), np.zeros((5, 6))
    )


def test_a_photo_taken_upright_is_segmented_upright(tmp_path, model):
    pixels = picture(9, 14)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held with its right side down
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    turned = np.rot90(pixels, -1)
    np.testing.assert_array_equal(
        segment(model, tmp_path / "photo.png"), turned.argmax(-1)
    )


def two_heads(model):
    """Finds the highest and the lowest of red, green and blue."""
    lowest = keras.layers.Rescaling(-1.0)(model.output)
    heads = {"sem": model.output, "geo": lowest}
    return keras.Model(model.input, heads, name="two")


def test_each_head_has_its_labels(model):
    pixels = picture(6, 8)
    labels = segment(two_heads(model), pixels)
    assert labels.keys() == {"sem", "geo"}
    np.testing.assert_array_equal(labels["sem"], pixels.argmax(-1))
    np.testing.assert_array_equal(labels["geo"], pixels.argmin(-1))


@pytest.fixture(scope="module")
def fusion():
    """A net that finds where colour is most above HHA."""
    inputs = {
        stream: keras.Input((None, None, 3), name=stream) for stream in ("hha", "color")
    }
    streams = {
        stream: Preprocess("RGB", [0, 0, 0], name=f"preprocess{stream}")(image)
        for stream, image in inputs.items()
    }
    output = keras.layers.Subtract()([streams["color"], streams["hha"]])
    return keras.Model(inputs, output, name="fusion")


def streams(height, width, seed=0):
    """A picture by stream, with room so that no two differences are equal."""
    rng = np.random.default_rng(seed)
    order = rng.permuted(np.tile([0, 40, 80], (height, width, 1)), axis=-1)
    hha = rng.integers(0, 100, (height, width, 3))
    return {"color": np.uint8(hha + order), "hha": np.uint8(hha)}, order.argmax(-1)


LOOKS = [{}, {"mirror": True}, {"mirror": True, "scales": (1, 1)}]


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@pytest.mark.parametrize("order", [("color", "hha"), ("hha", "color")])
def test_pictures_of_two_streams_are_told_apart_by_name(order, looks, fusion):
    pictures, wanted = streams(11, 14)
    pictures = {stream: pictures[stream] for stream in order}
    np.testing.assert_array_equal(segment(fusion, pictures, **looks), wanted)
    labels = wanted[None].astype("uint8")
    batch = {stream: x[None].astype("float32") for stream, x in pictures.items()}
    assert evaluate(fusion, [(batch, labels)], **looks)["pixel_accuracy"] == 1


def test_pictures_of_two_streams_may_be_files(tmp_path, fusion):
    pictures, wanted = streams(5, 9)
    for stream, pixels in pictures.items():
        Image.fromarray(pixels).save(tmp_path / f"{stream}.png")
    paths = {stream: tmp_path / f"{stream}.png" for stream in pictures}
    np.testing.assert_array_equal(segment(fusion, paths), wanted)


@pytest.fixture(scope="module")
def depth_net():
    """A net that finds the highest of red, green, blue and 10 log depth."""
    image = keras.Input((None, None, 4))
    x = Preprocess("RGBD", [0, 0, 0, 0], name="preprocess")(image)
    score = keras.layers.Conv2D(4, 1, name="score")
    output = score(x)
    score.set_weights([np.diag([1, 1, 1, 10]).reshape(1, 1, 4, 4), np.zeros(4)])
    return keras.Model(image, output, name="deep")


@pytest.mark.parametrize("looks", LOOKS, ids=str)
@pytest.mark.parametrize("dtype", ["float32", "uint16"])
def test_depth_is_the_fourth_channel(dtype, looks, depth_net):
    depth = np.random.default_rng(1).choice([0, 2000, 60000], (7, 10, 1))
    pixels = np.concatenate([picture(7, 10) // 2, depth], axis=-1)
    logs = 10 * np.log(np.maximum(depth, 1))
    wanted = np.concatenate([pixels[..., :3], logs], axis=-1).argmax(-1)
    assert set(np.unique(wanted)) == {0, 1, 2, 3}
    found = segment(depth_net, pixels.astype(dtype), **looks)
    np.testing.assert_array_equal(found, wanted)
    batch = pixels[None].astype("float32"), wanted[None]
    assert evaluate(depth_net, [batch], **looks)["pixel_accuracy"] == 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda pixels: "picture.png",
        lambda pixels: pixels[..., :3],
        lambda pixels: pixels[0],
        lambda pixels: np.where(pixels > 5, np.nan, pixels),
    ],
    ids=["path", "no depth", "a row", "not finite"],
)
def test_what_is_no_picture_with_depth_is_refused(wrong, depth_net):
    pixels = np.full((4, 5, 4), 9, "float32")
    with pytest.raises(ValueError, match=r"expected finite numbers .*, width, 4\)"):
        segment(depth_net, wrong(pixels))


def net(shape, name):
    image = keras.Input(shape)
    output = keras.layers.ReLU(name=name)(image)
    return keras.Model(image, output, name="other")


@pytest.mark.parametrize(
    "wrong",
    [
        net((None, None, 3), "conv1_1"),
        net((None, None, 5), "preprocess"),
        net((32, 32, 3), "preprocess"),
    ],
    ids=["no preprocessing", "five channels", "one size"],
)
def test_a_net_that_takes_no_pictures_is_refused(wrong):
    with pytest.raises(ValueError, match=r"other takes .*; expected a net from RGB"):
        segment(wrong, picture(8, 8))


def test_pictures_that_are_not_those_of_the_net_s_streams_are_refused(model, fusion):
    pixels, other = picture(4, 4), picture(4, 5)
    with pytest.raises(ValueError, match="one without a name .*a dict of hha, color"):
        segment(fusion, pixels)
    with pytest.raises(ValueError, match="a dict of hha was given; expected one with"):
        segment(model, {"hha": pixels})
    with pytest.raises(ValueError, match=r"4, 5, 3\).*expected .*of one size"):
        segment(fusion, {"color": pixels, "hha": other})


def test_what_is_no_picture_is_refused(tmp_path, model):
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"text\.png"):
        segment(model, tmp_path / "text.png")
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        segment(model, tmp_path / "missing.png")
    with pytest.raises(ValueError, match="float64"):
        segment(model, picture(4, 4) / 255)


# A data set


class Dataset(keras.utils.PyDataset):
    """One that never ends, as Keras allows."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return self.batches[index % len(self.batches)]


def batches_of(sizes, channels=False):
    """Batches of pictures of several sizes, and their labels."""
    batches = []
    for seed, (count, height, width) in enumerate(sizes):
        pictures = np.stack(
            [picture(height, width, 10 * seed + i) for i in range(count)]
        )
        labels = truths(pictures, seed)
        labels = labels[..., None] if channels else labels
        batches.append((pictures.astype("float32"), labels.astype("uint8")))
    return batches


SIZES = [(2, 8, 9), (1, 5, 20), (3, 1, 1)]


@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("feed", [list, iter, Dataset])
def test_the_matrix_of_a_data_set_is_that_of_its_predictions(feed, channels, model):
    batches = batches_of(SIZES, channels)
    done = []
    result = evaluate(model, feed(batches), progress=done.append)
    expected = np.zeros((3, 3), int)
    for pictures, labels in batches:
        predicted = model.predict(pictures, verbose=0).argmax(-1)
        for i, j in zip(labels.ravel(), predicted.ravel(), strict=True):
            if i != VOID:
                expected[i, j] += 1
    assert result["confusion_matrix"] == expected.tolist()
    assert result["pixel_accuracy"] == np.trace(expected) / expected.sum()
    assert result["images"] == 6
    assert done == [1, 2, 3]


def test_how_pictures_are_batched_does_not_matter(model):
    (pictures, labels), *_ = batches_of([(4, 7, 7)])
    whole = evaluate(model, [(pictures, labels)])
    single = evaluate(
        model, [(pictures[i : i + 1], labels[i : i + 1]) for i in range(4)]
    )
    np.testing.assert_equal(single, whole)


def test_a_data_set_of_nothing_but_void_has_no_scores(model):
    pictures = picture(4, 4)[None].astype("float32")
    result = evaluate(model, [(pictures, np.full((1, 4, 4), VOID))])
    assert np.isnan(result["mean_iou"])
    assert not np.any(result["confusion_matrix"])


@pytest.mark.parametrize("stray", [3, 254, -1])
def test_labels_that_are_no_class_stop_the_evaluation(stray, model):
    (pictures, labels), *_ = batches_of([(1, 4, 4)])
    labels = labels.astype("int32")
    wrong = labels.copy()
    wrong[0, 2, 3] = stray
    with pytest.raises(
        ValueError, match=rf"Batch 1 holds labels \[{stray}\]; expected 0 to 2"
    ):
        evaluate(model, [(pictures, labels), (pictures, wrong)])


def test_labels_of_another_size_stop_the_evaluation(model):
    (pictures, labels), *_ = batches_of([(1, 4, 6)])
    with pytest.raises(ValueError, match=r"\(1, 6, 4\).*\(1, 4, 6\)"):
        evaluate(model, [(pictures, labels.transpose(0, 2, 1))])


@pytest.mark.parametrize("empty", [[], iter(()), Dataset([])])
def test_a_data_set_without_batches_is_refused(empty, model):
    with pytest.raises(
        ValueError, match="no batches to evaluate; expected one at least"
    ):
        evaluation.evaluate(model, empty)


def of_classes(count):
    """Finds the class of the highest of as many logits, all of them made of red."""
    image = keras.Input((None, None, 3))
    x = Preprocess("RGB", [0, 0, 0], name="preprocess")(image)
    return keras.Model(image, keras.layers.Conv2D(count, 1)(x), name="many")


def test_a_net_that_has_a_class_void_is_not_scored():
    (pictures, _), *_ = batches_of([(1, 4, 4)])
    net = of_classes(256)
    labels = segment(net, np.uint8(pictures[0]))
    with pytest.raises(ValueError, match="many has 256 classes; expected 255 at most"):
        evaluate(net, [(pictures, labels[None])])
    two = keras.Model(net.input, {"few": net.output[..., :2], "all": net.output})
    with pytest.raises(ValueError, match="256 classes of all; expected 255 at most"):
        evaluate(two, [(pictures, {"few": labels[None], "all": labels[None]})])
    truth = np.full((1, 4, 4), 254)
    assert len(evaluate(of_classes(255), [(pictures, truth)])["iou"]) == 255


@pytest.mark.parametrize("looks", [{}, {"mirror": True}], ids=["one", "two"])
def test_a_net_of_one_class_labels_no_pixels(looks):
    (pictures, labels), *_ = batches_of([(1, 4, 4)])
    with pytest.raises(ValueError, match="one leaves nothing to decide"):
        segment(of_classes(1), np.uint8(pictures[0]), **looks)
    with pytest.raises(ValueError, match="one leaves nothing to decide"):
        evaluate(of_classes(1), [(pictures, 0 * labels)], **looks)


def test_what_are_no_batches_of_pairs_is_refused(model):
    (pictures, labels), *_ = batches_of([(1, 4, 4)])
    for given, words in (
        ([(pictures, labels, labels)], "Batch 0 is a tuple of 3; .* weights out"),
        (
            (pictures, labels),
            r"Batch 0 is float32 of shape \(1, 4, 4, 3\); .*\[\(images",
        ),
        ([{"image": pictures, "label": labels}], "Batch 0 is a dict of image, label"),
        ({"image": pictures, "label": labels}, "Batch 0 is a str; expected"),
        ([(pictures, labels), None], "Batch 1 is a NoneType; expected"),
        (
            [(pictures.tolist(), labels)],
            "images of batch 0 are a list of 1; .*np.array",
        ),
        (None, "The batches are a NoneType; expected an iterable"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(model, given)
    assert evaluate(model, [[pictures, labels.tolist()]])["images"] == 1


def test_a_sequential_model_around_a_net_is_refused(model):
    around = keras.Sequential([keras.Input((None, None, 3)), model], name="around")
    with pytest.raises(ValueError, match="around is a Sequential .*a functional net"):
        segment(around, picture(4, 4))
    with pytest.raises(ValueError, match="around is a Sequential .*a functional net"):
        evaluate(around, batches_of(SIZES))
    inside = keras.Model(around.inputs[0], around.outputs[0])
    assert evaluate(inside, batches_of(SIZES)) == evaluate(model, batches_of(SIZES))
    with pytest.raises(ValueError, match="voc is a str .*a functional net"):
        segment("voc", picture(4, 4))


def by_hand(truth, prediction):
    matrix = np.zeros((3, 3), int)
    for i, j in zip(truth.ravel(), prediction.ravel(), strict=True):
        if i != VOID:
            matrix[i, j] += 1
    return matrix.tolist()


@pytest.mark.parametrize("order", [("sem", "geo"), ("geo", "sem")])
@pytest.mark.parametrize("channels", [False, True])
def test_each_head_is_scored_against_the_labels_of_its_name(order, channels, model):
    batches, expected = [], {"sem": 0, "geo": 0}
    for i, (pictures, sem) in enumerate(batches_of(SIZES)):
        labels = {"sem": sem, "geo": truths(255 - pictures, seed=i)}
        found = {"sem": pictures.argmax(-1), "geo": pictures.argmin(-1)}
        for head, truth in labels.items():
            expected[head] += np.array(by_hand(truth, found[head]))
        labels = {head: labels[head] for head in order}
        if channels:
            labels = {head: truth[..., None] for head, truth in labels.items()}
        batches.append((pictures, labels))
    result = evaluate(two_heads(model), batches)
    assert result.keys() == {"sem", "geo"}
    for head, matrix in expected.items():
        assert result[head]["confusion_matrix"] == matrix.tolist()
        assert result[head]["images"] == 6
        assert result[head]["pixel_accuracy"] == np.trace(matrix) / matrix.sum()


def test_outputs_and_inputs_without_names_are_refused(model):
    image = keras.Input((None, None, 3))
    heads = keras.Model(model.input, [model.output, model.output], name="two")
    streams = keras.Model([model.input, image], model.output, name="both")
    with pytest.raises(ValueError, match="two has outputs without names; expected one"):
        evaluate(heads, batches_of(SIZES))
    with pytest.raises(ValueError, match="both has inputs without names; expected one"):
        evaluate(streams, batches_of(SIZES))


def test_batches_that_are_not_those_of_the_net_stop_the_evaluation(model, fusion):
    (pictures, labels), *_ = batches_of([(1, 4, 4)])
    heads = two_heads(model)
    for net, inputs, truth, words in (
        (
            model,
            pictures,
            {"sem": labels},
            "labels of batch 0: a dict of sem was given",
        ),
        (heads, pictures, labels, "one without a name was given; expected a dict of"),
        (heads, pictures, {"sem": labels}, "a dict of sem was given.*sem, geo"),
        (
            model,
            {"hha": pictures},
            labels,
            "images of batch 0: a dict of hha was given",
        ),
        (fusion, pictures, labels, "expected a dict of hha, color"),
        (
            model,
            pictures[..., :2],
            labels,
            r"\(1, 4, 4, 2\).*expected .batch, height, width, 3\)",
        ),
        (
            fusion,
            {"hha": pictures, "color": pictures[:, :3]},
            labels,
            r"'color': \(1, 3, 4, 3\).*expected .*, of one size",
        ),
        (model, pictures[0], labels, r"\(4, 4, 3\).*expected .batch, height, width, 3"),
        (model, np.where(pictures > 99, np.nan, pictures), labels, "are not finite"),
        (
            model,
            np.where(pictures > 99, np.inf, np.float64(pictures)),
            labels,
            "not finite",
        ),
        (model, pictures, labels + 0.5, r"labels \[0.5.*\]; expected 0 to 2"),
        (model, pictures, np.where(labels > 0, np.nan, 0), r"labels \[nan.*; expected"),
        (keras.Sequential([model]), pictures, labels, "expected a functional net"),
    ):
        with pytest.raises(ValueError, match=words):
            evaluate(net, [(inputs, truth)])
    wrong = {"sem": labels, "geo": np.full_like(labels, 7)}
    with pytest.raises(ValueError, match=r"Batch 0 holds labels \[7\] for geo"):
        evaluate(heads, [(pictures, wrong)])


@pytest.mark.parametrize("looks", [{}, {"mirror": True}], ids=["one", "two"])
def test_a_classifier_labels_no_pixels(looks):
    net = models.classifier("alexnet", 3, width=1 / 64)
    pixels = picture(250, 300)
    with pytest.raises(ValueError, match=r"gives \(2, 4\) scores for .*\(250, 300\)"):
        segment(net, pixels, **looks)
    with pytest.raises(ValueError, match=r"gives \(2, 4\) scores for .*\(250, 300\)"):
        evaluate(net, [(pixels[None], pixels[None, ..., 0] % 3)], **looks)


def test_whole_numbers_are_looked_at_as_the_same_in_float32(model):
    pixels = picture(9, 14)[None]
    truth = truths(pixels)
    found = [
        evaluate(model, [(x, truth)], scales=(0.5, 1, 1.7), mirror=True)
        for x in (pixels, pixels.astype("float32"))
    ]
    assert found[0]["confusion_matrix"] == found[1]["confusion_matrix"]


def test_pictures_of_a_source_come_one_by_one_at_their_own_size(model, fusion):
    sizes = [(4, 6), (7, 3)]
    plain = [(picture(*size), truths(picture(*size))) for size in sizes]
    batches = list(evaluation.one_by_one(plain))
    for (inputs, labels), (pixels, truth) in zip(batches, plain, strict=True):
        assert inputs.dtype == np.float32
        np.testing.assert_array_equal(inputs, pixels[None])
        np.testing.assert_array_equal(labels, truth[None])
    assert evaluate(model, batches) == evaluate(model, evaluation.one_by_one(plain))
    named = [streams(*size) for size in sizes]
    found = evaluate(fusion, evaluation.one_by_one(named))
    assert (found["images"], found["pixel_accuracy"]) == (2, 1)


# A net that finds one class


def batch_of(labels):
    """A picture whose pixels are brightest in the channel of their label."""
    labels = np.array(labels, "uint8").reshape(1, 1, -1)
    return np.eye(3, dtype="float32")[labels] * 200, labels


def test_one_class_nearly_everywhere_is_warned_of():
    net, batch = highest(1000), batch_of([0] * 700 + [1] * 298 + [2] * 2)
    with pytest.warns(UserWarning, match="highest finds class 2 in 100.0%") as caught:
        evaluate(net, [batch])
    (warning,) = [w for w in caught if w.category is UserWarning]
    for words in ("where 0.2% are of it", "not loaded", "learning rate", "labels are"):
        assert words in str(warning.message)
    assert warning.filename == __file__  # who called


@pytest.mark.parametrize("looks", [{}, {"mirror": True}], ids=["one", "two"])
def test_a_net_of_nan_finds_no_class(looks):
    pixels, labels = batch_of([0, 1, 2])
    with pytest.raises(ValueError, match="NaN at 100.0% of the pixels"):
        segment(highest(np.nan), pixels[0].astype("uint8"), **looks)
    with pytest.raises(ValueError, match="NaN at 100.0% of the pixels"):
        evaluate(highest(np.nan), [(pixels, labels)], **looks)


def test_the_warning_names_the_head(model):
    heads = two_heads(highest(1000))
    pictures, labels = batch_of([0] * 7 + [1] * 3)
    with pytest.warns(UserWarning, match="two sem finds class 2") as caught:
        evaluate(heads, [(pictures, {"sem": labels, "geo": labels})])
    assert [w.category for w in caught].count(UserWarning) == 1


@pytest.mark.parametrize(
    ("truth", "found"),
    [
        ([0] * 700 + [1] * 300, [0] * 700 + [1] * 300),
        ([0] * 700 + [2] * 300, [0] * 2 + [2] * 998),  # below the limit
        ([0] * 999 + [2], [0] * 1000),  # where the truth has hardly another class
        ([2] * 1000, [2] * 1000),
        ([VOID] * 1000, [2] * 1000),
    ],
)
def test_other_nets_are_not_warned_of(truth, found, model):
    pictures, _ = batch_of(found)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(model, [(pictures, np.array([[truth]], "uint8"))])


# Upper bounds


@pytest.mark.parametrize("shape", [(8, 12), (7, 13), (1, 1), (5, 3)])
@pytest.mark.parametrize("factor", [1, 2, 4, 16])
def test_a_coarser_label_map_holds_the_most_frequent_label_of_each_cell(shape, factor):
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 255], shape)
    found = evaluation.coarsen(labels, factor, 4)
    assert (found.shape, found.dtype) == (shape, np.uint8)
    for y in range(0, shape[0], factor):
        for x in range(0, shape[1], factor):
            cell = labels[y : y + factor, x : x + factor]
            votes = np.bincount(cell[cell != 255], minlength=4)
            assert (found[y : y + factor, x : x + factor] == votes.argmax()).all()


def test_labels_that_fill_whole_cells_lose_nothing():
    labels = np.kron(np.random.default_rng(0).integers(0, 9, (4, 5)), np.ones((8, 8)))
    np.testing.assert_array_equal(evaluation.coarsen(labels, 8, 9), labels)
    assert (evaluation.coarsen(labels, 16, 9) != labels).any()


# Several looks


BLOCKS = np.random.default_rng(1).choice([0, 255], (3, 4, 3)).astype(np.uint8)
BLOCKS = BLOCKS.repeat(40, axis=0).repeat(40, axis=1)[:113, :150]


def random_net(heads=8):
    """A narrow net, the same on every backend."""
    model = models.fcn("alexnet", 8, heads, width=1 / 16)
    oracle.draw(model)
    return model


def test_with_the_mirror_image_left_and_right_are_treated_alike():
    model = random_net()
    picture = BLOCKS
    found = segment(model, picture, mirror=True)
    mirrored = segment(model, picture[:, ::-1].copy(), mirror=True)
    assert len(np.unique(found)) > 1
    assert (found == mirrored[:, ::-1]).mean() > 0.99  # rounding may break a tie
    assert (segment(model, picture) != found).any()


def test_the_mean_probability_of_all_looks_decides():
    model = random_net({"a": 3, "b": 4})
    picture = np.random.default_rng(1).integers(0, 256, (37, 50, 3)).astype("float32")
    small = np.asarray(
        keras.ops.convert_to_numpy(
            keras.ops.image.resize(picture, (28, 38), antialias=True)
        )
    )
    looks = []
    for image in (picture, picture[:, ::-1], small, small[:, ::-1]):
        logits = model.predict_on_batch(image[None])
        looks.append({h: _probabilities(x[0]) for h, x in logits.items()})
    found = segment(model, picture.astype(np.uint8), mirror=True, scales=(1, 0.75))
    for head, labels in found.items():
        back = [
            look[head][:, ::step] for look, step in zip(looks, (1, -1) * 2, strict=True)
        ]
        back = [
            keras.ops.convert_to_numpy(keras.ops.image.resize(x.copy(), (37, 50)))
            for x in back
        ]
        wanted = np.sum(back, axis=0).argmax(axis=-1)
        assert (labels == wanted).mean() > 0.99


def _probabilities(logits):
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def test_scales_may_be_an_array():
    net = random_net()
    for scales in ((1,), (1, 0.5)):
        expected = segment(net, picture(20, 24), scales=scales)
        for array in (np.array(scales), list(scales), np.float32(scales)):
            found = segment(net, picture(20, 24), scales=array)
            np.testing.assert_array_equal(found, expected)


def test_scales_that_are_none_are_refused():
    picture = np.zeros((9, 9, 3), np.uint8)
    numbers = (2, 0.5, np.float32(1), None, "1", ("1",), [(1, 2)], np.ones((1, 1)))
    for scales in ((), (0,), (1, -1), (np.nan,), (np.inf,), np.array([]), *numbers):
        with pytest.raises(ValueError, match="expected factors above 0"):
            segment(random_net(), picture, scales=scales)


def test_an_evaluation_with_several_looks_scores_what_they_say(model, fusion):
    looks = {"mirror": True, "scales": (1, 1.5)}
    pictures, _ = streams(37, 50)
    for net, image in (
        (random_net(), pictures["color"]),
        (two_heads(model), pictures["color"]),
        (fusion, pictures),
    ):
        batch = next(evaluation.one_by_one([(image, segment(net, image, **looks))]))
        tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, batch)
        for batches in ([batch], [tensors]):
            found = evaluate(net, batches, **looks)
            found = found if "sem" in found else {"": found}
            assert {result["pixel_accuracy"] for result in found.values()} == {1}


def test_nets_from_two_streams_and_from_depth_look_at_the_mirror_image_of_all():
    depth = np.full_like(BLOCKS[..., :1], 3000, "uint16")
    fusion = models.late_fusion("alexnet", 8, 4, width=1 / 16)
    early = models.fcn("alexnet", 8, 4, width=1 / 16, input_channels=4)
    for net, image in (
        (fusion, {"hha": BLOCKS[::-1], "color": BLOCKS}),
        (early, np.concatenate([BLOCKS, depth], axis=-1)),
    ):
        labels = segment(oracle.draw(net), image, mirror=True)
        mirrored = keras.tree.map_structure(lambda x: x[:, ::-1].copy(), image)
        back = segment(net, mirrored, mirror=True)[:, ::-1]
        assert len(np.unique(labels)) > 1
        assert (labels == back).mean() > 0.99  # rounding may break a tie
