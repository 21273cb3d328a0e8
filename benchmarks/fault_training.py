"""Injects the faults of `tests/test_callbacks.py` at full counts, and prints tables.

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

from running import add_names

BACKENDS = ("torch", "tensorflow", "jax")
TESTS = pathlib.Path(__file__).parent.parent / "tests" / "test_callbacks.py"
PROMISES = {
    40: "resume is exact",
    41: "never without a snapshot",
    42: "a full disk while saving",
    43: "a bad newest snapshot",
    44: "divergence stops",
    45: "polite signals",
}


class Tally:
    """Adds up what the tests say of themselves."""

    def __init__(self, promises):
        self.rows = {number: [0, 0, 0.0] for number in promises}
        self.left_out = []

    def pytest_collection_modifyitems(self, items):
        """Keeps the tests of promises."""
        items[:] = [item for item in items if "faults" in item.fixturenames]

    def pytest_runtest_logreport(self, report):
        """Takes the promise, the cases and the failures that a test has recorded."""
        if report.skipped:
            self.left_out.append(f"{report.nodeid}: {report.longrepr[2]}")
        found = dict(report.user_properties)
        if report.when == "call" and found.get("promise") in self.rows:
            row = self.rows[found["promise"]]
            row[0] += found["cases"]
            row[1] += found["failures"]
            row[2] += report.duration

    def __str__(self):
        lines = [f"{'promise':40}{'cases':>8}{'failures':>10}{'seconds':>10}"]
        for number, (cases, failures, seconds) in self.rows.items():
            text = f"P{number} {PROMISES[number]}"
            lines.append(f"{text:40}{cases:8,}{failures:10,}{seconds:10.1f}")
        return "\n".join(lines + [f"left out: {line}" for line in self.left_out])


def run(promises):
    """Tries some promises on the backend of this process; returns pytest's status."""
    import pytest  # only now: it brings in Keras, by way of the tests

    tally = Tally(promises)
    options = ["-q", "-p", "no:cacheprovider", "--show-capture=no", str(TESTS)]
    if len(promises) == 1:
        options += ["-k", "killed_at_any_batch"]
    status = pytest.main(options, plugins=[tally])
    print(f"\n{os.environ['KERAS_BACKEND']}\n{tally}", flush=True)
    return status


def main():
    """Tries all on each backend, in a process of its own; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_names(parser, "backends", BACKENDS)
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
