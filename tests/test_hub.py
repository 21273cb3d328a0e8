"""What `hub.fetch` promises when network, disk, files or people misbehave.

The promises P1 to P14 are tried at a twentieth of their counts, in full where
KERAS_FCN_FAULTS is "full" (benchmarks/faults.py).
"""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.request

import huggingface_hub
import pytest
import servers
from huggingface_hub import constants
from servers import REVISION, sha256

from keras_fcn import download, hub

NAME = "vgg16-8s-voc"
OLD = time.time() - 3700  # an hour and a little ago
RETRIED = [408, 429, 500, 502, 503, 504]
FINAL = [401, 403, 404, 410, 416]
KINDS = ["hub", "host"]
CHUNK = 2**16  # bytes that the Hub's client writes at once, in these tests
LOADED = 4  # seconds that a busy machine may add


def can_unshare():
    """Whether mounts and networks of our own can be had."""
    if not shutil.which("unshare"):
        return False
    return subprocess.run(["unshare", "-m", "-n", "true"]).returncode == 0


namespaces = pytest.mark.skipif(
    not can_unshare(), reason="needs root and unshare for mounts and networks"
)


@pytest.fixture(scope="module")
def stubs():
    """The two servers, and children that know the Hub's."""
    both = {"hub": servers.Server(hub=True), "host": servers.Server()}
    both["children"] = servers.Children(both["hub"].url)
    yield both
    both["children"].close()
    both["hub"].shutdown()
    both["host"].shutdown()


@pytest.fixture
def naps(monkeypatch):
    """Seconds slept so far: nobody sleeps, the clock goes on."""
    slept = []
    real = time.monotonic
    clock = types.SimpleNamespace(
        sleep=lambda seconds: slept.append(seconds),
        monotonic=lambda: real() + sum(slept),
        time=time.time,
    )
    monkeypatch.setattr(download, "time", clock)
    monkeypatch.setattr(time, "sleep", clock.sleep)
    return slept


@pytest.fixture
def site(stubs, naps, tmp_path, monkeypatch):
    """Makes a `Site`: a file on one of the servers, and empty caches."""
    monkeypatch.setattr(constants, "ENDPOINT", stubs["hub"].url)
    template = stubs["hub"].url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    for variable in ("KERAS_FCN_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(variable, raising=False)
    number = itertools.count()

    def make(kind, size=200_000, hashes=("bytes", "sha1"), server=None):
        here = Site(tmp_path / str(next(number)), kind, server or stubs[kind])
        here.build(size, hashes)
        here.children = stubs["children"]
        monkeypatch.setenv("KERAS_FCN_CACHE", str(here.cache))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(here.hub_cache))
        return here

    return make


class Site:
    """One checkpoint on one server, with caches of its own."""

    def __init__(self, folder, kind, server):
        self.kind, self.server = kind, server
        self.cache, self.hub_cache = folder / "ours", folder / "hubs"
        server.log, server.fault, server.pace, server.version = [], None, 0, None

    def build(self, size, hashes, revision=REVISION, seed=0):
        content = random.Random(seed).randbytes(size)
        if self.kind == "hub":
            self.body = self.good = content
            where = {"repo": "fcn/voc", "revision": revision, "file": "weights.h5"}
            facts = {"bytes": size, "sha256": sha256(content)}
            self.entry = {"hub": where | facts}
            self.path = f"/fcn/voc/resolve/{revision}/weights.h5"
        else:
            self.body = b"CAFFE" + content[5:]
            self.good = servers.ported(self.body)
            digests = {
                kind: hashlib.new(kind, self.body).hexdigest()
                for kind in ("sha256", "sha1", "md5")
            }
            facts = digests | {"bytes": size}
            self.path = f"/{seed or ''}fcn8s.caffemodel"
            url = self.server.url + self.path
            stated = {key: facts[key] for key in hashes}
            self.entry = {"caffemodel": {"url": url} | stated}
        self.facts = facts
        self.server.files = {self.path: self.body}

    @property
    def final(self):
        """Where the file is to be seen."""
        if self.kind == "host":
            return self.cache / f"{NAME}.h5"
        return self.hub_cache / f"models--fcn--voc/snapshots/{REVISION}/weights.h5"

    @property
    def part(self):
        return self.cache / f"{NAME}.keras_fcn.part"

    def fetch(self, **options):
        return hub.fetch(NAME, self.entry, servers.port, **options)

    def job(self, **options):
        caches = {"cache": str(self.cache), "hub_cache": str(self.hub_cache)}
        return {"name": NAME, "entry": self.entry} | caches | options

    def is_right(self, path):
        return path == self.final and path.read_bytes() == self.good

    def shows_nothing_wrong(self):
        return not self.final.is_file() or self.final.read_bytes() == self.good

    def refuses(self, error, **options):
        """The message of the `error` that `fetch` ends with."""
        with pytest.raises(error) as caught:
            self.fetch(**options)
        return str(caught.value)


def once(fault, method="GET"):
    """`fault` for the first request of that method only."""
    left = [fault]

    def first(request):
        return bool(left) and request.command == method and left.pop()(request)

    return first


def always(fault, method="GET"):
    """`fault` for every request of that method."""
    return lambda request: request.command == method and fault(request)


# The way it should go


@pytest.mark.parametrize("kind", KINDS)
def test_a_cached_file_asks_for_nothing(site, kind):
    here = site(kind)
    assert here.is_right(here.fetch())
    assert len(here.server.gets()) == 1
    here.server.log.clear()
    result = here.children.run(**here.job(telemetry=True))
    assert result["sha256"] == sha256(here.good)
    assert here.server.log == []


def test_the_port_is_recorded_and_the_original_is_not_kept(site):
    here = site("host")
    here.fetch()
    record = json.loads((here.cache / f"{NAME}.json").read_text())
    assert record["sha256"] == sha256(here.good)
    assert record["source"] == {"url": here.server.url + here.path} | here.facts
    assert sorted(path.name for path in here.cache.iterdir()) == [
        f"{NAME}.h5",
        f"{NAME}.json",
        f"{NAME}.lock",
    ]


@pytest.mark.parametrize("hashes", [["md5"], ["sha1"], ["sha256"], ["bytes", "md5"]])
def test_any_published_hash_is_enough(site, hashes):
    here = site("host", hashes=hashes)
    assert here.is_right(here.fetch())
    here.server.files[here.path] = here.body[:-1] + b"?"
    shutil.rmtree(here.cache)
    assert here.facts[hashes[-1]] in here.refuses(ValueError)


