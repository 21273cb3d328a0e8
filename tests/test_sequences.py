"""benchmarks/sequences.py: no frame of the sequence held out is trained on."""

import pytest
import scripts

FRAMES = ("0001TP_006690", "0006R0_f00930", "0006R0_f00960", "0016E5_00390")


@pytest.fixture
def camvid(tmp_path):
    for kind, ending in (("images", "jpg"), ("labels", "png")):
        folder = tmp_path / "camvid" / "train" / kind
        folder.mkdir(parents=True)
        for frame in FRAMES:
            (folder / f"{frame}.{ending}").write_text(frame)
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


def test_a_folder_that_is_missing_is_said(camvid, script, tmp_path):
    (camvid / "train" / "labels").rename(camvid / "masks")
    with pytest.raises(SystemExit, match="labels is no folder; expected"):
        script.split(camvid, tmp_path / "run", "0006R0")
    assert not (tmp_path / "run").exists()


def test_a_sequence_that_is_none_is_said(camvid, script, tmp_path):
    with pytest.raises(SystemExit, match="'0006R' is not one of train's"):
        script.split(camvid, tmp_path / "run", "0006R")
    assert not (tmp_path / "run").exists()
