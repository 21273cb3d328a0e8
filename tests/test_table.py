"""The table of checkpoints in the docs, and the tool that writes it."""

import pathlib
import runpy
from types import SimpleNamespace

import pytest

from keras_fcn import manifest

ROOT = pathlib.Path(__file__).parent.parent
tool = SimpleNamespace(**runpy.run_path(str(ROOT / "tools" / "table.py")))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ENTRIES = {
    "vgg16-8s-toy": {
        "model": {"backbone": "vgg16", "stride": 8},
        "labels": {"sem": "siftflow-sem", "geo": "siftflow-geo"},
        "parameters": 134_362_751,
        "source": "https://example.org/nets/toy",
        "published": {"split": "val", "mean_iou": 65.46, "source": "its paper"},
        "measured": {"split": "test", "mean_iou": 41.0, "version": "0.1.0"},
    },
    "vgg16-toy": {
        "model": {"backbone": "vgg16", "num_classes": 7},
        "parameters": 46_000,
        "source": "this package",
        "published": {"split": "val", "top5_accuracy": 91, "source": "its paper"},
        "measured": {},
    },
}
ROWS = [
    "| `vgg16-8s-toy` | 33 sem, 3 geo | 134.4 M | 65.5 mean IU, val "
    "| 41.0 mean IU, test | [toy](https://example.org/nets/toy) |",
    "| `vgg16-toy` | 7 | 0.0 M | 91.0 top-5, val |  | this package |",
]


@pytest.fixture
def toys(monkeypatch):
    monkeypatch.setattr(manifest, "_table", lambda: ENTRIES)


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"# Nets – all\n{tool.START}\nold\n{tool.END}\nThe end.\n", "utf-8")
    return path


def test_the_docs_have_the_manifests_table():
    pages = [str(page) for page in PAGES if tool.START in page.read_text("utf-8")]
    assert str(ROOT / "docs" / "checkpoints.md") in pages
    assert tool.main(["--check", *pages]) == 0


def test_a_row_has_classes_parameters_scores_with_their_splits_and_source(toys, capsys):
    assert tool.main([]) == 0
    title, rule, *rows = capsys.readouterr().out.splitlines()
    assert rows == ROWS
    assert title.count("|") == rule.count("|") == ROWS[0].count("|")


def test_a_written_page_keeps_its_text_and_passes_the_check(toys, page, capsys):
    assert tool.main(["--check", str(page)]) == 1
    assert f"--write {page}" in capsys.readouterr().err
    assert tool.main(["--write", str(page)]) == 0
    text = page.read_text("utf-8")
    assert text.startswith(f"# Nets – all\n{tool.START}\n")
    assert text.endswith(f"{ROWS[-1]}\n\n{tool.END}\nThe end.\n")
    assert "old" not in text
    assert tool.main(["--check", str(page)]) == 0
    assert tool.main(["--write", str(page)]) == 0
    assert page.read_text("utf-8") == text


@pytest.mark.parametrize("kept", ["", "START", "END", "END START", "START END END"])
def test_a_page_without_both_markers_is_named_and_left_alone(tmp_path, capsys, kept):
    path = tmp_path / "page.md"
    path.write_text("\n".join(vars(tool)[marker] for marker in kept.split()), "utf-8")
    before = path.read_bytes()
    for action in ("--check", "--write"):
        assert tool.main([action, str(path)]) == 2
        assert str(path) in capsys.readouterr().err
    assert path.read_bytes() == before


@pytest.mark.parametrize("wrong", ["absent.md", "folder.md", "latin-1.md"])
def test_no_page_is_written_if_one_cannot_be(toys, page, tmp_path, capsys, wrong):
    (tmp_path / "folder.md").mkdir()
    (tmp_path / "latin-1.md").write_text("S\xfcd", "latin-1")
    before = page.read_bytes()
    for action in ("--check", "--write"):
        assert tool.main([action, str(page), str(tmp_path / wrong)]) == 2
        assert f"{wrong} cannot be read" in capsys.readouterr().err
    assert page.read_bytes() == before
