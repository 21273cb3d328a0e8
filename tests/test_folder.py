import keras
import numpy as np
import pytest
from PIL import Image

from keras_fcn.datasets import folder
from keras_fcn.datasets.folder import FolderBatches

VOID = 255


def write(root, pictures, suffix=".png"):
    """Writes {name: (image array, mask array or PIL image)} to the two folders."""
    folders = root / "images", root / "masks"
    for place in folders:
        place.mkdir(exist_ok=True)
    for name, (image, mask) in pictures.items():
        Image.fromarray(np.uint8(image)).save(folders[0] / f"{name}{suffix}")
        if not isinstance(mask, Image.Image):
            mask = Image.fromarray(np.asarray(mask))
        mask.save(folders[1] / f"{name}.png")
    return folders


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3))


def labels(height, width, *values):
    """A mask of horizontal bands of these labels."""
    return np.uint8(np.resize(np.repeat(values, width), (height, width)))


def numbered(root, count, height=4, width=6):
    """Pictures that differ, whose mask says which one it is."""
    return folder.pairs(
        *write(
            root,
            {
                f"{i:02}": (noise(height, width, i), labels(height, width, i))
                for i in range(count)
            },
        )
    )


# Pairs


def test_pairs_match_by_stem_in_the_order_of_names_whatever_the_suffix(tmp_path):
    images, masks = write(tmp_path, {"b.2": (noise(2, 2), labels(2, 2, 0))}, ".JPG")
    write(tmp_path, {"a": (noise(2, 2), labels(2, 2, 0))}, ".webp")
    (images / "._a.jpg").write_text("a stray file of macOS")
    (masks / ".DS_Store").write_text("another")
    (images / "notes.txt").write_text("no image")
    expected = [
        (images / "a.webp", masks / "a.png"),
        (images / "b.2.JPG", masks / "b.2.png"),
    ]
    assert folder.pairs(images, masks) == expected


def lonely(kind, count):
    def add(root):
        for i in range(count):
            (root / kind / f"lonely{i}.png").write_bytes(b"")

    return add


def twin(root):
    (root / "images" / "a.jpg").write_bytes(b"")


def as_jpeg(root):
    (root / "masks" / "a.png").rename(root / "masks" / "a.jpg")


def remove(kind):
    return lambda root: (root / kind).rename(root / "elsewhere")


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (lonely("images", 1), ValueError, "1 of 2 files have no mask .* lonely0.png. "),
        (lonely("masks", 7), ValueError, "no image .*lonely4.png and 2 more"),
        (twin, ValueError, "differ in their suffix only: a.jpg, a.png"),
        (as_jpeg, FileNotFoundError, "`.*masks` holds no masks: none of its 1 files"),
        (remove("images"), FileNotFoundError, "`.*images` is no folder"),
    ],
)
def test_folders_that_do_not_pair_are_one_error_that_names_files(
    tmp_path, fault, error, message
):
    folders = write(tmp_path, {"a": (noise(2, 2), labels(2, 2, 0))})
    fault(tmp_path)
    with pytest.raises(error, match=message):
        folder.pairs(*folders)


# Checking


def palette_mask(mask, colors):
    mask = Image.fromarray(np.uint8(mask))
    mask.putpalette(np.uint8(colors).tobytes())
    return mask


COLORS = [(0, 0, 0), (128, 0, 0), (0, 128, 0)]  # the first of VOC


@pytest.mark.parametrize(
    "mask",
    [
        labels(4, 6, 0, 1, 2),
        labels(4, 6, 0, VOID),
        labels(4, 6, VOID),
        palette_mask(labels(4, 6, 0, 1, 2), COLORS),
        np.uint16(labels(4, 6, 0, 2)),
    ],
)
def test_masks_of_classes_and_void_pass(tmp_path, mask):
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(4, 6), mask)}))
    assert folder.check(pairs, 3) == [(4, 6)]


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (labels(4, 6, 0, 3), r"a.png` holds label 3; expected 0 to 2, or 255 for void"),
        (labels(4, 6, 3), r"Pass `relabel=\{3: 255\}`"),
        (labels(4, 6, 200), "label 200; expected 0 to 2"),
        (palette_mask(labels(4, 6, 0, 1, 2), COLORS).convert("L"), "label 38, 75; exp"),
        (noise(4, 6).astype(np.uint8), "a.png` holds RGB pixels"),
        (labels(6, 4, 0), r"a.png` is 6 x 4, but its image `.*a.png` is 4 x 6"),
    ],
)
def test_other_masks_are_named_with_what_they_hold(tmp_path, mask, message):
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(4, 6), mask)}))
    with pytest.raises(ValueError, match=message):
        FolderBatches(pairs, 3)


