"""Kills builds of data sets at random instants, and spoils every kind of file.

    python benchmarks/fault_datasets.py
    python benchmarks/fault_datasets.py --kills 2 camvid  # these kills alone

After each `kill -9` there is either no data set or the whole one, and the next build
gives the same records, by their hashes. The archives are invented. The exit status
is 1 if that fails, or a test of `tests/test_datasets.py` at its full counts, which
takes TensorFlow.
"""

import argparse
import hashlib
import importlib
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "numpy"  # has no threads: it can be forked
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import archives_made  # noqa: E402

from keras_fcn.datasets import catalog  # noqa: E402

NAMES = ["voc2011", "sbd", "camvid"]


def fork(job):
    """Runs a function in a child that says nothing; returns the child's id."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        job()
        status = 0
    finally:
        os._exit(status)


def hashes(folder):
    """Hashes of the files of records and of the list of ids; None if there are none."""
    if not folder.exists():
        return None
    files = [*folder.glob("*.array_record*"), folder / "metadata.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def kill(name, kills, root):
    """Builds a data set, then kills builds of it.

    Returns:
        Builds killed before they ended, half data sets, builds with other records.
    """
    made = archives_made.make(name, root)
    dataset = catalog.DATASETS[name]
    module = importlib.import_module(f"keras_fcn.datasets.{dataset.module}")
    setattr(module, dataset.builder, made.builder)
    archives = made.write(root / "archives")
    data = root / "data"
    target = pathlib.Path(catalog._builder(name, data).data_dir)

    def build():
        catalog.prepare(name, data_dir=data, manual_dir=archives)

    def build_all():
        if os.waitpid(fork(build), 0)[1]:
            raise RuntimeError(f"{name} cannot be built.")
        return hashes(target)

    start = time.monotonic()
    expected = build_all()
    seconds = time.monotonic() - start
    hit = half = other = 0
    for _ in range(kills):
        shutil.rmtree(data)
        child = fork(build)
        time.sleep(random.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        found = hashes(target)
        hit += found is None
        half += found not in (None, expected)
        other += build_all() != expected
    return hit, half, other


def spoil():
    """Runs the tests of data at fault, each kind of file; returns pytest's status."""
    full = {"KERAS_FCN_FAULTS": "full", "KERAS_BACKEND": "tensorflow"}
    tests = ["-q", "-k", "at_fault", str(ROOT / "tests" / "test_datasets.py")]
    return subprocess.call(
        [sys.executable, "-m", "pytest", *tests], env=os.environ | full
    )


def main():
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("names", nargs="*", help=", ".join(archives_made.LAYOUTS))
    arguments = parser.parse_args()
    print("data set        kills  unfinished  half  other records")
    failures = 0
    for name in arguments.names or NAMES:
        with tempfile.TemporaryDirectory() as root:
            hit, half, other = kill(name, arguments.kills, pathlib.Path(root))
        failures += half + other
        print(f"{name:14}{arguments.kills:7}{hit:12}{half:6}{other:15}", flush=True)
    if not arguments.names:
        failures += spoil()
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())
