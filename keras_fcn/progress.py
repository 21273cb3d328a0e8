"""Progress bars on standard error, for whatever takes longer than two seconds."""

import contextlib
import sys


def bar(*columns, console=None):
    """Returns a `rich.progress.Progress`: a name, a bar, numbers and the time left.

    Where the console is no terminal it shows nothing.

    Args:
        columns: The numbers, as rich's columns; by default the items done, those in all
            and the time passed.
        console: A `rich.console.Console`; standard error if None.
    """
    from rich import progress
    from rich.console import Console

    console = console or Console(stderr=True)
    return progress.Progress(
        "{task.description}",
        progress.BarColumn(),
        *columns or (progress.MofNCompleteColumn(), progress.TimeElapsedColumn()),
        "left",
        progress.TimeRemainingColumn(),
        console=console,
        redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays its own
        disable=not console.is_terminal,
    )


@contextlib.contextmanager
def reporting(what, *columns):
    """Shows a bar.

    Args:
        what: Its name.
        columns: As in `bar`.

    Yields:
        A function of (done, total) that moves it; total is None if unknown.
    """
    with bar(*columns) as shown:
        task = shown.add_task(what, total=None)
        yield lambda done, total: shown.update(task, completed=done, total=total)


def busy(what):
    """Returns a context that shows that something is being done.

    Args:
        what: Such as "Loading the net".
    """
    from rich.console import Console
    from rich.live import Live
    from rich.spinner import Spinner

    # `Console.status`, which would take what goes to a file for the terminal's.
    return Live(
        Spinner("dots", f"{what} ...", style="status.spinner"),
        console=Console(stderr=True),
        refresh_per_second=12.5,
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
    )


def track(items, what):
    """Yields items, and shows a bar of how many there have been.

    Args:
        items: A sequence.
        what: The bar's name.
    """
    with bar() as shown:
        yield from shown.track(items, description=what)
