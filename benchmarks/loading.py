"""Ports, builds and fills the largest nets, and prints time and memory of each.

    python benchmarks/loading.py  # on Keras' backend: KERAS_BACKEND=jax python ...

Every row is a process of its own. Memory is its peak, Python and the backend included,
beside the length of the file read. Files of random weights are written first, to a
temporary folder that needs 4 GB. Linux only.
"""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import keras  # noqa: E402
from caffemodels import caffe_layers, caffemodel  # noqa: E402

from keras_fcn import files, models  # noqa: E402

# As in the manifest, where a hash would refuse random weights: {name: options}.
NETS = {
    "vgg16-8s-voc": ["--stride", "8", "--num-classes", "21"],
    "vgg16-32s-nyud-color-hha": [
        *("--late-fusion", "--stride", "32", "--num-classes", "40")
    ],
}
START = f"""
import time, sys
sys.path.insert(0, {str(ROOT)!r})
import keras_fcn, keras
began = time.perf_counter()
"""
PORT = """
import io, contextlib
from keras_fcn.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main({command}) == 0
"""
LOAD = """
model = keras_fcn.load_checkpoint({output!r})
"""
FROM_CACHE = """
model = keras_fcn.load_checkpoint({name!r})
"""
END = """
seconds = time.perf_counter() - began
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
print(seconds, int(status["VmHWM"].split()[0]) * 1024)
"""


def write(name, path):
    """Writes a .caffemodel of random weights for a checkpoint."""
    model = models.skeleton(models.checkpoint_entry(name))
    path.write_bytes(caffemodel(caffe_layers(model), version=1))


def measure(what, program, file):
    """Runs a program in a process of its own and prints its row."""
    command = [sys.executable, "-c", START + program + END]
    cache = {"KERAS_FCN_CACHE": str(file.parent), "KERAS_FCN_OFFLINE": "1"}
    environment = {**os.environ, **cache}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, peak = map(float, done.stdout.splitlines()[-1].split())
    length = file.stat().st_size
    print(
        f"{what:40} {length / 1e6:8.0f} MB {seconds:7.1f} s {peak / 1e6:8.0f} MB"
        f" {peak / length:6.2f} x",
        flush=True,
    )


def main():
    """Prints the table."""
    print(f"{keras.backend.backend()}, {time.strftime('%Y-%m-%d')}")
    print(f"{'':40} {'file':>11} {'time':>9} {'peak':>11} {'of file':>8}")
    with tempfile.TemporaryDirectory() as folder:
        source, output = (
            pathlib.Path(folder, "n.caffemodel"),
            pathlib.Path(folder, "n.h5"),
        )
        for name, options in NETS.items():
            write(name, source)
            command = ["convert", str(source), "--output", str(output)]
            command += ["--backbone", "vgg16", *options]
            measure(f"port {name}", PORT.format(command=command), source)
            measure(f"build and load {name}", LOAD.format(output=str(output)), output)
            cached = output.rename(output.with_name(f"{name}.h5"))
            record = {**files.measure(cached), "source": None}  # trusted by hand
            cached.with_suffix(".json").write_text(json.dumps(record))
            measure(
                "the same from the cache, hashed", FROM_CACHE.format(name=name), cached
            )


if __name__ == "__main__":
    main()
