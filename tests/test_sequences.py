"""benchmarks/sequences.py: no frame of the sequence held out is trained on."""

import shlex

import pytest
import scripts

FRAMES = ("0001TP_006690", "0006R0_f00930", "0006R0_f00960", "0016E5_00390")


@pytest.fixture
def camvid(tmp_path):
    for kind, ending in (("images", "jpg"), ("labels", "png")):
        for part in ("train", "val"):
            (tmp_path / "camvid" / part / kind).mkdir(parents=True)
        for frame in FRAMES:
            file = tmp_path / "camvid" / "train" / kind / f"{frame}.{ending}"
            file.write_text(frame)
    return tmp_path / "camvid"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(scripts.ROOT / "benchmarks")  # it imports a neighbour
    return scripts.load("benchmarks/sequences.py")


@pytest.mark.parametrize("sequence", ["0001TP", "0006R0"])
def test_every_frame_is_on_one_side(camvid, script, tmp_path, sequence):
    for _ in range(2):  # a run that goes on finds its links there
        rest, held = script.split(camvid, tmp_path / "run", sequence)
    for kind in ("images", "labels"):
        trained, scored = (
            sorted(file.read_text() for file in (part / kind).iterdir())
            for part in (rest, held)
        )
        assert scored == [frame for frame in FRAMES if frame.startswith(sequence)]
        assert sorted(trained + scored) == sorted(FRAMES)


@pytest.mark.parametrize("missing", ["train/labels", "val/images"])
def test_a_folder_that_is_missing_is_said(camvid, script, tmp_path, missing):
    (camvid / missing).rename(camvid / "elsewhere")
    with pytest.raises(SystemExit, match=f"{missing} is no folder; expected"):
        script.split(camvid, tmp_path / "run", "0006R0")
    assert not (tmp_path / "run").exists()


def test_a_sequence_that_is_none_is_said(camvid, script, tmp_path):
    with pytest.raises(SystemExit, match="'0006R' is not one of train's"):
        script.split(camvid, tmp_path / "run", "0006R")
    assert not (tmp_path / "run").exists()


def test_what_was_trained_in_another_way_is_not_taken(script, tmp_path, monkeypatch):
    import strides

    typed, run = [], tmp_path / "run"

    def note(command, *arguments):
        run.mkdir(exist_ok=True)
        typed.append(shlex.join(["keras-fcn", command, *map(str, arguments)]))
        (run / "command.sh").write_text(f"# when\n{typed[-1]}\n")

    monkeypatch.setattr(strides, "keras_fcn", note)
    assert strides.train(["images", "masks"], run, ["--epochs", "3"]) is not None
    (run / "state").mkdir()
    (run / "state" / "epoch-0001-batch-000000.npz").touch()
    assert strides.train(["images", "masks"], run, ["--epochs", "3"]) is None
    assert typed[1] == f"{typed[0]} --resume"
    (run / "model.h5").touch()
    assert strides.train(["images", "masks"], run, ["--epochs", "3"]) is None
    assert len(typed) == 2
    for recipe in ([], ["--epochs", "33"], ["--epochs", "3", "--crop", "9"]):
        with pytest.raises(SystemExit, match="run was trained by `keras-fcn train"):
            strides.train(["images", "masks"], run, recipe)
    with open(run / "command.sh", "a") as file:  # resumed at another rate
        file.write(f"# later\n{typed[0].replace(' --epochs', ' --lr 1 --epochs')}\n")
    with pytest.raises(SystemExit, match="run was trained by .* --lr 1 "):
        strides.train(["images", "masks"], run, ["--epochs", "3"])
