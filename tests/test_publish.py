"""tools/publish.py, against a Hub on loopback that takes what its client pushes."""

import tomllib
import types

import numpy as np
import pytest
import scripts
import servers
from caffemodels import caffe_layers, caffemodel
from huggingface_hub import HfApi, ModelCard, constants
from PIL import Image

import keras_fcn
from keras_fcn import evaluation, manifest, models, saving, weights
from keras_fcn.datasets import folder

publish = scripts.load("tools/publish.py")


@pytest.fixture
def server(tmp_path, monkeypatch):
    stub = servers.Repositories()
    monkeypatch.setattr(constants, "ENDPOINT", stub.url)
    template = stub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hubs"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", "hf_of_the_tests")
    monkeypatch.setenv("KERAS_FCN_CACHE", str(tmp_path / "ours"))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield stub
    stub.shutdown()


@pytest.fixture
def trained(tmp_path):
    """A small net with class names, as `keras-fcn train` leaves it."""
    model = models.fcn("googlenet", 8, 3, width=1 / 16)
    rng = np.random.default_rng(1)
    for variable in model.get_layer("score_fr").weights:
        variable.assign(rng.standard_normal(variable.shape))
    path = tmp_path / "model.h5"
    facts = {"labels": {"names": ["left", "right", "rest"]}}
    saving.save_checkpoint(model, path, facts=facts)
    return path


@pytest.fixture
def street(tmp_path):
    """Folders of two pictures and masks, whose labels are 0 to 3."""
    folders = tmp_path / "images", tmp_path / "masks"
    rng = np.random.default_rng(0)
    for each in folders:
        each.mkdir()
    for i in range(2):
        picture = rng.integers(0, 255, (40, 50, 3)).astype(np.uint8)
        mask = rng.integers(0, 4, (40, 50)).astype(np.uint8)
        Image.fromarray(picture).save(folders[0] / f"{i}.png")
        Image.fromarray(mask).save(folders[1] / f"{i}.png")
    return [str(each) for each in folders]


def run(*arguments):
    return publish.main([str(argument) for argument in arguments])


def test_what_was_pushed_is_what_an_address_loads(
    server, trained, street, tmp_path, capsys
):
    status = run(
        trained,
        *("--repo", "me/Street-Net", "--output", tmp_path / "out", "--license", "MIT"),
        *("--evaluate", *street, "--split", "two noises", "--relabel", "3=255"),
        *("--picture", f"{street[0]}/0.png"),
    )
    assert status == 0, capsys.readouterr().err
    assert server.tokens == {"Bearer hf_of_the_tests"}
    pushed = {path.rsplit("/", 1)[-1] for path in server.files if "/resolve/" in path}
    assert pushed == {"Street-Net.h5", "README.md", "example.png"}
    out = capsys.readouterr().out
    address = next(word for word in out.split() if word.startswith("hf://"))
    picture = np.asarray(Image.open(f"{street[0]}/1.png"))
    wanted = keras_fcn.segment(keras_fcn.load_checkpoint(trained), picture)
    for model in (
        keras_fcn.load_checkpoint("hf://me/Street-Net"),
        keras_fcn.load_checkpoint(address),
        keras_fcn.FCN8s("googlenet", weights=address, width=1 / 16),
    ):
        np.testing.assert_array_equal(keras_fcn.segment(model, picture), wanted)
    printed = tomllib.loads(out.partition("would be:")[2])["Street-Net"]
    assert printed["hub"]["sha256"] in server.large
    assert f"hf://me/Street-Net@{printed['hub']['revision']}" == address


