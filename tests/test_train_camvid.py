"""tools/train_camvid.py, with a training in place of which its command is kept."""

import pathlib
import shlex

import h5py
import numpy as np
import pytest
import scripts

from keras_fcn import cli, files, manifest, models, saving, weights

tool = scripts.load("tools/train_camvid.py")
CAMVID = pathlib.Path("camvid")
LAST = "+".join(tool.SHIPPED.values()).split("+")  # stages of which the nets are made


@pytest.fixture
def no_means(monkeypatch):
    """Stages whose files are no nets; such as have several before them start anyhow."""
    monkeypatch.setattr(tool, "net_of", lambda runs, stages: runs / stages / "model.h5")


@pytest.fixture
def trained(monkeypatch):
    """The options of each training; one that ships writes a small net of its stride."""
    seen = []

    def run(*arguments):
        options = cli._parser().parse_args([str(argument) for argument in arguments])
        seen.append(options)
        output = pathlib.Path(options.output)
        output.mkdir(parents=True)
        if output.name in LAST:
            net = models.fcn("googlenet", options.stride or 8, 11, width=1 / 16)
            saving.save_checkpoint(net, output / "model.h5")

    monkeypatch.setattr(tool, "keras_fcn", run)
    return seen


def kinds(path):
    """The data types of the arrays of an HDF5 file."""
    found = set()
    with h5py.File(path) as file:
        file.visititems(lambda _, x: found.add(getattr(x, "dtype", None)))
    return {str(kind) for kind in found if kind is not None}


def check_mean(paths, path):
    """Checks that each weight of a file is the mean of those of others."""
    alone = [weights.read_arrays(each) for each in paths]
    for weight, found in weights.read_arrays(path).items():
        expected = sum(arrays[weight] for arrays in alone) / len(alone)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_each_stage_starts_from_its_own_and_the_last_ones_ship(
    trained, tmp_path, capsys
):
    tool.main([str(CAMVID), str(tmp_path), "--", "--epochs", "1"])
    assert [pathlib.Path(o.output).name for o in trained] == list(tool.STAGES)
    assert trained[0].init == []
    for options, (before, _) in zip(trained, tool.STAGES.values(), strict=True):
        start = [str(tmp_path / before / "model.h5")] if before else []
        assert options.init == start
    folders = [str(CAMVID / "train" / kind) for kind in ("images", "labels")]
    for options in trained:
        assert options.data == folders  # and none of val
        assert (options.labels, options.relabel) == ("camvid", [(11, 255)])
        assert not options.validation
    assert {o.epochs for o in trained} == {1}
    assert not any(o.resume for o in trained)
    said = capsys.readouterr().out
    assert LAST == list(tool.STAGES)[-3:]
    for name, stages in tool.SHIPPED.items():
        path = tmp_path / f"{name}.h5"
        for file in (path, tmp_path / stages / "model.h5"):
            check_mean([tmp_path / x / "model.h5" for x in stages.split("+")], file)
        assert files.measure(path)["sha256"] in said
        assert kinds(path) == {"float16"}
        entry, found = manifest.checkpoint_info(name), weights.metadata(path)
        for fact in ("labels", "license", "trained_on"):
            assert found[fact] == entry[fact]
        assert models.load_checkpoint(path).name == f"fcn{name.split('-')[1]}_googlenet"


@pytest.mark.usefixtures("no_means")
def test_what_is_there_is_not_trained_again(tmp_path, monkeypatch):
    first, second, *_ = tool.STAGES
    (tmp_path / first).mkdir()
    (tmp_path / first / "model.h5").touch()
    (tmp_path / second / "state").mkdir(parents=True)
    (tmp_path / second / "state" / "epoch-0001-batch-000000.npz").touch()
    seen = []
    monkeypatch.setattr(tool, "keras_fcn", lambda *arguments: seen.append(arguments))
    tool.train(CAMVID, tmp_path)
    assert seen[0][-2:] == (tmp_path / second, "--resume")
    assert all("--resume" not in arguments for arguments in seen[1:])
    assert len(seen) == len(tool.STAGES) - 1


@pytest.mark.usefixtures("no_means")
def test_a_stage_that_was_trained_in_another_way_is_not_taken(tmp_path, monkeypatch):
    first, *_ = tool.STAGES
    typed = []

    def note(command, *arguments):
        run = arguments[arguments.index("--output") + 1]
        run.mkdir(parents=True, exist_ok=True)
        typed.append(shlex.join(["keras-fcn", command, *map(str, arguments)]))
        (run / "command.sh").write_text(f"# when\n{typed[-1]}\n")
        (run / "model.h5").touch()

    monkeypatch.setattr(tool, "keras_fcn", note)
    tool.train(CAMVID, tmp_path, ["--epochs", "1"])
    tool.train(CAMVID, tmp_path, ["--epochs", "1"])
    assert len(typed) == len(tool.STAGES)
    for options in ([], ["--epochs", "1", "--seed", "2"], ["--epochs", "11"]):
        with pytest.raises(
            SystemExit, match=f"{first} was trained by `keras-fcn train"
        ):
            tool.train(CAMVID, tmp_path, options)


def test_a_stage_that_fails_ends_it(tmp_path):
    with pytest.raises(SystemExit, match="keras-fcn train failed"):
        tool.main([str(tmp_path / "none"), str(tmp_path / "runs")])
    assert not (tmp_path / "runs" / "second").exists()


def test_a_mean_is_that_of_the_nets_that_are_there(tmp_path):
    paths = [tmp_path / stage / "model.h5" for stage in ("one", "two")]
    for value in (4, 6):  # the second as if it had been trained again
        for path, number in zip(paths, (2, value), strict=True):
            net = models.fcn("alexnet", 32, 2, width=1 / 16)
            net.set_weights([np.full_like(x, number) for x in net.get_weights()])
            path.parent.mkdir(exist_ok=True)
            saving.save_checkpoint(net, path)
        found = weights.read_arrays(tool.net_of(tmp_path, "one+two"))
        assert all(np.all(array == (2 + value) / 2) for array in found.values())
    assert tool.net_of(tmp_path, "two") == paths[1]
