import itertools

import keras
import numpy as np
import pytest
from pictures import labels, noise, numbered, write
from PIL import Image

from keras_fcn.datasets import batches as batches_module
from keras_fcn.datasets import folder
from keras_fcn.datasets.batches import (
    MEAN_COLOR,
    Batches,
    cut,
    label_counts,
    sample_cells,
)
from keras_fcn.layers import Preprocess
from keras_fcn.training import WeightedCrossentropy

VOID = 255


def batches_of(pairs, num_classes, **arguments):
    return Batches(folder.Folder(pairs, num_classes), **arguments)


# Geometry


def stripes(length, width, axis):
    """A picture in pure red, green and blue, and its mask: its own argmax."""
    mask = np.resize(np.repeat([0, 1, 2, 1], width), length)
    mask = np.broadcast_to(mask, (23, length))
    mask = np.ascontiguousarray(mask if axis else mask.T).astype(np.uint8)
    return np.eye(3, dtype=np.uint8)[mask] * 255, mask


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("cells", [31, 45, 60, 97, 151, 177, 301])
def test_colors_and_labels_are_scaled_by_one_geometry(cells, axis):
    image, mask = stripes(97, 13, axis)
    scaled = (23, cells) if axis else (cells, 23)
    image, mask, _ = cut(image, mask, scaled, (0, 0), scaled)
    second, first = np.sort(np.int32(image))[..., -2:].transpose(2, 0, 1)
    clear = first - second > 8  # at the very edge of a stripe two colours are equal
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(image.argmax(-1)[clear], mask[clear])


@pytest.mark.parametrize("scaled", [(29, 17), (64, 64), (50, 91)])
@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (-4, 6), (-7, -9)])
def test_a_window_is_that_part_of_the_whole_scaled_picture(scaled, corner):
    image, mask = np.uint8(noise(37, 41)), np.uint8(noise(37, 41, 1)[..., 0])
    whole, whole_mask, _ = cut(image, mask, scaled, (0, 0), scaled)
    part, part_mask, inside = cut(image, mask, scaled, corner, (24, 20))
    padded = np.full((99, 120), -1)  # the scaled picture, 10 cells from the corner
    padded[10 : 10 + scaled[0], 10 : 10 + scaled[1]] = np.arange(
        whole_mask.size
    ).reshape(scaled)
    top, left = np.add(corner, 10)
    window = padded[top : top + 24, left : left + 20]
    assert (window[inside] >= 0).all()
    assert (window >= 0).sum() == part_mask.size
    np.testing.assert_array_equal(part_mask, whole_mask.ravel()[window[inside]])
    colors = whole.reshape(-1, 3)[window[inside]]
    np.testing.assert_allclose(part, np.int32(colors), atol=1)  # Pillow rounds twice


def test_a_window_larger_than_the_picture_is_mean_color_and_void(tmp_path):
    image = noise(4, 6)
    pairs = folder.pairs(*write(tmp_path, {"a": (image, labels(4, 6, 0))}))
    batches = batches_of(pairs, 1, crop=(9, 8))
    corners = set()
    for epoch in range(20):
        pictures, target = batches.batch(epoch, 0)
        rows, columns = np.nonzero(target[0] == 0)
        corners.add((rows[0], columns[0]))
        np.testing.assert_array_equal(pictures[0][rows, columns], image.reshape(-1, 3))
        assert (pictures[target == VOID] == MEAN_COLOR).all()
        assert (target == VOID).sum() == 9 * 8 - 4 * 6
    assert len(corners) > 5


def test_whole_pictures_lie_in_the_corner_of_the_largest_of_their_batch(tmp_path):
    sizes = [(4, 9), (7, 5), (6, 6)]
    pictures = {
        str(i): (noise(*size), labels(*size, i)) for i, size in enumerate(sizes)
    }
    pairs = folder.pairs(*write(tmp_path, pictures))
    images, target = batches_of(pairs, 3, batch_size=3, shuffle=False)[0]
    assert images.shape == (3, 7, 9, 3)
    assert (images.dtype, target.dtype) == (np.float32, np.int32)
    for i, (height, width) in enumerate(sizes):
        np.testing.assert_array_equal(images[i, :height, :width], pictures[str(i)][0])
        assert (target[i, :height, :width] == i).all()
        assert (target[i] != VOID).sum() == height * width


def test_every_second_picture_is_mirrored_with_its_labels(tmp_path):
    mask = np.uint8(noise(5, 4)[..., 0] % 3)
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(5, 4), mask)}))
    batches = batches_of(pairs, 3, mirror=True)
    turned = 0
    for epoch in range(200):
        image, target = (array[0] for array in batches.batch(epoch, 0))
        if (target[:, 0] == mask[:, -1]).all():
            image, target, turned = image[:, ::-1], target[:, ::-1], turned + 1
        np.testing.assert_array_equal(image, noise(5, 4))
        np.testing.assert_array_equal(target, mask)
    assert 70 < turned < 130  # 4 standard deviations


