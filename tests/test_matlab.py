"""Reading .mat files of strangers: a label map or one error, and never a crash."""

import io
import os
import resource
import signal
import struct
import sys
import time

import numpy as np
import pytest
import scripts

from keras_fcn.datasets import matlab

fuzzer = scripts.load("benchmarks/fuzz_datasets.py")
FORMS = fuzzer.label_maps()
LABELS = np.arange(6).reshape(2, 3)


@pytest.fixture(scope="module")
def reader():
    with matlab.Reader() as reader:
        yield reader


@pytest.fixture
def save(tmp_path):
    savemat = pytest.importorskip("scipy.io").savemat

    def save(variables, compressed=False):
        path = tmp_path / "labels.mat"
        savemat(path, variables, do_compression=compressed)
        return path

    return save


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """Puts a SciPy in place of the installed one: a function of the file's bytes."""

    def pretend(body):
        (tmp_path / "site" / "scipy").mkdir(parents=True)
        (tmp_path / "site" / "scipy" / "__init__.py").write_text("")
        (tmp_path / "site" / "scipy" / "io.py").write_text(body)
        monkeypatch.syspath_prepend(tmp_path / "site")
        return matlab.Reader()

    return pretend


def files(folder, **contents):
    """Writes files, and returns their paths."""
    for name, content in contents.items():
        (folder / f"{name}.mat").write_bytes(content)
    return [folder / f"{name}.mat" for name in contents]


# What a sound file holds


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_labels_of_each_data_set_are_read(form, compressed, reader, save):
    variables, name, labels = FORMS[form]
    found = reader.read(save(variables, compressed), name)
    np.testing.assert_array_equal(found, labels)
    assert found.dtype == np.int32
    assert found.flags.c_contiguous


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "u2", "i2", "u4", "i8", "f4", "f8"])
def test_whole_numbers_are_taken_whatever_their_type(dtype, reader, save):
    found = reader.read(save({"S": LABELS.astype(dtype)}), "S")
    np.testing.assert_array_equal(found, LABELS.astype(dtype).astype(int))


def test_the_least_and_the_greatest_numbers_are_kept(reader, save):
    extremes = [[-1, -(2**31), 2**31 - 1]]
    for dtype in (np.int64, np.float64):
        assert reader.read(save({"S": dtype(extremes)}), "S").tolist() == extremes


def test_a_field_of_a_field_is_read(reader, save):
    path = save({"a": {"b": {"c": LABELS}}})
    np.testing.assert_array_equal(reader.read(path, "a.b.c"), LABELS)


def sparse():
    from scipy.sparse import csc_matrix

    return csc_matrix(LABELS)


