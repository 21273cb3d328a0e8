"""Extracting archives: wholly or not at all, and nowhere else."""

import contextlib
import gzip
import os
import random
import signal
import stat
import struct
import subprocess
import unicodedata
import zipfile

import pytest
import scripts

from keras_fcn.datasets import archives

fuzzer = scripts.load("benchmarks/fuzz_datasets.py")  # writes what the formats can say
FORMATS, LIMITS, Member = fuzzer.FORMATS, fuzzer.LIMITS, fuzzer.Member
FOLDER = stat.S_IFDIR | 0o755
FAULTS = fuzzer.hostile("/outside")


@pytest.fixture
def write(tmp_path):
    def write(kind, members):
        path = tmp_path / f"archive.{kind}"
        fuzzer.write(path, members)
        return path

    return write


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(path, **limits):
    """Checks that an archive is refused whole, and returns what is said."""
    target = path.parent / "target"
    before = fuzzer.snapshot(path.parent)
    with pytest.raises(ValueError, match="archive") as caught:
        archives.extract(path, target, **(LIMITS | limits))
    assert str(caught.value).startswith(str(path))
    assert fuzzer.snapshot(path.parent) == before
    return str(caught.value)


# Sound archives


@pytest.mark.parametrize("kind", FORMATS)
def test_the_wanted_files_come_out_as_they_went_in(kind, write, tmp_path):
    long = f"wanted/{'deep/' * 30}{'x' * 120}"  # two of a tar's extensions
    contents = {
        "wanted/a.bin": random.Random(0).randbytes(200_000),
        "wanted/sub/b.bin": b"",
        long: b"c",
        "wanted too/d.bin": b"d",
        "other/a.bin": b"unwanted",
    }
    path = write(
        kind,
        [
            Member("wanted/", mode=FOLDER),
            *map(Member, *zip(*contents.items(), strict=True)),
        ],
    )
    count = archives.extract(
        path,
        tmp_path / "target",
        prefixes=("wanted/", "wanted too/"),
        most_files=6,
        most_bytes=sum(map(len, contents.values())),
    )
    del contents["other/a.bin"]
    assert tree(tmp_path / "target") == contents
    assert count == len(contents)
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "target"}


