import keras
import numpy as np
import pytest
from keras import ops

from keras_fcn.metrics import SegmentationScores, confusion_matrix, present, scores

NAMES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou")
VOID = 255


def labels(seed, classes, *shape, void=0.2):
    """Random labels, some of them void, and logits that often agree with them."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, shape)
    logits = rng.standard_normal((*shape, classes)) + 1.5 * np.eye(classes)[truth]
    truth[rng.random(shape) < void] = VOID
    return truth.astype("int32"), logits.astype("float32")


def counted(truth, prediction, classes):
    """The definition: n[i, j] is the number of pixels of class i found to be j."""
    matrix = [[0] * classes for _ in range(classes)]
    for i, j in zip(truth.ravel().tolist(), prediction.ravel().tolist(), strict=True):
        if i < classes:
            matrix[i][j] += 1
    return matrix


def transcribed(n):
    """The paper's formulas (section 5), as loops; score.py's means leave out 0/0."""
    classes = range(len(n))
    t = [sum(n[i][j] for j in classes) for i in classes]
    p = [sum(n[i][j] for i in classes) for j in classes]
    accuracy = {i: n[i][i] / t[i] for i in classes if t[i]}
    iou = {i: n[i][i] / (t[i] + p[i] - n[i][i]) for i in classes if t[i] + p[i]}
    return {
        "pixel_accuracy": sum(n[i][i] for i in classes) / sum(t),
        "mean_accuracy": sum(accuracy.values()) / len(accuracy),
        "mean_iou": sum(iou.values()) / len(iou),
        "fw_iou": sum(t[i] * iou[i] for i in classes if t[i]) / sum(t),
        "iou": [iou.get(i, np.nan) for i in classes],
        "accuracy": [accuracy.get(i, np.nan) for i in classes],
    }


MATRICES = {
    "every class": [[5, 1, 0], [2, 7, 3], [0, 4, 9]],
    "perfect": [[3, 0], [0, 8]],
    "nothing right": [[0, 3], [8, 0]],
    "a class neither there nor found": [[5, 1, 0], [2, 7, 0], [0, 0, 0]],
    "a class found by mistake": [[5, 0, 1], [2, 7, 0], [0, 0, 0]],
    "a class never found": [[5, 1, 0], [2, 7, 0], [1, 1, 0]],
    "classes of one pixel": [[5, 0, 1], [0, 1, 0], [0, 0, 1]],
    "one class": [[4]],
}


# NumPy


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64", "float32"])
def test_a_confusion_matrix_counts_what_is_not_void(dtype):
    truth, logits = labels(0, 5, 2, 7, 9)
    prediction = logits.argmax(-1)
    matrix = confusion_matrix(truth.astype(dtype), prediction.astype("uint8"), 5)
    assert matrix.dtype == np.int64
    assert matrix.tolist() == counted(truth, prediction, 5)


def test_labels_that_are_no_class_do_not_count_and_their_prediction_may_be_any():
    truth = np.array([0, 1, 1, 2, 7, -1, 255])
    prediction = np.array([0, 1, 0, 99, 99, 99, 99])
    assert confusion_matrix(truth, prediction, 2).tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16"])
def test_there_may_be_more_classes_than_their_product_has_room_in_a_label(dtype):
    truth = np.array([0, 1, 200, 254, 254], dtype)
    matrix = confusion_matrix(truth, truth[::-1], 255)
    assert np.argwhere(matrix).tolist() == [
        [0, 254],
        [1, 254],
        [200, 200],
        [254, 0],
        [254, 1],
    ]
    assert matrix.sum() == 5


def test_void_may_be_a_class_s_number():
    matrix = confusion_matrix(np.array([0, 0, 1]), np.array([1, 0, 1]), 2, void=0)
    assert matrix.tolist() == [[0, 0], [0, 1]]


def test_a_truth_of_nothing_but_void_counts_nothing():
    matrix = confusion_matrix(np.full((3, 3), VOID), np.zeros((3, 3), int), 2)
    assert matrix.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("wrong", [-1, 3])
def test_predictions_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"labels .*{wrong}.*; expected 0 to 2"):
        confusion_matrix(np.array([0, 1]), np.array([1, wrong]), 3)


def test_other_sizes_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 3\) and the prediction \(3, 2\)"):
        confusion_matrix(np.zeros((2, 3)), np.zeros((3, 2)), 3)


@pytest.mark.parametrize("name", MATRICES)
def test_scores_are_those_of_the_paper(name):
    found, expected = scores(MATRICES[name]), transcribed(MATRICES[name])
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-12, err_msg=key)


def test_one_pixel_found_by_mistake_brings_an_absent_class_into_the_mean():
    absent, mistaken = (
        MATRICES["a class neither there nor found"],
        np.zeros((3, 3), int),
    )
    mistaken[:] = absent
    mistaken[0, 2] = 1
    assert scores(absent)["mean_iou"] == pytest.approx((5 / 8 + 7 / 10) / 2)
    assert scores(mistaken)["mean_iou"] == pytest.approx((5 / 9 + 7 / 10 + 0) / 3)


def score_py(hist):
    """The formulas of the reference's score.py, NaN and all."""
    with np.errstate(invalid="ignore"):
        iu = np.diag(hist) / (hist.sum(1) + hist.sum(0) - np.diag(hist))
        freq = hist.sum(1) / hist.sum()
        return {
            "pixel_accuracy": np.diag(hist).sum() / hist.sum(),
            "mean_accuracy": np.nanmean(np.diag(hist) / hist.sum(1)),
            "mean_iou": np.nanmean(iu),
            "fw_iou": (freq[freq > 0] * iu[freq > 0]).sum(),
        }


