"""Feeds `keras_fcn.datasets` archives and .mat files of strangers, and prints a table.

    python benchmarks/fuzz_datasets.py

Archives are extracted wholly or refused with a `ValueError` that names them, nothing
else being touched; .mat files give a label map or such an error. Mutants that break a
promise are saved. Exits with 1 if any did. Needs Linux and SciPy.
"""

import argparse
import contextlib
import gzip
import importlib.util
import io
import pathlib
import random
import resource
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from typing import NamedTuple

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from fuzz_caffemodel import MEMORY, in_child, limit_memory, mutate, save  # noqa: E402

FORMATS = ("tar", "tgz", "zip")
LIMITS = {"prefixes": "wanted/", "most_files": 1000, "most_bytes": 1_000_000}
SECONDS, MEGABYTES = 10, 200  # that a bomb may take
BOMB = 100_000_000  # bytes that it unpacks to
A_MILLION = 1_000_000


def load(name):
    """Returns a module of `keras_fcn.datasets`, without the rest of the package."""
    path = ROOT / "keras_fcn" / "datasets" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# A writer of archives: anything that the formats can say.


class Member(NamedTuple):
    """A member of an archive.

    Args:
        name: Whatever it may be.
        data: Bytes of a file.
        mode: File type and permissions, as the system call `stat` has them.
        target: What a link leads to.
        hard: Whether it is a hard link, in a tar.
    """

    name: str
    data: bytes = b""
    mode: int = stat.S_IFREG | 0o644
    target: str = ""
    hard: bool = False


TAR_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
}


def write(path, members):
    """Writes members into an archive, in the format of the path's suffix."""
    write_zip(path, members) if path.suffix == ".zip" else write_tar(path, members)


def write_tar(path, members):
    """Writes a .tar or .tgz."""
    mode = "w:gz" if path.suffix == ".tgz" else "w"
    with tarfile.open(path, mode, format=tarfile.PAX_FORMAT) as archive:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type = TAR_TYPES[stat.S_IFMT(member.mode)]
            if member.hard:
                info.type = tarfile.LNKTYPE
            info.mode, info.linkname = stat.S_IMODE(member.mode), member.target
            info.size = len(member.data)
            if "\0" in member.name:  # the plain field would end there
                info.pax_headers = {"path": member.name}
            archive.addfile(info, io.BytesIO(member.data))


def write_zip(path, members):
    """Writes a .zip."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            info = zipfile.ZipInfo(member.name)
            info.filename = member.name  # as it is: the constructor cuts it at a NUL
            info.external_attr = member.mode << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            data = member.target.encode() or member.data
            archive.writestr(info, data)


def sound(count=3, size=1000):
    """Returns members that nobody can object to."""
    rng = random.Random(0)
    return [Member(f"wanted/{i}.bin", rng.randbytes(size)) for i in range(count)]


def hostile(outside):
    """Returns `{fault: members}`.

    Args:
        outside: Absolute path of a folder with the file `victim`, where no archive may
            write.
    """
    link = stat.S_IFLNK | 0o777
    return {
        "..": [Member("wanted/../../evil", b"evil")],
        "absolute": [Member(f"{outside}/evil", b"evil")],
        "backslash": [Member("wanted\\..\\..\\evil", b"evil")],
        "drive": [Member("C:/evil", b"evil")],
        "link out": [Member("other/link", mode=link, target=f"{outside}/victim")],
        "write through link": [
            Member("wanted/link", mode=link, target=f"{outside}"),
            Member("wanted/link/evil", b"evil"),
        ],
        "hard link": [
            Member("wanted/link", mode=link, target=f"{outside}/victim", hard=True)
        ],
        "device": [Member("other/null", mode=stat.S_IFCHR | 0o666)],
        "FIFO": [Member("other/fifo", mode=stat.S_IFIFO | 0o666)],
        "duplicate": [Member("wanted/0.bin", b"evil")],
        "case twin": [Member("Wanted/0.BIN", b"evil")],
        "long path": [Member("wanted/" + 2000 * "long/" + "evil", b"evil")],
        "NUL": [Member("wanted/evil\0.bin", b"evil")],
        "odd Unicode": [Member("wanted/\uff0e\uff0e/\uff0e\uff0e\uff0fevil", b"evil")],
        "setuid": [Member("wanted/setuid", b"good", mode=stat.S_IFREG | 0o6755)],
    }


def snapshot(folder):
    """Returns what a folder holds: `{path: (mode, time, content or None)}`."""
    return {
        path: (
            path.lstat().st_mode,
            path.lstat().st_mtime_ns,
            path.read_bytes() if path.is_file() else None,
        )
        for path in folder.rglob("*")
    }


def outcome(extract, path, folder, **limits):
    """Extracts an archive, and says what came of it.

    Returns:
        `"extracted"`, `"refused"`, or what breaks the promise.
    """
    before = snapshot(folder.parent)
    try:
        extract(path, folder, **(limits or LIMITS))
    except ValueError as error:
        if not str(error).startswith(str(path)):
            return f"the error does not name the archive: {error}"
        if snapshot(folder.parent) != before:
            return f"left or changed files: {error}"
        return "refused"
    except Exception as error:
        return repr(error)
    after = snapshot(folder.parent)
    shutil.rmtree(folder)
    new = {path for path in after if path not in before}
    if any(path != folder and folder not in path.parents for path in new):
        return "left files elsewhere"
    if any(after[path] != before[path] for path in before):
        return "changed files elsewhere"
    return "extracted"


# Bombs


def zeros(size):
    """Yields so many bytes in blocks."""
    block = bytes(2**20)
    for start in range(0, size, len(block)):
        yield block[: size - start]


def tar_header(name, size=0, kind=tarfile.REGTYPE):
    """Returns the block of a tar that announces a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def local_header(name):
    """Returns what a zip has before an empty member."""
    name = name.encode()
    return struct.pack("<4s5H3I2H", b"PK\3\4", 20, *[0] * 7, len(name), 0) + name


