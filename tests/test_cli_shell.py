"""What `keras-fcn` is to a shell: files, pipes, terminals, locks."""

import os
import subprocess
import sys

import pytest
from PIL import Image

COMMAND = [sys.executable, "-m", "keras_fcn"]


@pytest.fixture
def pictures(tmp_path):
    """A folder of three small pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 30), (80 * i, 99, 150)).save(folder / f"{i}.png")
    return folder


def on_a_terminal(arguments, folder, columns=80, **streams):
    """Runs the command; what streams are not given is a terminal, whose text returns.

    Returns:
        The exit status, and what the terminal has been sent.
    """
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    given = {"stdout": theirs, "stderr": theirs, **streams}
    size = {"COLUMNS": str(columns), "TERM": "xterm"}
    process = subprocess.Popen(
        [*COMMAND, *arguments], cwd=folder, env=os.environ | size, **given
    )
    os.close(theirs)
    said = b""
    try:
        while block := os.read(ours, 65536):
            said += block
    except OSError:  # how Linux says that nobody writes any more
        pass
    os.close(ours)
    return process.wait(), said.decode()


def test_what_predict_prints_goes_to_the_file_and_not_to_the_terminal(
    tmp_path, pictures
):
    with open(tmp_path / "shares.txt", "w") as file:
        status, shown = on_a_terminal(["predict", "pictures"], tmp_path, stdout=file)
    assert status == 0
    lines = (tmp_path / "shares.txt").read_text().splitlines()
    assert [line.split(":")[0] for line in lines[:3]] == [
        f"pictures/{i}.png" for i in range(3)
    ]
    assert lines[3].startswith("Wrote labels")
    assert "Segmenting" in shown
    assert "pictures/0.png" not in shown
