"""What `keras-fcn train` makes of its options: each reaches what it is for."""

import keras
import numpy as np
import pytest
from pictures import write

import keras_fcn
from keras_fcn import (
    batch_norm,
    checkpoints,
    cli_data,
    cli_train,
    images,
    models,
    saving,
    training,
    weights,
)
from keras_fcn.cli import main
from keras_fcn.datasets import batches as batches_module
from keras_fcn.datasets import catalog
from keras_fcn.labels import LABEL_SETS


class _Seen(BaseException):
    """Ends a training where all that was to be looked at has been."""


@pytest.fixture
def seen(monkeypatch):
    """The arguments of what `train` calls, by name, up to the compiling of the net."""
    found = {}

    def watch(owner, name, act):
        def called(*arguments, **named):
            found.setdefault(name, []).append((arguments, named))
            return act(*arguments, **named)

        monkeypatch.setattr(owner, name, called)

    def thin(act):
        return lambda *arguments, **named: act(*arguments, width=1 / 16, **named)

    def end(*arguments, **named):
        raise _Seen

    watch(models, "fcn", thin(models.fcn))
    watch(models, "late_fusion", thin(models.late_fusion))
    watch(weights, "transplant", weights.transplant)
    watch(batches_module, "Batches", batches_module.Batches)
    watch(keras.config, "set_dtype_policy", lambda policy: None)
    watch(keras.utils, "set_random_seed", keras.utils.set_random_seed)
    watch(training, "fix_trunk", training.fix_trunk)
    watch(batch_norm, "fit_batch_norm", batch_norm.fit_batch_norm)
    watch(training, "compile_modern", end)
    watch(training, "compile_reference", end)
    return found


def trained(*options):
    with pytest.raises(_Seen):
        main(["train", *map(str, options)])


@pytest.fixture
def data(tmp_path, scene):
    return [*scene, "--relabel", "9=255", "--output", tmp_path / "run"]


@pytest.fixture
def scene(tmp_path):
    """Two folders of three pictures and masks of two classes, one void label."""
    scenes = {}
    for i in range(3):
        mask = np.zeros((40, 50), np.uint8)
        mask[:, 10 + i :] = 1
        mask[:3] = 9
        scenes[str(i)] = np.full((40, 50, 3), 99, np.uint8), mask
    return write(tmp_path, scenes)


WINDOWS = {
    "batch_size": 2,
    "crop": (48, 48),
    "scale": [0.8, 1.5],
    "mirror": False,
    "jitter": 0,
    "color": (0.1, 0.1, 0.1),
    "tint": 0.2,
    "blur": 1.1,
    "noise": 2.2,
    "cutmix": 0.3,
    "keep": 0.5,
    "cell": 16,
    "replacement": True,
    "seed": 7,
    "cache": True,
    "shard": (0, 1),
}
PIXELS = [3 * 37 * 11, 3 * 37 * 39]  # of the two classes, void left out


@pytest.mark.parametrize("classes", range(2, 7))  # the pictures' number among them
def test_a_start_of_another_backbone_is_refused(classes, data, seen, tmp_path, capsys):
    start = tmp_path / "vgg16.h5"
    saving.save_checkpoint(models.fcn("vgg16", 32, classes), start)
    assert main(["train", *map(str, data), "--init", str(start)]) == 2
    error = capsys.readouterr().err
    assert f"--init {start} has no trunk that fits googlenet-8s" in error
    assert "Pass the --backbone" in error


def test_a_start_of_other_widths_is_refused(data, seen, tmp_path, capsys):
    start = tmp_path / "thin.h5"
    saving.save_checkpoint(keras_fcn.fcn("googlenet", 8, 2, width=1 / 4), start)
    assert main(["train", *map(str, data), "--init", str(start)]) == 2
    assert f"--init {start} has no trunk that fits" in capsys.readouterr().err