def directory_entry(name, offset, crc=0, packed=0, size=0, method=0):
    """Returns what a zip's directory says of a member."""
    name = name.encode()
    sizes = crc, packed, size, len(name)
    head = struct.pack(
        "<4s6H3I5H2I", b"PK\1\2", 20, 20, 0, method, 0, 0, *sizes, *[0] * 5, offset
    )
    return head + name


def directory_end(count, size, offset):
    """Returns the end of a zip."""
    count = min(count, 2**16 - 1)
    return struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, count, count, size, offset, 0)


def write_gzip(path, blocks):
    """Writes blocks into a .tgz."""
    with gzip.open(path, "wb", compresslevel=1) as file:
        for block in blocks:
            file.write(block)


def deflated(path):
    """One member of zeros, a thousandth of its size."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("wanted/bomb", "w") as file:
            for block in zeros(BOMB):
                file.write(block)


def lying(path):
    """As `deflated`, but 1,000 bytes are declared."""
    deflated(path)
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", BOMB), struct.pack("<I", 1000)))


def gzipped(path):
    """One member of zeros, a thousandth of its size."""
    write_gzip(path, [tar_header("wanted/bomb", BOMB), *zeros(BOMB), bytes(1536)])


def unwanted(path):
    """As `gzipped`, but nobody asked for that member."""
    write_gzip(path, [tar_header("other/bomb", BOMB), *zeros(BOMB), bytes(1536)])


def padded(path):
    """An endless end."""
    write_gzip(path, [tar_header("wanted/a"), *zeros(BOMB)])


def described(path):
    """One member whose PAX header is a bomb."""
    head = tar_header("wanted/bomb", BOMB, tarfile.XHDTYPE)
    write_gzip(path, [head, *zeros(BOMB), tar_header("wanted/a"), bytes(1024)])


def headers_on_headers(path):
    """One member with more PAX headers than a stack has room for."""
    head = tar_header("wanted/bomb", 512, tarfile.XHDTYPE) + bytes(512)
    write_gzip(path, [head] * 20_000 + [tar_header("wanted/a"), bytes(1024)])


def nested(path):
    """Sound members, which are bombs themselves."""
    deflated(path)
    write(path, [Member(f"wanted/{i}.zip", path.read_bytes()) for i in range(5)])


def overlapping(path):
    """Many members that share their bytes."""
    packer = zlib.compressobj(wbits=-15)
    data = b"".join([*map(packer.compress, zeros(900_000)), packer.flush()])
    crc = zlib.crc32(bytes(900_000))
    entry = directory_entry("wanted/a", 0, crc, len(data), 900_000, 8)
    start = bytearray(local_header("wanted/a"))
    start[8] = 8  # deflated
    body = bytes(start) + data
    path.write_bytes(
        body + entry * 900 + directory_end(900, 900 * len(entry), len(body))
    )


def million_in_tar(path):
    """Empty members, each a block of the tar."""
    first = tar_header("wanted/0000000")
    before = sum(b"0000000")

    def header(i):
        name = b"%07d" % i
        total = int(first[148:154], 8) + sum(name) - before
        return first[:7] + name + first[14:148] + b"%06o" % total + first[154:]

    write_gzip(path, [*map(header, range(A_MILLION)), bytes(1024)])


def million_in_zip(path):
    """Empty members, each an entry of the directory."""
    names = [f"wanted/{i:07}" for i in range(A_MILLION)]
    length = len(local_header(names[0]))
    body = b"".join(map(local_header, names))
    entries = [directory_entry(name, i * length) for i, name in enumerate(names)]
    directory = b"".join(entries)
    end = directory_end(A_MILLION, len(directory), len(body))
    path.write_bytes(body + directory + end)


def declared_in_tar(path):
    """50 GB are announced, none is there."""
    path.write_bytes(tar_header("wanted/bomb", 50_000_000_000) + bytes(1024))


def declared_in_zip(path):
    """4 GB are announced 13 times, none is there."""
    names = [f"wanted/{i:02}" for i in range(13)]
    length = len(local_header(names[0]))
    entries = [
        directory_entry(name, i * length, size=2**32 - 2)
        for i, name in enumerate(names)
    ]
    directory = b"".join(entries)
    body = b"".join(map(local_header, names))
    path.write_bytes(body + directory + directory_end(13, len(directory), len(body)))


BOMBS = {
    "zip": [deflated, lying, nested, overlapping, million_in_zip, declared_in_zip],
    "tgz": [gzipped, unwanted, padded, described, headers_on_headers, million_in_tar],
    "tar": [declared_in_tar],
}


@contextlib.contextmanager
def weighing(archives):
    """Weighs what extractions have written, before they remove it.

    Args:
        archives: The module.

    Yields:
        List of (files, bytes), to which each extraction adds.
    """
    remove, weights = archives.shutil.rmtree, []

    def weigh(folder, **options):
        files = [path for path in folder.rglob("*") if path.is_file()]
        weights.append((len(files), sum(path.stat().st_size for path in files)))
        remove(folder, **options)

    archives.shutil.rmtree = weigh
    try:
        yield weights
    finally:
        archives.shutil.rmtree = remove


# .mat files


def label_maps():
    """Returns `{file: (variables, name to read, labels)}`, in the data sets' forms."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 21, (6, 7), np.uint8)
    sbd = {"GTcls": {"Segmentation": labels, "CategoriesPresent": labels[:1]}}
    geometric, context = labels - 1.0, 20 * np.uint16(labels)
    return {
        "sbd": (sbd, "GTcls.Segmentation", labels),
        "nyud": ({"segmentation": labels}, "segmentation", labels),
        "sift-flow": ({"S": geometric, "names": ["sky"]}, "S", geometric),
        "context": ({"LabelMap": context}, "LabelMap", context),
    }