UNFIT = {
    "a fraction": ({"S": LABELS + 0.5}, "float64 from 0.5 to 5.5"),
    "NaN": ({"S": np.full((2, 2), np.nan)}, "float64 from nan to nan"),
    "infinity": ({"S": np.full((2, 2), np.inf)}, "float64 from inf to inf"),
    "too great": ({"S": np.float64([[2**31]])}, "float64 from 2147483648.0"),
    "too small": ({"S": np.int64([[-(2**31) - 1]])}, "int64 from -2147483649"),
    "complex": ({"S": LABELS + 1j}, "complex128 of shape (2, 3)"),
    "text": ({"S": "sky"}, "of shape (1,)"),
    "three dimensions": ({"S": np.zeros((2, 3, 4))}, "of shape (2, 3, 4)"),
    "nothing": ({"S": np.zeros((0, 0))}, "of shape (0, 0)"),
    "cells": ({"S": np.array([["sky", 1]], object)}, "object of shape (1, 2)"),
    "a sparse matrix": (lambda: {"S": sparse()}, "int64 of shape (2, 3)"),
    "a structure": ({"S": {"a": LABELS, "b": 1}}, "a structure of a, b"),
    "another variable": ({"LabelMap": LABELS, "x": 1}, "holds LabelMap, x; expected"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_is_no_label_map_is_refused(case, reader, save):
    variables, message = UNFIT[case]
    path = save(variables() if callable(variables) else variables)
    with pytest.raises(ValueError, match="expected") as caught:
        reader.read(path, "S")
    assert str(caught.value).startswith(f"{path} holds ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("variables", "holds"),
    [
        ({"GTcls": {"Boundaries": LABELS}}, "holds Boundaries in GTcls, of shape"),
        ({"GTcls": LABELS}, r"holds nothing in GTcls, of shape \(2, 3\)"),
        (
            {"GTcls": np.zeros((1, 2), [("Segmentation", "O")])},
            r"holds Segmentation in GTcls, of shape \(1, 2\)",
        ),
    ],
)
def test_a_field_that_is_not_there_once_is_refused(variables, holds, reader, save):
    with pytest.raises(ValueError, match=f"{holds}.*expected one .* Segmentation"):
        reader.read(save(variables), "GTcls.Segmentation")


# Other files


@pytest.mark.parametrize("content", [b"", b"MATLAB", b"<html>" * 100, bytes(1000)])
def test_another_file_is_refused(content, reader, tmp_path):
    (path,) = files(tmp_path, other=content)
    with pytest.raises(ValueError, match=r"other\.mat is damaged or no \.mat file"):
        reader.read(path, "S")


def test_a_file_of_version_7_3_says_how_to_save_it(reader, tmp_path):
    header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
    (path,) = files(tmp_path, new=header + bytes(1000))
    with pytest.raises(ValueError, match=r"new\.mat cannot be read.*-v7"):
        reader.read(path, "S")


def test_a_file_that_is_too_long_is_not_read(reader, tmp_path):
    (path,) = files(tmp_path, long=b"")
    os.truncate(path, matlab.MOST_BYTES + 1)
    with pytest.raises(ValueError, match=r"long\.mat has 67,108,865 bytes"):
        reader.read(path, "S")


def test_a_file_that_is_missing_is_named(reader, tmp_path):
    for path in (tmp_path / "missing.mat", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"{path} is no file"):
            reader.read(path, "S")


def test_a_path_may_be_relative_and_hold_any_character(save, tmp_path, monkeypatch):
    content = save({"S": LABELS}).read_bytes()
    name = os.fsdecode(b'new\nline " \xff')
    with matlab.Reader() as reader:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / name).write_bytes(content)
            monkeypatch.chdir(tmp_path / folder)  # the child stays where it began
            np.testing.assert_array_equal(reader.read(name, "S"), LABELS)
            (tmp_path / folder / name).unlink()


# The child

ECHO = """
import os, resource, sys, time
import numpy as np

def loadmat(file, variable_names=None):
    words = file.read().decode()
    return {"S": np.array(eval(words))}
"""


def test_one_child_reads_all_files_and_ends_with_the_block(pretend, tmp_path):
    (path,) = files(tmp_path, pid=b"[[os.getpid()]]")
    with pretend(ECHO) as reader:
        (pid,) = {reader.read(path, "S").item() for _ in range(3)}
        assert pid != os.getpid()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_child_imports_neither_keras_nor_the_package(pretend, tmp_path):
    names = b"[['keras' in sys.modules, 'keras_fcn' in sys.modules]]"
    (path,) = files(tmp_path, modules=names)
    with pretend(ECHO) as reader:
        assert reader.read(path, "S").tolist() == [[0, 0]]


@pytest.mark.skipif(sys.platform != "linux", reason="limits are for Linux only")
def test_the_child_has_limits_of_memory_and_time_and_dumps_no_core(pretend, tmp_path):
    limits = b"[[resource.getrlimit(x)[0]] for x in (resource.RLIMIT_CORE, "
    limits += b"resource.RLIMIT_CPU)]"
    greedy = b"np.ones((2**14, 2**14))"  # 2 GiB
    paths = files(tmp_path, limits=limits, greedy=greedy)
    ours = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (ours[1], ours[1]))
    with pretend(ECHO) as reader:
        core, cpu = reader.read(paths[0], "S").ravel()
        resource.setrlimit(resource.RLIMIT_CORE, ours)
        assert core == 0
        assert 0 < cpu <= matlab.SECONDS + 10
        with pytest.raises(ValueError, match=r"greedy\.mat.*Memory"):
            reader.read(paths[1], "S")


@pytest.mark.parametrize(
    ("death", "name"),
    [
        (b"os.kill(os.getpid(), 11)", "SIGSEGV"),
        (b"os.abort()", "SIGABRT"),
        (b"os._exit(3)", "exit status 3"),
        (b"[os.close(1), time.sleep(60)]", "SIGKILL"),
    ],
)
def test_a_file_that_kills_the_child_is_named_and_the_next_one_read(
    death, name, pretend, tmp_path
):
    deadly, good = files(tmp_path, deadly=death, good=b"[[1, 2]]")
    with pretend(ECHO) as reader:
        for _ in range(2):
            with pytest.raises(ValueError, match=rf"deadly\.mat .*by {name}; expected"):
                reader.read(deadly, "S")
            assert reader.read(good, "S").tolist() == [[1, 2]]


