"""What the scripts beside it share: backends one after the other, errors in a line."""

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
