"""Extracts archives of strangers: wholly or not at all, and nowhere else.

Python's own readers give the members; what a member may be is decided here, because
their filters know no limits, leave parts behind, and skip where this refuses.
"""

import contextlib
import errno
import glob
import gzip
import itertools
import math
import os
import secrets
import shutil
import stat
import tarfile
import unicodedata
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:  # Windows: what a killed extraction leaves stays
    fcntl = None

BLOCK = 2**16  # bytes read at once, and most that may describe a member of a tar
PADDING = 2**20  # most bytes of zeros that fill up a tar
DIRECTORY_ENTRY = 512  # bytes that describe a member of a zip, on average, at most
LOCAL_HEADER = 30  # bytes before a member of a zip, without its name
LONGEST_NAME, LONGEST_PART = 1024, 255  # bytes in UTF-8, of a path and between slashes

_DAMAGE = (
    tarfile.TarError,
    zipfile.BadZipFile,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    ValueError,  # a number that is none, a name that is no UTF-8
    RuntimeError,  # encrypted, of a later version, headers nested too deep
)
_TAR_KINDS = {
    tarfile.REGTYPE: "file",
    tarfile.AREGTYPE: "file",
    tarfile.DIRTYPE: "folder",
    tarfile.SYMTYPE: "link",
    tarfile.LNKTYPE: "hard link",
    tarfile.FIFOTYPE: "FIFO",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
}
_ZIP_KINDS = {
    0: "file",  # written where there are no such modes
    stat.S_IFREG: "file",
    stat.S_IFDIR: "folder",
    stat.S_IFLNK: "link",
    stat.S_IFIFO: "FIFO",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
}


def extract(archive, folder, *, prefixes, most_files, most_bytes, progress=None):
    """Extracts files from a .tar, .tar.gz or .zip into a new folder.

    The folder appears when all is there, after one pass over the archive. A single
    member that is not sound, wanted or not, and nothing is extracted. Sound are files
    and folders with relative names that fit into one folder of any file system: no
    `..`, backslash, colon or character that cannot be printed, also once compatible
    characters are replaced (Unicode's NFKC); no part that ends with a dot or a space
    or is longer than 255 bytes; no name twice, be it in other letters, capitals or
    small. Names keep their spelling otherwise. Permissions, owners, times and setuid
    bits are not taken over. `./` at the front of a name does not count.

    What a killed extraction has left beside the folder is removed by the next one.

    Args:
        archive: Path of the file. Its first bytes tell the format, not its name.
        folder: Path of the folder; it must not exist, its parent must.
        prefixes: What the names of the wanted files begin with, one string or several,
            such as `"VOCdevkit/VOC2012/JPEGImages/"`; `""` is everything.
        most_files: Members that the archive may have: files and folders, wanted or not.
        most_bytes: Bytes that these may have together, unpacked.
        progress: Called with the bytes of the archive done and its length.

    Returns:
        The number of files extracted.

    Raises:
        ValueError: If the archive is damaged or cut short, goes beyond a limit, holds a
            member that is not sound, or none that is wanted. Names archive and member.
        OSError: If it cannot be read, or the folder exists or cannot be written.
    """
    archive, folder = Path(archive), Path(folder)
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} is there; expected none. Move it away first.")
    if not folder.parent.is_dir():
        raise FileNotFoundError(f"{folder.parent} is no folder; make it first.")
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} is no file; expected a .tar, .tgz or .zip.")
    prefixes = (prefixes,) if isinstance(prefixes, str) else tuple(prefixes)
    with (
        open(archive, "rb") as file,
        _appearing(folder) as part,
        _naming(archive),
    ):
        wanted, length = 0, os.fstat(file.fileno()).st_size
        members = _limited(_members(file, most_files), most_files, most_bytes)
        names = _Names()
        for member in members:
            name = names.add(member)
            if member.kind == "file" and name.startswith(prefixes):
                _write(member, part / name)
                wanted += 1
            if progress:
                progress(min(file.tell(), length), length)
        if not wanted:
            raise _RefusedError(
                f"holds no file whose name begins with {' or '.join(prefixes)}; "
                "expected some. Give the archive that was asked for."
            )
        if progress:
            progress(length, length)
    return wanted


