"""Writes files that appear whole or not at all, and tells files apart."""

import contextlib
import errno
import glob
import hashlib
import os
import pathlib
import secrets
import shutil
import sys
import time

try:
    import fcntl
except ImportError:  # Windows: no process knows of another
    fcntl = None

DIGESTS = ("sha256", "sha1", "md5")
BLOCK = 2**20  # bytes
ORPHAN_SECONDS = 3600  # an unfinished file this old has no owner left


def write_bytes(path, data):
    """Writes a file.

    Args:
        path: Of the file.
        data: Its bytes.

    Raises:
        OSError: If that fails; an earlier file of that name is then untouched.
    """
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path):
    """Opens a file to write, which appears whole when the block ends without error.

    Args:
        path: Of the file; if it is a link, it stays and what it leads to is replaced.

    Yields:
        The open file, binary.

    Raises:
        OSError: If that fails; an earlier file of that name is then untouched.
    """
    target = pathlib.Path(os.path.realpath(path))
    part = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
    try:
        _sweep(target)
        with open(part, "x+b") as file:  # not mkstemp, whose files are private
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, target)
        sync_folder(target.parent)
    except OSError as error:
        part.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        if error.errno == errno.ENOSPC:
            free = shutil.disk_usage(target.parent).free
            reason = f"{reason}: it needs more than the {free:,} bytes that are free"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        part.unlink(missing_ok=True)


def _sweep(target):
    """Removes what processes that were killed have left of this file."""
    for part in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, too
            if time.time() - part.stat().st_mtime > ORPHAN_SECONDS:
                part.unlink()


@contextlib.contextmanager
def locked(path, name):
    """Holds off other processes that fetch the same, as long as the block lasts.

    Args:
        path: Of a file for that alone; it stays, empty.
        name: What is fetched, to say that another process does.

    Yields:
        Whether locks do something on this file system.

    Raises:
        OSError: If the file cannot be written.
    """
    with open(path, "a") as file, open(path, "a") as rival:
        yield _excludes(file, rival, name)


@contextlib.contextmanager
def claimed(path, refusal):
    """Keeps a lock as long as the block lasts, and waits for nobody.

    Where there are no locks, as on Windows and on some file systems, nothing is kept.

    Args:
        path: Of a file for that alone; it stays, empty.
        refusal: What to say if another process has the lock.

    Raises:
        ValueError: If another process has it.
        OSError: If the file cannot be written.
    """
    with open(path, "a") as file:
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(refusal) from None
        except OSError:  # a file system without locks
            pass
        yield


def _excludes(file, rival, name):
    """Locks `file`; whether that means anything shows in `rival`, the same file."""
    if not fcntl:
        return False
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"Waiting for another process to fetch {name}", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        fcntl.flock(rival, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


def sync_folder(folder):
    """Makes sure that what was renamed in a folder stays so when the power fails."""
    if os.name == "posix":  # only there can a folder be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def measure(path, digests=DIGESTS[:1]):
    """Returns the length and the hashes of a file: `{"bytes": ..., "sha256": ...}`.

    Args:
        path: Of the file.
        digests: Any of `DIGESTS`.

    Raises:
        OSError: If it cannot be read.
    """
    hashes = {kind: hashlib.new(kind, usedforsecurity=False) for kind in digests}
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            for value in hashes.values():
                value.update(block)
        length = file.tell()
    return {"bytes": length} | {
        kind: value.hexdigest() for kind, value in hashes.items()
    }
