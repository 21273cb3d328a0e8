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


class Tally:
    """Adds up what the tests say of themselves."""

    def __init__(self):
        self.rows = {number: [0, 0, 0.0] for number in range(1, len(PROMISES) + 1)}
        self.left_out = []
        self.end = time.monotonic() + 60 * MINUTES

    def pytest_runtest_setup(self, item):
        """Leaves out what begins too late."""
        if time.monotonic() > self.end:
            pytest.skip(f"{MINUTES} minutes are over")

    def pytest_runtest_logreport(self, report):
        """Takes the promise, the cases and the failures that a test has recorded."""
        if report.skipped:
            self.left_out.append(f"{report.nodeid}: {report.longrepr[2]}")
        if report.when != "call":
            return
        promise = None
        for key, value in report.user_properties:
            if key == "promise":
                promise = value
            else:
                self.rows[promise][("cases", "failures").index(key)] += value
        if promise:
            self.rows[promise][2] += report.duration

    def __str__(self):
        lines = [f"{'promise':40}{'cases':>8}{'failures':>10}{'seconds':>10}"]
        for number, row in self.rows.items():
            text = f"P{number} {PROMISES[number - 1]}"
            lines.append(f"{text:40}{row[0]:8,}{row[1]:10,}{row[2]:10.1f}")
        cases, failures, seconds = map(sum, zip(*self.rows.values(), strict=True))
        lines.append(f"{'all':40}{cases:8,}{failures:10,}{seconds:10.1f}")
        return "\n".join(lines + [f"left out: {line}" for line in self.left_out])


if __name__ == "__main__":
    os.environ["KERAS_FCN_FAULTS"] = "full"
    tally = Tally()
    options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", str(TESTS)]
    status = pytest.main(options, plugins=[tally])
    print(tally)
    sys.exit(status)