def test_scales_are_drawn_between_their_limits_and_halve_as_often_as_they_double(
    tmp_path,
):
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(40, 40), labels(40, 40, 0))}))
    batches = batches_of(pairs, 1, crop=(100, 100), scale=(0.5, 2))
    pixels = [(batches.batch(epoch, 0)[1] == 0).sum() for epoch in range(200)]
    sides = np.sqrt(pixels)
    assert 20 <= sides.min() < 23
    assert 74 < sides.max() <= 80
    assert 70 < (sides < 40).sum() < 130


def test_a_picture_may_be_moved_out_of_its_window_altogether(tmp_path):
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(4, 5), labels(4, 5, 0))}))
    changes = {"color": (1, 1, 1), "tint": 1, "blur": 3, "noise": 9}
    batches = batches_of(pairs, 1, jitter=32, **changes)
    gone = 0
    for epoch in range(40):
        images, target = batches.batch(epoch, 0)
        assert (images[target == VOID] == MEAN_COLOR).all()
        gone += (target == VOID).all()
    assert gone > 20


# Mixture


def test_cutmix_pastes_a_rectangle_of_another_picture_with_its_labels(tmp_path):
    size, count = (40, 60), 30
    sources = {
        f"{i:02}": (np.full((*size, 3), 7 * i), labels(*size, i)) for i in range(count)
    }
    pairs = folder.pairs(*write(tmp_path, sources))
    arguments = {"crop": size, "batch_size": count, "cutmix": 0.5, "shuffle": False}
    areas, shapes, partners, corners = [], [], [], []
    for epoch in range(20):
        images, target = batches_of(pairs, count, **arguments).batch(epoch, 0)
        np.testing.assert_array_equal(images, np.stack([7 * target] * 3, axis=-1))
        for i, mask in enumerate(target):
            rows, columns = np.nonzero(mask != i)
            if rows.size:
                height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
                assert rows.size == height * width  # one rectangle
                areas.append(rows.size / mask.size)
                shapes.append((height / 40) / (width / 60))
                (partner,) = np.unique(mask[rows, columns])
                partners.append(partner)
                corners.append((rows.min(), columns.min()))
    windows = 20 * count
    assert abs(len(areas) - windows / 2 * (1 - 1 / count)) < 4 * windows**0.5 / 2
    assert 0.045 < min(areas) < 0.08 < 0.36 < max(areas) < 0.42
    assert 0.55 < min(shapes) < 0.75 < 1.35 < max(shapes) < 1.8
    assert set(partners) == set(range(count))
    assert min(corners)[0] == 0
    assert len(set(corners)) > len(corners) / 2


def test_what_is_pasted_is_changed_like_any_other_picture(tmp_path):
    pairs = folder.pairs(
        *write(tmp_path, {"a": (np.full((20, 20, 3), 100), labels(20, 20, 0))})
    )
    batches = batches_of(pairs, 1, crop=(20, 20), tint=0.5, cutmix=1.0)
    for epoch in range(20):
        (image,), _ = batches.batch(epoch, 0)
        assert len(np.unique(image.reshape(-1, 3), axis=0)) == 2  # two tints


# Colour


def changed(root, image, color=None, **changes):
    pairs = folder.pairs(*write(root, {"a": (image, labels(*image.shape[:2], 0))}))
    batches = batches_of(pairs, 1, color=color, **changes)
    return [batches.batch(epoch, 0)[0][0] for epoch in range(50)]


def test_brightness_multiplies_every_pixel_alike(tmp_path):
    image = noise(5, 5) // 2 + 1
    factors = [picture / image for picture in changed(tmp_path, image, (0.5, 0, 0))]
    factor = np.array([ratio.mean() for ratio in factors])
    np.testing.assert_allclose(
        factors, factor[:, None, None, None] + 0 * image, rtol=1e-4
    )
    assert 0.5 <= factor.min() < 0.6
    assert 1.4 < factor.max() <= 1.5


def test_contrast_keeps_the_mean_and_scales_the_distance_to_it(tmp_path):
    image = noise(5, 5) // 4 + 96
    for picture in changed(tmp_path, image, (0, 0.5, 0)):
        ratio = (picture - image.mean()) / (image - image.mean())
        np.testing.assert_allclose(ratio, ratio.mean(), rtol=1e-3)
        assert 0.5 <= ratio.mean() <= 1.5


def test_saturation_changes_neither_greys_nor_any_pixels_luma(tmp_path):
    image = noise(5, 5) // 4 + 96
    image[0] = 77
    pictures = changed(tmp_path, image, (0, 0, 0.5))
    luma = [0.299, 0.587, 0.114]  # ITU-R BT.601
    for picture in pictures:
        np.testing.assert_allclose(picture[0], 77, rtol=1e-5)
        np.testing.assert_allclose(picture @ luma, image @ luma, rtol=1e-4)
    spread = np.array([picture[1].std(-1) / image[1].std(-1) for picture in pictures])
    np.testing.assert_allclose(spread, spread[:, :1] + 0 * spread, rtol=1e-3)
    assert 0.5 <= spread.min() < 0.7 < 1.3 < spread.max() <= 1.5


