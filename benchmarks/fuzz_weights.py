"""Feeds `keras_fcn.weights` what it must survive: weights, or one error.

    python benchmarks/fuzz_weights.py --mutants 100000  # damaged files of five kinds
    python benchmarks/fuzz_weights.py --truncate        # each of them, cut short

A damaged file is loaded, every variable then holding sane numbers, or refused with a
`ValueError` that names it, no variable changed; in 10 s, without running code or using
the network, and without a signal. Files are read in forked children under limits of
time and address space; those that break a promise are saved. Exits with 1 if any did.
Needs Linux.
"""

import argparse
import mmap
import os
import pathlib
import random
import resource
import signal
import sys
import tempfile
import time

os.environ["KERAS_BACKEND"] = "numpy"  # has no threads: it can be forked
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import h5py  # noqa: E402
import keras  # noqa: E402
import numpy as np  # noqa: E402
from fuzz_caffemodel import MEMORY, limit_memory, mutate, row, save  # noqa: E402

from keras_fcn import weights  # noqa: E402

SECONDS = 10
MEGABYTES = 2048
A_CHILD = 5000  # files that one child reads
FORBIDDEN = ("marshal.loads", "pickle.find_class", "exec", "compile", "import")
FORBIDDEN += ("socket.", "subprocess.", "os.system", "os.posix_spawn")
KINDS = ("loaded", "refused", "broken")


def net():
    """Returns a net of three layers, small enough that no byte is rarely hit."""
    relu = {"activation": "relu", "kernel_initializer": "ones"}
    return keras.Sequential(
        [
            keras.Input((8, 8, 3)),
            keras.layers.Conv2D(4, 3, name="conv1", **relu),
            keras.layers.Conv2D(5, 3, name="conv2", **relu),
            keras.layers.Conv2D(2, 1, name="score", **relu),
        ]
    )


def seeds(folder):
    """Returns `{name: bytes}`: one small file for each way to write a net."""
    model, path = net(), folder / "net.h5"
    rng = np.random.default_rng(0)
    for variable in model.weights:
        variable.assign(rng.standard_normal(variable.shape))
    files = {}
    for dtype in ("float32", "float16"):
        weights.save(model, path, metadata={"model": {"stride": 8}}, dtype=dtype)
        files[dtype] = path.read_bytes()
    weights.save(model, path)
    gzip = {"compression": "gzip", "shuffle": True}
    for name, options, version in (("gzip", gzip, "earliest"), ("new", {}, "latest")):
        with h5py.File(path) as file:
            copy(file, folder / name, options, version)
        files[name] = (folder / name).read_bytes()
    model.save_weights(folder / "keras.weights.h5")
    files["Keras' own"] = (folder / "keras.weights.h5").read_bytes()
    return files


def copy(file, path, options, version):
    """Copies a file, its arrays stored with other options."""
    with h5py.File(path, "w", libver=version) as new:
        new.attrs.update(file.attrs)
        for layer, group in file.items():
            for name, item in group.items():
                new.create_dataset(f"{layer}/{name}", data=item[()], **options)
            new[layer].attrs.update(group.attrs)


def mutants(files, count, first):
    """Returns (number of the first, of the last and one, number -> (kind, bytes))."""
    names = list(files)

    def make(i):
        name = names[i % len(names)]
        return name, mutate(random.Random(i), files[name])

    return first, first + count, make