def test_all_masks_of_stray_labels_make_one_error(tmp_path):
    pairs = numbered(tmp_path, 5)
    with pytest.raises(ValueError, match=r"02.png` holds label 2 \(and 2 more masks"):
        folder.check(pairs, 2)


def test_relabelled_masks_are_checked_and_read_as_what_they_become(tmp_path):
    mask = labels(4, 6, 1, 11)
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(4, 6), mask)}))
    batches = FolderBatches(pairs, 1, relabel={1: 0, 11: VOID})
    np.testing.assert_array_equal(batches[0][1][0], np.where(mask == 1, 0, VOID))
    with pytest.raises(ValueError, match="-1 is no label"):
        folder.check(pairs, 1, relabel={1: -1})


def test_labels_are_counted_as_what_they_become(tmp_path):
    masks = labels(4, 6, 0, 1, 2, 11), labels(3, 3, 2, 2, 7)
    pictures = {str(i): (noise(*mask.shape), mask) for i, mask in enumerate(masks)}
    pairs = folder.pairs(*write(tmp_path, pictures))
    expected = np.zeros(256)
    expected[[0, 1, 2, VOID]] = 6 + 3, 6, 6 + 6, 6
    counts = folder.label_counts(pairs, relabel={11: VOID, 7: 0})
    np.testing.assert_array_equal(counts, expected)


def test_a_picture_that_lies_on_its_side_has_the_size_it_is_read_with(tmp_path):
    images, masks = write(tmp_path, {"a": (noise(4, 6), labels(6, 4, 0))}, ".jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.uint8(noise(4, 6))).save(images / "a.jpg", exif=exif)
    pairs = folder.pairs(images, masks)
    assert folder.check(pairs, 1) == [(6, 4)]
    assert next(folder.one_by_one(pairs))[0].shape == (1, 6, 4, 3)


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
    image, mask, _ = folder.cut(image, mask, scaled, (0, 0), scaled)
    second, first = np.sort(np.int32(image))[..., -2:].transpose(2, 0, 1)
    clear = first - second > 8  # at the very edge of a stripe two colours are equal
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(image.argmax(-1)[clear], mask[clear])


@pytest.mark.parametrize("scaled", [(29, 17), (64, 64), (50, 91)])
@pytest.mark.parametrize("corner", [(0, 0), (3, 5), (-4, 6), (-7, -9)])
def test_a_window_is_that_part_of_the_whole_scaled_picture(scaled, corner):
    image, mask = np.uint8(noise(37, 41)), np.uint8(noise(37, 41, 1)[..., 0])
    whole, whole_mask, _ = folder.cut(image, mask, scaled, (0, 0), scaled)
    part, part_mask, inside = folder.cut(image, mask, scaled, corner, (24, 20))
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
    batches = FolderBatches(pairs, 1, crop=(9, 8))
    corners = set()
    for epoch in range(20):
        pictures, target = batches.batch(epoch, 0)
        rows, columns = np.nonzero(target[0] == 0)
        corners.add((rows[0], columns[0]))
        np.testing.assert_array_equal(pictures[0][rows, columns], image.reshape(-1, 3))
        assert (pictures[target == VOID] == folder.MEAN_COLOR).all()
        assert (target == VOID).sum() == 9 * 8 - 4 * 6
    assert len(corners) > 5


def test_whole_pictures_lie_in_the_corner_of_the_largest_size(tmp_path):
    sizes = [(4, 9), (7, 5), (6, 6)]
    pictures = {
        str(i): (noise(*size), labels(*size, i)) for i, size in enumerate(sizes)
    }
    pairs = folder.pairs(*write(tmp_path, pictures))
    images, target = FolderBatches(pairs, 3, batch_size=3, shuffle=False)[0]
    assert images.shape == (3, 7, 9, 3)
    assert (images.dtype, target.dtype) == (np.float32, np.int32)
    for i, (height, width) in enumerate(sizes):
        np.testing.assert_array_equal(images[i, :height, :width], pictures[str(i)][0])
        assert (target[i, :height, :width] == i).all()
        assert (target[i] != VOID).sum() == height * width
    assert [x.shape[1:3] for x, _ in folder.one_by_one(pairs)] == sizes


def test_every_second_picture_is_mirrored_with_its_labels(tmp_path):
    mask = np.uint8(noise(5, 4)[..., 0] % 3)
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(5, 4), mask)}))
    batches = FolderBatches(pairs, 3, mirror=True)
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
    batches = FolderBatches(pairs, 1, crop=(100, 100), scale=(0.5, 2))
    pixels = [(batches.batch(epoch, 0)[1] == 0).sum() for epoch in range(200)]
    sides = np.sqrt(pixels)
    assert 20 <= sides.min() < 23
    assert 74 < sides.max() <= 80
    assert 70 < (sides < 40).sum() < 130


# Colour