def test_a_tint_multiplies_each_channel_by_itself(tmp_path):
    image = noise(5, 5) // 2 + 1
    factors = np.stack(
        [picture / image for picture in changed(tmp_path, image, tint=0.5)]
    )
    each = factors[:, :1, :1]
    np.testing.assert_allclose(factors, each + 0 * factors, rtol=1e-4)
    assert (0.5 <= each.min(axis=(0, 1, 2))).all()
    assert (each.max(axis=(0, 1, 2)) <= 1.5).all()
    assert (each.std(axis=0) > 0.2).all()
    assert (np.corrcoef(each.reshape(-1, 3).T) < 0.5)[~np.eye(3, dtype=bool)].all()


def test_a_blur_spreads_a_point_as_a_gaussian_of_up_to_its_deviation(tmp_path):
    image = np.zeros((41, 41, 3), np.uint8)
    image[20, 20] = 255
    axis = np.arange(41) - 20
    spreads = []
    for picture in changed(tmp_path, image, blur=2.0):
        line = picture[..., 0].sum(axis=0)
        assert abs((line * axis).sum()) <= 1e-6 * line.sum()  # nothing moves
        spreads.append(np.sqrt((line * axis**2).sum() / line.sum()))
    spreads = np.array(spreads)
    assert 15 <= (spreads == 0).sum() <= 35
    assert 1.4 < spreads.max() <= 2.1


def test_noise_has_mean_zero_and_up_to_its_deviation(tmp_path):
    image = np.full((30, 30, 3), 128, np.uint8)
    pictures = np.stack(changed(tmp_path, image, noise=10.0))
    deviations = pictures.std(axis=(1, 2, 3))
    assert abs(pictures.mean() - 128) < 0.2
    assert 0 < deviations.min() < 1.5
    assert 8.5 < deviations.max() < 10.5
    pictures = pictures[deviations > 5] - 128
    neighbours = (pictures[:, 1:] * pictures[:, :-1]).mean() / (pictures**2).mean()
    channels = (pictures[..., 0] * pictures[..., 1]).mean() / (pictures**2).mean()
    assert max(abs(neighbours), abs(channels)) < 0.02