def test_the_cache_is_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("KERAS_FCN_CACHE", str(tmp_path / "here"))
    assert hub.cache_folder() == tmp_path / "here"
    monkeypatch.delenv("KERAS_FCN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / "keras_fcn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert hub.cache_folder() == tmp_path / ".cache" / "keras_fcn"
    monkeypatch.setenv("KERAS_FCN_CACHE", "~/there")
    assert hub.cache_folder() == tmp_path / "there"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_FCN_CACHE", "where I am")
    assert hub.cache_folder() == tmp_path / "where I am"


def test_one_line_is_printed_where_there_is_no_terminal(site, capsys):
    here = site("host")
    here.fetch()
    assert capsys.readouterr().err == f"Downloading {here.server.url}{here.path}\n"


def test_a_terminal_sees_a_bar(site, monkeypatch):
    here = site("host")
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    here.fetch()
    assert "fcn8s.caffemodel" in terminal.getvalue()
    assert "200.0/200.0 kB" in terminal.getvalue()


# Resuming


def test_a_cut_download_goes_on_in_the_next_call(site):
    here = site("host")
    here.server.fault = always(lambda request: request.send(stop=(0, "FIN")))
    here.refuses(OSError)
    here.server.fault = once(lambda request: request.send(stop=(120_000, "FIN")))
    here.server.log.clear()
    interrupted = once(lambda request: request.send(status=404))
    here.server.fault = chain(here.server.fault, interrupted)
    here.refuses(OSError)
    assert here.part.stat().st_size == 120_000
    here.server.fault = None
    assert here.is_right(here.fetch())
    ranges = [entry[2] for entry in here.server.gets()]
    assert ranges == [None, "bytes=120000-", "bytes=120000-"]


def chain(*faults):
    """The first of the faults that handles a request."""
    return lambda request: any(fault(request) for fault in faults)


def test_a_file_that_changed_meanwhile_starts_from_zero(site):
    here = site("host", hashes=["bytes"])
    broken = once(lambda request: request.send(stop=(120_000, "FIN")))
    here.server.fault = chain(broken, once(lambda request: request.send(status=404)))
    here.refuses(OSError, trust_first_download=True)
    here.server.fault = None
    here.server.files[here.path] = body = here.body[:-9] + b"different"
    path = here.fetch(trust_first_download=True)
    assert path.read_bytes() == servers.ported(body)
    ranges = [entry[2] for entry in here.server.gets()]
    assert ranges == [None, "bytes=120000-", "bytes=120000-"]  # If-Range saves a fourth


def test_without_a_version_nothing_is_glued_on(site):
    here = site("host")
    bare = {"ETag": None}
    broken = once(lambda request: request.send(stop=(120_000, "FIN"), headers=bare))
    here.server.fault = chain(broken, always(lambda r: r.send(headers=bare)))
    assert here.is_right(here.fetch())
    assert [entry[2] for entry in here.server.gets()] == [None, None]


@pytest.mark.parametrize(
    ("version", "second"),
    [  # RFC 9110, 13.1.5: If-Range takes a date, and no weak ETag
        ({"Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT"}, "bytes=120000-"),
        ({"ETag": 'W/"about so"'}, None),
        (
            {"ETag": 'W/"x"', "Last-Modified": "Sat, 28 Nov 2026 12:00:00 GMT"},
            "bytes=120000-",
        ),
    ],
)
def test_a_date_is_version_enough_and_a_weak_etag_is_none(site, version, second):
    here = site("host")
    here.server.version = version
    here.server.fault = once(lambda request: request.send(stop=(120_000, "FIN")))
    assert here.is_right(here.fetch())
    assert [entry[2] for entry in here.server.gets()] == [None, second]


def test_what_came_whole_without_length_or_version_is_not_fetched_again(site, tmp_path):
    here, path = site("host"), tmp_path / "file"
    bare = {"ETag": None}
    here.server.fault = always(lambda r: r.send(length=False, headers=bare))
    for _ in range(2):
        download.download(here.server.url + here.path, path)
        assert path.read_bytes() == here.body
    assert len(here.server.gets()) == 1


@pytest.mark.parametrize(
    ("of", "ranges"), [("", ["bytes=200000-"]), ("another", [None])]
)
def test_what_came_whole_before_a_kill_is_kept_for_its_own_address_alone(
    site, tmp_path, of, ranges
):
    here, path = site("host"), tmp_path / "file"
    url, etag = here.server.url + here.path, f'"{sha256(here.body)[:16]}"'
    path.write_bytes(here.body)  # of a length that nobody had said
    note = {"url": url + of, "version": etag, "total": None}
    (tmp_path / "file.json").write_text(json.dumps(note))
    for _ in range(2):
        download.download(url, path)
        assert path.read_bytes() == here.body
    assert [entry[2] for entry in here.server.gets()] == ranges


def test_what_was_killed_an_hour_ago_is_swept_and_foreign_files_stay(site):
    here = site("host")
    here.cache.mkdir(parents=True)
    names = ["other.keras_fcn.part", f"{NAME}.keras_fcn.1234.h5", "film.part", "a.h5"]
    for name in [*names, "fresh.keras_fcn.part"]:
        then = time.time() - 3500 if "fresh" in name else OLD
        (here.cache / name).write_bytes(b"x")
        os.utime(here.cache / name, (then, then))
    here.fetch()
    left = {path.name for path in here.cache.iterdir()}
    assert left.isdisjoint(names[:2])
    assert left.issuperset([*names[2:], "fresh.keras_fcn.part"])


def leave(folder, *names):
    """Writes files as transfers left them that were killed an hour ago, or not yet."""
    folder.mkdir(parents=True, exist_ok=True)
    ages = {"old": OLD, "fresh": time.time() - 3500}
    for name, (age, then) in itertools.product(names, ages.items()):
        path = folder / name.format(age)
        path.write_bytes(b"x")
        os.utime(path, (then, then))


def left_in(folder):
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("cached", [False, True], ids=["fetched", "cached"])
def test_what_the_hub_s_client_left_is_swept_too(site, cached):
    here = site("hub")
    if cached:
        here.fetch()
    blobs, other = (
        here.hub_cache / f"models--fcn--{name}/blobs" for name in ("voc", "other")
    )
    for folder in (blobs, other):
        leave(folder, "{}.incomplete", "{}")
    assert here.is_right(here.fetch())
    assert left_in(blobs) >= {"fresh.incomplete", "fresh", "old"}
    assert "old.incomplete" not in left_in(blobs)
    assert left_in(other) == {"fresh.incomplete", "fresh", "old.incomplete", "old"}


def test_what_was_killed_is_swept_once_the_file_is_there(site):
    here = site("host")
    here.fetch()
    leave(here.cache, f"{NAME}.keras_fcn.{{}}.h5", "other.keras_fcn.{}.h5")
    here.fetch()
    mine = {x for x in left_in(here.cache) if x.startswith(f"{NAME}.keras_fcn.")}
    assert mine == {f"{NAME}.keras_fcn.fresh.h5"}
    others = {f"other.keras_fcn.{age}.h5" for age in ("old", "fresh")}
    assert left_in(here.cache) >= others


# Trust and hands


def test_without_a_hash_the_first_download_wants_a_word(site):
    here = site("host", hashes=["bytes"])
    message = here.refuses(ValueError)
    assert here.server.log == []
    assert len(message.splitlines()) == 3
    assert NAME in message
    assert here.server.url + here.path in message
    assert f"keras-fcn fetch {NAME} --trust-first-download" in message
    assert str(here.cache / "fcn8s.caffemodel") in message


def test_what_was_trusted_once_holds(site, caplog):
    here = site("host", hashes=[])
    assert here.is_right(here.fetch(trust_first_download=True))
    assert here.facts["sha256"] in caplog.text
    assert here.is_right(here.fetch())
    here.final.unlink()
    assert here.is_right(here.fetch())
    here.final.unlink()
    here.server.files[here.path] = b"CAFFE, but another"
    for trust in (False, True):
        message = here.refuses(ValueError, trust_first_download=trust)
        assert here.facts["sha256"] in message
        assert sha256(b"CAFFE, but another") in message


def test_trust_does_not_cover_a_page_that_is_no_caffemodel(site):
    here = site("host", hashes=[])
    page = b"<html>Log in to the network</html>"
    here.server.files[here.path] = page
    message = here.refuses(ValueError, trust_first_download=True)
    assert sha256(page) in message
    assert here.server.url + here.path in message
    assert not here.final.exists()
    here.server.files[here.path] = here.body
    assert here.is_right(here.fetch(trust_first_download=True))


def test_a_hash_published_later_overrules_what_was_trusted(site):
    here = site("host", hashes=[])
    here.server.files[here.path] = b"CAFFE, but forged"
    here.fetch(trust_first_download=True)
    here.server.files[here.path] = here.body
    here.entry["caffemodel"]["sha256"] = here.facts["sha256"]
    assert here.is_right(here.fetch())


def on_both(site):
    """Two sites of one cache: an original without a hash, then its port on the Hub."""
    first, later = site("host", hashes=[]), site("hub")
    later.cache = first.cache
    later.entry = {**first.entry, **later.entry}
    return first, later


def test_a_file_on_the_hub_overrules_a_download_that_was_trusted(site, monkeypatch):
    first, later = on_both(site)
    monkeypatch.setenv("KERAS_FCN_CACHE", str(first.cache))
    first.fetch(trust_first_download=True)
    assert later.is_right(later.fetch())


def test_a_file_on_the_hub_overrules_weights_that_were_trusted(site, monkeypatch):
    first, later = on_both(site)
    monkeypatch.setenv("KERAS_FCN_CACHE", str(first.cache))
    first.cache.mkdir(parents=True)
    first.final.write_bytes(b"mine")
    first.fetch(trust_first_download=True)
    assert later.facts["sha256"] in later.refuses(ValueError)
    assert first.final.read_bytes() == b"mine"


@pytest.mark.parametrize("hashes", [["sha1"], []])
def test_a_caffemodel_put_there_by_hand_is_ported_and_stays(site, monkeypatch, hashes):
    here = site("host", hashes=hashes)
    monkeypatch.setenv("KERAS_FCN_OFFLINE", "1")
    here.cache.mkdir(parents=True)
    original = here.cache / "fcn8s.caffemodel"
    original.write_bytes(here.body)
    if not hashes:
        assert "--trust-first-download" in here.refuses(ValueError)
    assert here.is_right(here.fetch(trust_first_download=not hashes))
    assert original.read_bytes() == here.body
    assert here.server.log == []


def test_offline_without_a_hash_the_way_by_hand_ends_with_the_word(site, monkeypatch):
    monkeypatch.setenv("KERAS_FCN_OFFLINE", "1")
    here = site("host", hashes=[])
    message = here.refuses(OSError)
    assert f"keras-fcn fetch {NAME} --trust-first-download" in message
    here = site("host")
    assert "--trust-first-download" not in here.refuses(OSError)


def test_a_wrong_caffemodel_put_there_by_hand_is_named_and_stays(site):
    here = site("host")
    here.cache.mkdir(parents=True)
    original = here.cache / "fcn8s.caffemodel"
    original.write_bytes(b"something else")
    message = here.refuses(ValueError)
    assert here.facts["sha1"] in message
    assert hashlib.sha1(b"something else").hexdigest() in message
    assert str(original) in message
    assert original.exists()


def test_weights_put_there_by_hand_need_the_hubs_hash_or_a_word(site, monkeypatch):
    monkeypatch.setenv("KERAS_FCN_OFFLINE", "1")
    here = site("hub")
    here.cache.mkdir(parents=True)
    placed = here.cache / f"{NAME}.h5"
    placed.write_bytes(here.good)
    assert here.fetch() == placed
    placed.write_bytes(b"something else")
    message = here.refuses(ValueError)
    assert here.facts["sha256"] in message
    assert sha256(b"something else") in message
    here = site("host")
    here.cache.mkdir(parents=True)
    placed = here.cache / f"{NAME}.h5"
    placed.write_bytes(b"mine")
    assert "--trust-first-download" in here.refuses(ValueError)
    assert here.fetch(trust_first_download=True) == placed
    assert here.fetch() == placed
    placed.write_bytes(b"changed")
    assert sha256(b"mine") in here.refuses(ValueError, trust_first_download=True)
    assert placed.read_bytes() == b"changed"


# P1 to P14


def test_a_cut_never_leaves_a_wrong_file(site, faults):
    def check(percent, how, kind, length):
        here = site(kind)
        stop = (len(here.body) * percent // 100, how)
        cut = once(lambda request: request.send(stop=stop, length=length))
        head = always(lambda request: request.send(length=length), "HEAD")
        here.server.fault = chain(cut, head)
        assert here.is_right(here.fetch())
        assert len(here.server.gets()) <= 2

    lengths = [True, False]
    faults(1, itertools.product(range(1, 101), ["FIN", "RST"], KINDS, lengths), check)


def test_every_try_that_brings_bytes_counts_anew(site, faults):
    def check(kind, how, fraction, _):
        here = site(kind, size=2_000_000)
        share = len(here.body) // fraction if fraction else 0

        def stop(request):
            start = int((request.headers.get("Range") or "bytes=0-")[6:-1])
            total = len(here.body) - start
            return request.send(stop=(min(share, total), how)) if share < total else 0

        here.server.fault = always(stop)
        if fraction and (kind, how) != ("hub", "RST"):
            assert here.is_right(here.fetch())
            # The Hub's client keeps whole chunks only; a reset takes with it what the
            # system had received and nobody had read yet.
            kept = share // CHUNK * CHUNK if kind == "hub" else share
            most = -(-len(here.body) // kept) + 1 if how == "FIN" else 36
            assert len(here.server.gets()) <= most
        else:
            assert here.server.url in here.refuses(OSError)
            assert len(here.server.gets()) <= 36
        assert here.shows_nothing_wrong()

    cases = itertools.product(KINDS, ["FIN", "RST"], [5, 20, 0], range(5))
    few = [("host", "FIN", 20, 0), ("hub", "FIN", 5, 0), ("host", "RST", 0, 0)]
    faults(2, cases, check, few)


@pytest.mark.parametrize(
    ("kind", "options", "pace", "kills"),
    [
        ("hub", {}, 0.003, 100),
        ("hub", {"links": False}, 0.003, 50),
        ("host", {}, 0.003, 100),
        ("host", {"port": "slow_port"}, 0, 100),
    ],
)
def test_kill_9_keeps_the_cache_valid(site, faults, kind, options, pace, kills):
    here = site(kind, size=1_000_000)
    here.server.pace = pace
    job = here.job(**options)
    whole = here.children.run(**job)["seconds"]
    chance = random.Random(3)

    def check(_):
        for path in {here.final, here.final.resolve()}:
            path.unlink(missing_ok=True)
        pid = here.children.start(**job)
        threading.Event().wait(chance.uniform(0, whole))
        os.kill(pid, signal.SIGKILL)
        here.children.wait(pid)
        assert here.shows_nothing_wrong()

    faults(3, zip(range(kills)), check)
    for path in [*here.cache.rglob("*"), *here.hub_cache.rglob("*")]:
        os.utime(path, (OLD, OLD), follow_symlinks=False)
    assert here.is_right(here.fetch())
    left = [*here.cache.rglob("*"), *here.hub_cache.rglob("*")]
    held = sum(path.lstat().st_size for path in left if path.is_file())
    assert held <= 2 * len(here.body) + 10_000


def test_sixteen_processes_make_one_download(site, faults):
    def check(kind, missing, most, _):
        here = site(kind)
        here.server.pace = 0.01
        job = here.job(**dict.fromkeys(missing, False))
        pids = [here.children.start(**job) for _ in range(16)]
        results = [here.children.wait(pid) for pid in pids]
        assert {result.get("sha256") for result in results} == {sha256(here.good)}
        assert 1 <= len(here.server.gets()) <= most
        assert len(here.server.log) <= 3 * most
        assert not list(here.cache.glob("*.part*"))

    rounds = [*itertools.product(KINDS, [()], [1], range(10))]
    rounds += itertools.product(KINDS, [("locks",)], [16], range(3))
    rounds += itertools.product(["hub"], [("links",)], [2], range(4))
    few = [("host", (), 1, 0), ("hub", (), 1, 0), ("host", ("locks",), 16, 0)]
    faults(4, rounds, check, few)


def test_a_file_that_comes_at_the_last_moment_is_kept(site, monkeypatch):
    here = site("host")
    here.fetch()
    here.server.log.clear()
    monkeypatch.setattr(hub, "_cached", lambda name, entry: None)
    assert here.is_right(here.fetch())
    assert here.server.log == []


@pytest.mark.parametrize("last", [".h5", ".json"])
def test_a_port_that_is_killed_between_its_two_files_is_made_again(
    site, monkeypatch, last
):
    here = site("host")
    replace = os.replace

    def die(source, target):
        if str(target).endswith(NAME + last):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", die)
        with pytest.raises(KeyboardInterrupt):
            here.fetch()
    assert here.is_right(here.fetch())
    assert len(here.server.gets()) == 1


@namespaces
def test_a_full_disk_is_said_so_and_shows_no_half_file(site, faults):
    def check(percent, kind, port, length):
        here = site(kind)
        here.server.fault = lambda request: request.send(length=length)
        need = len(here.body) * (1 if kind == "hub" else 2)
        folder = here.hub_cache if kind == "hub" else here.cache
        for path in (here.hub_cache, here.cache):
            path.mkdir(parents=True)
        size = {str(folder): int(need * percent / 100)}
        result = here.children.run(**here.job(tmpfs=size, port=port, waits=False))
        shown = str(here.final) in result["files"]
        if "error" in result:
            assert result["error"] == "OSError"
            assert "needed" in result["message"]
            assert "free" in result["message"]
            assert not shown
        else:
            assert percent > 100
            assert result["sha256"] == sha256(here.good)
        if port == "fat_port" or percent < 100:
            assert "error" in result

    ways = [("hub", "port", True), ("hub", "port", False), ("host", "port", True)]
    ways += [("host", "port", False), ("host", "fat_port", True)]
    shares = [5 + 5.25 * step for step in range(21)]
    few = [(47, *way) for way in ways] + [(110, "host", "fat_port", True)]
    faults(5, ((share, *way) for share in shares for way in ways), check, few)


@pytest.mark.parametrize(("kind", "need"), [("hub", 100), ("host", 200)])
def test_room_for_file_and_port_is_looked_for_first(site, monkeypatch, kind, need):
    here = site(kind, size=100)
    free = types.SimpleNamespace(free=need - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: free)
    assert f"{need} bytes needed, {need - 1} free" in here.refuses(OSError)
    free.free += 1
    assert here.is_right(here.fetch())


def test_wrong_bytes_are_fetched_once_more_and_refused(site, faults):
    def check(kind, make):
        here = site(kind)
        wrong = make(here.body)
        here.server.files[here.path] = wrong
        message = here.refuses(ValueError)
        digest = "sha256" if kind == "hub" else "sha1"
        for text in [
            here.facts[digest],
            hashlib.new(digest, wrong).hexdigest(),
            f"{len(here.body):,} bytes",
            f"{len(wrong):,} bytes",
            here.server.url + here.path,
        ]:
            assert text in message
        # What is empty the Hub's client does not ask for.
        assert len(here.server.gets()) == (2 if wrong or kind == "host" else 0)
        left = [*here.cache.rglob("*"), *here.hub_cache.rglob("*")]
        kept = [path for path in left if path.is_symlink() or path.is_file()]
        assert {path.suffix for path in kept} <= {".lock", ".TAG", ""}
        assert not [path for path in kept if path.parent.name in ("blobs", REVISION)]

    def flip(at):
        return lambda body: body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]

    others = [
        lambda body: body[:-1],
        lambda body: body + b"x",
        lambda body: b"<html>".ljust(len(body)),
        lambda body: b"",
    ]
    flips = [flip(2_000 * step) for step in range(100)]
    faults(6, itertools.product(KINDS, flips + others), check)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("status", RETRIED + FINAL)
def test_every_status_has_an_answer(site, faults, naps, kind, status):
    def check(method):
        here = site(kind)
        naps.clear()
        bad = always(lambda request: request.send(b"no", status), method)
        here.server.fault = bad
        message = here.refuses(OSError)
        for text in [str(status), here.server.url + here.path, NAME]:
            assert text in message
        asked = [entry for entry in here.server.log if entry[0] == method]
        if status in FINAL:
            assert len(asked) == 1
        elif kind == "host":
            assert len(asked) == 6
            for wait, nap in zip((1, 2, 4, 8, 16), naps, strict=True):
                assert 0.5 * wait <= nap <= 1.5 * wait
        here.server.fault = once(lambda request: request.send(b"no", status), method)
        if status in RETRIED:
            assert here.is_right(here.fetch())

    methods = ["GET"] if kind == "host" else ["HEAD", "GET"]
    for method in methods:
        faults(7, [(method,)], check)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_may_ask_for_two_minutes_but_not_for_more(site, naps, kind):
    here = site(kind)
    method = "HEAD" if kind == "hub" else "GET"
    wait = {"Retry-After": 117}
    here.server.fault = once(lambda r: r.send(b"", 503, wait), method)
    assert here.is_right(here.fetch())
    assert naps == [117]
    here = site(kind)
    naps.clear()
    here.server.fault = always(lambda r: r.send(b"", 503, {"Retry-After": 121}), method)
    assert "121 s" in here.refuses(OSError)
    assert naps == []


def test_a_retry_date_is_understood():
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 60))
    assert 57 < download._retry_after(date) <= 60
    assert download._retry_after("soon") is None