@pytest.mark.parametrize("kind", FORMATS)
def test_dots_and_slashes_that_mean_nothing_are_left_out(kind, write, tmp_path):
    members = [
        Member("./", mode=FOLDER),
        Member("./wanted/", mode=FOLDER),
        Member("./wanted/a", b"a"),
        Member("wanted//./b", b"b"),
        Member("wanted/", mode=FOLDER),
    ]
    archives.extract(write(kind, members), tmp_path / "target", **LIMITS)
    assert tree(tmp_path / "target") == {"wanted/a": b"a", "wanted/b": b"b"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("mode", [0o6755, 0o4777, 0o000, 0o600])
def test_a_file_has_the_rights_that_the_umask_leaves(kind, mode, write, tmp_path):
    path = write(kind, [Member("wanted/a", b"a", mode=stat.S_IFREG | mode)])
    before = os.umask(0o027)
    try:
        archives.extract(path, tmp_path / "target", **LIMITS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "target/wanted/a").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_any_script_keeps_its_spelling(kind, form, write, tmp_path):
    names = [unicodedata.normalize(form, f"wanted/{x}") for x in ("é ü", "日本語", "й")]
    path = write(kind, [Member(name, b"1") for name in names])
    archives.extract(path, tmp_path / "target", **LIMITS)
    assert set(tree(tmp_path / "target")) == set(names)


@pytest.mark.parametrize("suffix", [".tar", ".tgz", ".zip", ""])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_first_bytes_tell_the_format_not_the_name(kind, suffix, write, tmp_path):
    path = write(kind, fuzzer.sound())
    path = path.rename(tmp_path / f"other{suffix}")
    assert archives.extract(path, tmp_path / "target", **LIMITS) == 3


def test_a_zip_written_without_modes_is_extracted(write, tmp_path):
    members = [Member("wanted/", mode=0), Member("wanted/a", b"a", mode=0)]
    archives.extract(write("zip", members), tmp_path / "target", **LIMITS)
    assert tree(tmp_path / "target") == {"wanted/a": b"a"}


def test_a_tar_needs_no_more_than_the_first_block_of_its_end(write, tmp_path):
    path = write("tar", [Member("wanted/a", bytes(512))])
    os.truncate(path, 3 * 512)
    archives.extract(path, tmp_path / "target", **LIMITS)
    assert tree(tmp_path / "target") == {"wanted/a": bytes(512)}


@pytest.mark.parametrize("kind", FORMATS)
def test_progress_goes_up_to_the_length_of_the_archive(kind, write, tmp_path):
    path, calls = write(kind, fuzzer.sound(20, 10_000)), []

    def progress(*call):
        calls.append(call)

    archives.extract(path, tmp_path / "target", progress=progress, **LIMITS)
    done, total = zip(*calls, strict=True)
    assert len(calls) > 20
    assert list(done) == sorted(done)
    assert done[0] < done[-1] == path.stat().st_size
    assert set(total) == {path.stat().st_size}


# P29: nothing escapes


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "setuid"])
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_hostile_member_and_nothing_is_extracted(fault, kind, write, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "victim").write_bytes(b"victim")
    hostile = fuzzer.hostile(outside)[fault]
    good = fuzzer.sound()
    message = refused(write(kind, good[:2] + hostile + good[2:]))
    assert f"the member {hostile[0].name[:100]!r}"[:-1] in message
    assert "expected" in message


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("other/..", "has `..`"),
        ("other/. .", "has `..`, or a dot or space at an end"),
        ("other/a.", "a dot or space at an end"),
        ("other/a ", "a dot or space at an end"),
        ("other/a:stream", "a colon"),
        ("other/a\nb", "cannot be printed"),
        ("other/\u202egnp.exe", "cannot be printed"),
        ("other/a\u200bb", "cannot be printed"),
        ("other/\u2025/evil", "has `..`"),
        ("\uff0fevil", "is absolute"),
        ("other/\u2100", "a slash elsewhere"),
        ("other/\ufe68evil", "a backslash"),
        ("other/" + 128 * "é", "is 262 bytes long"),
        ("other/" + 600 * "a/" + "a", "is 1,207 bytes long"),
        ("wanted/0.bin/evil", "is another 'wanted/0.bin'"),
        ("wanted", "is another 'wanted'"),
        ("WANTED/a", "is another 'wanted'"),
        ("wanted/\uff10.bin", "is another 'wanted/0.bin'"),
        ("./wanted/./0.bin", "is another 'wanted/0.bin'"),
    ],
)
def test_a_name_that_means_another_elsewhere_is_refused(kind, name, problem, write):
    members = [*fuzzer.sound(), Member(name, b"evil")]
    assert problem in refused(write(kind, members))


def test_a_name_that_is_no_utf_8_is_refused(write):
    path = write("tar", [Member("wanted/e", b"1")])
    content = bytearray(path.read_bytes())
    content[7] = 0xE9
    checksum = sum(content[:148]) + 8 * 32 + sum(content[156:512])
    content[148:154] = b"%06o" % checksum
    path.write_bytes(content)
    assert "cannot be printed" in refused(path)


def test_a_file_without_a_name_is_refused(write):
    for kind in FORMATS:
        refused(write(kind, [Member("wanted/a"), Member("./.")]))
    path = write("zip", [Member("wanted/a"), Member("x")])
    path.write_bytes(path.read_bytes().replace(b"x", b""))
    refused(path)


def test_a_sparse_file_is_refused(tmp_path):
    path = tmp_path / "archive.tar"
    old = fuzzer.tar_header("wanted/a", 512, b"S") + bytes(512)
    path.write_bytes(old + bytes(1024))
    assert "sparse file" in refused(path)
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    new = fuzzer.tar_header("wanted/a", 512) + b"1\n0\n512\n".ljust(512)
    path.write_bytes(described(records) + new + bytes(1024))
    assert "sparse file" in refused(path)