def test_every_option_reaches_what_it_is_for(data, seen):
    options = "--classes left right --backbone alexnet --stride 16 --upsampling learned"
    options += " --batch-size 2 --crop 48 --scale 0.8 1.5 --no-mirror --color 0.1"
    options += " --tint 0.2 --blur 1.1 --noise 2.2 --cutmix 0.3 --keep 0.5 --seed 7"
    options += " --replacement --balance 1 --jaccard 0.25 --learning-rate 2e-3"
    options += " --precision mixed_bfloat16 --epochs 3"
    trained(*data, *options.split())
    (source,), windows = seen["Batches"][-1]
    assert len(source) == 3
    assert windows == WINDOWS
    [(net, named)] = seen["fcn"]
    assert net == ("alexnet", 16, 2)
    assert named["upsampling"] == "learned"
    assert not named["batch_norm"]
    assert seen["set_random_seed"] == [((7,), {})]
    assert seen["set_dtype_policy"] == [(("mixed_bfloat16",), {})]
    [((_, steps), compiled)] = seen["compile_modern"]
    assert steps == 3 * 2
    assert compiled == {
        "learning_rate": 2e-3,
        "class_weights": pytest.approx(training.balanced_weights(PIXELS, 1)),
        "jaccard": 0.25,
        "averaging": 0.1,
    }
    assert "fix_trunk" not in seen
    assert "compile_reference" not in seen


@pytest.mark.parametrize("named", [["--classes", "a", "b"], []])
def test_masks_are_decoded_once_before_the_first_step(data, seen, monkeypatch, named):
    read_labels, read = images.read_labels, []

    def watched(path):
        read.append(path.name)
        return read_labels(path)

    monkeypatch.setattr(images, "read_labels", watched)
    trained(*data, *named)
    first = "0.png"  # whose picture shows what the net is fed
    assert sorted(read) == [first, "0.png", "1.png", "2.png"]
    [(_, compiled)] = seen["compile_modern"]
    assert compiled["class_weights"] == training.balanced_weights(PIXELS, 0.5)


def test_whole_pictures_are_moved_and_not_zoomed(data, seen):
    trained(*data, "--classes", "a", "b", "--crop", "0", "--jitter", "5")
    _, windows = seen["Batches"][-1]
    assert windows["crop"] is None
    assert windows["scale"] is None
    assert windows["jitter"] == 5


def test_what_nobody_says_is_as_the_help_and_the_docs_have_it(data, seen):
    trained(*data, "--classes", "a", "b")
    _, windows = seen["Batches"][-1]
    assert windows["crop"] == (256, 256)
    assert windows["scale"] == (0.7, 2.0)
    assert windows["color"] == (0.4,) * 3
    assert windows["mirror"]
    assert not windows["replacement"]
    assert (windows["batch_size"], windows["seed"], windows["cell"]) == (6, 1, 8)
    [((_, steps), compiled)] = seen["compile_modern"]
    assert steps == 60
    assert compiled["learning_rate"] == 6e-4
    assert compiled["class_weights"] == training.balanced_weights(PIXELS, 0.5)
    [(net, _)] = seen["fcn"]
    assert net == ("googlenet", 8, 2)


def test_the_reference_s_recipes_take_whole_pictures_one_by_one(data, seen):
    arguments = ["--classes", "a", "b", "--recipe", "voc-fcn16s", "--stride", "16"]
    trained(*data, *arguments, "--learning-rate", "1e-13")
    _, windows = seen["Batches"][-1]
    nothing = ("crop", "scale", "color", "mirror", "jitter", "tint", "cutmix")
    assert not any(windows[name] for name in nothing)
    assert windows["replacement"]
    assert windows["batch_size"] == 1
    [((_, recipe), compiled)] = seen["compile_reference"]
    expected = training.RECIPES["voc-fcn16s"]._replace(learning_rate=1e-13)
    assert recipe == expected
    assert compiled == {"class_weights": None}


@pytest.mark.parametrize(
    ("recipe", "typed", "net", "scales"),
    [
        ("voc-fcn32s", "", ("vgg16", 32), None),
        ("siftflow-fcn16s", "", ("vgg16", 16), None),
        ("voc-fcn-alexnet", "", ("alexnet", 32), None),
        ("fcn8s-atonce", "", ("vgg16", 8), {"pool4": 1e-2, "pool3": 1e-4}),
        ("fcn32s", "--backbone googlenet --stride 4", ("googlenet", 4), None),
    ],
)
def test_a_recipe_is_for_its_net_where_no_other_is_typed(
    recipe, typed, net, scales, data, seen, capsys
):
    trained(*data, "--classes", "a", "b", "--recipe", recipe, *typed.split())
    [(built, named)] = seen["fcn"]
    assert built == (*net, 2)
    assert named["skip_scales"] == scales
    _, windows = seen["Batches"][-1]
    assert windows["cell"] == net[1]
    start = training.find_recipe(recipe).start
    said = f"From random numbers; the reference starts from {start} (--init)"
    assert said in capsys.readouterr().out


