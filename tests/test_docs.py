"""What the README and the docs say is run."""

import doctest
import pathlib
import re

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path):
    """Returns the Python blocks of a page that are no doctests."""
    found = re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL)
    return [block for block in found if ">>>" not in block]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_a_page_say_what_they_answer(page):
    result = doctest.testfile(str(page), module_relative=False)
    assert result.failed == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_a_page_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link).exists(), link


def test_the_ten_lines_of_the_readme_run(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (block,) = [b for b in blocks(ROOT / "README.md") if "transplant" in b]
    assert len([line for line in block.splitlines() if line.strip()]) <= 10
    exec(compile(block, "README.md", "exec"), {})
    out = capsys.readouterr().out
    assert "(427, 640) (427, 640, 3)" in out
    assert out.count("score_") == 6  # kernel and bias of three score layers


@pytest.mark.slow
def test_the_nets_of_the_readme_build():
    (block,) = [b for b in blocks(ROOT / "README.md") if "late_fusion" in b]
    names = {}
    first, *nets = block.strip().splitlines()
    exec(first, names)
    built = [eval(net, names) for net in nets if net]
    assert len(built) == block.count("\nkeras_fcn.")  # a line each
    for model in built:
        assert model.count_params() > 30e6, model.name


@pytest.mark.slow
def test_the_training_script_of_the_docs_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder, shape, top in (("images", (50, 60, 3), 256), ("masks", (50, 60), 3)):
        (tmp_path / folder).mkdir()
        for i in range(2):
            array = rng.integers(0, top, shape, np.uint8)
            Image.fromarray(array).save(tmp_path / folder / f"{i}.png")
    (block,) = [b for b in blocks(ROOT / "docs" / "training.md") if "pairs" in b]
    assert len(block.splitlines()) <= 30
    exec(compile(block.replace("60", "1").replace("256", "32"), "training.md", "exec"))
    assert (tmp_path / "model.h5").exists()
