"""Trains FCN-32s, 16s and 8s alike, from scratch on CamVid, and compares them.

    python benchmarks/strides.py CAMVID RUNS           # all rows: hours on two cores
    python benchmarks/strides.py CAMVID RUNS googlenet-8s   # one row
    python benchmarks/strides.py CAMVID RUNS --picture strides.png

CAMVID holds {train,val}/{images,labels}, 480 x 360, void 11. Every row is one command
of `keras-fcn train`, which is printed, and goes on where it was stopped; then
`keras-fcn evaluate` on val. Rows that are there already are not trained again. The
picture is the paper's figure 4: one image of val, what each net says of it, the truth;
with --nets-only without the image and the truth, which are not ours to publish.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time

import numpy as np
from running import add_names, one_sentence

from keras_fcn import snapshots

ROWS = ("googlenet-32s", "googlenet-16s", "googlenet-8s", "alexnet-32s", "alexnet-8s")
BUDGET = "--epochs 8 --crop 192 --scale 0.7 1.4".split()
LABELS = "--labels camvid --relabel 11=255".split()
SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou", "fw_iou")
IMAGE = "0016E5_08017"  # of val, with something of most classes


def keras_fcn(*arguments):
    """Runs the command line in a process of its own; ends this one if it fails."""
    command = ["keras-fcn", *map(str, arguments)]
    print("$", *command, flush=True)
    if subprocess.run([sys.executable, "-m", "keras_fcn", *command[1:]]).returncode:
        sys.exit(f"{' '.join(command)} failed")


def folders(camvid, split):
    """The images and the masks of a split."""
    return camvid / split / "images", camvid / split / "labels"


def check_folders(camvid):
    """Ends the script if one of CamVid's folders is missing."""
    for folder in (*folders(camvid, "train"), *folders(camvid, "val")):
        if not folder.is_dir():
            sys.exit(
                f"{folder} is no folder; expected the folder of CamVid's {{train,"
                "val}/{images,labels}."
            )


def train(data, run, recipe):
    """Runs `keras-fcn train`, as far as that is not done.

    Args:
        data: The folders of images and of masks.
        run: The folder to write.
        recipe: Options of the command, which are those of a `run` that exists.

    Returns:
        The seconds that it took; None if it was there, or went on.
    """
    how, command = [*LABELS, *recipe], run / "command.sh"
    if command.exists():
        for said in command.read_text(encoding="utf-8").splitlines()[1::2]:
            if f" {shlex.join(how)} --output " not in said:
                sys.exit(
                    f"{run} was trained by `{said}`; expected {shlex.join(recipe)}. "
                    "Give the same options, or another folder."
                )
    if (run / "model.h5").exists():
        return None
    resume = ["--resume"] if snapshots.positions(run / "state") else []
    began = time.perf_counter()
    keras_fcn("train", *data, *how, "--output", run, *resume)
    return None if resume else time.perf_counter() - began


def row(camvid, run, name):
    """Trains and scores one net, as far as that is not done; returns its scores."""
    backbone, stride = name.removesuffix("s").split("-")
    model, scores, clock = run / "model.h5", run / "val.json", run / "seconds.txt"
    net = ["--backbone", backbone, "--stride", stride]
    seconds = train(folders(camvid, "train"), run, [*net, *BUDGET])
    if seconds:
        clock.write_text(f"{seconds:.0f}")
    if not scores.exists():
        data = [*folders(camvid, "val"), "--relabel", "11=255"]
        keras_fcn("evaluate", *data, "--checkpoint", model, "--json", scores)
    found = dict(json.loads(scores.read_text())["scores"])
    found["seconds"] = clock.read_text() if clock.exists() else "resumed"
    return found


def picture(camvid, runs, names, path, nets_only):
    """Draws one image of val, what each net says of it, and the truth."""
    from keras_fcn import colorize, load_checkpoint, segment
    from keras_fcn.images import read_image, read_labels, save_image
    from keras_fcn.labels import LABEL_SETS

    images, labels = folders(camvid, "val")
    photographs = sorted(images.glob(f"{IMAGE}.*"))
    if not photographs:
        raise FileNotFoundError(f"{images} has no {IMAGE}; expected CamVid's val.")
    image = read_image(photographs[0])
    truth = read_labels(labels / f"{IMAGE}.png")
    truth[truth == 11] = 255
    palette = LABEL_SETS["camvid"].palette
    found = [segment(load_checkpoint(runs / n / "model.h5"), image) for n in names]
    panels = [image, *(colorize(x, palette) for x in (*found, truth))]
    if nets_only:
        panels = panels[1:-1]
    gap = np.full((image.shape[0], 6, 3), 255, np.uint8)
    parts = [part for panel in panels for part in (panel, gap)][:-1]
    save_image(path, np.concatenate(parts, axis=1))
    print(f"Wrote {path}: {', '.join(names)}")


def main():
    """Trains, scores and prints what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("camvid", type=pathlib.Path)
    parser.add_argument("runs", type=pathlib.Path)
    add_names(parser, "rows", ROWS)
    parser.add_argument("--picture", help="file to draw instead of a table")
    parser.add_argument("--nets-only", action="store_true")
    options = parser.parse_args()
    check_folders(options.camvid)
    if options.picture:
        with one_sentence():
            places = options.camvid, options.runs
            picture(*places, options.rows, options.picture, options.nets_only)
        return
    rows = {n: row(options.camvid, options.runs / n, n) for n in options.rows}
    print("| net | pixel accuracy | mean accuracy | mean IU | f.w. IU | seconds |")
    print("|---|---|---|---|---|---|")
    for name, found in rows.items():
        numbers = " | ".join(f"{100 * found[score]:.1f}" for score in SCORES)
        print(f"| {name} | {numbers} | {found['seconds']} |")


if __name__ == "__main__":
    main()