def test_at_once_nets_are_built_with_their_scales(data, seen):
    options = ["--backbone", "alexnet", "--stride", "8", "--classes", "a", "b"]
    options += ["--skip-scales", "pool2=0.01,pool1=0.0001"]
    trained(*data, *options)
    [(_, named)] = seen["fcn"]
    assert named["skip_scales"] == {"pool2": 0.01, "pool1": 0.0001}


def test_a_net_skips_from_what_is_typed(data, seen):
    skips = ["conv2", "inception_3b", "inception_4e"]
    trained(*data, "--stride", "4", "--classes", "a", "b", "--skips", *skips)
    [(_, named)] = seen["fcn"]
    assert named["skips"] == skips


@pytest.mark.parametrize(
    ("typed", "skips"), [([], ["conv2", "conv5"]), (["pool1", "pool2"],) * 2]
)
def test_a_net_skips_from_what_the_one_before_did_where_nothing_is_typed(
    typed, skips, data, seen, tmp_path, capsys
):
    before = models.fcn("alexnet", 8, 2, skips=("conv2", "conv5"))
    saving.save_checkpoint(before, tmp_path / "model.h5")
    seen.clear()
    options = ["--backbone", "alexnet", "--init", tmp_path / "model.h5"]
    options += ["--skips", *typed] if typed else []
    trained(*data, "--classes", "a", "b", *options)
    [*_, (_, named)] = seen["fcn"]
    assert named["skips"] == skips
    out = capsys.readouterr().out
    assert ("all weights" in out) == (not typed)
    assert f"Skips from {', '.join(skips)}\n" in out


def test_a_fixed_trunk_is_that_of_the_net_before(data, seen, tmp_path):
    start = tmp_path / "model.h5"
    saving.save_checkpoint(models.fcn("alexnet", 32, 2), start)
    options = ["--backbone", "alexnet", "--stride", "32", "--classes", "a", "b"]
    trained(*data, *options, "--fix-trunk", "--init", start)
    [((fixed,), _)] = seen["fix_trunk"]
    [((compiled, _), _)] = seen["compile_modern"]
    assert fixed is compiled


@pytest.mark.parametrize("before", [True, False])
def test_normalisation_is_fitted_to_a_net_that_is_trained_on(
    data, seen, tmp_path, before
):
    start = tmp_path / "lr=1" / "model.h5"  # no stream is called so
    start.parent.mkdir()
    saving.save_checkpoint(models.fcn("alexnet", 32, 2), start)
    seen.clear()
    options = ["--backbone", "alexnet", "--stride", "32", "--classes", "a", "b"]
    options += ["--batch-norm", *(["--init", start] if before else [])]
    trained(*data, *options)
    assert len(seen.get("fit_batch_norm", ())) == before
    [(_, compiled)] = seen["compile_modern"]
    assert compiled["averaging"] is None


class Scenes(list):
    """A source of pictures of one grey, or of several streams of it."""

    def __init__(self, known):
        picture = np.full((64, 64, 3), 99, np.uint8)
        if isinstance(known.inputs, dict):
            picture = dict.fromkeys(known.inputs, picture)
        elif isinstance(known.inputs, tuple):
            picture = np.full((64, 64, 4), 99, np.float32)
        truth = {head: np.zeros((64, 64), np.uint8) for head in known.labels}
        self.heads = truth
        super().__init__([(picture, truth.get("", truth))] * 2)
        self.ids = ["a", "b"]
        self.label_sets = {h: LABEL_SETS[name] for h, (_, name) in known.labels.items()}

    def labels(self, index):
        return self[index][1]


@pytest.fixture
def loaded(monkeypatch):
    """What data sets were opened, and with which split."""
    calls = []

    def load(name, split=None, *, data_dir=None):
        calls.append((name, split, data_dir))
        return Scenes(catalog.DATASETS[name])

    monkeypatch.setattr(catalog, "load", load)
    return calls