def mat_files():
    """Returns list of (bytes, name to read): each form, plain and compressed."""
    from scipy.io import savemat

    files = []
    for variables, name, _ in label_maps().values():
        for compressed in (False, True):
            content = io.BytesIO()
            savemat(content, variables, do_compression=compressed)
            files.append((content.getvalue(), name))
    return files


def read_mutants(reader, numbers, folder):
    """Reads mutants of .mat files; mutant i is the same in every run.

    Args:
        reader: A `Reader`.
        numbers: Of the mutants.
        folder: For the file that is read.

    Yields:
        (path, what came, seconds): `"read"`, `"refused"`, `"died"` if the process that
        read it did, or what breaks the promise.
    """
    files, path = mat_files(), folder / "mutant.mat"
    for i in numbers:
        content, name = files[i % len(files)]
        path.write_bytes(mutate(random.Random(i), content))
        start = time.perf_counter()
        try:
            labels = reader.read(path, name)
            fit = labels.ndim == 2 and labels.dtype == np.int32
            what = "read" if fit else f"{labels.dtype} of shape {labels.shape}"
        except ValueError as error:
            what = "died" if "ends its reader" in str(error) else "refused"
            if not str(error).startswith(str(path)):
                what = f"the error does not name the file: {error}"
        except Exception as error:
            what = repr(error)
        yield path, what, time.perf_counter() - start


# The promises