def described(records):
    """A PAX header, which describes the member behind it."""
    header = fuzzer.tar_header("header", len(records), b"x")
    return header + records.ljust(-(-len(records) // 512) * 512, b"\0")


# P30: bombs, at a twentieth of their sizes


@pytest.mark.parametrize(
    ("kind", "bomb"),
    [(kind, bomb) for kind, bombs in fuzzer.BOMBS.items() for bomb in bombs],
)
def test_a_bomb_stops_within_the_limits(kind, bomb, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzzer, "BOMB", fuzzer.BOMB // 20)
    monkeypatch.setattr(fuzzer, "A_MILLION", fuzzer.A_MILLION // 20)
    path = tmp_path / f"archive.{kind}"
    bomb(path)
    with fuzzer.weighing(archives) as weights:
        if bomb.__name__ == "nested":  # the bombs within stay what they are
            archives.extract(path, tmp_path / "target", **LIMITS)
            assert len(tree(tmp_path / "target")) == 5
        else:
            refused(path)
    files, size = weights[-1]
    assert files <= LIMITS["most_files"]
    assert size <= LIMITS["most_bytes"]


def test_members_that_overlap_are_refused(tmp_path):
    path = tmp_path / "archive.zip"
    fuzzer.overlapping(path)
    assert "members that overlap" in refused(path, most_bytes=10**9)


@pytest.mark.parametrize(
    ("before", "sizes"), [(0, [500_000]), (900_000, [500_000]), (0, [40_000] * 3)]
)
def test_no_more_is_read_than_a_member_can_need(before, sizes, tmp_path):
    path = tmp_path / "archive.tar"
    first = fuzzer.tar_header("other/a", before) + bytes(-(-before // 512) * 512)
    headers = [described(bytes(size)) for size in sizes]
    path.write_bytes(first + b"".join(headers) + fuzzer.tar_header("wanted/a"))
    assert "to describe its members" in refused(path)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("wanted", ["wanted/", "wanted/0"])
def test_the_limits_hold_to_the_byte_for_all_members(kind, wanted, write, tmp_path):
    path = write(kind, [Member("wanted/", mode=FOLDER), *fuzzer.sound(3, 100)])
    limits = {"most_files": 4, "most_bytes": 300}
    for limit, value in limits.items():
        assert f"{value - 1:,}" in refused(path, **(limits | {limit: value - 1}))
    count = archives.extract(path, tmp_path / "target", prefixes=wanted, **limits)
    assert count == (3 if wanted == "wanted/" else 1)


def test_a_negative_size_is_refused(tmp_path):
    path = tmp_path / "archive.tar"
    header = bytearray(fuzzer.tar_header("wanted/a"))
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"  # -512: back to this header
    header[148:156] = b" " * 8
    header[148:154] = b"%06o" % sum(header)
    path.write_bytes(header + bytes(1024))
    assert "-512 bytes" in refused(path)


# P31: truncated and damaged


@pytest.mark.parametrize("kind", FORMATS)
def test_a_truncated_archive_is_refused(kind, write):
    path = write(kind, fuzzer.sound(12, 9000))
    (path.parent / "target.bin").write_bytes(b"a neighbour")
    content = path.read_bytes()
    for i in range(0, 90, 5):
        path.write_bytes(content[: len(content) * i // 100])
        refused(path)


@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_a_bit_that_flips_in_a_file_is_found(kind, write):
    path = write(kind, fuzzer.sound(1, 100_000))
    content = bytearray(path.read_bytes())
    content[50_000] ^= 1
    path.write_bytes(content)
    refused(path)


def test_a_member_shorter_than_declared_is_refused(write):
    path = write("zip", [Member("wanted/a", b"abc")])
    content = path.read_bytes()
    path.write_bytes(content.replace(struct.pack("<I", 3), struct.pack("<I", 4)))
    refused(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_comes_before_or_after_an_archive_is_refused(kind, write):
    path = write(kind, fuzzer.sound())
    content = path.read_bytes()
    path.write_bytes(content + content)
    refused(path)
    path.write_bytes(b"#!" + content)
    refused(path)


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_a_tar_without_its_end_mark_is_refused(kind, write):
    path = write(kind, fuzzer.sound(2, 512))
    content = path.read_bytes()
    if kind == "tgz":
        path.write_bytes(gzip.compress(gzip.decompress(content)[: 4 * 512]))
    else:
        os.truncate(path, 4 * 512)
    assert "end mark" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_another_compression_than_zip_tools_write_is_refused(method, tmp_path):
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("wanted/a", b"a")
    assert f"compressed by method {method}" in refused(path)


def test_a_zip_of_a_later_version_is_refused(write):
    path = write("zip", fuzzer.sound(1))
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\1\2") + 6] = 99
    path.write_bytes(content)
    assert "version 9.9" in refused(path)


def test_what_cannot_be_decompressed_is_refused(write):
    path = write("tgz", [Member("wanted/a", bytes(10**6))])
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = b"\xff" * 100
    path.write_bytes(content)
    refused(path)
    path = write("zip", [Member("wanted/a", bytes(10**6))])
    content = bytearray(path.read_bytes())
    content[38:138] = b"\xff" * 100
    path.write_bytes(content)
    refused(path)


def test_an_encrypted_zip_is_refused(write):
    path = write("zip", fuzzer.sound(1))
    content = bytearray(path.read_bytes())
    content[6] |= 1
    content[content.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(content)
    assert "encrypted" in refused(path)


def test_a_web_page_is_refused(tmp_path):
    path = tmp_path / "archive.tgz"
    for content in (b"", b"<!DOCTYPE html>", b"<html>" * 1000):
        path.write_bytes(content)
        assert "no archive" in refused(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_archive_without_wanted_files_is_refused(kind, write):
    path = write(kind, fuzzer.sound())
    message = refused(path, prefixes=["elsewhere/", "Wanted"])
    assert "begins with elsewhere/ or Wanted" in message


def test_an_archive_of_nothing_is_refused(tmp_path):
    nothing = {"zip": fuzzer.directory_end(0, 0, 0), "tar": bytes(1024)}
    nothing["tgz"] = gzip.compress(nothing["tar"])
    for kind, content in nothing.items():
        path = tmp_path / f"archive.{kind}"
        path.write_bytes(content)
        assert "holds no file" in refused(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_mutants_are_extracted_or_refused(kind, write, tmp_path):
    (tmp_path / "room").mkdir()
    path, came = write(kind, fuzzer.sound(5, 9)), []
    content = path.read_bytes()
    for i in range(100):
        path.write_bytes(fuzzer.mutate(random.Random(i), content))
        came.append(fuzzer.outcome(archives.extract, path, tmp_path / "room/target"))
    assert set(came) == {"extracted", "refused"}


# The folder


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_is_there_stays_as_it_is(kind, write, tmp_path):
    path, target = write("tar", fuzzer.sound()), tmp_path / "target"
    make = {"folder": target.mkdir, "file": target.touch}
    make.get(kind, lambda: target.symlink_to(tmp_path / "nowhere"))()
    before = fuzzer.snapshot(tmp_path)
    with pytest.raises(FileExistsError, match="target is there"):
        archives.extract(path, target, **LIMITS)
    assert fuzzer.snapshot(tmp_path) == before


def test_a_missing_archive_or_parent_is_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.tar is no file"):
        archives.extract(tmp_path / "missing.tar", tmp_path / "target", **LIMITS)
    path = write("tar", fuzzer.sound())
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        archives.extract(path, tmp_path / "nowhere" / "target", **LIMITS)


def test_an_interruption_leaves_nothing(write, tmp_path):
    def interrupt(done, total):
        raise KeyboardInterrupt

    path = write("tar", fuzzer.sound())
    with pytest.raises(KeyboardInterrupt):
        archives.extract(path, tmp_path / "target", progress=interrupt, **LIMITS)
    assert list(tmp_path.iterdir()) == [path]


def test_the_next_extraction_removes_what_a_killed_one_left(write, tmp_path):
    path, target = write("tar", fuzzer.sound()), tmp_path / "target"
    child = os.fork()
    if child == 0:
        kill = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731
        archives.extract(path, target, progress=kill, **LIMITS)
    os.waitpid(child, 0)
    (left,) = set(tmp_path.iterdir()) - {path}
    assert len(tree(left)) == 1
    others = tmp_path / ".other.0123abcd.part", tmp_path / ".target.part"
    for other in others:
        other.mkdir()
    archives.extract(path, target, **LIMITS)
    assert set(tmp_path.iterdir()) == {path, target, *others}


def test_an_extraction_leaves_one_that_is_under_way_alone(write, tmp_path):
    path, target = write("tar", fuzzer.sound()), tmp_path / "target"

    def overtake(done, total):
        if not target.exists():
            archives.extract(path, target, **LIMITS)
            (part,) = tmp_path.glob(".target.*.part")
            assert len(tree(part)) == 1

    with pytest.raises(OSError, match="target"):  # the last one finds the folder there
        archives.extract(path, target, progress=overtake, **LIMITS)
    assert len(tree(target)) == 3
    assert set(tmp_path.iterdir()) == {path, target}


@contextlib.contextmanager
def small_disk(folder, size):
    options = ["-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(["mount", *options], check=False).returncode:
        pytest.skip("A full disk takes a small one, which only root can mount.")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_so_and_left_empty(write, tmp_path):
    path, disk = write("zip", fuzzer.sound(4, 100_000)), tmp_path / "disk"
    disk.mkdir()
    with small_disk(disk, "256k"):
        with pytest.raises(OSError, match=r"needs more than .*disk/target"):
            archives.extract(path, disk / "target", **LIMITS)
        assert list(disk.iterdir()) == []