# What the reference trained on, and evaluates on (its data_param and README).
SPLITS = {
    "voc2011": ("train", "seg11valid"),
    "sbd": ("train", "val"),
    "nyudv2": ("train+val", "test"),
    "nyudv2-hha": ("train+val", "test"),
    "siftflow": ("trainval", "test"),
    "pascal-context": ("train", "val"),
    "camvid": ("train", "val"),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_data_set_is_trained_on_and_validated_on_as_in_the_reference(
    name, seen, loaded, tmp_path
):
    options = ["--output", tmp_path / "run", "--data-dir", "there"]
    trained(name, *options, "--backbone", "alexnet", "--balance", "0")
    assert loaded == [(name, split, "there") for split in SPLITS[name]]


def test_a_split_that_was_asked_for_is_taken(seen, loaded, tmp_path):
    options = ["--output", tmp_path / "run", "--validation", "camvid/test"]
    trained("camvid/val", *options, "--backbone", "alexnet", "--balance", "0")
    assert [split for _, split, _ in loaded] == ["val", "test"]


# The mean of HHA, in its own order, and those of the colours, blue first (nets.md).
@pytest.mark.parametrize(
    ("name", "channels", "mean"),
    [
        ("voc2011", "BGR", [104.00699, 116.66877, 122.67892]),
        ("nyudv2", "BGR", [116.190, 97.203, 92.318]),
        ("nyudv2-hha", "RGB", [132.431, 94.076, 118.477]),
        ("siftflow", "BGR", [114.578, 115.294, 108.353]),
    ],
)
def test_pictures_of_a_data_set_are_fed_as_its_net_wants_them(
    name, channels, mean, seen, loaded, tmp_path
):
    options = ["--output", tmp_path / "run", "--backbone", "alexnet", "--balance", "0"]
    trained(name, *options)
    [(_, named)] = seen["fcn"]
    fed = named["preprocessing"]
    assert fed["channels"] == channels
    np.testing.assert_allclose(fed["mean"], mean, atol=6e-3)


def test_each_stream_starts_from_a_net_of_its_own(seen, loaded, tmp_path):
    paths = [tmp_path / "1.h5", tmp_path / "2.h5"]
    for classes, path in enumerate(paths, start=2):
        saving.save_checkpoint(models.fcn("alexnet", 32, classes), path)
    options = ["--output", tmp_path / "run", "--backbone", "alexnet", "--balance", "0"]
    options += ["--stride", "32", "--init", f"hha={paths[0]}", f"color={paths[1]}"]
    trained("nyudv2-color-hha", *options)
    found = [(net.output.shape[-1], to) for (net, _, to), _ in seen["transplant"]]
    assert found == [(2, "hha"), (3, "color")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("nyudv2-color-hha", "expected color or hha"), ("voc2011", "has but one")],
)
def test_a_stream_that_the_net_has_not_is_named(
    name, expected, seen, loaded, tmp_path, capsys
):
    options = ["--output", tmp_path / "run", "--backbone", "alexnet", "--stride", "32"]
    assert main(["train", name, *map(str, options), "--init", "colour=x"])
    said = capsys.readouterr().err
    assert "names the stream colour" in said
    assert expected in said


def test_a_training_that_begins_anew_forgets_what_was_typed_and_one_resumed_does_not(
    tmp_path,
):
    path = tmp_path / "command.sh"
    for typed, resume in (("first", False), ("second", False), ("third", True)):
        cli_train._note_command(path, typed, resume)
    assert path.read_text().splitlines()[1::2] == ["second", "third"]
    assert all(line.startswith("# 20") for line in path.read_text().splitlines()[::2])