def redirect(to):
    """Leads elsewhere."""
    return lambda request: request.send(b"", 302, {"Location": to(request)})


def here_again(request):
    """The URL that was asked for."""
    return request.server.url + request.path


def wrong_part(request):
    """Answers a request for the rest with another part of the same length."""
    if not request.headers.get("Range"):
        return request.send(stop=(100_000, "FIN"))
    body = request.server.files[request.path]
    place = f"bytes 0-{len(body) // 2 - 1}/{len(body)}"
    headers = {"Content-Range": place, "ETag": request.facts(body)["ETag"]}
    request.server.fault = None
    return request.send(body[: len(body) // 2], 206, headers, ranges=False)


def other_version(request):
    """Answers a request for the rest of one version with that of another."""
    if not request.headers.get("Range"):
        return request.send(stop=(100_000, "FIN"))
    request.server.fault = None
    return rest_of_another(request)


def rest_of_another(request):
    """The rest of another version, which its ETag tells."""
    body = request.server.files[request.path][::-1]
    place = f"bytes 100000-{len(body) - 1}/{len(body)}"
    headers = {"Content-Range": place, "ETag": '"another"'}
    return request.send(body[100_000:], 206, headers, ranges=False)


def heedless(request):
    """Breaks off, then has of another version the rest alone; all of it when asked."""
    if request.headers.get("Range"):
        return rest_of_another(request)
    first = len(request.server.gets()) == 1
    return request.send(stop=(100_000, "FIN") if first else None)


ODD = [
    ("host", redirect(here_again), "302"),
    ("host", redirect(lambda request: "file:///etc/passwd"), "302"),
    ("host", redirect(lambda request: "ftp://127.0.0.1/x"), "ftp://127.0.0.1/x"),
    ("hub", redirect(here_again), "TooManyRedirects"),
    ("hub", redirect(lambda request: "file:///etc/passwd"), "file:///etc/passwd"),
    ("host", lambda r: r.send(headers={"Content-Encoding": "gzip"}), "gzip"),
    ("host", lambda r: r.send(b"<html>", 200), "6 bytes"),
    ("host", lambda r: r.send(b"", 204), "204"),
    ("host", lambda r: r.send(status=206), "wrong part"),
    ("hub", lambda r: r.send(headers={"ETag": None}), "ETag"),
    ("hub", lambda r: r.send(headers={"X-Repo-Commit": None}), "commit"),
    ("host", lambda r: r.send(length=False), None),
    ("hub", lambda r: r.send(length=False), None),
    ("host", wrong_part, None),
    ("host", other_version, None),
    ("host", heedless, None),
    ("hub", once(redirect(lambda request: request.path), "HEAD"), None),
]


@pytest.mark.parametrize(("kind", "fault", "text"), ODD)
def test_every_odd_answer_has_an_answer(site, faults, kind, fault, text):
    def check():
        here = site(kind, hashes=[])  # so that nothing but the answer gives it away
        here.server.fault = fault
        if text is None:
            assert here.is_right(here.fetch(trust_first_download=True))
        else:
            message = here.refuses((OSError, ValueError), trust_first_download=True)
            assert text in message
            assert len(here.server.log) <= 21
        assert here.shows_nothing_wrong()

    faults(7, [()], check)


def test_a_range_that_is_refused_starts_once_from_zero(site):
    here = site("host", hashes=["bytes"])
    broken = once(lambda request: request.send(stop=(120_000, "FIN")))
    here.server.fault = chain(broken, once(lambda request: request.send(b"", 416)))
    assert here.is_right(here.fetch(trust_first_download=True))
    ranges = [entry[2] for entry in here.server.gets()]
    assert ranges == [None, "bytes=120000-", None]


@pytest.mark.parametrize(
    ("length", "said"),
    [
        (True, "announces 2,000,000 bytes, too many"),
        (False, "sends more than 1,999,999 bytes"),
    ],
)
def test_a_file_may_be_as_long_as_the_limit_and_no_longer(
    site, monkeypatch, length, said
):
    here = site("host", size=2_000_000)
    here.server.fault = always(lambda request: request.send(length=length))
    monkeypatch.setattr(download, "MAX_BYTES", 1_999_999)
    assert f"{here.server.url}{here.path} {said}" in here.refuses(OSError)
    assert len(here.server.gets()) == 1
    assert not here.final.exists()
    assert f"{here.server.url}{here.path} {said}" in here.refuses(OSError)
    monkeypatch.setattr(download, "MAX_BYTES", 2_000_000)
    assert here.is_right(here.fetch())


def test_of_what_has_no_end_no_more_is_read_than_the_limit(site, monkeypatch):
    here = site("host", size=5_000_000)
    here.server.fault = always(lambda request: request.send(length=False))
    monkeypatch.setattr(download, "MAX_BYTES", 100_000)
    forget, lengths = download.forget, []

    def noted(path):
        if path.exists():
            lengths.append(path.stat().st_size)
        forget(path)

    monkeypatch.setattr(download, "forget", noted)
    here.refuses(OSError)
    [length] = lengths
    assert 100_000 < length < 400_000  # the last of the blocks
    assert not here.part.exists()


@pytest.mark.parametrize(("length", "refused"), [(2**31, False), (2**31 + 1, True)])
def test_what_is_longer_than_any_caffemodel_can_be_is_not_read(site, length, refused):
    here = site("host")
    announced = {"Content-Length": length}
    cut = always(lambda request: request.send(headers=announced, stop=(0, "FIN")))
    here.server.fault = cut
    said = f"announces {length:,} bytes, too many"
    assert (said in here.refuses(OSError)) == refused
    assert len(here.server.gets()) == (1 if refused else 6)


SLOW = {
    "drip": lambda request: request.drip(
        b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 4000, 0.02
    ),
    "dripping headers": lambda request: request.drip(b"HTTP/1.1 200 OK" * 400, 0.02),
    "stall before headers": lambda request: threading.Event().wait(1.5) or True,
    "stall in the body": lambda request: (
        request.drip(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", 0)
        and not threading.Event().wait(1.5)
    ),
}


def test_no_wait_is_endless(site, faults, monkeypatch):
    monkeypatch.setattr(download, "SOCKET_SECONDS", 0.2)
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.5)
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)

    def check(kind, fault, method, _):
        here = site(kind)
        here.server.fault = always(SLOW[fault], method)
        start = time.perf_counter()
        assert here.server.url in here.refuses(OSError)
        assert time.perf_counter() - start < 30

    cases = [*itertools.product(["host"], SLOW, ["GET"], range(3))]
    cases += itertools.product(["hub"], ["stall before headers"], ["HEAD", "GET"], [0])
    cases += itertools.product(["hub"], ["stall in the body"], ["GET"], range(2))
    faults(8, cases, check, few=cases[::3])


def test_what_is_fast_enough_may_take_longer_than_that(site, monkeypatch):
    monkeypatch.setattr(download, "SLOW_SECONDS", 0.5)
    here = site("host", size=400_000)
    here.server.pace = 0.15  # for each of 7 blocks
    assert here.is_right(here.fetch())


def test_a_port_that_accepts_and_says_nothing_is_left(site, naps, monkeypatch):
    monkeypatch.setattr(download, "SOCKET_SECONDS", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        here = site("host")
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/fcn8s.caffemodel"
        here.entry["caffemodel"]["url"] = url
        assert f"{url} gave no answer: timed out" in here.refuses(OSError)


def test_tries_that_bring_nothing_end_after_a_minute(site, naps):
    here = site("host")
    here.server.fault = always(lambda r: naps.append(40) or r.send(b"", 503))
    assert "sent 0 bytes in 8" in here.refuses(OSError)
    assert len(here.server.gets()) == 2


def names_everything(here, message):
    """Whether a message says all that somebody without a network needs."""
    file = f"{NAME}.h5" if here.kind == "hub" else "fcn8s.caffemodel"
    digest = here.facts["sha256" if here.kind == "hub" else "sha1"]
    texts = [NAME, here.path, f"{len(here.body):,} bytes", digest, here.cache / file]
    if here.kind == "host":
        texts.append(
            f"keras-fcn convert fcn8s.caffemodel --checkpoint {NAME} --output {NAME}.h5"
        )
    return all(str(text) in message for text in texts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variable", ["KERAS_FCN_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_by_flag_works_or_says_what_to_do(site, faults, kind, variable):
    def check():
        here = site(kind)
        flag = {"environment": {variable: "1"}}
        result = here.children.run(**here.job(**flag))
        assert result["error"] == "OSError"
        assert result["seconds"] < 1 + LOADED
        assert names_everything(here, result["message"])
        assert here.server.log == []
        here.fetch()
        here.server.log.clear()
        assert here.children.run(**here.job(**flag))["sha256"] == sha256(here.good)
        assert here.server.log == []

    faults(9, [()], check)


@namespaces
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("host", ["10.1.2.3", "dl.example.org", None])
def test_without_a_network_it_works_or_says_what_to_do(site, faults, kind, host):
    def check():
        here = site(kind)
        away = here.job(network=False, waits=False)
        if host and kind == "host":
            url = here.entry["caffemodel"]["url"]
            here.entry["caffemodel"]["url"] = url.replace(
                here.server.url, f"http://{host}"
            )
        result = here.children.run(**away)
        assert result["error"] == "OSError"
        assert names_everything(here, result["message"])

    faults(9, [()], check)


@namespaces
@pytest.mark.parametrize("kind", KINDS)
def test_without_a_network_a_cached_file_works(site, kind):
    here = site(kind)
    here.fetch()
    result = here.children.run(**here.job(network=False))
    assert result["sha256"] == sha256(here.good)


@pytest.mark.parametrize("kind", KINDS)
def test_a_host_that_nobody_answers_for_is_given_up_in_ten_seconds(site, naps, kind):
    here = site(kind)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    nobody = f"http://127.0.0.1:{free}"
    if kind == "host":
        here.entry["caffemodel"]["url"] = nobody + here.path
    else:
        constants.HUGGINGFACE_CO_URL_TEMPLATE = (
            nobody + "/{repo_id}/resolve/{revision}/{filename}"
        )  # the fixture puts it back
    assert names_everything(here, here.refuses(OSError))
    assert 3 < sum(naps) < 10


def test_a_network_that_fails_halfway_is_waited_for(naps):
    failures = [download.DownloadError("cut", again=True, progress=True)]
    failures += [download.DownloadError("no route", again=True, reached=False)] * 4

    def attempt():
        if failures:
            raise failures.pop(0)
        return "done"

    assert download.retry(attempt) == "done"
    assert 15 < sum(naps) < 47


@namespaces
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["mount", "mode"])
def test_a_cache_that_cannot_be_written_serves_what_it_has(site, faults, kind, how):
    def check():
        here = site(kind)
        # As another user, who may come this far:
        folder = pathlib.Path(tempfile.mkdtemp())
        folder.chmod(0o755)
        here.cache, here.hub_cache = folder / "ours", folder / "hubs"
        locks = here.hub_cache / ".locks"
        for path in (here.cache, here.hub_cache, locks):
            path.mkdir()
        barred = {}
        if how == "mode":
            barred = {"user": 65534}
            for path in (here.cache, locks):
                (path / f"{NAME}.lock").touch()
                os.chown(path / f"{NAME}.lock", 65534, 65534)
            for path in (here.cache, here.hub_cache, locks):
                os.chown(path, 65534, 65534)
                path.chmod(0o555)
        if how == "mount":
            barred = {"readonly": [str(here.cache), str(here.hub_cache)]}
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder)
            result = here.children.run(**here.job(**barred))
            assert result["error"] == "OSError"
            variable = "HF_HOME" if kind == "hub" else "KERAS_FCN_CACHE"
            assert variable in result["message"]
            assert here.server.log == []
            here.children.run(**here.job())
            result = here.children.run(**here.job(**barred))
            assert result.get("sha256") == sha256(here.good)
            assert len(here.server.gets()) == 1

    faults(10, [()], check)


def tamper(path, how, precious=None):
    """Does something bad to a file, or leads it to another one."""
    content = path.read_bytes()
    if isinstance(how, int):
        at = how % len(content)
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.unlink()
    if how == "directory":
        path.mkdir()
    elif how == "FIFO":
        os.mkfifo(path)
    elif how == "link":
        precious.write_bytes(b"not the cache's")
        path.symlink_to(precious)
    elif how == "dangling link":
        path.symlink_to("nowhere")


HOW = [997 * step for step in range(100)]
HOW += ["truncated", "empty", "link", "dangling link", "directory", "FIFO", "gone"]


def test_a_tampered_cache_is_never_loaded(site, faults, monkeypatch):
    def check(how, victim):
        here = site("hub" if victim in ("blob", "pointer") else "host")
        here.fetch()
        here.server.log.clear()
        path = {
            "blob": here.final.resolve(),
            "pointer": here.final,
            "port": here.cache / f"{NAME}.h5",
            "record": here.cache / f"{NAME}.json",
        }[victim]
        precious = here.cache.parent / "precious"
        tamper(path, how, precious)
        with contextlib.suppress(OSError, ValueError), monkeypatch.context() as patch:
            patch.setenv("KERAS_FCN_OFFLINE", "1")
            assert here.fetch().read_bytes() == here.good
        assert here.server.log == []
        if victim == "record" and how in ("gone", "directory"):
            return  # then the port counts as put there by hand: it wants a word
        assert here.is_right(here.fetch())
        assert len(here.server.gets()) <= 1
        if how == "link":
            assert precious.read_bytes() == b"not the cache's"

    victims = ["blob", "pointer", "port", "record"]
    cases = [(how, victim) for how in HOW for victim in victims]
    faults(11, cases, check, few=cases[-28:])


CHARACTERS = "./\\ab%:~$*?&=#@ \t\x7f\xe9"
NASTY = ["../../../../x", "/etc/x", "..", ".", "", "a/b", "a\\b", "%2e%2e%2fx"]
NASTY += ["x" * 300, "~/x", "$HOME", "C:x", "a/../../x", "blobs/../../../x"]


def nasty_names(count):
    """Names nobody should use as a path."""
    chance = random.Random(12)
    for number in range(count):
        if number < len(NASTY):
            yield NASTY[number]
        else:
            length = chance.randrange(1, 30)
            text = "".join(chance.choice(CHARACTERS) for _ in range(length))
            yield f"/{text}" if text.strip("ab") == "" else text  # else it is none


def test_names_from_outside_stay_names(site, faults, tmp_path):
    def check(number, text, place):
        here = site("hub" if place != "url" else "host", size=100)
        entry = here.entry.get("hub")
        name, harmless = NAME, False
        if place in ("ETag", "X-Repo-Commit", "Content-Disposition"):
            text = text.strip()
            header = {place: f'"{text}"' if place == "ETag" else text}
            here.server.fault = lambda request: request.send(headers=header)
            harmless = place == "Content-Disposition"
        elif place == "name":
            name = text
        elif place == "url":
            here.entry["caffemodel"]["url"] = f"{here.server.url}/{text}"
        else:
            entry[place] = text
        before = {path for path in tmp_path.iterdir()}
        home = set(pathlib.Path.cwd().iterdir())
        if harmless:
            assert here.is_right(here.fetch())
        else:
            with contextlib.suppress(OSError if place == "url" else ZeroDivisionError):
                with contextlib.suppress(ValueError):
                    hub.fetch(name, here.entry, servers.port)
                    raise AssertionError(f"{place} {text!r} was accepted")
        after = {path for path in tmp_path.iterdir()}
        assert after - before <= {here.cache.parent}
        assert home == set(pathlib.Path.cwd().iterdir())
        if here.cache.parent.exists():
            inside = {path.name for path in here.cache.parent.iterdir()}
            assert inside <= {"ours", "hubs"}

    places = ["ETag", "X-Repo-Commit", "Content-Disposition", "name", "url"]
    places += ["file", "repo", "revision"]
    cases = itertools.product(enumerate(nasty_names(251)), places)
    cases = [(number, text, place) for (number, text), place in cases]
    cases.remove((5, "a/b", "repo"))  # a name like any other
    faults(12, cases, check)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("https://a.org/x", "http://a.org/x"),
        ("https://a.org/x", "http://b.org/x"),
        ("http://a.org/x", "http://b.org/x"),
        ("http://a.org/x", "https://b.org/x"),
        ("https://a.org/x", "ftp://a.org/x"),
        ("http://a.org/x", "file:///x"),
        ("https://a.org/x", "https://me:secret@b.org/x"),
    ],
)
def test_a_redirect_may_not_lead_astray(faults, old, new):
    def check():
        request = urllib.request.Request(old)
        with pytest.raises(download.DownloadError) as caught:
            download._Redirects().redirect_request(request, None, 302, "", {}, new)
        assert not caught.value.again

    faults(13, [()], check)