def run_hostile(archives, folder, findings):
    """29: nothing escapes. Refused whole, but for setuid, which is not taken over."""
    (folder / "outside").mkdir()
    (folder / "outside" / "victim").write_bytes(b"victim")
    for fault, members in hostile(folder / "outside").items():
        for kind in FORMATS:
            path = folder / f"{fault}.{kind}"
            write(path, sound()[:2] + members + sound()[2:])
            wanted = "extracted" if fault == "setuid" else "refused"
            what = outcome(archives.extract, path, folder / "target")
            yield f"{fault} in a {kind}", what, what == wanted
            path.unlink()


def run_bombs(archives, folder, findings):
    """30: bombs stop within the limits, in 10 s and 200 MB."""
    (folder / "room").mkdir()
    for kind, bombs in BOMBS.items():
        for bomb in bombs:
            path = folder / f"{bomb.__name__}.{kind}"
            bomb(path)

            def work(path=path):
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
                limit_memory(MEGABYTES)
                with weighing(archives) as weights:
                    what = outcome(archives.extract, path, folder / "room" / "target")
                files, size = map(max, zip(*weights, strict=True))
                over = files > LIMITS["most_files"] or size > LIMITS["most_bytes"]
                wanted = "extracted" if bomb is nested else "refused"  # noqa: B023
                if over or what != wanted:
                    raise AssertionError(f"{what}; {files:,} files, {size:,} bytes")

            kept = in_child(work) == 0
            yield bomb.__name__, "", kept
            path.unlink()


def run_truncated(archives, folder, findings):
    """31: an archive that is cut short is refused, nothing else touched."""
    for kind in FORMATS:
        path = folder / f"cut.{kind}"
        write(path, sound(count=100, size=9000))  # so 1 % is more than padding
        content = path.read_bytes()
        (folder / "target.bin").write_bytes(b"a neighbour")
        for i in range(100):
            path.write_bytes(content[: len(content) * i // 100])
            what = outcome(archives.extract, path, folder / "target")
            yield f"{i} % of a {kind}", what, what == "refused"
        path.unlink()


def run_archive_mutants(archives, folder, findings, count=6000):
    """Archives with random faults are extracted or refused."""
    contents = {}
    for kind in FORMATS:
        write(folder / f"sound.{kind}", [Member("a/", mode=stat.S_IFDIR), *sound(5, 9)])
        contents[kind] = (folder / f"sound.{kind}").read_bytes()
    for i in range(count):
        kind = FORMATS[i % len(FORMATS)]
        path = folder / f"mutant.{kind}"
        path.write_bytes(mutate(random.Random(i), contents[kind]))
        what = outcome(archives.extract, path, folder / "target")
        kept = what in ("extracted", "refused")
        if not kept:
            save(findings / f"{i}.{kind}", path.read_bytes())
        yield f"mutant {i}", what, kept


def run_mat_mutants(matlab, folder, findings, count=20_000):
    """32: a .mat file cannot kill us: a label map or a ValueError, in 10 s."""
    with matlab.Reader() as reader:
        mutants = read_mutants(reader, range(count), folder)
        for i, (path, what, seconds) in enumerate(mutants):
            kept = what in ("read", "refused", "died") and seconds <= matlab.SECONDS + 1
            if not kept:
                save(findings / f"{i}.mat", path.read_bytes())
            yield f"mutant {i}", what, kept


def main():
    """Runs all promises and prints what came."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--findings", type=pathlib.Path, default=pathlib.Path("datasets_findings")
    )
    findings = parser.parse_args().findings
    archives, matlab = load("archives"), load("matlab")
    runs = {
        run_hostile: archives,
        run_bombs: archives,
        run_truncated: archives,
        run_archive_mutants: archives,
        run_mat_mutants: matlab,
    }
    all_kept = True
    for run, module in runs.items():
        start, came, broken = time.perf_counter(), {}, 0
        with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
            for case, what, kept in run(module, pathlib.Path(folder), findings):
                came[what] = came.get(what, 0) + 1
                broken += not kept
                if not kept:
                    print(f"BROKEN: {case}: {what}")
        cases, seconds = sum(came.values()), time.perf_counter() - start
        counts = ", ".join(f"{count:,} {what}" for what, count in came.items() if what)
        print(f"{run.__doc__}\n    {cases:,} cases, {broken} failures, {seconds:.0f} s")
        print(f"    {counts}" if counts else "", flush=True)
        all_kept = all_kept and not broken
    sys.exit(0 if all_kept else 1)


if __name__ == "__main__":
    main()
