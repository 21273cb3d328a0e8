"""Trains on CamVid's train without one sequence, and scores the net on that sequence.

    python benchmarks/sequences.py CAMVID RUNS 0006R0
    python benchmarks/sequences.py CAMVID RUNS 0006R0 -- --precision mixed_bfloat16

CAMVID holds {train,val}/{images,labels}, 480 x 360, void 11. All of val is of the
sequence 0016E5, as most of train is, so val cannot say what a net does in a drive that
it has not seen; this can. A frame's name begins with its sequence. What follows -- is
given to `keras-fcn train`, which goes on where it was stopped.
"""

import argparse
import pathlib
import sys

from strides import check_folders, folders, keras_fcn, train

RECIPE = (
    "--batch-norm --scale 0.6 2 --color 0.4 --tint 0.15 --blur 1.5 --noise 8"
    " --jaccard 1 --learning-rate 1e-3 --epochs 70"
    " --stride 4 --batch-size 4 --crop 320 --adjust 0.5"
).split()
LOOKS = ("", "--mirror", "--mirror --scales 1 1.5")


def split(camvid, run, sequence):
    """Links train's files in two folders of `run`, `rest` and `held`; returns both."""
    check_folders(camvid)  # val is scored at the end
    sources = folders(camvid, "train")
    known = {file.name.split("_")[0] for file in sources[0].iterdir()}
    if sequence not in known or len(known) < 2:
        names = ", ".join(sorted(known))
        sys.exit(f"{sequence!r} is not one of train's several sequences: {names}.")
    parts = {name: run / name for name in ("rest", "held")}
    for source in sources:
        for part in parts.values():
            (part / source.name).mkdir(parents=True, exist_ok=True)
        for file in source.iterdir():
            part = parts["held" if file.name.split("_")[0] == sequence else "rest"]
            link = part / source.name / file.name
            if not link.exists():
                link.unlink(missing_ok=True)  # one that leads to where they were
                link.symlink_to(file.resolve())
    return parts["rest"], parts["held"]


def main():
    """Trains, as far as that is not done, and scores."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("camvid", type=pathlib.Path)
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("sequence")
    parser.add_argument("options", nargs="*", help="of keras-fcn train, after --")
    options = parser.parse_args()
    run = options.runs / options.sequence
    rest, held = split(options.camvid, run, options.sequence)
    recipe = [*RECIPE, *options.options]
    train((rest / "images", rest / "labels"), run / "net", recipe)
    model = run / "net" / "model.h5"
    for data in ((held / "images", held / "labels"), folders(options.camvid, "val")):
        for looks in LOOKS:
            how = "--relabel", "11=255", "--checkpoint", model, *looks.split()
            keras_fcn("evaluate", *data, *how)


if __name__ == "__main__":
    main()