def test_a_redirect_to_https_or_the_same_host_is_followed(site):
    redirects = download._Redirects()
    for old, new in [("http://a.org/x", "https://a.org/x")] + [
        ("https://a.org/x", "https://b.org/x")
    ]:
        request = urllib.request.Request(old)
        assert redirects.redirect_request(request, None, 302, "", {}, new)
    here = site("host")
    there = here.server.url + here.path
    here.entry["caffemodel"]["url"] = here.server.url + "/moved.caffemodel"
    here.server.fault = once(redirect(lambda request: there))
    assert here.is_right(here.fetch())


@pytest.mark.parametrize(
    "url",
    [
        "http://me:secret@127.0.0.1/x",
        "http://me@127.0.0.1/x",
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http:///x",
        "x.caffemodel",
    ],
)
def test_a_url_that_is_none_is_refused(site, faults, tmp_path, url):
    def check():
        here = site("host")
        here.entry["caffemodel"]["url"] = url
        assert url in here.refuses(ValueError)
        with pytest.raises(ValueError, match="is no URL to download from"):
            download.download(url, tmp_path / "file")

    faults(13, [()], check)


@pytest.mark.parametrize(
    "endpoint", ["http://hub.example.org", "https://me:secret@hub.example.org"]
)
def test_the_hub_is_asked_over_https_and_without_credentials(
    site, faults, monkeypatch, endpoint
):
    def check():
        here = site("hub")
        template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        assert endpoint in here.refuses(ValueError)

    faults(13, [()], check)


