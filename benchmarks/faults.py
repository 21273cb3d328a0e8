"""Injects the faults of `tests/test_hub.py` at their full counts, and prints a table.

    python benchmarks/faults.py

Loopback only. Tests that begin after `MINUTES` are left out, and said to be. The exit
status is pytest's.
"""

import os
import pathlib
import sys
import time

import pytest
import running

MINUTES = 30
TESTS = pathlib.Path(__file__).parent.parent / "tests" / "test_hub.py"
PROMISES = [
    "a cut never leaves a wrong file",
    "progress or a clean stop",
    "kill -9 keeps the cache valid",
    "16 processes, one download",
    "a full disk is said so",
    "wrong bytes are refused",
    "every status has an answer",
    "no endless wait",
    "offline says what to do",
    "a read-only cache serves",
    "a tampered cache is found",
    "outside names stay names",
    "safe hosts",
    "any order of events",
]


class Tally(running.Tally):
    """A tally that ends in time."""

    end = time.monotonic() + 60 * MINUTES

    def pytest_runtest_setup(self, item):
        """Leaves out what begins too late."""
        if time.monotonic() > self.end:
            pytest.skip(f"{MINUTES} minutes are over")


if __name__ == "__main__":
    os.environ["KERAS_FCN_FAULTS"] = "full"
    tally = Tally(dict(enumerate(PROMISES, start=1)))
    options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", str(TESTS)]
    status = pytest.main(options, plugins=[tally])
    print(tally)
    sys.exit(status)
