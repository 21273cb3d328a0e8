"""Reads label maps from MATLAB files, in another process.

SciPy's reader dies of damaged files now and then (scipy/scipy#25349), and may take all
memory on the way. So it runs in a child: one for many files, replaced when it dies.
This file is both sides of it. The child runs it as a script, without the package, which
would bring in Keras; therefore it imports nothing of the package.
"""

import contextlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np

SECONDS = 10  # for a file
START_SECONDS = 60  # for the child's imports
MEMORY = 2**30  # bytes of the child's address space
MOST_BYTES = 2**26  # length of a file: no label map is larger
INT32 = np.iinfo(np.int32)

_HEAD = struct.Struct(">?Q")  # of an answer: whether it is an array, and its length


class Reader:
    """Reads label maps from MATLAB files of strangers, to be used in a `with` block.

    ```python
    with Reader() as reader:
        labels = reader.read("2008_000002.mat", "GTcls.Segmentation")
    ```

    A file may take `SECONDS`, and on Linux 1 GiB of memory. For one thread at a time.
    """

    def __init__(self):
        self._child = None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop()

    def read(self, path, name):
        """Reads a variable, or a field of it.

        Args:
            path: Of the file, in one of MATLAB's formats before 7.3.
            name: Of the variable; of a field as in MATLAB, `"GTcls.Segmentation"`.

        Returns:
            (height, width) int32, whatever the numbers were stored as.

        Raises:
            ValueError: If the file is damaged or kills its reader, or if there is no
                such variable or it is no matrix of whole numbers. Names the file.
            OSError: If it is missing or cannot be read.
            ModuleNotFoundError: If SciPy is not installed.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path} is no file; expected a .mat file.")
        with open(path, "rb") as file:
            length = os.fstat(file.fileno()).st_size
        if length > MOST_BYTES:
            raise ValueError(
                f"{path} has {length:,} bytes; expected a label map of {MOST_BYTES:,} "
                "at most. Give the right file."
            )
        request = json.dumps([os.path.abspath(path), name]).encode() + b"\n"
        sound, answer = self._ask(path, request)
        if not sound:
            raise ValueError(f"{path} {answer.decode(errors='replace')}")
        return np.lib.format.read_array(io.BytesIO(answer), allow_pickle=False)

    def _ask(self, path, request):
        used = self._child is not None
        if not used:
            self._start()
        start = time.monotonic()
        answer = _exchange(self._child, request, SECONDS)
        if answer:
            return answer
        late = time.monotonic() - start >= SECONDS
        end = self._stop()
        if used and not late:  # perhaps of what an earlier file has done to it
            return self._ask(path, request)
        how = f"is not read within {SECONDS} s" if late else f"ends its reader by {end}"
        raise ValueError(f"{path} {how}; expected a sound .mat file. Fetch it again.")

    def _start(self):
        # So the child finds SciPy where this process does, and without threads, each of
        # which would take of its memory.
        environment = {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._child = subprocess.Popen(
            [sys.executable, "-P", __file__],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        greeting = _exchange(self._child, b"", START_SECONDS)
        if greeting is None:
            raise OSError(f"The reader of .mat files did not start: {self._stop()}.")
        sound, answer = greeting
        if not sound:
            self._stop()
            raise ModuleNotFoundError(
                f"Reading .mat files takes SciPy ({answer.decode()}); install it with "
                'pip install ".[datasets]" in the checkout.',
                name="scipy",
            )

    def _stop(self):
        """Ends the child, and returns how it ended if it had done so itself."""
        if self._child is None:
            return None
        self._child.kill()
        with contextlib.suppress(BrokenPipeError), self._child:
            pass  # closes its pipes and waits
        code, self._child = self._child.returncode, None
        return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _exchange(child, request, seconds):
    """Returns the child's answer, (whether it is an array, bytes); None if it ends."""
    alarm = threading.Timer(seconds, child.kill)
    alarm.start()
    try:
        child.stdin.write(request)
        child.stdin.flush()
        sound, length = _HEAD.unpack(_receive(child, _HEAD.size))
        return sound, _receive(child, length)
    except (BrokenPipeError, EOFError):
        return None
    except BaseException:  # interrupted: the next request must not get this answer
        child.kill()
        raise
    finally:
        alarm.cancel()


def _receive(child, length):
    data = child.stdout.read(min(length, MEMORY))
    if len(data) != length:
        raise EOFError
    return data


# The child


def _serve():
    """Answers requests until there are no more: lines of JSON, [path, name]."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        return _answer(False, str(error).encode())
    _limit("AS", MEMORY)
    _limit("CORE", 0)
    _answer(True, b"")
    for line in sys.stdin.buffer:
        # The parent has its own clock; this one is for when the parent is gone.
        _limit("CPU", int(time.process_time()) + SECONDS + 1)
        try:
            path, name = json.loads(line)
            array = _label_map(_variable(loadmat, path, name))
            npy = io.BytesIO()
            np.lib.format.write_array(npy, array, allow_pickle=False)
        except Exception as error:  # a damaged file raises any of ten kinds
            _answer(False, _sentence(error).encode(errors="replace"))
        else:
            _answer(True, npy.getbuffer())


def _answer(sound, data):
    sys.stdout.buffer.write(_HEAD.pack(sound, len(data)))
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _limit(what, value):
    """Limits a resource of this process on Linux; elsewhere limits are not obeyed."""
    if sys.platform == "linux":
        import resource

        kind = getattr(resource, f"RLIMIT_{what}")
        hard = resource.getrlimit(kind)[1]
        soft = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (soft, hard))


class _Unfit(Exception):
    """A sound file holds something else: the rest of a sentence about it."""


def _sentence(error):
    if isinstance(error, _Unfit):
        return str(error)
    if isinstance(error, NotImplementedError):  # how SciPy says 7.3
        return f"cannot be read: {error}. Save it in MATLAB with the option -v7."
    return (
        f"is damaged or no .mat file: {type(error).__name__}: {str(error)[:200]}. "
        "Fetch it again."
    )


def _variable(loadmat, path, name):
    """Returns a variable, or a field of a structure."""
    first, *fields = name.split(".")
    with open(path, "rb") as file:
        value = loadmat(file, variable_names=[first]).get(first)
        if value is None:
            file.seek(0)
            there = [key for key in loadmat(file) if not key.startswith("__")]
            raise _Unfit(
                f"holds {_listed(there)}; expected the variable {first}. Give the "
                "right file."
            )
    for field in fields:
        there = getattr(value.dtype, "names", None) or ()
        if field not in there or value.size != 1:
            raise _Unfit(
                f"holds {_listed(there)} in {first}, of shape {value.shape}; expected "
                f"one structure with the field {field}. Give the right file."
            )
        value = value[field].item()
    return value


def _listed(names):
    return ", ".join(names)[:200] or "nothing"


def _label_map(value):
    """Returns a matrix of whole numbers as int32, whatever its type."""
    kind = value.dtype
    matrix = isinstance(value, np.ndarray) and value.ndim == 2 and value.size
    if matrix and kind.kind in "buif":
        low, high = value.min(), value.max()
        whole = kind.kind != "f" or (value == np.rint(value)).all()
        if INT32.min <= low <= high <= INT32.max and whole:  # false for NaN
            return value.astype(np.int32, order="C")
        kind = f"{kind} from {low} to {high}"
    elif kind.names:
        kind = f"a structure of {_listed(kind.names)}"
    raise _Unfit(
        f"holds {kind} of shape {value.shape} there; expected a matrix of whole "
        "numbers, a label for each pixel."
    )


if __name__ == "__main__":
    _serve()