def test_what_the_hub_answered_is_said_and_not_what_its_client_makes_of_it(site):
    here = site("hub")
    heads = itertools.count()
    here.server.fault = lambda request: (
        request.command == "HEAD" and next(heads) and request.send(b"", 410)
    )
    assert "answered 410 Gone" in here.refuses(OSError)
    assert next(heads) == 2


def test_a_disk_that_fills_up_while_the_hubs_file_comes_is_said_so(site, monkeypatch):
    here = site("hub")

    def write(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", write)
    message = here.refuses(OSError)
    assert "200,000 bytes needed" in message
    assert str(here.hub_cache) in message


def test_a_file_of_the_hub_on_another_host_is_refused_over_plain_http(site, faults):
    def check():
        here = site("hub")
        to = "http://cdn.example.org/x"
        headers = {"X-Linked-Etag": f'"{sha256(here.body)}"', "Location": to}
        here.server.fault = lambda request: request.send(b"", 302, headers)
        assert to in here.refuses(ValueError)

    faults(13, [()], check)


def test_no_token_leaves_the_hub(site, stubs, faults, monkeypatch):
    def check():
        here = site("hub")
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        sent = []
        cdn = servers.Server()
        cdn.files["/blob"] = here.body
        cdn.fault = lambda r: sent.append(("cdn", r.headers.get("Authorization")))
        linked = {
            "X-Linked-Etag": f'"{sha256(here.body)}"',
            "X-Linked-Size": len(here.body),
            "Location": f"{cdn.url}/blob",
        }

        def lead(request):
            sent.append(("hub", request.headers.get("Authorization")))
            return request.send(b"", 302, linked)

        here.server.fault = lead
        assert here.is_right(here.fetch())
        assert ("hub", "Bearer hf_secret") in sent
        assert [token for who, token in sent if who == "cdn"] == [None]
        cdn.shutdown()

    faults(13, [()], check)


def test_whatever_happens_a_returned_file_is_right(site, faults, monkeypatch):
    """Random walks of 30 steps; online and unharmed, a fetch must also succeed."""

    def check(seed):
        chance = random.Random(seed)
        here = site(chance.choice(KINDS), size=20_000)
        first = (here.entry, here.path, here.body, here.good)
        here.build(20_000, ["sha256"], revision="6" * 40, seed=seed + 1)
        versions = [first, (here.entry, here.path, here.body, here.good)]
        here.server.files = {path: body for _, path, body, _ in versions}
        for _ in range(30):
            step = chance.choice(STEPS)
            if step == "other version":
                here.entry, here.path, here.body, here.good = chance.choice(versions)
            elif step in ("corrupt", "truncate", "delete"):
                harm(here, chance, step)
            fault = FAULTS.get(step)
            here.server.fault = once(fault) if fault else None
            monkeypatch.setenv("KERAS_FCN_OFFLINE", str(int(step == "offline")))
            placed = here.kind == "host" and not (here.cache / f"{NAME}.json").exists()
            expected = OSError if step in ("offline", *FAULTS) else ()
            with contextlib.suppress(expected, *[ValueError] * placed):
                assert here.fetch().read_bytes() == here.good, step
                continue
            if placed:  # a port without its record counts as put there by hand
                here.final.unlink(missing_ok=True)

    faults(14, zip(range(500)), check)


def harm(here, chance, step):
    """Corrupts, truncates or deletes any file of the caches."""
    files = [*here.cache.rglob("*"), *here.hub_cache.rglob("*")]
    files = [path for path in files if path.is_file() and path.stat().st_size]
    if not files:
        return
    path = chance.choice(sorted(files))
    if step == "corrupt":
        tamper(path, chance.randrange(10**6))
    elif step == "truncate":
        tamper(path, "truncated")
    else:
        path.unlink()


FAULTS = {
    "cut": lambda request: request.send(stop=(9_000, "FIN")),
    "reset": lambda request: request.send(stop=(9_000, "RST")),
    "gone": lambda request: request.send(b"", 410),
    "busy": lambda request: request.send(b"", 503),
}
STEPS = [*FAULTS, "fetch", "offline", "corrupt", "truncate", "delete", "other version"]


# Repositories that are in no manifest

BRANCH = "/api/models/fcn/voc/revision/main?blobs=true"


def described(here, revision=REVISION, files=("weights.h5",), **lfs):
    """What the Hub says of the repository of `here`."""
    facts = here.entry["hub"]
    lfs = {"size": facts["bytes"], "sha256": facts["sha256"], "pointerSize": 9} | lfs
    siblings = [{"rfilename": n, "size": lfs["size"], "lfs": lfs} for n in files]
    siblings.append({"rfilename": "README.md", "size": 3})
    facts = {"id": "fcn/voc", "sha": revision, "siblings": siblings}
    return json.dumps(facts).encode()


def test_an_address_gives_the_file_and_a_commit_asks_only_once(site):
    here = site("hub")
    pinned = BRANCH.replace("main", REVISION)
    here.server.files |= {BRANCH: described(here), pinned: described(here)}
    assert here.is_right(hub.fetch_repository("hf://fcn/voc"))
    asked = [path for _, path, _ in here.server.log]
    assert asked == [BRANCH, here.path, here.path, here.path]  # HEAD, HEAD, GET
    here.server.log.clear()
    assert here.is_right(hub.fetch_repository("hf://fcn/voc"))
    assert [path for _, path, _ in here.server.log] == [BRANCH]
    here.server.log.clear()
    for _ in range(2):
        assert here.is_right(hub.fetch_repository(f"hf://fcn/voc@{REVISION}"))
    assert [path for _, path, _ in here.server.log] == [pinned]


def test_a_branch_that_moved_on_is_followed(site, monkeypatch):
    here = site("hub")
    here.server.files[BRANCH] = described(here)
    hub.fetch_repository("hf://fcn/voc")
    later = "6" * 40
    here.build(100_000, (), revision=later, seed=1)
    here.server.files[BRANCH] = described(here, later)
    assert hub.fetch_repository("hf://fcn/voc").read_bytes() == here.good
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch_repository("hf://fcn/voc").read_bytes() == here.good


def test_a_branch_whose_new_file_never_came_is_what_it_was(site, monkeypatch):
    here = site("hub")
    here.server.files[BRANCH] = described(here)
    before = hub.fetch_repository("hf://fcn/voc").read_bytes()
    here.build(100_000, (), revision="6" * 40, seed=1)
    here.server.files = {BRANCH: described(here, "6" * 40)}
    with pytest.raises(OSError, match="404"):
        hub.fetch_repository("hf://fcn/voc")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert hub.fetch_repository("hf://fcn/voc").read_bytes() == before


@pytest.mark.parametrize("how", ["offline", "gone"])
def test_without_the_hub_a_branch_is_what_it_was_and_that_is_said(
    how, site, monkeypatch, caplog
):
    here = site("hub")
    here.server.files[BRANCH] = described(here)
    hub.fetch_repository("hf://fcn/voc")
    if how == "offline":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    else:
        here.server.files = {}
    assert here.is_right(hub.fetch_repository("hf://fcn/voc"))
    assert f"hf://fcn/voc is taken from commit {REVISION}" in caplog.text
    with pytest.raises(OSError, match="hf://fcn/new could not be fetched.*revision"):
        hub.fetch_repository("hf://fcn/new")


def test_repositories_whose_names_are_written_alike_are_not_mixed_up(site, monkeypatch):
    here = site("hub")
    here.server.files[BRANCH] = described(here)
    hub.fetch_repository("hf://fcn/voc")
    (note,) = here.cache.glob("*.json")
    note.rename(note.with_name("fcn--a--b@main.json"))  # of fcn/a--b or fcn--a/b
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="hf://fcn--a/b could not be fetched"):
        hub.fetch_repository("hf://fcn--a/b")