def test_the_card_says_what_was_measured_and_its_index_nothing_else(
    trained, street, tmp_path
):
    output = tmp_path / "out"
    options = ["--repo", "me/net", "--output", output, "--license", "CC BY 4.0"]
    options += ["--dry-run"]
    assert run(trained, *options) == 0
    card = ModelCard.load(output / "README.md")
    assert card.data.eval_results is None
    assert "None are known." in card.text
    options += ["--evaluate", *street, "--split", "two noises", "--relabel", "3=255"]
    assert run(trained, *options) == 0
    card = ModelCard.load(output / "README.md")
    source = folder.Folder(folder.pairs(*street), 3, relabel={3: 255})
    batches = evaluation.one_by_one(source)
    found = keras_fcn.evaluate(keras_fcn.load_checkpoint(trained), batches)
    scores = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert scores == {n: round(100 * found[n], 2) for n in publish.SCORES}
    assert {r.dataset_name for r in card.data.eval_results} == {"two noises"}
    assert "CC BY 4.0" in card.text
    assert "left, right, rest" in card.text
    assert (card.data.license, card.data.license_name) == ("other", "cc-by-4.0")


def test_published_scores_are_cited_and_not_in_the_index():
    text = publish.card("n", manifest.checkpoint_info("vgg16-8s-voc"), "me/n")
    assert "| mean_iou | 65.5 | seg11valid | published: Shelhamer" in text
    assert ModelCard(text).data.eval_results is None


def test_a_bar_in_a_split_s_name_ends_no_cell():
    entry = manifest.checkpoint_info("vgg16-8s-voc")
    measured = {"split": "val | day", "version": "0.1", "mean_iou": 12.3}
    text = publish.card("n", {**entry, "measured": measured}, "me/n")
    assert r"| mean_iou | 12.3 | val \| day | measured with keras_fcn 0.1 |" in text


def test_scores_of_another_run_are_not_in_the_card(trained, tmp_path):
    path, output = tmp_path / "scored.h5", tmp_path / "out"
    measured = {"split": "somewhere", "mean_iou": 12.34, "version": "0"}
    model = keras_fcn.load_checkpoint(trained)
    saving.save_checkpoint(model, path, facts={"measured": measured})
    options = ["--repo", "me/net", "--output", output, "--license", "MIT", "--dry-run"]
    assert run(path, *options) == 0
    card = ModelCard.load(output / "README.md")
    assert card.data.eval_results is None
    assert "12.34" not in card.text


def test_a_file_of_another_net_is_not_published_under_a_name(tmp_path, capsys):
    name, path = "vgg16-32s-voc", tmp_path / "hha.h5"
    entry = manifest.checkpoint_info(name)
    hha = {**entry, "input": {"channels": "RGB", "mean": [132.431, 94.076, 118.477]}}
    arrays = iter([("conv1_1/kernel", np.ones((3, 3, 3, 64), "float32"))])
    weights.save_arrays(arrays, path, metadata=hha)
    options = ["--checkpoint", name, "--repo", "me/net", "--output", tmp_path / "out"]
    assert run(path, *options, "--dry-run") == 2
    assert "hha.h5 says input {'channels': 'RGB'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "image", "labels"),
    [
        ("vgg16-8s-voc", "photo.jpg", "(height, width) uint8"),
        ("vgg16-16s-siftflow", "photo.jpg", "{head: (height, width) uint8}"),
        (
            "vgg16-32s-nyud-color-hha",
            {"color": "photo.png", "hha": "photo-hha.png"},
            "",
        ),
        ("vgg16-imagenet", None, "(batch, h, w, classes), logits"),
    ],
)
def test_the_card_shows_how_such_a_net_is_asked(name, image, labels, monkeypatch):
    text = publish.card(name, manifest.checkpoint_info(name), "me/n")
    code = text.partition("```python\n")[2].partition("```")[0]
    assert labels in code
    asked = []
    model = types.SimpleNamespace(predict=asked.append)
    monkeypatch.setattr(keras_fcn, "load_checkpoint", lambda _: model)
    monkeypatch.setattr(keras_fcn, "segment", lambda model, given: asked.append(given))
    exec(code, {"images": None})
    assert asked == [image]