def truncations(files):
    """As `mutants`: the first 4,096 lengths of each file, and each hundredth of it."""
    cuts = [
        (name, length)
        for name, content in files.items()
        for length in sorted(
            {*range(4096), *(len(content) * i // 100 for i in range(100))}
        )
        if length < len(content)
    ]
    return 0, len(cuts), lambda i: (cuts[i][0], files[cuts[i][0]][: cuts[i][1]])


def judge(path, model):
    """Reads one file and says what came, and of what kind that is.

    Args:
        path: Of the file.
        model: The `net` to fill; in the end its weights are what they were.
    """
    before = [v.numpy().copy() for v in model.weights]
    EVENTS.clear()
    kind, what = "loaded", ""
    try:
        weights.load(model, path)
    except ValueError as error:
        kind, what = "refused", str(error)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is a finding
        return "broken", repr(error)
    after = [v.numpy() for v in model.weights]
    for variable, array in zip(model.weights, before, strict=True):
        variable.assign(array)
    if EVENTS:
        return "broken", f"did {EVENTS[0]}"
    if kind == "refused" and str(path) not in what:
        return "broken", f"did not name the file: {what}"
    if kind == "refused" and any(map(np.any, map(np.not_equal, before, after))):
        return "broken", f"changed weights, and then refused: {what}"
    if kind == "loaded" and not all(np.all(np.abs(a) < 1e6) for a in after):
        return "broken", "loaded insane numbers"
    return kind, what


EVENTS = []


def watch():
    """Notes from now on what a reader of files has no business to do."""

    def note(event, _):
        if event.startswith(FORBIDDEN):
            EVENTS.append(event)

    sys.addaudithook(note)


def fuzz(cases, folder, findings):
    """Reads all cases, thousands a child, and counts what came.

    Args:
        cases: (first, last and one, number -> (seed, bytes)).
        folder: For the file that is read.
        findings: The folder where files that break a promise are saved.

    Returns:
        (loaded, refused, broken promises, longest time in seconds).
    """
    at, stop, make = cases
    # at, then the counts of KINDS, then the longest time
    shared = np.frombuffer(mmap.mmap(-1, 40), np.float64)
    shared[0] = at
    path = folder / "mutant.h5"
    while shared[0] < stop:
        child = os.fork()
        if child == 0:
            read(path, make, stop, shared, findings)
        _, status = os.waitpid(child, 0)
        if status:  # by the alarm, or a crash: the file is the finding
            i = int(shared[0])
            print(f"{i}: {make(i)[0]}: status {status}")
            save(findings / f"{i}.h5", make(i)[1])
            shared[1 + KINDS.index("broken")] += 1
            shared[0] += 1
    return tuple(shared[1:])


def read(path, make, stop, shared, findings):
    """Reads some thousand cases, and ends the process."""
    model = net()
    weights.save(model, path)
    weights.load(model, path)  # what is imported at the first use is imported
    watch()
    limit_memory(MEGABYTES)
    for i in range(int(shared[0]), min(stop, int(shared[0]) + A_CHILD)):
        shared[0] = i
        name, content = make(i)
        path.write_bytes(content)
        signal.alarm(SECONDS)
        start = time.perf_counter()
        kind, what = judge(path, model)
        signal.alarm(0)
        shared[-1] = max(shared[-1], time.perf_counter() - start)
        shared[1 + KINDS.index(kind)] += 1
        if kind == "broken":
            print(f"{i}: {name}: {what}", flush=True)
            save(findings / f"{i}.h5", content)
        shared[0] = i + 1
    os._exit(0)


def report(name, cases, findings):
    """Promise: loaded or refused, in 10 s and 2 GB each. Returns whether it is kept."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        loaded, refused, broken, worst = fuzz(cases, pathlib.Path(folder), findings)
    taken = time.perf_counter() - start
    outcome = f"{loaded:,.0f} loaded, {refused:,.0f} refused, {broken:.0f} broken"
    added = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return row(name, f"{outcome}; slowest {worst:.3f} s", taken, added, not broken)


def main():
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=0, metavar="N")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first mutant"
    )
    parser.add_argument("--truncate", action="store_true")
    parser.add_argument(
        "--findings", type=pathlib.Path, default=pathlib.Path("weights_findings")
    )
    given = parser.parse_args()
    asked = given.mutants, given.truncate
    if min(given.mutants, given.first) < 0 or not any(asked):
        parser.error("expected --mutants from 1 or --truncate")
    with tempfile.TemporaryDirectory() as folder:
        files = seeds(pathlib.Path(folder))
    kept = []
    if given.mutants:
        cases = mutants(files, given.mutants, given.first)
        kept.append(report(f"{given.mutants:,} mutants", cases, given.findings))
    if given.truncate:
        cases = truncations(files)
        kept.append(report(f"{cases[1]:,} truncations", cases, given.findings))
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
