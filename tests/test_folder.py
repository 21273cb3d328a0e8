import numpy as np
import pytest
from pictures import labels, noise, numbered, write
from PIL import Image

from keras_fcn.datasets import folder
from keras_fcn.datasets.batches import label_counts

VOID = 255


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
        folder.Folder(pairs, 3)


def test_all_masks_of_stray_labels_make_one_error(tmp_path):
    pairs = numbered(tmp_path, 5)
    with pytest.raises(ValueError, match=r"02.png` holds label 2 \(and 2 more masks"):
        folder.check(pairs, 2)


def test_relabelled_masks_are_checked_and_read_as_what_they_become(tmp_path):
    mask = labels(4, 6, 1, 11)
    pairs = folder.pairs(*write(tmp_path, {"a": (noise(4, 6), mask)}))
    source = folder.Folder(pairs, 1, relabel={1: 0, 11: VOID})
    expected = np.where(mask == 1, 0, VOID)
    np.testing.assert_array_equal(source[0][1], expected)
    np.testing.assert_array_equal(source.labels(0), expected)
    with pytest.raises(ValueError, match="-1 is no label"):
        folder.check(pairs, 1, relabel={1: -1})


def test_labels_are_counted_as_what_they_become(tmp_path):
    masks = labels(4, 6, 0, 1, 2, 11), labels(3, 3, 2, 2, 7)
    pictures = {str(i): (noise(*mask.shape), mask) for i, mask in enumerate(masks)}
    pairs = folder.pairs(*write(tmp_path, pictures))
    expected = np.zeros(256)
    expected[[0, 1, 2, VOID]] = 6 + 3, 6, 6 + 6, 6
    source = folder.Folder(pairs, 3, relabel={11: VOID, 7: 0})
    np.testing.assert_array_equal(label_counts(source), expected)
    np.testing.assert_array_equal(source.label_counts, expected)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_picture_that_lies_on_its_side_has_the_size_it_is_read_with(suffix, tmp_path):
    images, masks = write(tmp_path, {"a": (noise(4, 6), labels(6, 4, 0))}, suffix)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.uint8(noise(4, 6))).save(images / f"a{suffix}", exif=exif)
    pairs = folder.pairs(images, masks)
    assert folder.check(pairs, 1) == [(6, 4)]
    assert folder.Folder(pairs, 1)[0][0].shape == (6, 4, 3)


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


def test_labels_are_counted_as_they_are_trained_on(tmp_path):
    mask = palette_mask(labels(4, 6, 0, 1, 2, 4), [*COLORS[:3], *[(9, 9, 9)] * 253])
    folders = write(tmp_path, {"a": (noise(4, 6), mask)})
    report = folder.inspect(*folders, relabel={4: VOID, 2: 1})
    assert report["warnings"] == []
    assert report["pixels"] == {0: 6, 1: 12, VOID: 6}
    assert report["masks"] == {0: 1, 1: 1, VOID: 1}
    assert set(report["drawn"]) == {*enumerate(COLORS), (4, (9, 9, 9))}
    with pytest.raises(ValueError, match="but 256 is no label"):
        folder.inspect(*folders, relabel={256: 0})


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


def test_a_folder_that_is_missing_is_an_error_and_no_warning(tmp_path):
    folders = write(tmp_path, {"a": (noise(4, 6), BLANK)})
    remove("masks")(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"masks` is no folder"):
        folder.inspect(*folders)


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