def test_a_caffemodel_is_ported_and_its_entry_completed(
    server, tmp_path, monkeypatch, capsys
):
    place, name = tmp_path / "weights_manifest", "vgg16-8s-voc"
    place.mkdir()
    text = (manifest.folder() / "checkpoints.toml").read_text(encoding="utf-8")
    scored = {"measured": {"split": "of an earlier file", "mean_iou": 1.5}}
    old = publish.complete(text, name, scored)
    (place / "checkpoints.toml").write_text(old, encoding="utf-8")
    monkeypatch.setattr(manifest, "folder", lambda: place)
    small = manifest.checkpoint_info(name)
    small["model"]["width"] = 1 / 32
    small["caffemodel"] = {"url": small["caffemodel"]["url"]}  # no hash to hold
    monkeypatch.setitem(manifest._table(), name, small)
    source = tmp_path / "net.caffemodel"
    source.write_bytes(caffemodel(caffe_layers(models.build(small))))
    options = ["--checkpoint", name, "--repo", "me/voc", "--output", tmp_path / "out"]
    assert run(source, *options) == 0, capsys.readouterr().err
    before = tomllib.loads(text)
    after = tomllib.loads((place / "checkpoints.toml").read_text(encoding="utf-8"))
    hub = after[name].pop("hub")
    assert before == after
    content = server.files[f"/me/voc/resolve/{hub['revision']}/{hub['file']}"]
    assert (hub["sha256"], hub["bytes"]) == (servers.sha256(content), len(content))


@pytest.mark.parametrize("name", manifest.list_checkpoints())
def test_any_entry_can_be_completed_and_completed_again(name):
    text = (manifest.folder() / "checkpoints.toml").read_text(encoding="utf-8")
    first = publish.complete(text, name, {"hub": {"file": "a.h5", "bytes": 1_000}})
    again = publish.complete(first, name, {"hub": {"file": "b.h5"}})
    assert tomllib.loads(again)[name]["hub"] == {"file": "b.h5"}
    assert again.count("\n") == text.count("\n") + 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--split", "val"], "--evaluate and --split belong together"),
        ([], "says nothing of its license; expected --license"),
        (["--checkpoint", "vgg16-8s-voc", "--license", "MIT"], "leave out --license"),
        (["--checkpoint", "vgg61"], "There is no checkpoint 'vgg61'"),
        (["--repo", "net"], "--repo is 'net'; expected owner/name"),
        (["--repo", "me/a/b"], "--repo is 'me/a/b'; expected owner/name"),
        (["--repo", "../net"], "Repo id must use alphanumeric"),
        (["--relabel", "3=255"], "--relabel was given without --evaluate"),
    ],
)
def test_what_cannot_be_published_is_said_before_anything_is_written(
    wrong, message, trained, tmp_path, capsys
):
    output = tmp_path / "out"
    assert run(trained, "--repo", "me/net", "--output", output, *wrong) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--checkpoint", "vgg16-8s-voc"], "does not hold the weights"),
        (["--picture", "absent.jpg"], "absent.jpg is not a file; expected"),
        (["--evaluate", "absent", "absent", "--split", "val"], "absent` is no folder"),
    ],
)
def test_files_that_will_not_do_are_found_before_anything_is_written(
    wrong, message, trained, tmp_path, capsys
):
    output = tmp_path / "out"
    terms = [] if "--checkpoint" in wrong else ["--license", "MIT"]
    assert run(trained, "--repo", "me/net", "--output", output, *terms, *wrong) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.mark.parametrize("place", ["model.h5", "model.h5/below"])
def test_an_output_that_is_a_file_is_left_alone(trained, tmp_path, capsys, place):
    before = trained.read_bytes()
    options = ["--repo", "me/net", "--license", "MIT", "--output", tmp_path / place]
    assert run(trained, *options) == 2
    assert "a file; expected a folder, or a new one" in capsys.readouterr().err
    assert trained.read_bytes() == before


@pytest.mark.parametrize("fact", ["license", "trained_on"])
def test_the_card_does_not_contradict_the_file(trained, tmp_path, capsys, fact):
    path, output = tmp_path / "said.h5", tmp_path / "out"
    facts = {"license": "CC BY 4.0", "trained_on": "streets"}
    saving.save_checkpoint(keras_fcn.load_checkpoint(trained), path, facts=facts)
    options = ["--repo", "me/net", "--output", output, "--dry-run"]
    option = f"--{fact.replace('_', '-')}"
    assert run(path, *options, option, "another") == 2
    assert f"says {fact} '{facts[fact]}'" in capsys.readouterr().err
    assert not output.exists()
    assert run(path, *options, option, facts[fact]) == 0