@pytest.mark.parametrize("seed", range(20))
def test_scores_are_those_of_score_py_with_any_classes_absent(seed):
    rng = np.random.default_rng(seed)
    matrix = rng.integers(0, 10**6, (9, 9))
    matrix[rng.random(9) < 0.3] = 0  # absent, and found by mistake
    absent = rng.random(9) < 0.2
    matrix[absent], matrix[:, absent] = 0, 0  # and not even that
    found = scores(matrix)
    for name, value in score_py(matrix).items():
        assert found[name] == pytest.approx(value, rel=1e-12)


def test_means_over_some_classes_leave_the_pixels_of_all_others_counted():
    matrix = [[6, 1, 1, 0], [2, 4, 0, 0], [0, 0, 0, 0], [0, 3, 2, 5]]
    found = scores(matrix, [1, 3])
    assert found["mean_accuracy"] == pytest.approx((4 / 6 + 5 / 10) / 2)
    assert found["mean_iou"] == pytest.approx((4 / 10 + 5 / 10) / 2)
    everything = scores(matrix)
    assert everything["mean_iou"] == pytest.approx((6 / 10 + 4 / 10 + 0 + 5 / 10) / 4)
    for same in ("pixel_accuracy", "fw_iou", "iou", "accuracy"):
        np.testing.assert_equal(found[same], everything[same])
    assert np.isnan(scores(matrix, [])["mean_iou"])
    assert np.isnan(scores(matrix, [2])["mean_accuracy"])


def test_the_classes_present_are_those_of_the_truth():
    matrix = [[6, 1, 1], [0, 0, 0], [0, 0, 2]]
    assert present(matrix) == [0, 2]
    assert scores(matrix, present(matrix))["mean_iou"] == (6 / 8 + 2 / 3) / 2


@pytest.mark.parametrize("classes", [[0, 3], [-1, 0]])
def test_means_over_classes_that_a_matrix_does_not_have_are_refused(classes):
    with pytest.raises(ValueError, match=r"expected 0 to 2, those of the matrix"):
        scores(np.ones((3, 3)), classes)


def test_an_empty_matrix_has_no_scores():
    found = scores(np.zeros((2, 2)))
    assert np.isnan([found[name] for name in NAMES]).all()
    assert np.isnan(found["iou"]).all()


# In Keras


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 8, 9), (3, 8, 9, 1)])
@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
def test_the_metric_is_the_score_of_all_batches_so_far(name, shape, dtype):
    metric, total = SegmentationScores(5, name), np.zeros((5, 5), int)
    for seed in range(3):
        truth, logits = labels(seed, 5, 3, 8, 9)
        metric.update_state(truth.reshape(shape).astype(dtype), logits)
        total += counted(truth, logits.argmax(-1), 5)
        expected = transcribed(total.tolist())[name]
        assert float(metric.result()) == pytest.approx(expected, rel=1e-6)
    np.testing.assert_array_equal(metric.matrix(), total)
    metric.reset_state()
    assert np.isnan(float(metric.result()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("matrix", MATRICES)
def test_the_metric_leaves_out_of_a_mean_what_the_paper_s_code_leaves_out(name, matrix):
    counts = np.array(MATRICES[matrix])
    truth, prediction = (
        np.indices(counts.shape).reshape(2, -1).repeat(counts.ravel(), 1)
    )
    metric = SegmentationScores(len(counts), name)
    metric.update_state(truth[None, None], np.eye(len(counts))[prediction][None, None])
    expected = transcribed(MATRICES[matrix])[name]
    assert float(metric.result()) == pytest.approx(expected, rel=1e-6)


def test_the_metric_counts_no_pixel_whose_label_is_no_class():
    metric = SegmentationScores(3)
    truth = np.array([[[0, 1, 2, 3, 4, -1, -2, 254, VOID]]])
    prediction = np.array([[[0, 2, 2, 0, 1, 2, 0, 1, 2]]])
    metric.update_state(truth, np.eye(3)[prediction])
    assert metric.matrix().tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 1]]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", NAMES)