@pytest.mark.parametrize(
    "endpoint", ["http://hub.example.org", "https://me:secret@hub.example.org"]
)
def test_a_repository_is_described_over_https_and_without_credentials(
    site, monkeypatch, endpoint
):
    site("hub")
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    with pytest.raises(ValueError, match=f"{endpoint}/fcn/voc/tree/main"):
        hub.fetch_repository("hf://fcn/voc")


def test_a_hub_that_is_busy_is_asked_again_about_a_repository(site, naps):
    here = site("hub")
    here.server.files[BRANCH] = described(here)
    here.server.fault = once(lambda request: request.send(b"", 503))
    assert here.is_right(hub.fetch_repository("hf://fcn/voc"))
    assert len(naps) == 1


def test_a_hub_that_nobody_answers_for_is_given_up_in_ten_seconds(
    site, naps, monkeypatch
):
    site("hub")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free}")
    with pytest.raises(OSError, match="hf://fcn/voc could not be fetched"):
        hub.fetch_repository("hf://fcn/voc")
    assert 3 < sum(naps) < 10


def test_a_hub_that_says_nothing_about_a_repository_is_not_waited_for(
    site, monkeypatch
):
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.1)
    here = site("hub")
    here.server.fault = lambda request: threading.Event().wait(20)
    start = time.perf_counter()
    with pytest.raises(OSError, match="hf://fcn/voc could not be fetched"):
        hub.fetch_repository("hf://fcn/voc")
    assert time.perf_counter() - start < 6 * 0.1 + LOADED