@pytest.mark.parametrize(
    ("net", "message"),
    [
        ({"builder": "classifier", "num_classes": 5}, "is a classifier"),
        ({"builder": "late_fusion", "stride": 32, "num_classes": 3}, "takes depth"),
        ({"stride": 32, "num_classes": 3, "input_channels": 4}, "takes depth"),
    ],
)
def test_a_net_that_labels_no_photographs_has_no_scores_and_no_picture(
    street, tmp_path, capsys, net, message
):
    path, output = tmp_path / "other.h5", tmp_path / "out"
    facts = {"model": {"backbone": "alexnet", "width": 1 / 64, **net}}
    model = models.build(facts)
    model.set_weights([np.ones_like(array) for array in model.get_weights()])
    weights.save(model, path, metadata=facts)
    options = ["--repo", "me/net", "--output", output, "--license", "MIT", "--dry-run"]
    for shown in (
        ["--evaluate", *street, "--split", "val"],
        ["--picture", f"{street[0]}/0.png"],
    ):
        assert run(path, *options, *shown) == 2
        assert message in capsys.readouterr().err
        assert not output.exists()
    assert run(path, *options) == 0
    assert sorted(file.name for file in output.iterdir()) == ["README.md", "net.h5"]


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (OSError, 2)])
def test_what_ends_halfway_leaves_the_folder_as_it_was(
    trained, street, tmp_path, monkeypatch, capsys, error, status
):
    output = tmp_path / "new" / "out"
    options = ["--repo", "me/net", "--output", output, "--license", "MIT", "--dry-run"]
    options += ["--evaluate", *street, "--split", "noise", "--relabel", "3=255"]

    def fail(*_, **__):
        raise error("in the middle")

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", fail)
        assert run(trained, *options) == status
        assert not output.parent.exists()
    assert run(trained, *options) == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    other = keras_fcn.load_checkpoint(trained)
    other.get_layer("score_fr").kernel.assign(0 * other.get_layer("score_fr").kernel)
    saving.save_checkpoint(other, trained)
    monkeypatch.setattr(evaluation, "evaluate", fail)
    assert run(trained, *options) == status
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before


def test_a_net_of_two_heads_is_not_evaluated_on_one_folder(street, tmp_path, capsys):
    path = tmp_path / "heads.h5"
    saving.save_checkpoint(
        models.fcn("alexnet", 32, {"a": 2, "b": 3}, width=1 / 64), path
    )
    options = ["--repo", "me/net", "--license", "MIT", "--evaluate", *street]
    assert run(path, *options, "--split", "val", "--output", tmp_path / "out") == 2
    assert "has the heads a, b; expected a net of one" in capsys.readouterr().err


def test_a_push_that_is_refused_keeps_what_was_to_be_pushed(
    server, trained, tmp_path, capsys
):
    server.fault = lambda request: request.send(b"{}", 401)
    options = ["--repo", "me/net", "--output", tmp_path / "out", "--license", "MIT"]
    assert run(trained, *options) == 2
    error = capsys.readouterr().err
    assert "401" in error
    assert "hf auth login" in error
    assert (tmp_path / "out" / "net.h5").read_bytes() == trained.read_bytes()
    with pytest.raises(OSError, match="401"):
        HfApi().create_repo("me/net")


def test_to_log_in_is_not_the_advice_where_nobody_answers(
    server, trained, tmp_path, capsys
):
    server.shutdown()
    server.server_close()
    options = ["--repo", "me/net", "--output", tmp_path / "out", "--license", "MIT"]
    assert run(trained, *options) == 2
    error = capsys.readouterr().err
    assert "could not be pushed" in error
    assert "Run the same command again." in error
    assert "log in" not in error.lower()