def test_a_score_of_logits_that_are_nan_is_nan_until_it_is_reset(name, dtype):
    metric, (truth, logits) = SegmentationScores(3, name), labels(0, 3, 2, 4, 5)
    damaged = logits.astype(dtype)
    damaged[1, 2, 3, 1], truth[1, 2, 3] = np.nan, 2
    for batch in (damaged, logits):
        metric.update_state(truth, batch)
        assert np.isnan(float(metric.result()))
    metric.reset_state()
    metric.update_state(truth, logits)
    expected = transcribed(counted(truth, logits.argmax(-1), 3))[name]
    assert float(metric.result()) == pytest.approx(expected, rel=1e-6)


def test_where_no_pixel_counts_logits_may_be_nan():
    metric, (truth, logits) = SegmentationScores(3), labels(0, 3, 2, 4, 5)
    truth[0], logits[0] = VOID, np.nan
    metric.update_state(truth, logits)
    expected = transcribed(counted(truth[1], logits[1].argmax(-1), 3))
    assert float(metric.result()) == pytest.approx(expected["mean_iou"], rel=1e-6)


@pytest.mark.parametrize("count", [2**24, 2**31, 2**40])
def test_counts_neither_round_nor_overflow(count):
    metric = SegmentationScores(2, "pixel_accuracy")
    metric.millions.assign(np.full((2, 2), count // 2**20))
    metric.ones.assign(np.full((2, 2), 2**20 - 1))
    truth = np.array([[[0, 0, 0, 1]]])
    metric.update_state(truth, np.eye(2)[[[[0, 1, 0, 1]]]])
    total = count + 2**20 - 1
    assert metric.matrix().tolist() == [[total + 2, total + 1], [total, total + 1]]
    assert float(metric.result()) == pytest.approx(0.5)


def test_a_metric_is_rebuilt_from_its_configuration():
    metric = SegmentationScores(7, "fw_iou", void=0, name="mine")
    config = keras.saving.serialize_keras_object(metric)
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == metric.get_config()
    assert (again.num_classes, again.score, again.void) == (7, "fw_iou", 0)


def test_unknown_scores_other_classes_and_sample_weights_are_refused():
    truth, logits = labels(0, 3, 1, 4, 4)
    with pytest.raises(
        ValueError, match="score='miou' was given; expected one of pixel_accuracy"
    ):
        SegmentationScores(3, "miou")
    with pytest.raises(ValueError, match="of 4 classes was given logits of 3"):
        SegmentationScores(4).update_state(truth, logits)
    with pytest.raises(ValueError, match="given sample weights; expected none: mark"):
        SegmentationScores(3).update_state(
            truth, logits, sample_weight=np.ones((1, 4, 4))
        )


@pytest.fixture
def policy(request):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(request.param)
    yield request.param
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"], indirect=True)
def test_fit_and_evaluate_follow_the_scores_of_each_epoch_by_itself(policy):
    truth, logits = labels(0, 3, 5, 6, 7)  # batches of 2, 2 and 1
    image = keras.Input((None, None, 3))
    model = keras.Model(image, keras.layers.Rescaling(1.0, dtype="float32")(image))
    metrics = [SegmentationScores(3, name) for name in NAMES]
    loss = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=VOID
    )
    model.compile("sgd", loss, metrics=metrics)
    expected = transcribed(counted(truth, logits.argmax(-1), 3))
    found = model.evaluate(logits, truth, batch_size=2, return_dict=True, verbose=0)
    history = model.fit(
        logits,
        truth,
        batch_size=2,
        epochs=2,
        verbose=0,
        validation_data=(logits[:1], truth[:1]),
    ).history
    first = transcribed(counted(truth[:1], logits[:1].argmax(-1), 3))
    for name in NAMES:
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
        assert history[name] == pytest.approx([expected[name]] * 2, rel=1e-6)
        assert history[f"val_{name}"] == pytest.approx([first[name]] * 2, rel=1e-6)


def test_the_metric_updates_inside_a_compiled_function():
    metric = SegmentationScores(4)
    truth, logits = labels(0, 4, 2, 5, 5)
    variables = [v.value for v in metric.variables]
    state = metric.stateless_update_state(
        [ops.copy(v) for v in variables], ops.convert_to_tensor(truth), logits
    )
    expected = transcribed(counted(truth, logits.argmax(-1), 4))["mean_iou"]
    assert float(metric.stateless_result(state)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "shape", [(2, 1, 1), (2, 7, 1), (7, 9), (2, 14, 18), (1, 7, 9)]
)
def test_labels_of_another_size_than_the_logits_are_refused(shape):
    metric = SegmentationScores(3)
    with pytest.raises(ValueError, match="expected one label for each pixel"):
        metric.update_state(np.zeros(shape, int), np.zeros((2, 7, 9, 3)))


def test_callbacks_know_that_more_is_better(tmp_path):
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(3, 1)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=[SegmentationScores(3)])
    data = np.ones((2, 4, 4, 3), "float32"), np.ones((2, 4, 4), int)
    best = keras.callbacks.EarlyStopping("val_mean_iou", mode="auto")
    model.fit(*data, validation_data=data, verbose=0, callbacks=[best])
    assert best.monitor_op(2.0, 1.0)