def test_colors_stay_within_0_and_255_and_padding_stays_mean_color(tmp_path):
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(9, 9), labels(9, 9, 0))}))
    changes = {"color": (1, 1, 1), "tint": 1, "blur": 3, "noise": 99}
    batches = batches_of(pairs, 1, crop=(12, 12), **changes)
    for epoch in range(20):
        images, target = batches.batch(epoch, 0)
        assert images.min() >= 0
        assert images.max() <= 255
        assert (images[target == VOID] == MEAN_COLOR).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.5, 2)}, "`crop` None"),
        ({"scale": (2, 0.5), "crop": (2, 2)}, r"\(lowest, highest\)"),
        ({"scale": 2, "crop": (2, 2)}, r"\(lowest, highest\)"),
        ({"crop": 256}, r"`crop` is 256; expected \(height, width\)"),
        ({"color": 0.3}, "brightness, contrast and saturation"),
        ({"color": (0.3, 0.3)}, "brightness, contrast and saturation"),
        ({"color": (0.3, 0.3, 3)}, "each 0 to 1"),
        ({"tint": 1.1}, "`tint` is 1.1; expected 0 to 1"),
        ({"tint": float("nan")}, "`tint` is nan; expected 0 to 1"),
        ({"blur": -1}, "`blur` is -1; expected 0 or more"),
        ({"noise": -1}, "`noise` is -1; expected 0 or more"),
        ({"crop": (9, 0)}, "`crop` is 0; expected 1 or more"),
        ({"multiple": 0}, "`multiple` is 0; expected 1 or more"),
        ({"jitter": -1}, "`jitter` is -1; expected 0 or more"),
        ({"keep": 0.5, "cell": 0}, "`cell` is 0; expected 1 or more"),
        ({"seed": -1}, "`seed` is -1; expected 0 or more"),
        ({"workers": 0}, "`workers` is 0; expected 1 or more"),
        ({"batch_size": 0}, "`batch_size` is 0; expected 1 or more"),
        ({"cutmix": 0.5}, "`crop` None"),
        ({"cutmix": 1.5, "crop": (2, 2)}, "`cutmix` is 1.5; expected 0 to 1"),
        ({"jitter": 32, "crop": (2, 2)}, "expected one of them"),
        ({"keep": 0}, "a share above 0"),
        ({"batch_size": 2, "shard": (2, 2)}, "a rank below"),
        ({"batch_size": 2, "shard": (0, 3)}, "no more processes than pictures"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        batches_of(numbered(tmp_path, 1), 1, **arguments)


# Order

AUGMENTED = {
    "crop": (5, 5),
    "scale": (0.5, 2),
    "mirror": True,
    "color": (0.3, 0.3, 0.3),
    "tint": 0.2,
    "blur": 1.0,
    "noise": 5.0,
    "cutmix": 0.5,
}


def equal(first, second):
    return all(
        np.array_equal(a, b)
        for batch, other in zip(first, second, strict=True)
        for a, b in zip(batch, other, strict=True)
    )


def epoch_of(batches, epoch):
    return [batches.batch(epoch, i) for i in range(len(batches))]


def test_every_epoch_holds_every_picture_once_in_an_order_of_its_own(tmp_path):
    batches = batches_of(numbered(tmp_path, 7), 7, batch_size=3)
    assert len(batches) == 3
    orders = [
        tuple(
            int(mask.max()) for _, masks in epoch_of(batches, epoch) for mask in masks
        )
        for epoch in range(5)
    ]
    assert all(sorted(order) == list(range(7)) for order in orders)
    orders.append(tuple(batches_of(batches.source.pairs, 7, seed=1).order(0).tolist()))
    assert len(set(orders)) == 6


def test_a_batch_depends_on_seed_epoch_and_index_only(tmp_path):
    pairs = numbered(tmp_path, 5)
    arguments = {"batch_size": 2, **AUGMENTED}
    batches = batches_of(pairs, 5, **arguments)
    expected = epoch_of(batches, 3)
    for other in ({"workers": 1}, {"workers": 7}, {"cache": True}):
        again = batches_of(pairs, 5, **arguments, **other)
        again.seek(3)
        assert equal([again[2], again[0], again[1]], [expected[i] for i in (2, 0, 1)])
        assert equal(list(again), expected)
    assert not equal(epoch_of(batches, 4), expected)
    assert not equal(epoch_of(batches_of(pairs, 5, **arguments, seed=1), 3), expected)


class Counted(list):
    """Pictures of as many bytes as they are wide, and how often each was read."""

    def __init__(self, widths):
        super().__init__(widths)
        self.read = dict.fromkeys(range(len(widths)), 0)

    def __getitem__(self, index):
        self.read[index] += 1
        width = super().__getitem__(index) // 4
        return np.zeros((1, width, 3), np.uint8), np.zeros((1, width), np.uint8)


def test_pictures_are_kept_in_memory_as_far_as_there_is_room(monkeypatch):
    monkeypatch.setattr(batches_module, "CACHED", 100)
    for cache, read in ((True, [1, 3, 1, 3, 1]), (False, [3] * 5)):
        source = Counted([40, 80, 40, 24, 20])
        batches = Batches(source, shuffle=False, cache=cache)
        for epoch in range(3):
            for index in range(5):
                batches.batch(epoch, index)
        assert list(source.read.values()) == read


@pytest.mark.filterwarnings("ignore")  # TensorFlow's own, of what it was given
def test_what_kept_a_batch_from_being_read_is_known_after_fit():
    class Damaged(Counted):
        def __getitem__(self, index):
            if index == 4:
                raise ValueError("picture 4 is damaged")
            return super().__getitem__(index)

    batches = Batches(Damaged([40] * 6), shuffle=False)
    assert batches.fault is None
    model = keras.Sequential([keras.layers.Conv2D(2, 1)])
    model.compile("sgd", WeightedCrossentropy())
    with pytest.raises(Exception, match="picture 4 is damaged"):
        model.fit(batches, shuffle=False, verbose=0)
    assert str(batches.fault) == "picture 4 is damaged"
    assert isinstance(batches.fault, ValueError)


def test_a_picture_changes_from_epoch_to_epoch_whatever_its_batch(tmp_path):
    batches = batches_of(numbered(tmp_path, 5), 5, shuffle=False, **AUGMENTED)
    larger = Batches(batches.source, shuffle=False, batch_size=5, **AUGMENTED)
    assert equal(
        [[image[0] for image, _ in epoch_of(batches, 1)]], [larger.batch(1, 0)[0]]
    )
    pictures = {batches.batch(epoch, 2)[0].tobytes() for epoch in range(6)}
    assert len(pictures) == 6


def test_order_and_augmentation_of_the_first_picture_are_drawn_apart(tmp_path):
    batches = batches_of(numbered(tmp_path, 5), 5, batch_size=5)
    drawn = []
    make = np.random.default_rng

    def record(key):
        drawn.append(make(key).random())
        return make(key)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "default_rng", record)
        batches.batch(0, 0)
    assert len(set(drawn)) == len(drawn) == 1 + 5


def test_a_pass_in_another_order_is_refused(tmp_path):
    batches = batches_of(numbered(tmp_path, 4), 4)
    batches.on_epoch_begin()
    batches[0]
    with pytest.raises(ValueError, match="Pass `shuffle=False` to `fit`"):
        batches[2]


def test_a_pass_that_steps_per_epoch_cuts_is_refused_by_that_name(tmp_path):
    batches = batches_of(numbered(tmp_path, 5), 5)
    # What `fit(batches, steps_per_epoch=2)` asks for on JAX and PyTorch (Keras 3.15).
    for asked in ([0], [0, 1], [2, 3]):
        batches.on_epoch_begin()
        for index in asked:
            batches[index]
        batches.on_epoch_end()
    batches.on_epoch_begin()
    with pytest.raises(ValueError, match="Batch 4 .*no `steps_per_epoch`"):
        batches[4]


# Streams, heads, depth


