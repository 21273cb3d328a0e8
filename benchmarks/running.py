"""What the scripts beside it share: backends in turn, errors in a line, a tally."""

import argparse
import contextlib
import os
import pathlib
import subprocess
import sys

BACKENDS = ("tensorflow", "jax", "torch")


def add_names(parser, argument, names):
    """Adds a positional argument: some of `names`, or none for all of them.

    Args:
        parser: An `argparse.ArgumentParser`, which has no such thing itself: it takes
            no default for its `choices`.
        argument: What the option is called.
        names: A tuple of strings.
    """

    def name(text):
        if text not in names:
            raise argparse.ArgumentTypeError(
                f"{text} was given; expected one of {', '.join(names)}"
            )
        return text

    known = ", ".join(names)
    parser.add_argument(
        argument, nargs="*", type=name, default=names, metavar="name", help=known
    )


def on_backends(measure, parser, heading):
    """Runs the script once for each backend that its command line names, or for all.

    Args:
        measure: Function of the options, called in a process with that backend.
        parser: Its `argparse.ArgumentParser`, to which the backends are added.
        heading: A line to print first.
    """
    add_names(parser, "backends", BACKENDS)
    parser.add_argument("--here", action="store_true", help="on Keras' backend, alone")
    options = parser.parse_args()
    if options.here:
        measure(options)
        return
    print(heading, flush=True)
    for backend in options.backends:
        environment = {**os.environ, "KERAS_BACKEND": backend}
        done = subprocess.run([sys.executable, *sys.argv, "--here"], env=environment)
        if done.returncode:
            sys.exit(f"{sys.argv[0]} failed on {backend}")


@contextlib.contextmanager
def one_sentence():
    """Ends the script, where the package refuses what it was given, with its words."""
    try:
        yield
    except (OSError, ValueError) as error:
        sys.exit(f"{pathlib.Path(sys.argv[0]).name}: error: {error}")


class Tally:
    """Adds up what the tests of promises say of themselves: a plugin of pytest.

    Args:
        promises: `{number: words}`; tests of other promises do not count.
    """

    def __init__(self, promises):
        self.promises = promises
        self.rows = {number: [0, 0, 0.0] for number in promises}
        self.left_out = []

    def pytest_runtest_logreport(self, report):
        """Takes the promise, the cases and the failures that a test has recorded."""
        if report.skipped:
            self.left_out.append(f"{report.nodeid}: {report.longrepr[2]}")
        row = None
        for key, value in report.user_properties if report.when == "call" else ():
            if key == "promise":
                row = self.rows.get(value)
            elif row:
                row[("cases", "failures").index(key)] += value
        if row:
            row[2] += report.duration

    def __str__(self):
        rows = {f"P{n} {self.promises[n]}": row for n, row in self.rows.items()}
        rows["all"] = map(sum, zip(*self.rows.values(), strict=True))
        lines = [f"{'promise':40}{'cases':>8}{'failures':>10}{'seconds':>10}"]
        for text, (cases, failures, seconds) in rows.items():
            lines.append(f"{text:40}{cases:8,}{failures:10,}{seconds:10.1f}")
        return "\n".join(lines + [f"left out: {line}" for line in self.left_out])
