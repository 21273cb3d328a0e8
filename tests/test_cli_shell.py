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


@pytest.mark.parametrize(
    "arguments", [["show", "vgg16-8s"], ["list"]], ids=lambda arguments: arguments[0]
)
def test_no_column_is_cut_where_the_terminal_is_narrow(tmp_path, arguments):
    status, shown = on_a_terminal(arguments, tmp_path, columns=80)
    assert status == 0
    assert "…" not in shown
    for name in {"show": ["upscore_pool4", "multiply-adds"], "list": ["measured"]}[
        arguments[0]
    ]:
        assert name in shown


def own(stderr):
    """The lines that are not TensorFlow's, which tells of its start on any stream."""
    return [x for x in stderr.splitlines() if "keras-fcn" in x or "Error" in x]


def unread(arguments, folder):
    """Runs the command with nobody at the other end of its pipe."""
    with subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        process.stdout.close()
        return own(process.stderr.read().decode()), process.wait()


def test_a_closed_pipe_ends_the_command_as_its_signal_would(tmp_path):
    assert unread(["show", "alexnet-32s"], tmp_path) == ([], 141)
    assert unread(["list"], tmp_path) == ([], 141)


def test_predict_finishes_its_pictures_though_nobody_reads_their_lines(
    tmp_path, pictures
):
    assert unread(["predict", "pictures", "--output", "out"], tmp_path) == ([], 141)
    assert len(list((tmp_path / "out").iterdir())) == 3 * 3


def test_a_name_that_cannot_be_printed_is_spelled_out(tmp_path, pictures):
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii"}
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.frombytes("L", (2, 1), b"\0\1").save(masks / "1.png")
    (pictures / "0.png").rename(pictures / "stra\u00dfe.png")
    for arguments, expected, status in (
        (["predict", "pictures"], "pictures/stra\\xdfe.png: ", 0),
        (["check-data", "pictures", "masks"], "stra\\xdfe.png", 1),
    ):
        done = subprocess.run(
            [*COMMAND, *arguments], cwd=tmp_path, env=ascii_only, capture_output=True
        )
        assert done.returncode == status
        assert expected in done.stdout.decode("ascii")
        assert own(done.stderr.decode()) == []
