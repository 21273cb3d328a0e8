"""Feeds `keras_fcn.caffe` what it must survive, and measures time and memory.

    python benchmarks/fuzz_caffemodel.py --mutants 1000000  # arrays or ValueError
    python benchmarks/fuzz_caffemodel.py --amplify          # small files, large claims
    python benchmarks/fuzz_caffemodel.py --sizes            # 0.54, 1.1 and 2.1 GB

Each case runs in a forked child under limits of time and address space. Mutants that
break a promise are saved. Exits with 1 if any promise is broken. Needs Linux.
"""

import argparse
import importlib.util
import mmap
import os
import pathlib
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
MB = 2**20
INTERESTING = (0x00, 0x01, 0x7F, 0x80, 0xFF, 0x0B, 0x0C, 0x12, 0x2A, 0x2D, 0x3A, 0xA2)
# A file on disk costs more to write than to read; None is the usual folder.
MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None
WORDS = (0, 2**64 - 1, 2**40, 2**31, 2**31 - 1)


def load_reader():
    """Returns the module `keras_fcn.caffe`, without the rest of the package.

    Keras would be most of the memory that is measured here.
    """
    path = ROOT / "keras_fcn" / "caffe.py"
    spec = importlib.util.spec_from_file_location("caffe_reader", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A writer of .caffemodel files: anything that the wire format can say.


def varint(n):
    """Returns an integer of up to 64 bits, 7 bits a byte from the lowest."""
    n &= 2**64 - 1
    out = bytearray()
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes(out) + bytes([n])


def integer(number, value):
    """Returns a field that holds an integer."""
    return varint(number << 3) + varint(value)


def field(number, payload):
    """Returns a field that holds bytes, a string or a message."""
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def shape(dims):
    """Returns the shape of a blob, as written since March 2015."""
    return field(7, field(1, b"".join(map(varint, dims))))


def legacy(dims):
    """Returns the shape of a blob, as written before: four dims."""
    dims = (1,) * (4 - len(dims)) + tuple(dims)
    return b"".join(integer(i, dim) for i, dim in enumerate(dims, start=1))


def data(array):
    """Returns the numbers of a blob, packed."""
    return field(5, np.asarray(array, "<f4").tobytes())


def unpacked(array):
    """Returns the numbers of a blob, one by one."""
    numbers = np.asarray(array, "<f4").ravel()
    return b"".join(b"\x2d" + number.tobytes() for number in numbers)


def doubles(array):
    """Returns the numbers of a blob in 64 bits, packed."""
    return field(8, np.asarray(array, "<f8").tobytes())


def v1_layer(name, number, *blobs, bottoms=(), tops=()):
    """Returns a layer as written before February 2015."""
    links = [field(2, n.encode()) for n in bottoms]
    links += [field(3, n.encode()) for n in tops]
    body = b"".join(links) + field(4, name.encode()) + integer(5, number)
    return field(2, body + b"".join(field(6, blob) for blob in blobs))


def v2_layer(name, kind, *blobs, bottoms=(), tops=()):
    """Returns a layer as written since."""
    body = field(1, name.encode()) + field(2, kind.encode())
    links = [field(3, n.encode()) for n in bottoms]
    links += [field(4, n.encode()) for n in tops]
    return field(100, b"".join([body, *links, *(field(7, blob) for blob in blobs)]))


def small_arrays():
    """Returns the kernel and the bias that the seeds hold."""
    kernel = np.linspace(-1, 1, 2 * 3 * 2 * 2, dtype=np.float32)
    return kernel.reshape(2, 3, 2, 2), np.array([0.5, -0.25], np.float32)


def seeds():
    """Returns `{name: bytes}`: one small file for each way to write a net."""
    kernel, bias = small_arrays()
    pairs = {
        "v1": [legacy(a.shape) + data(a) for a in (kernel, bias)],
        "v1-diff": [
            legacy(a.shape) + data(a) + field(6, a.tobytes()) for a in (kernel, bias)
        ],
        "v2": [shape(a.shape) + data(a) for a in (kernel, bias)],
        "v2-unpacked": [shape(a.shape) + unpacked(a) for a in (kernel, bias)],
        "v2-double": [shape(a.shape) + doubles(a) for a in (kernel, bias)],
    }
    files = {}
    for name, blobs in pairs.items():
        if name.startswith("v1"):
            layers = v1_layer("data", 5) + v1_layer("conv1", 4, *blobs)
            layers += v1_layer("relu1", 18) + v1_layer("norm1", 15)
            layers += v1_layer("pool1", 17)
        else:
            layers = v2_layer("data", "Input") + v2_layer(
                "conv1", "Convolution", *blobs
            )
            layers += v2_layer("relu1", "ReLU") + v2_layer("pool1", "Pooling")
            layers += v2_layer("norm1", "LRN")
        files[name] = field(1, b"tiny") + layers
    return files


def mutate(random, seed):
    """Returns a file with one to three faults.

    Args:
        random: A `random.Random`.
        seed: The bytes of a sound file.
    """
    out = bytearray(seed)
    for _ in range(random.randint(1, 3)):
        at = random.randrange(len(out) + 1)
        fault = random.randrange(6)
        if fault == 0 and at < len(out):
            out[at] ^= 1 << random.randrange(8)
        elif fault == 1 and at < len(out):
            out[at] = random.choice(INTERESTING)
        elif fault == 2:
            word = random.choice((*WORDS, max(len(out) - 4, 0)))
            out[at : at + 8] = struct.pack("<Q", word)
        elif fault == 3:
            start = random.randrange(len(out) + 1)
            block = out[start : start + random.randint(1, 64)]
            out[at : at + len(block)] = block
        elif fault == 4:
            del out[at : at + random.randint(1, 32)]
        elif fault == 5:
            out[at:at] = random.randbytes(random.randint(1, 16))
    return bytes(out)


def amplifications(size):
    """Yields (pattern, bytes): files of `size` bytes that claim far more."""

    def fill(unit):
        return unit * (size // len(unit))

    name = field(1, b"a") + field(2, b"Convolution")
    yield "empty V2 layers", fill(field(100, b""))
    yield "empty V1 layers", fill(field(2, b""))
    yield "empty blobs", field(100, name + fill(field(7, b"")))
    yield "one long name", field(100, field(1, fill(b"a")))
    yield "many long names", fill(field(100, field(1, b"a" * 4000)))
    yield "one layer, many names", field(100, fill(field(1, b"a")))
    yield "unpacked dims", field(100, name + field(7, field(7, fill(integer(1, 1)))))
    yield "packed dims", field(100, name + field(7, field(7, field(1, fill(b"\x01")))))
    yield "unpacked floats", field(100, name + field(7, fill(b"\x2d" + bytes(4))))
    pair = (b"\x2d" + bytes(4)) * 2 + (b"\x35" + bytes(4)) * 2
    yield "short runs of floats", field(100, name + field(7, fill(pair)))
    yield "unpacked floats anywhere", fill(b"\x2d" + bytes(4))
    yield "unpacked ints", fill(integer(4, 1))
    yield "nested groups", fill(b"\x0b")
    yield "groups in a layer", field(100, fill(b"\x0b"))
    yield "unknown fields", fill(field(100, field(99, b"") * 4000))


def measure(read, path, *, seconds, megabytes):
    """Reads a file in a child under limits.

    Args:
        read: The function to call with the path.
        path: The file.
        seconds: Until the child is killed.
        megabytes: Address space that the child may add.

    Returns:
        (what came, CPU seconds taken, megabytes added to the resident memory).
    """
    receive, send = os.pipe()

    def work():
        signal.alarm(seconds)
        limit_memory(megabytes)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.process_time()  # other work on the machine is no finding
        try:
            outcome = f"read {len(read(path))} layers"
        except Exception as error:  # the caller judges what it is
            outcome = f"{type(error).__name__}: {str(error).removeprefix(str(path))}"
        taken = time.process_time() - start
        added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        os.write(send, f"{taken}\n{added / 1024}\n{outcome[:2000]}".encode())

    status = in_child(work)
    os.close(send)
    with open(receive) as pipe:
        report = pipe.read()
    if status:
        return f"killed by signal {os.WTERMSIG(status)}", float(seconds), float("nan")
    taken, added, outcome = report.split("\n", 2)
    return outcome, float(taken), float(added)


def in_child(work):
    """Runs a function in a forked child, and returns how that ended; 0 is well."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:  # it must not return into the caller's code
            traceback.print_exc()
            os._exit(1)
    return os.waitpid(child, 0)[1]


def limit_memory(megabytes):
    """Lets this process add so many megabytes to its address space."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + megabytes * MB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def fuzz(reader, count, first, folder, findings):
    """Reads mutants in a child, a new one after each crash, and counts what came.

    Args:
        reader: The module to try.
        count: Of mutants; mutant i is the same in every run.
        first: Number of the first mutant.
        folder: For the file that is read.
        findings: The folder where mutants that break a promise are saved.

    Returns:
        (read, refused, broken promises, longest time in seconds).
    """
    files = list(seeds().values())
    # With the child: number of the mutant, read, refused, broken, longest time.
    shared = np.frombuffer(mmap.mmap(-1, 40), np.float64)
    path = folder / "mutant.caffemodel"

    def work():
        limit_memory(512)
        for i in range(int(shared[0]), first + count):
            shared[0] = i
            path.write_bytes(mutate(random.Random(i), files[i % len(files)]))
            judge(reader, path, shared, findings / f"{i}.caffemodel")

    shared[0] = first
    while in_child(work):  # the alarm or a crash ended it: this mutant is a finding
        save(findings / f"{shared[0]:.0f}.caffemodel", path.read_bytes())
        shared[3] += 1
        shared[0] += 1
    return tuple(shared[1:])


def judge(reader, path, shared, finding):
    """Reads one mutant under the alarm and adds what came to the counts."""
    signal.setitimer(signal.ITIMER_REAL, 2)
    start = time.perf_counter()
    try:
        layers = reader.read_caffemodel(path)
        blobs = [blob for layer in layers.values() for blob in layer.blobs]
        sound = all(b.dtype == np.float32 and np.isfinite(b).all() for b in blobs)
        shared[1 if blobs and sound else 3] += 1
        if not (blobs and sound):
            save(finding, path.read_bytes())
    except ValueError as error:
        shared[2] += 1
        if str(path) not in str(error):
            shared[3] += 1
            save(finding, path.read_bytes())
    except BaseException as error:  # whatever it is, it is a finding
        print(f"{finding.name}: {error!r}")
        shared[3] += 1
        save(finding, path.read_bytes())
    signal.setitimer(signal.ITIMER_REAL, 0)
    shared[4] = max(shared[4], time.perf_counter() - start)


def save(path, content):
    """Saves a finding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_vgg(path, streams):
    """Writes a file with the weights of VGG16 as an FCN, once for each stream."""
    widths = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    shapes = [(o, i, 3, 3) for i, o in zip([3, *widths], widths, strict=False)]
    shapes += [(4096, 512, 7, 7), (4096, 4096, 1, 1), (21, 4096, 1, 1)]
    block = np.random.default_rng(0).standard_normal(4 * MB, dtype=np.float32).tobytes()
    with open(path, "wb") as file:
        for stream in range(streams):
            for i, dims in enumerate(shapes):
                size = 4 * int(np.prod(dims))
                head = shape(dims) + varint(5 << 3 | 2) + varint(size)
                blob = varint(7 << 3 | 2) + varint(len(head) + size) + head
                body = field(1, f"conv{i}_{stream}".encode()) + field(2, b"Convolution")
                file.write(varint(100 << 3 | 2) + varint(len(body) + len(blob) + size))
                file.write(body + blob)
                for start in range(0, size, len(block)):
                    file.write(block[: size - start])


def row(name, outcome, taken, added, kept):
    """Prints one row of a table, and returns whether the promise was kept."""
    mark = "ok " if kept else "BAD"
    print(f"{mark} {name:<24} {taken:7.2f} s {added:8.0f} MB  {outcome[:90]}")
    return kept


def run_amplify(reader, size):
    """Promise: refused in less than 1 s, with less than 200 MB."""
    kept = []
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = pathlib.Path(folder) / "amplify.caffemodel"
        for name, content in amplifications(size):
            path.write_bytes(content)
            outcome, taken, added = measure(
                reader.read_caffemodel, path, seconds=10, megabytes=200
            )
            good = outcome.startswith("ValueError") and taken < 1 and added < 200
            kept.append(row(name, outcome, taken, added, good))
    return all(kept)


def run_sizes(reader, folder):
    """Promise: at most 3 x the file in memory and 120 s; above 2 GiB unread."""
    kept = []
    for streams in (1, 2):
        path = folder / "large.caffemodel"
        write_vgg(path, streams)
        size = path.stat().st_size / MB
        outcome, taken, added = measure(
            reader.read_caffemodel, path, seconds=120, megabytes=int(3 * size)
        )
        good = outcome.startswith("read") and taken < 120 and added < 3 * size
        name = f"{size:.0f} MB: {added / size:.2f} x in memory"
        kept.append(row(name, outcome, taken, added, good))
    os.truncate(path, 2_100_000_000 + 50_000_000)  # the rest is a hole
    outcome, taken, added = measure(
        reader.read_caffemodel, path, seconds=5, megabytes=100
    )
    good = outcome.startswith("ValueError") and taken < 0.1
    return all([*kept, row("2.15 GB", outcome, taken, added, good)])


def run_mutants(reader, count, first, findings):
    """Promise: arrays or a ValueError that names the file, in 2 s and 512 MB each."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        folder = pathlib.Path(folder)
        read, refused, bad, worst = fuzz(reader, count, first, folder, findings)
    taken = time.perf_counter() - start
    outcome = f"{read:,.0f} read, {refused:,.0f} refused, {bad:.0f} findings"
    name = f"{count:,} mutants"
    added = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return row(name, f"{outcome}; slowest {worst:.3f} s", taken, added, not bad)


def main():
    """Runs what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mutants", type=int, default=0, metavar="N")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first mutant"
    )
    parser.add_argument("--amplify", action="store_true")
    parser.add_argument(
        "--megabytes", type=int, default=20, help="of --amplify's files"
    )
    parser.add_argument("--sizes", action="store_true", help="needs 1.2 GB of disk")
    parser.add_argument(
        "--findings", type=pathlib.Path, default=pathlib.Path("caffemodel_findings")
    )
    given = parser.parse_args()
    asked = given.mutants, given.amplify, given.sizes
    if min(given.mutants, given.first) < 0 or not any(asked):
        parser.error("expected --mutants from 1, --amplify or --sizes")
    reader, kept = load_reader(), []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        if given.mutants:
            kept.append(run_mutants(reader, given.mutants, given.first, given.findings))
        if given.amplify:
            kept.append(run_amplify(reader, given.megabytes * MB))
        if given.sizes:
            kept.append(run_sizes(reader, folder))
    sys.exit(0 if all(kept) else 1)


if __name__ == "__main__":
    main()
