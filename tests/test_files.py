"""Writing files: whole or not at all."""

import contextlib
import errno
import os
import resource
import signal
import subprocess
import threading
import time

import numpy as np
import pytest

from keras_fcn import files, hub


@contextlib.contextmanager
def umask(mask):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_file_has_the_rights_that_the_umask_leaves(mask, tmp_path):
    with umask(mask):
        files.write_bytes(tmp_path / "file", b"abc")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~mask


def test_writing_leaves_the_umask_of_other_threads_alone(tmp_path, monkeypatch):
    def never(mask):
        raise AssertionError("the umask is the whole process's")

    monkeypatch.setattr(os, "umask", never)
    threads = [
        threading.Thread(target=files.write_bytes, args=(tmp_path / str(i), b"abc"))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(p.name for p in tmp_path.iterdir()) == [str(i) for i in range(8)]


def test_two_writers_of_one_file_leave_one_whole_file(tmp_path):
    contents = [bytes([i]) * 1_000_000 for i in range(8)]
    threads = [
        threading.Thread(target=files.write_bytes, args=(tmp_path / "file", content))
        for content in contents
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "file").read_bytes() in contents
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_stays_and_what_it_leads_to_is_written(exists, tmp_path):
    (tmp_path / "large disk").mkdir()
    target = tmp_path / "large disk" / "file"
    if exists:
        target.write_bytes(b"before")
    link = tmp_path / "link"
    link.symlink_to("large disk/file")
    files.write_bytes(link, b"after")
    assert link.is_symlink()
    assert target.read_bytes() == b"after"


def survives(path, error, number, size):
    """Checks that a write that fails half way leaves the earlier file alone."""
    files.write_bytes(path, b"before")
    with pytest.raises(error) as caught:
        files.write_bytes(path, bytes(size))
    assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert path.read_bytes() == b"before"
    assert list(path.parent.iterdir()) == [path]
    return str(caught.value)


def test_a_write_that_fails_half_way_leaves_the_earlier_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = survives(tmp_path / "file", OSError, errno.EFBIG, 100_001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in message
    assert "are free" not in message  # the disk is not what is full


def test_a_full_disk_leaves_the_earlier_file_and_says_how_much_is_free(tmp_path):
    options = ["-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path)]
    if os.getuid() or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("A full disk takes a small one, which only root can mount.")
    try:
        message = survives(tmp_path / "file", OSError, errno.ENOSPC, 1_000_000)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert f"needs more than the {256 * 1024 - 4096:,} bytes that are free" in message


def test_killed_while_it_writes_a_process_leaves_the_earlier_or_the_later_file(
    tmp_path,
):
    path = tmp_path / "file"
    files.write_bytes(path, bytes(4_000_000))
    rng = np.random.default_rng(0)
    for _ in range(8):
        child = os.fork()
        if child == 0:
            while True:
                for i in range(256):
                    files.write_bytes(path, bytes([i]) * 4_000_000)
        time.sleep(rng.uniform(0.01, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        content = path.read_bytes()
        assert content == content[:1] * 4_000_000


@pytest.mark.parametrize("name", ["file", "file[1]"])
def test_what_killed_writers_left_is_removed_an_hour_later(name, tmp_path):
    old, young = (tmp_path / f".{name}.{x}.part" for x in ("0123abcd", "4567cdef"))
    other = tmp_path / ".file1.0123abcd.part"
    for part in (old, young, other):
        part.write_bytes(b"half a file")
    for part, age in ((old, 3700), (young, 3500), (other, 3700)):
        os.utime(part, (time.time() - age,) * 2)
    files.write_bytes(tmp_path / name, b"whole")
    assert {p.name for p in tmp_path.iterdir()} == {name, young.name, other.name}


def moved(path, content):
    temporary = path.with_name("temporary")
    temporary.write_bytes(content)
    hub._move(temporary, path)


@pytest.mark.parametrize("write", [files.write_bytes, moved])
def test_a_file_is_on_the_disk_before_it_is_seen_and_its_folder_after(
    write, tmp_path, monkeypatch
):
    fsync, replace, done = os.fsync, os.replace, []

    def sync(descriptor):
        found = os.fstat(descriptor)
        done.append((found.st_ino, found.st_size if found.st_ino != folder else None))
        fsync(descriptor)

    def show(source, target):
        done.append(target)
        replace(source, target)

    folder, path = tmp_path.stat().st_ino, tmp_path / "file"
    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", show)
    write(path, b"abc")
    assert done == [(path.stat().st_ino, 3), path, (folder, None)]
