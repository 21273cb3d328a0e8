"""Trains the checkpoints that ship, from nothing, on the pictures of CamVid's train.

    python tools/train_camvid.py CAMVID RUNS                # many hours on two cores
    python tools/train_camvid.py CAMVID RUNS -- --epochs 1  # to see it run

CAMVID holds train/{images,labels}, 480 x 360, void 11. Every stage is one command of
`keras-fcn train`, which is printed; it starts from the net of a stage before, or the
mean of several, and goes on where it was stopped. Stages that are there already are not
trained again. What follows -- is given to all of them. At the end the nets that ship
are written as float16: RUNS/googlenet-4s-camvid.h5, RUNS/googlenet-8s-camvid.h5.
What each stage brought, and how long it took: docs/camvid.md.
"""

import argparse
import pathlib
import shlex
import subprocess
import sys

import numpy as np

from keras_fcn import files, manifest, models, saving, snapshots

DATA = "--labels camvid --relabel 11=255"
LIGHT = "--color 0.4 --tint 0.15 --blur 1.5 --noise 8"
LONG = f"--batch-norm --scale 0.5 2 {LIGHT} --jaccard 0.5 --learning-rate 5e-4"
LARGE = f"{LONG} --crop 320 --scale 0.6 2"
LARGER = f"{LARGE} --batch-size 4 --jaccard 1"
MIXED = f"{LARGER} --cutmix 0.5 --adjust 0.5"
WHOLE = f"--batch-norm {LIGHT} --crop 0 --batch-size 4 --jaccard 1 --adjust 0.5"
LAST = "--skips conv2 inception_3b inception_4e"  # features of their stride
STAGES = {  # after which one, or the mean of which, and how
    "first": (None, "--epochs 64"),
    "second": ("first", f"{LONG} --epochs 20"),
    "third": ("second", f"{LONG} --epochs 40 --stride 4"),
    "fourth": (
        "third",
        f"{LARGE} --epochs 22 --stride 4 --batch-size 3 --learning-rate 3e-4",
    ),
    "fifth": ("fourth", f"{LARGER} --epochs 88 --stride 4"),
    "sixth": ("fifth", f"{LARGER} --epochs 108 --stride 4"),
    "seventh": ("sixth", f"{LARGER} --scale 0.75 1.6 --epochs 72 --stride 4"),
    "eighth": ("seventh", f"{MIXED} --epochs 50 --stride 4"),
    "ninth": ("eighth", f"{MIXED} {LAST} --epochs 80 --stride 4"),
    "tenth": ("ninth", f"{WHOLE} {LAST} --epochs 20 --learning-rate 3e-4 --stride 4"),
    "tenth-8s": ("ninth+tenth", f"{WHOLE} {LAST} --epochs 10 --learning-rate 3e-4"),
}
SHIPPED = {  # which stage, or the mean of which
    "googlenet-4s-camvid": "ninth+tenth",
    "googlenet-8s-camvid": "tenth-8s",
}
FACTS = ("labels", "license", "trained_on")  # of the manifest, that the files repeat


def keras_fcn(*arguments):
    """Runs the command line in a process of its own; ends this one if it fails."""
    print("$ keras-fcn", *arguments, flush=True)
    command = [sys.executable, "-m", "keras_fcn", *map(str, arguments)]
    if subprocess.run(command).returncode:
        sys.exit(f"keras-fcn {arguments[0]} failed")


def train(camvid, runs, options=()):
    """Trains one stage after the other, as far as that is not done.

    Args:
        camvid: The folder of the data.
        runs: The folder whose folders are named like the stages.
        options: Of `keras-fcn train`, for every stage.
    """
    data = [camvid / "train" / "images", camvid / "train" / "labels", *DATA.split()]
    for stage, (before, recipe) in STAGES.items():
        run, how = runs / stage, [*recipe.split(), *options]
        check_command(run / "command.sh", how)
        if not (run / "model.h5").exists():
            stopped = snapshots.positions(run / "state")
            goes_on = ["--resume"] if stopped else []
            start = ["--init", net_of(runs, before)] if before else []
            keras_fcn("train", *data, *start, *how, "--output", run, *goes_on)


def check_command(path, how):
    """Ends this process if a stage that is there was trained in another way.

    Args:
        path: Of what `keras-fcn train` has written of itself there, if anything.
        how: The options that are expected.
    """
    if path.exists():
        for said in path.read_text(encoding="utf-8").splitlines()[1::2]:
            if f" {shlex.join(how)} --output " not in said:
                sys.exit(
                    f"{path.parent} was trained by `{said}`; expected "
                    f"{shlex.join(how)}. Give the same options, or another folder."
                )


def net_of(runs, stages):
    """Returns the file of a stage's net, or of the mean of several, which it writes.

    Args:
        runs: As in `train`.
        stages: A name of `STAGES`, or several joined by "+", of whose weights the net
            has the mean.
    """
    path = runs / stages / "model.h5"
    if "+" in stages:  # anew each time: one of them may have been trained again
        nets = [models.load_checkpoint(net_of(runs, x)) for x in stages.split("+")]
        model, alike = nets[0], zip(*(net.get_weights() for net in nets), strict=True)
        model.set_weights([np.mean(arrays, axis=0) for arrays in alike])
        path.parent.mkdir(exist_ok=True)
        saving.save_checkpoint(model, path)
    return path


def ship(runs):
    """Writes what ships, as float16, and prints what the manifest says of a file.

    Args:
        runs: As in `train`.
    """
    for name, stages in SHIPPED.items():
        model = models.load_checkpoint(net_of(runs, stages))
        entry = manifest.checkpoint_info(name)
        facts = {fact: entry[fact] for fact in FACTS}
        path = runs / f"{name}.h5"
        saving.save_checkpoint(model, path, facts=facts, dtype="float16")
        print(path, files.measure(path))


def main(arguments=None):
    """Trains and writes; `arguments` are those of the process if None."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("camvid", type=pathlib.Path)
    parser.add_argument("runs", type=pathlib.Path)
    parser.add_argument("options", nargs="*", help="of keras-fcn train, after --")
    options = parser.parse_args(arguments)
    train(options.camvid, options.runs, options.options)
    ship(options.runs)


if __name__ == "__main__":
    main()