class Invented:
    """A source of pictures that exist in memory alone."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]

    def labels(self, index):
        return self.samples[index][1]


def test_the_labels_of_each_head_are_counted_by_themselves():
    sem, geo = [np.uint8([[0, 0, 7]]), np.uint8([[7], [VOID]])], np.uint8([[2, 1, 2]])
    source = Invented(*((None, {"geo": geo, "sem": labels}) for labels in sem))
    for head, expected in {
        "sem": {0: 2, 7: 2, VOID: 1},
        "geo": {1: 2, 2: 4},
    }.items():
        counts = label_counts(source, head)
        assert {label: counts[label] for label in np.flatnonzero(counts)} == expected


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint64", ">i4"])
def test_labels_of_any_integers_are_counted(dtype):
    labels = np.array([[0, 1, 1]]).astype(dtype)
    assert label_counts(Invented((None, labels)))[:3].tolist() == [1, 2, 0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.float32([[0, 1]]), r"float32 of shape \(1, 2\).*astype\(.uint8"),
        (np.eye(3, dtype=int)[None], r"int64 of shape \(1, 3, 3\).*argmax"),
        ([[0, 1]], "a list of 1.*np.array"),
        (np.array([[0, -1]]), "holds the values -1 to 0; expected classes from 0"),
        (np.array([[256, 7]]), "holds the values 7 to 256; expected classes from 0"),
        ({"sem": np.eye(2)}, "has the heads 'sem', and head='' was given"),
    ],
)
def test_labels_that_are_none_are_not_counted(labels, message):
    source = Invented((None, np.uint8([[1]])), (None, labels))
    with pytest.raises(ValueError, match=rf"source\.labels\(1\).*{message}"):
        label_counts(source)


def test_labels_of_a_head_that_is_none_are_not_counted():
    with pytest.raises(ValueError, match="has the heads '', and head='geo' was given"):
        label_counts(Invented((None, np.uint8([[1]]))), "geo")


@pytest.mark.parametrize("index", [-1, 2])
def test_a_batch_beyond_the_epoch_is_none(index):
    batches = Batches(
        Invented(*[(np.zeros((2, 2, 3), "uint8"), None)] * 3), batch_size=2
    )
    batches.seek(0, 1)
    with pytest.raises(IndexError, match=f"no batch {index}: there are 2"):
        batches.batch(0, index)


def test_streams_and_heads_are_changed_alike(tmp_path):
    color = np.uint8(noise(9, 11) % 250)
    truth = color[..., 0]
    source = Invented(({"color": color, "hha": color}, {"sem": truth, "geo": truth}))
    arguments = {"crop": (6, 7), "scale": (0.5, 2), "mirror": True, "keep": 0.5}
    arguments["cutmix"] = 0.5
    for epoch in range(10):
        pictures, targets = Batches(source, cell=2, **arguments).batch(epoch, 0)
        np.testing.assert_array_equal(pictures["color"], pictures["hha"])
        np.testing.assert_array_equal(targets["sem"], targets["geo"])
    changed, _ = Batches(source, color=(0.5, 0.5, 0.5)).batch(0, 0)
    np.testing.assert_array_equal(changed["hha"][0], color)
    assert (changed["color"][0] != color).any()


def test_depth_is_cut_like_its_labels():
    truth = np.uint8(np.arange(72).reshape(8, 9))
    picture = np.float32(np.stack([truth] * 4, axis=-1))
    for corner in itertools.product((0, 2, 4), (0, 3, 5)):
        window, target, _ = cut(picture, truth, (8, 9), corner, (4, 4))
        np.testing.assert_array_equal(window[..., 3], target)


def test_windows_reach_to_every_border():
    truth = np.uint8(np.arange(20).reshape(4, 5))
    source = Invented((np.zeros((4, 5, 3), np.uint8), truth))
    batches = Batches(source, crop=(3, 3))
    corners = {int(batches.batch(epoch, 0)[1][0, 0, 0]) for epoch in range(200)}
    assert corners == {0, 1, 2, 5, 6, 7}


def test_around_a_picture_a_net_sees_the_zeros_with_which_it_pads():
    pictures, _ = Batches(
        Invented((np.zeros((2, 2, 3), "uint8"), labels(2, 2, 0))), crop=(9, 9)
    ).batch(0, 0)
    fed = Preprocess("BGR", [104.00699, 116.66877, 122.67892])(pictures)
    outside = (pictures != 0).any(axis=-1)
    assert outside.sum() == 77
    assert np.abs(keras.ops.convert_to_numpy(fed)[outside]).max() < 1


def test_depth_moves_with_its_picture_and_is_the_mean_outside():
    color, depth = noise(5, 6), 1000.0 + np.arange(30).reshape(5, 6)
    picture = np.float32(np.concatenate([color, depth[..., None]], axis=-1))
    source = Invented((picture, np.zeros((5, 6), np.uint8)))
    [image], [target] = Batches(source, crop=(8, 8)).batch(0, 0)
    np.testing.assert_array_equal(image[target == 0], picture.reshape(-1, 4))
    assert (image[target == VOID] == [*MEAN_COLOR, 2550]).all()  # exp(7.844)
    with pytest.raises(ValueError, match="a picture of 4 channels"):
        Batches(source, color=(0.1, 0.1, 0.1)).batch(0, 0)


# Sources of one's own

COLOR, TRUTH = np.zeros((8, 6, 3), np.uint8), np.ones((8, 6), np.uint8)


@pytest.mark.parametrize(
    ("labels", "sizes"),
    [
        (TRUTH[:4, :3], "picture 8 x 6, labels 4 x 3"),
        (TRUTH.T, "picture 8 x 6, labels 6 x 8"),
        (
            {"sem": TRUTH, "geo": TRUTH[1:]},
            "picture 8 x 6, labels sem 8 x 6, labels geo",
        ),
    ],
    ids=["half", "turned", "one head"],
)
def test_a_picture_is_not_paired_with_labels_of_another_size(labels, sizes):
    source = Invented((COLOR, TRUTH), (COLOR, labels))
    for arguments in ({}, {"crop": (4, 4)}):
        with pytest.raises(ValueError, match=rf"source\[1\] has sizes .*{sizes}"):
            Batches(source, shuffle=False, **arguments).batch(0, 1)


def test_streams_are_of_one_size():
    streams = {"color": COLOR, "hha": COLOR[:4]}
    with pytest.raises(ValueError, match="picture color 8 x 6, picture hha 4 x 6"):
        Batches(Invented((streams, TRUTH))).batch(0, 0)


def test_what_is_pasted_is_checked_too():
    class Smaller(Invented):
        asked = 0

        def __getitem__(self, index):
            self.asked += 1
            return COLOR, TRUTH if self.asked == 1 else TRUTH[:4]

    batches = Batches(Smaller(0), crop=(8, 6), cutmix=1.0)
    with pytest.raises(ValueError, match="labels 4 x 6"):
        batches.batch(0, 0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (TRUTH / 255, r"float64 of shape \(8, 6\).*astype"),
        (np.full((8, 6), np.nan, "float32"), r"float32 of shape \(8, 6\).*astype"),
        (TRUTH[..., None], r"uint8 of shape \(8, 6, 1\).*\[\.\.\., 0\]"),
        (np.eye(3, dtype="uint8")[TRUTH], r"shape \(8, 6, 3\).*argmax"),
        (TRUTH[0], r"uint8 of shape \(6,\)"),
        (TRUTH[:0], r"uint8 of shape \(0, 6\)"),
        (TRUTH.tolist(), "a list of 8.*np.array"),
        (Image.fromarray(TRUTH), "a Image.*np.array"),
        (None, "a NoneType"),
        ({"sem": TRUTH, "geo": TRUTH / 2}, "geo: the labels are float64"),
    ],
)
def test_labels_of_another_kind_are_refused_with_what_to_do(labels, message):
    batches = Batches(Invented((COLOR, TRUTH), (COLOR, labels)), shuffle=False)
    with pytest.raises(ValueError, match=rf"(?s)source\[1\].*{message}"):
        batches.batch(0, 1)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (COLOR[..., 0], r"uint8 of shape \(8, 6\).*read_image"),
        (COLOR[..., :1], r"uint8 of shape \(8, 6, 1\)"),
        (np.zeros((8, 6, 4), "uint8"), r"uint8 of shape \(8, 6, 4\)"),
        (np.zeros((8, 6, 5), "float32"), r"float32 of shape \(8, 6, 5\)"),
        (np.int64(COLOR), r"int64 of shape.*astype\(.float32"),
        (np.float16(COLOR), r"float16 of shape.*astype\(.float32"),
        (COLOR[:0], r"shape \(0, 6, 3\)"),
        (COLOR.tolist(), "a list of 8.*read_image"),
        (Image.fromarray(COLOR), "a Image.*read_image"),
        ("picture.png", "a str.*read_image"),
        ({"color": COLOR, "hha": None}, "hha: the picture is a NoneType"),
    ],
)
def test_pictures_of_another_kind_are_refused_with_what_to_do(picture, message):
    batches = Batches(Invented((picture, TRUTH)))
    with pytest.raises(ValueError, match=rf"(?s)source\[0\].*{message}"):
        batches.batch(0, 0)


@pytest.mark.parametrize(
    "item", [COLOR, (COLOR,), (COLOR, TRUTH, TRUTH), {"image": COLOR, "label": TRUTH}]
)
def test_an_item_of_a_source_is_a_pair(item):
    with pytest.raises(
        ValueError, match=r"source\[0\] is .*expected \(picture, labels\)"
    ):
        Batches(Invented(item)).batch(0, 0)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", ">i4"])
@pytest.mark.parametrize("color", ["uint8", "float32", "float64"])
def test_labels_may_be_integers_of_any_type_and_pictures_floats(dtype, color):
    truth = np.arange(48).reshape(8, 6) % 2
    source = Invented((COLOR.astype(color) + 7, truth.astype(dtype)))
    [image], [target] = Batches(source, crop=(8, 6)).batch(0, 0)
    np.testing.assert_array_equal(target, truth)
    assert (image == 7).all()


def test_a_picture_of_floats_is_not_blurred():
    source = Invented(*[(COLOR.astype("float32"), TRUTH)] * 9)
    for batch in range(9):  # every second would be
        with pytest.raises(ValueError, match="`blur` was given for a picture of float"):
            Batches(source, blur=1.0).batch(0, batch)


# Whole pictures


def test_sides_are_filled_up_to_a_multiple(tmp_path):
    shapes = [(4, 9), (7, 5), (6, 6)]
    pictures = {str(i): (noise(*x), labels(*x, 0)) for i, x in enumerate(shapes)}
    source = folder.Folder(folder.pairs(*write(tmp_path, pictures)), 1)
    for multiple, expected in ((1, shapes), (4, [(4, 12), (8, 8), (8, 8)])):
        batches = Batches(source, shuffle=False, multiple=multiple)
        found = [batches.batch(0, i) for i in range(3)]
        assert [target.shape[1:] for _, target in found] == expected
        for (picture, target), (height, width) in zip(found, shapes, strict=True):
            assert (target == 0).sum() == height * width
            assert (target[0, :height, :width] == 0).all()
            assert (picture[target == VOID] == MEAN_COLOR).all()


def test_jitter_moves_whole_pictures_and_their_labels(tmp_path):
    image = np.uint8(noise(40, 50))
    mask = image[..., 0] % 200
    source = folder.Folder(folder.pairs(*write(tmp_path, {"a": (image, mask)})), 200)
    moves = set()
    for epoch in range(60):
        [picture], [target] = Batches(source, jitter=3).batch(epoch, 0)
        row, column = np.argwhere(target != VOID)[0]
        down = row or -(np.argwhere(target[::-1] != VOID)[0][0])
        right = column or -(np.argwhere(target.T[::-1] != VOID)[0][0])
        moves.add((int(down), int(right)))
        canvas = np.full((46, 56), VOID)
        canvas[3 + down : 43 + down, 3 + right : 53 + right] = mask
        np.testing.assert_array_equal(target, canvas[3:43, 3:53])
        assert (picture[..., 0] % 200 == target)[target != VOID].all()
    assert {abs(move) for pair in moves for move in pair} == {0, 1, 2, 3}
    assert len(moves) > 25


# Patchwise training


class Chosen:
    """Draws what it was told."""

    def __init__(self, kept):
        self.kept = np.array(kept)

    def random(self, shape):
        return np.where(self.kept.reshape(shape), 0.0, 0.999)


def test_the_loss_over_sampled_cells_is_an_unbiased_estimate():
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, (5, 7)).astype("uint8")
    truth[0, :2] = VOID
    logits = rng.normal(size=(1, 5, 7, 3)).astype("float32")
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=VOID, reduction="sum"
    )

    def value(labels):
        return float(loss(np.int32(labels)[None], logits))

    keep, cells = 0.3, 2 * 3  # cells of 3 by 3 on 5 by 7 pixels
    expectation = sum(
        keep ** sum(kept)
        * (1 - keep) ** (cells - sum(kept))
        * value(sample_cells(truth, keep, 3, Chosen(kept)))
        / keep
        for kept in itertools.product([0, 1], repeat=cells)
    )
    assert expectation == pytest.approx(value(truth), rel=1e-5)


def test_cells_are_kept_whole_with_their_probability_and_by_themselves():
    labels = np.zeros((32, 48), np.uint8)
    kept = []
    for seed in range(600):
        sampled = sample_cells(labels, 0.25, 8, np.random.default_rng(seed))
        cells = sampled.reshape(4, 8, 6, 8).transpose(0, 2, 1, 3).reshape(24, 64)
        assert all(len(set(cell)) == 1 for cell in cells.tolist())
        kept.append(cells[:, 0] == 0)
    assert np.mean(kept) == pytest.approx(0.25, abs=0.018)  # 5 standard deviations
    assert np.abs(np.corrcoef(np.transpose(kept)) - np.eye(24)).max() < 0.2


def test_batches_sample_their_labels_anew_in_every_epoch(tmp_path):
    source = folder.Folder(numbered(tmp_path, 1, 64, 64), 1)
    batches = Batches(source, keep=0.5, cell=8)
    drawn = [batches.batch(epoch, 0)[1] for epoch in (0, 1, 0)]
    np.testing.assert_array_equal(drawn[0], drawn[2])
    assert (drawn[0] != drawn[1]).any()
    assert 0.3 < np.mean(drawn[0] == 0) < 0.7


# Replacement, and several processes


def test_with_replacement_each_turn_draws_from_all_pictures(tmp_path):
    source = folder.Folder(numbered(tmp_path, 8), 8)
    batches = Batches(source, replacement=True)
    orders = np.array([batches.order(epoch) for epoch in range(100)])
    counts = np.bincount(orders.ravel(), minlength=8)
    assert (abs(counts - 100) < 50).all()  # 5 standard deviations
    distinct = [len(set(order)) for order in orders.tolist()]
    assert np.mean(distinct) == pytest.approx(8 * (1 - (7 / 8) ** 8), abs=0.5)


def test_a_picture_drawn_twice_is_changed_in_two_ways(tmp_path):
    source = folder.Folder(numbered(tmp_path, 1, 40, 40), 1)
    arguments = {"batch_size": 1, "crop": (9, 9), "replacement": True}
    first = Batches(source, **arguments)
    two = Invented(source[0], source[0])
    [pair] = [Batches(two, **{**arguments, "batch_size": 2}).batch(0, 0)[0]]
    assert (pair[0] != pair[1]).any()
    assert first.batch(0, 0)[0].shape == (1, 9, 9, 3)


@pytest.mark.parametrize("length", [12, 13, 14, 15])
def test_processes_share_each_batch_between_them(tmp_path, length):
    source = folder.Folder(numbered(tmp_path, length), length)
    arguments = {"batch_size": 6, "crop": (3, 3), "scale": (0.5, 2), "seed": 4}
    arguments["cutmix"] = 0.5
    whole = Batches(source, **arguments)
    ranks = [Batches(source, shard=(rank, 3), **arguments) for rank in range(3)]
    count = {12: 2, 13: 2, 14: 2, 15: 3}[length]  # 1 or 2 pictures are not enough
    assert [len(rank) for rank in ranks] == [count] * 3
    for i in range(count):
        parts = [rank.batch(1, i) for rank in ranks]
        for kind, array in enumerate(whole.batch(1, i)):
            shared = np.stack([part[kind] for part in parts], axis=1)
            np.testing.assert_array_equal(shared.reshape(array.shape), array)


# fit, on the backend in use


class LastLabel(keras.metrics.Metric):
    """Shows which picture a step was trained on."""

    def __init__(self):
        super().__init__(name="label")
        self.label = self.add_variable((), "zeros", name="label")

    def update_state(self, y_true, y_pred, sample_weight=None):
        valid = keras.ops.where(y_true == VOID, 0, y_true)
        self.label.assign(keras.ops.cast(keras.ops.max(valid), "float32"))

    def result(self):
        return self.label * 1

    def reset_state(self):
        pass


class Log(keras.callbacks.Callback):
    """Keeps the label of every step, and the weights after it, epoch by epoch."""

    def on_train_begin(self, logs=None):
        self.labels, self.weights = [], []

    def on_epoch_begin(self, epoch, logs=None):
        self.labels.append([])
        self.weights.append([])

    def on_train_batch_end(self, batch, logs=None):
        self.labels[-1].append(round(float(logs["label"])))
        self.weights[-1].append(self.model.get_weights())


def small_model(num_classes):
    model = keras.Sequential(
        [
            keras.Input((None, None, 3)),
            keras.layers.Rescaling(1 / 255),
            keras.layers.Conv2D(num_classes, 1, kernel_initializer="zeros"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=VOID
    )
    model.compile(keras.optimizers.SGD(0.1), loss, metrics=[LastLabel()])
    return model


def fit(model, batches, **arguments):
    log = Log()
    model.fit(batches, shuffle=False, verbose=0, callbacks=[log], **arguments)
    return log


def test_fit_trains_every_epoch_on_its_own_batches(tmp_path):
    arguments = {"num_classes": 6, "workers": 2, "seed": 5}
    pairs = numbered(tmp_path, 6)
    expected = batches_of(pairs, **arguments)
    orders = [
        [int(target.max()) for _, target in epoch_of(expected, epoch)]
        for epoch in range(5)
    ]
    assert len(set(map(tuple, orders))) == 5
    assert fit(small_model(6), expected, epochs=5).labels == orders
    batches, validation = (batches_of(pairs, **arguments) for _ in range(2))
    model = small_model(6)
    log = fit(model, batches, epochs=3, validation_data=validation)
    assert log.labels == orders[:3]
    assert batches.epoch == 3
    assert fit(model, batches, epochs=2).labels == orders[3:]


@pytest.mark.parametrize(("epoch", "batch"), [(1, 2), (1, 0), (0, 4), (2, 3)])
def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path, epoch, batch):
    pairs = numbered(tmp_path, 10)
    arguments = {"num_classes": 10, "batch_size": 2, **AUGMENTED}
    whole = fit(small_model(10), batches_of(pairs, **arguments), epochs=3)
    before = [small_model(10).get_weights()] + sum(whole.weights, [])

    model, batches = small_model(10), batches_of(pairs, **arguments)
    model.set_weights(before[5 * epoch + batch])
    batches.seek(epoch, batch)
    rest = fit(model, batches, initial_epoch=epoch, epochs=epoch + 1)
    batches.seek(epoch + 1)
    log = fit(model, batches, initial_epoch=epoch + 1, epochs=3)
    assert (
        rest.labels + log.labels
        == [whole.labels[epoch][batch:]] + whole.labels[epoch + 1 :]
    )
    for resumed, expected in zip(model.get_weights(), before[-1], strict=True):
        np.testing.assert_array_equal(resumed, expected)


def test_fit_takes_pictures_of_many_sizes_though_the_first_agree(tmp_path):
    shapes = [(6, 8), (6, 8), (6, 8), (9, 5), (4, 8), (6, 11)]
    pictures = {str(i): (noise(*x), labels(*x, i)) for i, x in enumerate(shapes)}
    source = folder.Folder(folder.pairs(*write(tmp_path, pictures)), 6)
    batches = Batches(source, shuffle=False)
    assert fit(small_model(6), batches, epochs=2).labels == [list(range(6))] * 2
    for i, (height, width) in enumerate(shapes):
        assert batches[i][1].shape == (1, height, width)
