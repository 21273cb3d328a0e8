"""The table of checkpoints in docs/checkpoints.md, from the manifest.

python tools/table.py                prints it
python tools/table.py --check FILE   fails if the table in a page is another one
python tools/table.py --write FILE   puts it into the page, between the two markers
"""

import argparse
import pathlib
import sys

from keras_fcn import manifest
from keras_fcn.files import write_bytes

START = "<!-- checkpoints: written by tools/table.py -->"
END = "<!-- end of checkpoints -->"
COLUMNS = ("checkpoint", "classes", "parameters", "published", "measured", "source")
# The score that stands for an entry: the first of these that it has.
SCORES = {"mean_iou": "mean IU", "top1_accuracy": "top-1", "top5_accuracy": "top-5"}


def main(arguments=None):
    """Prints, checks or writes the table.

    Args:
        arguments: A list of strings; those of the process if None.

    Returns:
        The exit status: 0, 1 if a page has another table, 2 after an error.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--check", metavar="FILE", type=pathlib.Path, nargs="+")
    action.add_argument("--write", metavar="FILE", type=pathlib.Path, nargs="+")
    options = parser.parse_args(arguments)
    if not (options.check or options.write):
        print(table())
        return 0
    status = 0
    try:
        pages = {path: read_page(path) for path in options.check or options.write}
        changed = {path: replace_table(page, path) for path, page in pages.items()}
        for path, new in changed.items():
            if options.write:
                write_bytes(path, new.encode())
            elif new != pages[path]:
                print(
                    f"{path} has another table than the manifest; run "
                    f"python tools/table.py --write {path}",
                    file=sys.stderr,
                )
                status = 1
    except (OSError, ValueError) as error:
        print(f"table.py: error: {error}", file=sys.stderr)
        return 2
    return status


def read_page(path):
    """Returns the text of a page.

    Args:
        path: Of the page.

    Raises:
        ValueError: If it is no file, or no UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a page of text in UTF-8."
        ) from error


def table():
    """Returns the table of all checkpoints, Markdown."""
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for name in manifest.list_checkpoints():
        entry = manifest.checkpoint_info(name)
        lines.append(
            (
                f"`{name}`",
                _classes(entry),
                f"{entry['parameters'] / 1e6:.1f} M",
                _score(entry["published"]),
                _score(entry["measured"]),
                _source(entry["source"]),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_table(page, path):
    """Returns a page with the manifest's table between its markers.

    Args:
        page: The text of the page.
        path: Of the page, for the error.

    Raises:
        ValueError: If the two markers are not there, once each and in order.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end) or START in rest or END in before + after:
        raise ValueError(
            f"{path} has no place for the table; expected one line {START!r} and, "
            f"below, one line {END!r}."
        )
    return f"{before}{START}\n\n{table()}\n\n{END}{after}"


def _classes(entry):
    classes = manifest.num_classes(entry)
    if isinstance(classes, dict):
        return ", ".join(f"{count} {head}" for head, count in classes.items())
    return str(classes)


def _score(scores):
    for score, word in SCORES.items():
        if score in scores:
            return f"{scores[score]:.1f} {word}, {scores['split']}"
    return ""


def _source(source):
    name = source.rstrip("/").rsplit("/", 1)[-1]
    return f"[{name}]({source})" if source.startswith("http") else source


if __name__ == "__main__":
    sys.exit(main())