class _RefusedError(Exception):
    """An archive holds what it should not: the rest of a sentence about it."""


class _Member(NamedTuple):
    name: str
    kind: str
    size: int  # bytes
    open: Callable


@contextlib.contextmanager
def _naming(archive):
    try:
        yield
    except _RefusedError as error:
        raise ValueError(f"{archive} {error}") from None
    except _DAMAGE as error:
        raise ValueError(
            f"{archive} is damaged, cut short or no archive: "
            f"{error or type(error).__name__}. Expected a .tar, .tar.gz or .zip; fetch "
            "it again."
        ) from error


@contextlib.contextmanager
def _appearing(folder):
    """Makes a folder that has its name once the block has ended without error."""
    _sweep(folder)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    try:
        with _held(part):
            yield part
            os.rename(part, folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder.parent).free
        reason = f"it needs more than the {free:,} bytes that are free"
        raise OSError(error.errno, reason, str(folder)) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextlib.contextmanager
def _held(part):
    """Locks a folder for as long as this process lives; yields whether that worked."""
    if not fcntl:
        yield False
        return
    descriptor = os.open(part, os.O_RDONLY)
    try:
        yield _locks(descriptor)
    finally:
        os.close(descriptor)


def _locks(descriptor):
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # somebody has it, or the file system knows no locks
        return False
    return True


def _sweep(folder):
    """Removes what extractions that were killed have left of this folder."""
    for part in folder.parent.glob(f".{glob.escape(folder.name)}.*.part/"):
        with contextlib.suppress(FileNotFoundError), _held(part) as abandoned:
            if abandoned:
                shutil.rmtree(part, ignore_errors=True)