def test_two_trainings_at_once_do_not_share_an_output(
    data, monkeypatch, capsys, tmp_path
):
    pytest.importorskip("fcntl")
    arguments, begun = ["train", *map(str, data)], []

    def read(*_):
        begun.append(len(begun))
        if begun == [0]:
            assert main(arguments) == 2  # while this one runs
        raise ValueError("The data are read.")

    monkeypatch.setattr(cli_train, "_open", read)
    for _ in range(2):
        assert main(arguments) == 2
    assert begun == [0, 1]
    assert [line.split(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        f"Another keras-fcn train writes to {tmp_path / 'run'}; expected a folder that "
        "none does. Wait for it, or name another --output.",
        *["The data are read."] * 2,
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "options", "words"),
    [
        ("a b", "--init vgg16-imagenot", "vgg16-imagenet"),
        ("a b", "--init nowhere.h5", "nowhere.h5"),
        ("a b", "--skip-scales pool9=1", "skip_scales names pool9; expected taps"),
        ("a b", "--skips pool2 pool4", "pool2 or inception_3b, pool3 or"),
        ("nyudv2-color-hha", "--skips conv5_3", "nothing for a net of two streams"),
        ("a b", "--init vgg16-imagenet", "no trunk that fits googlenet-8s"),
        (
            "a b",
            "--backbone vgg16 --init vgg16-32s-nyud-color-hha",
            "is of two streams; expected a checkpoint of one",
        ),
        (
            "nyudv2-color-hha",
            "--backbone vgg16 --init vgg16-32s-nyud",
            "color=vgg16-32s-nyud or hha=vgg16-32s-nyud",
        ),
        (
            "nyudv2-color-hha",
            "--backbone vgg16 --init hha=vgg16-32s-nyud-color-hha",
            "expected vgg16-32s-nyud-color-hha alone",
        ),
        ("a b", "--scale 2 0.5", "--scale 2 0.5 was given; expected the lowest"),
        ("a b", "--crop 7", "--crop 7 is less than --stride 8, one cell"),
        ("a b", "--classes c", "--classes names c alone; expected 2 classes or more"),
        ("a b", "--jitter 4", "`jitter` is 4 and `crop` (256, 256); expected one"),
        ("a b", "--cutmix 1 --crop 0", "`cutmix` is 1.0 and `crop` None"),
        ("a b", "--fix-trunk", "--fix-trunk was given without --init; expected a"),
        ("a b", "--keep 0", "`keep` is 0.0; expected a share above 0"),
        ("a b", "--jaccard 1 --recipe voc-fcn32s", "leave one of them out"),
        ("a b", "--classes c c d", "--classes names c twice; expected each class once"),
        ("siftflow", "--adjust 1", "several heads; leave it out"),
        ("nyudv2-color-hha", "--skip-scales pool4=1", "nothing for a net of two str"),
    ],
)
def test_options_are_judged_before_any_data_are_read(
    data, options, words, tmp_path, monkeypatch, capsys
):
    def opener(*_, **__):
        pytest.fail("Data were looked for.")

    monkeypatch.setattr(cli_data, "opener", opener)
    output = tmp_path / "run"
    arguments = [*data.split(), "--output", str(output), *options.split()]
    assert main(["train", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        ("nowhere masks", "`nowhere` is no folder"),
        ("camvit", "no data set 'camvit'; expected camvid"),
        ("camvid", "camvid is not prepared in `there"),
        ("images", "--validation is images; expected a folder of images and a folder"),
        ("camvid/val --relabel 9=255", "--relabel was given for --validation camvid"),
    ],
)
def test_a_validation_that_is_not_there_is_said_before_any_data_are_read(
    scene, validation, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        images, "read_labels", lambda path: pytest.fail("Data are read.")
    )
    options = ["--output", "run", "--data-dir", "there"]
    options += ["--validation", *validation.split()]
    assert main(["train", *map(str, scene), *options]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_checkpoint_to_start_from_is_fetched_before_any_data_are_read(
    tmp_path, monkeypatch, capsys
):
    def locate(model, checkpoint):
        raise OSError(f"No way to {checkpoint.name}.")

    monkeypatch.setattr(checkpoints, "locate", locate)
    monkeypatch.setattr(cli_data, "opener", lambda *_, **__: pytest.fail("Data."))
    options = ["--backbone", "alexnet", "--init", "alexnet-imagenet"]
    assert main(["train", "a", "b", "--output", str(tmp_path / "run"), *options]) == 2
    assert "error: No way to alexnet-imagenet." in capsys.readouterr().err


def test_what_is_no_snapshot_is_nothing_to_go_on_with(data, capsys):
    state = data[-1] / "state"
    state.mkdir(parents=True)
    (state / "mine.npz").write_bytes(b"")
    assert main(["train", *map(str, data), "--resume"]) == 2
    assert "holds no state of a training" in capsys.readouterr().err