@pytest.mark.parametrize("repo", ["Fcn/VOC", f"fcn/{'v' * 96}"])
def test_a_repository_may_have_capitals_and_a_long_name(site, repo):
    here = site("hub")
    here.server.files = {
        BRANCH.replace("fcn/voc", repo): described(here),
        here.path.replace("fcn/voc", repo): here.body,
    }
    assert hub.fetch_repository(f"hf://{repo}").read_bytes() == here.good


def test_a_commit_for_which_the_hub_describes_another_is_refused(site):
    here = site("hub")
    wanted = "7" * 40
    here.server.files[BRANCH.replace("main", wanted)] = described(here)
    with pytest.raises(ValueError, match=f"{REVISION}', expected {wanted}"):
        hub.fetch_repository(f"hf://fcn/voc@{wanted}")


def test_wrong_bytes_of_a_repository_are_refused(site):
    here = site("hub")
    here.server.files[BRANCH] = described(here, sha256="0" * 64)
    with pytest.raises(ValueError, match="0" * 64):
        hub.fetch_repository("hf://fcn/voc")


def test_a_weight_file_of_which_the_hub_knows_no_hash_is_an_error(site):
    here = site("hub")
    answer = json.loads(described(here))
    answer["siblings"][0]["lfs"] = None
    here.server.files[BRANCH] = json.dumps(answer).encode()
    with pytest.raises(ValueError, match="weights.h5; expected one, in Git LFS"):
        hub.fetch_repository("hf://fcn/voc")