def test_a_file_is_not_blamed_for_what_an_earlier_one_did(pretend, tmp_path):
    body = ECHO.replace(
        "words =", "if hasattr(sys, 'poisoned'): os.abort()\n    words ="
    )
    poison = b"[[setattr(sys, 'poisoned', True) is None]]"
    poisonous, good = files(tmp_path, poisonous=poison, good=b"[[1, 2]]")
    with pretend(body) as reader:
        reader.read(poisonous, "S")
        assert reader.read(good, "S").tolist() == [[1, 2]]


def test_a_file_that_takes_too_long_is_named_and_the_next_one_read(
    pretend, tmp_path, monkeypatch
):
    monkeypatch.setattr(matlab, "SECONDS", 1)
    tries = tmp_path / "tries"
    sleep = f"[open({str(tries)!r}, 'a').write('1'), time.sleep(60)]"
    slow, good = files(tmp_path, slow=sleep.encode(), good=b"[[1, 2]]")
    with pretend(ECHO) as reader:
        reader.read(good, "S")
        start = time.monotonic()
        with pytest.raises(ValueError, match=r"slow\.mat is not read within 1 s"):
            reader.read(slow, "S")
        assert time.monotonic() - start < 5
        assert tries.read_text() == "1"
        monkeypatch.setattr(matlab, "SECONDS", 10)
        assert reader.read(good, "S").tolist() == [[1, 2]]


def test_an_interruption_does_not_mix_up_the_answers(pretend, tmp_path):
    def interrupt(*signal):
        raise KeyboardInterrupt

    slow, good = files(tmp_path, slow=b"[[time.sleep(9)]]", good=b"[[1, 2]]")
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pretend(ECHO) as reader:
            reader.read(good, "S")
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                reader.read(slow, "S")
            assert reader.read(good, "S").tolist() == [[1, 2]]
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_child_does_not_outlive_its_parent(pretend, tmp_path):
    (path,) = files(tmp_path, pid=b"[[os.getpid()]]")
    receive, send = os.pipe()
    reader = pretend(ECHO)
    parent = os.fork()
    if parent == 0:
        os.write(send, b"%d" % reader.read(path, "S").item())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    status = f"/proc/{int(os.read(receive, 100))}/status"
    for descriptor in (receive, send):
        os.close(descriptor)
    end = time.monotonic() + 10
    while os.path.exists(status) and "zombie" not in open(status).read():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_without_scipy_it_says_what_to_install(pretend, tmp_path):
    (path,) = files(tmp_path, any=b"")
    with pretend("raise ImportError('No module named scipy')") as reader:
        with pytest.raises(ModuleNotFoundError, match=r"\.\[datasets\]"):
            reader.read(path, "S")


def test_a_child_that_does_not_start_is_no_fault_of_the_file(pretend, tmp_path):
    (path,) = files(tmp_path, any=b"")
    with pretend("import os; os.abort()") as reader:
        with pytest.raises(OSError, match="did not start: SIGABRT"):
            reader.read(path, "S")


def test_a_child_that_a_file_took_over_runs_no_code_here(pretend, tmp_path):
    npy = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (1, 1)}
    np.lib.format.write_array_header_1_0(npy, header)
    npy.write(f"cos\nmkdir\n(V{tmp_path}/evil\ntR.".encode())
    answer = struct.pack(">?Q", True, len(npy.getvalue())) + npy.getvalue()
    say = f"sys.stdout.buffer.write({answer!r}), sys.stdout.flush(), os._exit(0)"
    (path,) = files(tmp_path, evil=say.encode())
    with pretend(ECHO) as reader:
        with pytest.raises(ValueError, match="Object arrays cannot be loaded"):
            reader.read(path, "S")
    assert not (tmp_path / "evil").exists()


# P32: a .mat file cannot kill us, at a twentieth of the count


def test_mutants_give_labels_or_one_error(reader, tmp_path):
    pytest.importorskip("scipy")
    came = {"read": 0, "refused": 0, "died": 0}
    for _, what, seconds in fuzzer.read_mutants(reader, range(1000), tmp_path):
        came[what] += 1
        assert seconds < matlab.SECONDS + 1
    assert min(came["read"], came["refused"]) > 100
