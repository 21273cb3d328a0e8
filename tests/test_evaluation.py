import keras
import numpy as np
import oracle
import pytest
from PIL import Image

from keras_fcn import evaluation, models
from keras_fcn.evaluation import evaluate, segment
from keras_fcn.layers import Preprocess

VOID = 255


@pytest.fixture(scope="module")
def model():
    """A net that finds the class of the highest of red, green and blue."""
    image = keras.Input((None, None, 3))
    x = Preprocess("BGR", [0, 0, 0], name="preprocess")(image)
    score = keras.layers.Conv2D(3, 1, name="score")
    output = score(x)
    score.set_weights([np.eye(3)[::-1].reshape(1, 1, 3, 3), np.zeros(3)])
    return keras.Model(image, output, name="highest")


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


def test_each_head_has_its_labels(model):
    reversed_scores = keras.layers.Rescaling(-1.0)(model.output)
    heads = {"highest": model.output, "lowest": reversed_scores}
    pixels = picture(6, 8)
    labels = segment(keras.Model(model.input, heads), pixels)
    assert labels.keys() == heads.keys()
    np.testing.assert_array_equal(labels["highest"], pixels.argmax(-1))
    np.testing.assert_array_equal(labels["lowest"], pixels.argmin(-1))


def net(shape, name):
    image = keras.Input(shape)
    output = keras.layers.ReLU(name=name)(image)
    return keras.Model(image, output, name="other")


@pytest.mark.parametrize(
    "wrong",
    [
        net((None, None, 3), "conv1_1"),
        net((None, None, 4), "preprocess"),
        net((32, 32, 3), "preprocess"),
    ],
    ids=["no preprocessing", "four channels", "one size"],
)
def test_a_net_that_takes_no_pictures_is_refused(wrong):
    with pytest.raises(ValueError, match=r"other takes .*; expected a net from RGB"):
        segment(wrong, picture(8, 8))


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


def test_a_net_of_several_heads_is_refused(model):
    heads = keras.Model(model.input, {"a": model.output, "b": model.output}, name="two")
    with pytest.raises(ValueError, match="two has several heads; expected one output"):
        evaluate(heads, batches_of(SIZES))


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


def test_scales_that_are_none_are_refused():
    picture = np.zeros((9, 9, 3), np.uint8)
    for scales in ((), (0,), (1, -1)):
        with pytest.raises(ValueError, match="expected factors above 0"):
            segment(random_net(), picture, scales=scales)


def test_an_evaluation_with_several_looks_scores_what_they_say():
    model, rng = random_net(), np.random.default_rng(1)
    picture = rng.integers(0, 256, (37, 50, 3)).astype(np.uint8)
    labels = segment(model, picture, mirror=True, scales=(1, 1.5))
    batch = np.float32(picture)[None], labels[None]
    tensors = tuple(map(keras.ops.convert_to_tensor, batch))
    for batches in ([batch], [tensors]):
        found = evaluate(model, batches, mirror=True, scales=(1, 1.5))
        assert found["pixel_accuracy"] == 1