@pytest.mark.parametrize("files", [(), ("a.h5", "b.h5")])
def test_a_repository_without_the_one_weight_file_is_an_error(files, site):
    here = site("hub")
    here.server.files[BRANCH] = described(here, files=files)
    with pytest.raises(ValueError, match=f"{', '.join(files) or 'none'}; expected one"):
        hub.fetch_repository("hf://fcn/voc")


@pytest.mark.parametrize(
    "address",
    ["hf://voc", "hf://fcn/voc/x", "hf://../voc", "hf://fcn/voc@", "hf://a/b@x/y"],
)
def test_what_is_no_address_is_refused(address, site):
    here = site("hub")
    with pytest.raises(ValueError, match=r"no address on the Hub; expected hf://owner"):
        hub.fetch_repository(address)
    assert here.server.log == []


@pytest.mark.parametrize("said", ["file", "sha256", "revision", "bytes"])
def test_names_and_hashes_that_the_hub_says_cannot_lead_astray(said, site):
    here = site("hub")
    nasty = "../../../x.h5" if said == "file" else "../x"
    files = (nasty,) if said == "file" else ("weights.h5",)
    lfs = {said: nasty} if said == "sha256" else {}
    revision = nasty if said == "revision" else REVISION
    answer = described(here, revision, files, **lfs)
    if said == "bytes":
        answer = b"[1, 2]"
    here.server.files[BRANCH] = answer
    with pytest.raises(ValueError, match="cannot be a name|no description"):
        hub.fetch_repository("hf://fcn/voc")
    assert [path for _, path, _ in here.server.log] == [BRANCH]


@pytest.mark.parametrize("content", [b"", b"[]", b'{"repo": "fcn/voc"}', b"\xff"])
def test_a_damaged_note_of_a_branch_is_as_good_as_none(content, site, monkeypatch):
    here = site("hub")
    here.server.files[BRANCH] = described(here)
    hub.fetch_repository("hf://fcn/voc")
    (note,) = here.cache.glob("*.json")
    note.write_bytes(content)
    assert here.is_right(hub.fetch_repository("hf://fcn/voc"))
    note.write_bytes(content)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="could not be fetched"):
        hub.fetch_repository("hf://fcn/voc")