def _write(member, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    # "x" should the file system take two names for one that `_Names` does not.
    with member.open() as source, open(path, "xb") as file:
        shutil.copyfileobj(source, file, BLOCK)
        if file.tell() != member.size:
            raise _RefusedError(
                f"holds {file.tell():,} bytes of {_shown(member.name)}; expected "
                f"{member.size:,}. Fetch it again."
            )


# Members


def _members(file, most_files):
    """Yields the members in the order of the file; all is read when it ends."""
    magic = file.read(2)
    file.seek(0)
    if magic == b"PK":
        return _zip_members(file, most_files)
    return _tar_members(gzip.GzipFile(fileobj=file) if magic == b"\x1f\x8b" else file)


def _limited(members, most_files, most_bytes):
    """Yields members up to the first one that is beyond a limit."""
    total = 0
    for count, member in enumerate(members, start=1):
        total += member.size
        if count > most_files or member.size < 0 or total > most_bytes:
            raise _RefusedError(
                f"holds {count:,} members of {total:,} bytes, as far as "
                f"{_shown(member.name)}; expected {most_files:,} of {most_bytes:,} "
                "bytes at most. Give the archive that was asked for."
            )
        yield member


def _tar_members(file):
    stream = _Metered(file, longest=BLOCK, left=BLOCK)
    with tarfile.TarFile(fileobj=stream) as archive:
        for info in archive:
            kind = _TAR_KINDS.get(info.type, f"member of type {info.type!r}")
            if info.issparse():
                kind = "sparse file"
            stream.left = max(info.size, 0) + BLOCK
            yield _Member(
                info.name, kind, info.size, lambda info=info: archive.extractfile(info)
            )
    # A member whose header is damaged or missing ends the iteration like the mark.
    if stream.last != bytes(tarfile.BLOCKSIZE):
        raise _RefusedError("ends without a tar's end mark. Fetch it again.")
    stream.left = PADDING
    while rest := stream.read(BLOCK):
        if rest.strip(b"\0"):
            raise _RefusedError("goes on behind its end mark. Fetch it again.")


def _zip_members(file, most_files):
    # The directory is read at once; so is what may be the archive's comment.
    longest = max(2 * BLOCK, most_files * DIRECTORY_ENTRY)
    with zipfile.ZipFile(_Metered(file, longest=longest, left=math.inf)) as archive:
        infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
        if infos and infos[0].header_offset:
            raise _RefusedError("begins with what is no member. Fetch it again.")
        starts = [info.header_offset for info in infos] + [archive.start_dir]
        for info, following in zip(infos, starts[1:], strict=True):
            if info.header_offset + LOCAL_HEADER + info.compress_size > following:
                raise _RefusedError(
                    f"has members that overlap, such as {_shown(info.orig_filename)}; "
                    "expected one behind the other. Do not trust this archive."
                )
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _RefusedError(
                    f"has {_shown(info.orig_filename)} compressed by method "
                    f"{info.compress_type}; expected 0 or 8, stored or deflated."
                )
        for info in infos:
            mode = stat.S_IFMT(info.external_attr >> 16)
            kind = _ZIP_KINDS.get(mode, f"member of mode {mode:o}")
            if kind == "file" and info.orig_filename.endswith("/"):
                kind = "folder"
            yield _Member(
                info.orig_filename,
                kind,
                info.file_size,
                lambda info=info: archive.open(info),
            )


class _Metered:
    """An open file of which no more is read than a member can need.

    Args:
        file: The open file.
        longest: Most bytes to read at once.
        left: Most bytes to read until that is set anew.
    """

    def __init__(self, file, *, longest, left):
        self.file, self.longest, self.left = file, longest, left
        self.last = b""

    def read(self, size=-1):
        most = min(self.longest, self.left)
        data = self.file.read(size if 0 <= size <= most else most + 1)
        if len(data) > most:
            raise _RefusedError(
                f"takes more than {most:,} bytes to describe its members; expected "
                "fewer. Do not trust this archive."
            )
        self.left -= len(data)
        self.last = data
        return data

    def __getattr__(self, name):  # seek, tell, and what else it takes to be a file
        return getattr(self.file, name)


# Names


class _Names:
    """The names of an archive's members, as all file systems can hold them."""

    def __init__(self):
        self.taken = {}

    def add(self, member):
        """Returns the name of a member without `./` and final slash, if it is sound."""
        if member.kind not in ("file", "folder"):
            raise _refused(member.name, f"is a {member.kind}", "files and folders only")
        parts = _parts(member.name)
        if not parts and member.kind == "file":
            raise _refused(member.name, "is a file without a name", "one")
        for path in itertools.accumulate(parts, "{}/{}".format):
            is_file = member.kind == "file" and len(path) == len("/".join(parts))
            entry = (path, is_file)
            folded = unicodedata.normalize("NFKC", path).casefold()
            taken = self.taken.setdefault(folded, entry)
            if taken is not entry and (is_file or taken != entry):
                problem = f"is another {_shown(taken[0])}"
                raise _refused(member.name, problem, "one file of a name")
        return "/".join(parts)


def _parts(name):
    """Splits a name at its slashes, and refuses one that leads astray."""
    alike = unicodedata.normalize("NFKC", name)
    parts, doubles = (
        [part for part in text.split("/") if part not in ("", ".")]
        for text in (name, alike)
    )
    problems = {
        "holds characters that cannot be printed": not name.isprintable(),
        "is absolute": alike.startswith("/"),
        "holds a backslash or a colon": "\\" in alike or ":" in alike,
        "has `..`, or a dot or space at an end": any(
            part.endswith((".", " ")) for part in doubles
        ),
        "holds a character that is a slash elsewhere": len(parts) != len(doubles),
    }
    for problem, found in problems.items():
        if found:
            raise _refused(name, problem, "plain relative names")
    longest = max((len(part.encode()) for part in parts), default=0)
    if longest > LONGEST_PART or len(name.encode()) > LONGEST_NAME:
        expected = f"{LONGEST_NAME:,} at most, {LONGEST_PART} between slashes"
        raise _refused(name, f"is {len(name.encode()):,} bytes long", expected)
    return parts


def _refused(name, problem, expected):
    return _RefusedError(
        f"holds the member {_shown(name)}, which {problem}; expected {expected}. "
        "Nothing was extracted: do not trust this archive."
    )


def _shown(name):
    return repr(name if len(name) < 100 else f"{name[:100]}...")