def changed(root, image, color):
    pairs = folder.pairs(*write(root, {"a": (image, labels(*image.shape[:2], 0))}))
    batches = FolderBatches(pairs, 1, color=color)
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


def test_colors_stay_within_0_and_255_and_padding_stays_mean_color(tmp_path):
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(9, 9), labels(9, 9, 0))}))
    batches = FolderBatches(pairs, 1, color=(1, 1, 1), crop=(12, 12))
    for epoch in range(20):
        images, target = batches.batch(epoch, 0)
        assert images.min() >= 0
        assert images.max() <= 255
        assert (images[target == VOID] == folder.MEAN_COLOR).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": (0.5, 2)}, "`crop` None"),
        ({"scale": (2, 0.5), "crop": (2, 2)}, r"\(lowest, highest\)"),
        ({"color": (0.3, 0.3)}, "brightness, contrast and saturation"),
        ({"color": (0.3, 0.3, 3)}, "each 0 to 1"),
    ],
)
def test_augmentations_that_make_no_sense_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        FolderBatches(numbered(tmp_path, 1), 1, **arguments)


# Order

AUGMENTED = {
    "crop": (5, 5),
    "scale": (0.5, 2),
    "mirror": True,
    "color": (0.3, 0.3, 0.3),
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
    batches = FolderBatches(numbered(tmp_path, 7), 7, batch_size=3)
    assert len(batches) == 3
    orders = [
        tuple(
            int(mask.max()) for _, masks in epoch_of(batches, epoch) for mask in masks
        )
        for epoch in range(5)
    ]
    assert all(sorted(order) == list(range(7)) for order in orders)
    orders.append(tuple(FolderBatches(batches.pairs, 7, seed=1).order(0).tolist()))
    assert len(set(orders)) == 6


def test_a_batch_depends_on_seed_epoch_and_index_only(tmp_path):
    pairs = numbered(tmp_path, 5)
    arguments = {"batch_size": 2, **AUGMENTED}
    batches = FolderBatches(pairs, 5, **arguments)
    expected = epoch_of(batches, 3)
    for other in ({"workers": 1}, {"workers": 7}, {"cache": True}):
        again = FolderBatches(pairs, 5, **arguments, **other)
        again.seek(3)
        assert equal([again[2], again[0], again[1]], [expected[i] for i in (2, 0, 1)])
        assert equal(list(again), expected)
    assert not equal(epoch_of(batches, 4), expected)
    assert not equal(
        epoch_of(FolderBatches(pairs, 5, **arguments, seed=1), 3), expected
    )


def test_a_picture_changes_from_epoch_to_epoch_whatever_its_batch(tmp_path):
    batches = FolderBatches(numbered(tmp_path, 5), 5, shuffle=False, **AUGMENTED)
    larger = FolderBatches(batches.pairs, 5, shuffle=False, batch_size=5, **AUGMENTED)
    assert equal(
        [[image[0] for image, _ in epoch_of(batches, 1)]], [larger.batch(1, 0)[0]]
    )
    pictures = {batches.batch(epoch, 2)[0].tobytes() for epoch in range(6)}
    assert len(pictures) == 6


def test_order_and_augmentation_of_the_first_picture_are_drawn_apart(tmp_path):
    batches = FolderBatches(numbered(tmp_path, 5), 5, batch_size=5)
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
    batches = FolderBatches(numbered(tmp_path, 4), 4)
    batches.on_epoch_begin()
    batches[0]
    with pytest.raises(ValueError, match="Pass `shuffle=False` to `fit`"):
        batches[2]


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
    expected = FolderBatches(pairs, **arguments)
    orders = [
        [int(target.max()) for _, target in epoch_of(expected, epoch)]
        for epoch in range(5)
    ]
    assert len(set(map(tuple, orders))) == 5
    assert fit(small_model(6), expected, epochs=5).labels == orders
    batches, validation = (FolderBatches(pairs, **arguments) for _ in range(2))
    model = small_model(6)
    log = fit(model, batches, epochs=3, validation_data=validation)
    assert log.labels == orders[:3]
    assert batches.epoch == 3
    assert fit(model, batches, epochs=2).labels == orders[3:]


@pytest.mark.parametrize(("epoch", "batch"), [(1, 2), (1, 0), (0, 4), (2, 3)])
def test_a_resumed_run_ends_with_the_very_same_weights(tmp_path, epoch, batch):
    pairs = numbered(tmp_path, 10)
    arguments = {"num_classes": 10, "batch_size": 2, **AUGMENTED}
    whole = fit(small_model(10), FolderBatches(pairs, **arguments), epochs=3)
    before = [small_model(10).get_weights()] + sum(whole.weights, [])

    model, batches = small_model(10), FolderBatches(pairs, **arguments)
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


# Inspecting


def test_a_sound_folder_is_described_without_a_warning(tmp_path):
    masks = {
        "a": palette_mask(labels(4, 6, 0, 1, 2), COLORS),
        "b": palette_mask(labels(4, 6, 0, 0, 1, VOID), [*COLORS, *[(9, 9, 9)] * 253]),
        "c": labels(3, 3, 0, 1),
    }
    pictures = {
        name: (noise(*np.asarray(mask).shape), mask) for name, mask in masks.items()
    }
    folders, done = write(tmp_path, pictures), []
    report = folder.inspect(*folders, progress=lambda *place: done.append(place))
    assert report["warnings"] == []
    assert done == [(1, 3), (2, 3), (3, 3)]
    assert report["pairs"] == 3
    assert report["sizes"] == {(4, 6): 2, (3, 3): 1}
    assert report["image_modes"] == {"RGB": 3}
    assert report["mask_modes"] == {"P": 2, "L": 1}
    assert report["palettes"] == {"voc": 2}
    assert report["pixels"] == {0: 30, 1: 15, 2: 6, VOID: 6}
    assert report["masks"] == {0: 3, 1: 3, 2: 1, VOID: 1}
    text = folder.summary(report)
    for line in ("3 pairs", "sizes: 4 x 6 (2), 3 x 3 (1)", "52.63%", "nothing looks"):
        assert line in text


def also(mask, image=None):
    image = noise(*np.asarray(mask).shape[:2]) if image is None else image
    return lambda root: write(root, {"b": (image, mask)})


def cut_short(kind, length):
    def cut(root):
        path = root / kind / "a.png"
        path.write_bytes(path.read_bytes()[:length])

    return cut


def jpeg_named_png(root):
    Image.fromarray(labels(4, 6, 0, 1)).save(root / "masks" / "a.png", "JPEG")


BLANK, BANDS = labels(4, 6, 0), labels(4, 6, 0, 1, 2)
VOC = palette_mask(BANDS, COLORS)
OWN = palette_mask(BANDS, [*COLORS[:2], (1, 2, 3)])


@pytest.mark.parametrize(
    ("mask", "fault", "expected"),
    [
        (BANDS + 1, None, "start at 1"),
        (labels(4, 6, 0, VOID), None, r"relabel={255: 1}"),
        (labels(4, 6, VOID), None, "All masks are void"),
        (labels(4, 6, 0, 1, 4), None, "No mask holds label 2, 3, but some hold 4"),
        (labels(4, 6, 0, 38, 147, 220), None, "greys of the voc palette"),
        (BLANK, also(np.eye(3, dtype=np.uint8)[BANDS] * 250), "3 different ones"),
        (BLANK, also(np.uint8(COLORS)[BANDS]), '`LABEL_SETS["voc"].palette`'),
        (BLANK, also(np.stack([BANDS] * 3, axis=-1)), 'convert("L")'),
        (BLANK, also(np.uint8(noise(20, 20))), "pictures that are no masks"),
        (VOC, also(OWN), "have different colours: 2."),
        (BLANK, also(BLANK, noise(6, 4)), "b.png` is 4 x 6, but its image"),
        (BLANK, also(BLANK, BLANK), "1 of 2 images are grey (L)"),
        (BLANK, cut_short("images", 20), "images/a.png` cannot be decoded"),
        (BLANK, cut_short("images", 60), "images/a.png` cannot be decoded"),
        (BLANK, cut_short("masks", 20), "masks/a.png` cannot be decoded"),
        (BLANK, cut_short("masks", 45), "masks/a.png` cannot be decoded"),
        (BLANK, jpeg_named_png, "a.png` is a JPEG"),
        (BLANK, lonely("images", 1), "have no mask of their name"),
        (BLANK, remove("masks"), "is no folder"),
    ],
)
def test_what_looks_wrong_is_said_in_one_warning(tmp_path, mask, fault, expected):
    folders = write(tmp_path, {"a": (noise(4, 6), mask)})
    if fault:
        fault(tmp_path)
    report = folder.inspect(*folders)
    assert len(report["warnings"]) == 1
    assert expected in report["warnings"][0]
    assert f"warning: {report['warnings'][0]}" in folder.summary(report)


@pytest.mark.parametrize(("mask", "name"), [(VOC, "voc"), (OWN, "other")])
def test_a_palette_is_named_if_it_is_that_of_a_label_set(tmp_path, mask, name):
    folders = write(tmp_path, {"a": (noise(4, 6), mask)})
    assert folder.inspect(*folders)["palettes"] == {name: 1}


def test_of_many_files_at_fault_the_first_are_named_and_the_others_counted(tmp_path):
    pairs = numbered(tmp_path, 14)
    for image, _ in pairs:
        image.write_bytes(b"no image")
    warnings = folder.inspect(tmp_path / "images", tmp_path / "masks")["warnings"]
    assert len(warnings) == 11
    assert warnings[-1] == "4 more files are at fault."
