"""Injects the faults of test_snapshots.py and test_callbacks.py at full counts.

    python benchmarks/fault_training.py

Trainings are killed on each backend (P40); the rest is tried on the first one that is
named. Names of backends as arguments leave out the others. Full disks take root. The
exit status is 1 if a promise was broken.
"""

import argparse
import os
import pathlib
import subprocess
import sys

import running

BACKENDS = ("torch", "tensorflow", "jax")
ROOT = pathlib.Path(__file__).parent.parent
TESTS = [ROOT / "tests" / f"test_{name}.py" for name in ("snapshots", "callbacks")]
PROMISES = {
    40: "resume is exact",
    41: "never without a snapshot",
    42: "a full disk while saving",
    43: "a bad newest snapshot",
    44: "divergence stops",
    45: "polite signals",
}


class Tally(running.Tally):
    """A tally of the tests of promises alone."""

    def pytest_collection_modifyitems(self, items):
        """Keeps the tests of promises."""
        items[:] = [item for item in items if "faults" in item.fixturenames]


def run(promises):
    """Tries some promises on the backend of this process; returns pytest's status."""
    import pytest  # only now: it brings in Keras, by way of the tests

    tally = Tally({number: PROMISES[number] for number in promises})
    options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", *map(str, TESTS)]
    if len(promises) == 1:
        options += ["-k", "killed_at_any_batch"]
    status = pytest.main(options, plugins=[tally])
    print(f"\n{os.environ['KERAS_BACKEND']}\n{tally}", flush=True)
    return status


def main():
    """Tries all on each backend, in a process of its own; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    running.add_names(parser, "backends", BACKENDS)
    parser.add_argument("--promises", type=int, nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.promises:
        return run(options.promises)
    failed = False
    for i, backend in enumerate(options.backends):
        promises = list(PROMISES)[: None if i == 0 else 1]
        environment = {
            **os.environ,
            "KERAS_BACKEND": backend,
            "KERAS_FCN_FAULTS": "full",
        }
        command = [sys.executable, __file__, "--promises", *map(str, promises)]
        failed |= subprocess.run(command, env=environment).returncode != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
