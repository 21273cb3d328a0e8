"""Finds the weight file of a checkpoint, verified: the cache, the Hub, the first host.

A file is hashed at every load, not only when it arrives: 0.4 s for 540 MB. A wrong one
is fetched once more, then refused.
"""

import contextlib
import errno
import json
import logging
import os
import re
import secrets
import time
from pathlib import Path
from urllib.parse import urlsplit

from keras_fcn import files
from keras_fcn.download import (
    DownloadError,
    check_space,
    check_url,
    disk_full,
    download,
    forget,
    retry,
    status_error,
)
from keras_fcn.files import DIGESTS, measure

SCHEME = "hf://"
CHECKPOINT_NAME = r"[a-z0-9_-][a-z0-9._-]{,99}"
FILE_NAME = r"[A-Za-z0-9_-][A-Za-z0-9._-]{,199}"
COMMIT = r"[0-9a-f]{40}"
SHA256 = r"[0-9a-f]{64}"
HUB_FIELDS = {"repo", "revision", "file", "bytes", "sha256"}
# Exceptions of the Hub's client, by name: their library differs between its versions.
FINAL = {"OfflineModeIsEnabled", "TooManyRedirects", "UnsupportedProtocol"}

logger = logging.getLogger("keras_fcn")


def fetch(name, entry, port, *, trust_first_download=False):
    """Finds or fetches the HDF5 weight file of a checkpoint, and verifies it.

    The file comes from the cache; else from the Hub, if `entry` has `hub`; else from
    the host in `entry["caffemodel"]`, ported here once. A host that only drips is given
    up; the Hub's client waits for it as long as it drips.

    Args:
        name: Checkpoint, such as `"vgg16-8s-voc"`.
        entry: Its table in the manifest, a dict with `hub` or `caffemodel`.
        port: Function `(caffemodel_path, output_path)` that writes the HDF5 file; may
            be None for an entry that has `hub`.
        trust_first_download: Whether to accept a file of which nobody has published a
            hash. Its hash is kept, and holds from then on.

    Returns:
        `pathlib.Path` of the file. Its content has the hash that was published or, if
        it was ported, the one recorded when the verified original was.

    Raises:
        ValueError: If a name, a URL or a file's content is not what it should be.
        OSError: If the network, the disk or a missing file prevents it.
    """
    _check_names(name, entry)
    path = _cached(name, entry)
    if path is not None:
        _sweep(cache_folder(), f"{name}.keras_fcn.*")
        _sweep_hub(entry)
        return path
    with _lock(name, entry) as exclusive:
        path = _cached(name, entry)  # another process may have brought it meanwhile
        path = path or _left_by_hand(name, entry, trust_first_download)
        if path is not None:
            return path
        try:
            if "hub" in entry:
                return _from_hub(entry["hub"])
            return _from_first_host(name, entry, port, exclusive, trust_first_download)
        except DownloadError as error:
            raise OSError(
                f"{name} could not be fetched: {error}.\n{_by_hand(name, entry)}"
            ) from error


def fetch_repository(address):
    """Finds or fetches the weight file of any repository on the Hub, and verifies it.

    The Hub says at which commit a branch is, and the hash of the file there. What it
    said is kept: it holds for a commit, and for a branch while there is no network.

    Args:
        address: `hf://owner/repo`, or `hf://owner/repo@revision`, a branch, a tag or a
            commit. The repository holds one .h5 file, as `tools/publish.py` leaves it.

    Returns:
        `pathlib.Path` of the file.

    Raises:
        ValueError: If the address, what the Hub says or the file's content is not what
            it should be.
        OSError: If the network, the disk or a missing repository prevents it.
    """
    match = re.fullmatch(
        f"{SCHEME}({FILE_NAME}/{FILE_NAME})(?:@({FILE_NAME}))?", address
    )
    if not match:
        raise ValueError(
            f"{address!r} is no address on the Hub; expected hf://owner/repo or "
            "hf://owner/repo@revision, with a branch, a tag or a commit."
        )
    repo, revision = match[1], match[2] or "main"
    name = repo.replace("/", "--").lower()[:100]
    note = cache_folder() / f"{name}@{revision}.json"
    known = _read_json(note)
    sound = isinstance(known, dict) and HUB_FIELDS <= known.keys()
    if not sound or known["repo"] != repo:  # a--b/c and a/b--c share a name
        known = None
    if known is None or not re.fullmatch(COMMIT, revision):
        try:
            hub = _hub_file(repo, revision)
        except DownloadError as error:
            if known is None:
                raise OSError(
                    f"{address} could not be fetched: {error}. Check repository and "
                    "revision, and log in with `hf auth login` if it is private."
                ) from error
            commit = known["revision"]
            logger.warning("%s is taken from commit %s: %s", address, commit, error)
            hub = known
    else:
        hub = known
    path = fetch(name, {"hub": hub}, None)
    if hub != known:
        note.parent.mkdir(parents=True, exist_ok=True)
        _write_json(note, hub)
    return path


def cache_folder():
    """Returns `KERAS_FCN_CACHE`, else `keras_fcn` in the user's cache folder."""
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = os.environ.get("KERAS_FCN_CACHE") or f"{caches}/keras_fcn"
    return Path(folder).expanduser().absolute()


# What is there: read only, no request


def _cached(name, entry):
    """The verified file if it is here, else None."""
    path = cache_folder() / f"{name}.h5"
    if _measure(path).get("sha256") in _accepted(name, entry):
        return path
    if "hub" in entry:
        # Not hf_hub_download: it can send a request even for a file that it has.
        from huggingface_hub import try_to_load_from_cache

        hub = entry["hub"]
        path = try_to_load_from_cache(hub["repo"], hub["file"], None, hub["revision"])
        if isinstance(path, str) and _agrees(_measure(Path(path)), hub):
            return Path(path)
    return None


def _accepted(name, entry):
    """The hashes that `name`.h5 in our cache may have."""
    hub, record, published = entry.get("hub"), _record(name), _published(entry)
    accepted = {hub["sha256"]} if hub else set()
    if record and record["source"] and published:
        holds = _agrees(record["source"], published)
    else:  # somebody trusted it, which a hash on the Hub overrules
        holds = record and not hub
    return accepted | {record["sha256"]} if holds else accepted


def _record(name):
    """What was recorded of `name`.h5: its length, sha256 and `source`, or None.

    `source` holds the URL, length and hashes of the caffemodel; it is None if somebody
    put the HDF5 file there and trusted it.
    """
    record = _read_json(cache_folder() / f"{name}.json")
    try:
        return {key: record[key] for key in ("bytes", "sha256", "source")}
    except (KeyError, TypeError):
        return None


def _read_json(path):
    """What a file of ours holds; None if there is none, or a damaged one."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError):
        return None


def _published(entry):
    """The hashes, and the length, that the manifest states of the caffemodel."""
    source = entry.get("caffemodel", {})
    stated = {key: source[key] for key in ("bytes", *DIGESTS) if key in source}
    return stated if stated.keys() - {"bytes"} else {}


def _left_by_hand(name, entry, trust):
    """`name`.h5 that somebody put there and trusts; removes a port gone bad."""
    path, record = cache_folder() / f"{name}.h5", _record(name)
    if not os.path.lexists(path):
        return None
    found = _measure(path)
    if found.get("sha256") in _accepted(name, entry):  # where locks do nothing
        return path
    recorded = os.path.lexists(path.with_suffix(".json"))
    if not found or (recorded and (record is None or record["source"])):
        logger.warning("%s is not what was written there: it is removed", path)
        _discard(path)
        return None
    if recorded or "hub" in entry:
        raise ValueError(_mismatch(path, found, entry.get("hub") or record))
    if not trust:
        raise ValueError(_trust_needed(name, entry["caffemodel"]["url"], path))
    logger.warning("%s is trusted from now on: %s", path, _facts(found))
    _keep_record(name, found, source=None)
    return path


# The Hub


def _hub_file(repo, revision):
    """Asks the Hub for the one .h5 file of a repository: a manifest's `hub` table."""
    from huggingface_hub import HfApi, constants, errors

    _check_online()
    url = f"{constants.ENDPOINT}/{repo}/tree/{revision}"
    _check_hub_url(url)

    def attempt():
        try:
            return HfApi().model_info(
                repo,
                revision=revision,
                files_metadata=True,
                timeout=constants.HF_HUB_ETAG_TIMEOUT,
            )
        except (OSError, RuntimeError, errors.HTTPError) as error:
            raise _hub_error(error, {"bytes": 0}, url, reached=False) from error
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{url} is no description of a repository: {error}."
            ) from error

    info = retry(attempt)
    files = [f for f in info.siblings or () if f.rfilename.endswith(".h5")]
    if len(files) != 1 or not files[0].lfs:
        names = ", ".join(file.rfilename for file in files) or "none"
        raise ValueError(
            f"{url} has these .h5 files: {names}; expected one, in Git LFS, which "
            "knows its hash. Publish it with tools/publish.py."
        )
    if re.fullmatch(COMMIT, revision) and info.sha != revision:
        raise ValueError(f"{url} is of commit {info.sha!r}, expected {revision}.")
    (file,) = files
    facts = {"file": file.rfilename, "bytes": file.size, "sha256": file.lfs.sha256}
    return {"repo": repo, "revision": info.sha, **facts}


def _from_hub(hub):
    from huggingface_hub import constants, hf_hub_url

    _check_online()
    url = hf_hub_url(hub["repo"], hub["file"], revision=hub["revision"])
    _check_hub_url(url)
    root = Path(constants.HF_HUB_CACHE).absolute()
    _sweep_hub({"hub": hub})
    check_space(root, hub["bytes"])
    path, _ = _verified(lambda: _download_from_hub(hub, url), hub, url, root)
    return path


def _download_from_hub(hub, url):
    from huggingface_hub import constants, errors, get_hf_file_metadata, hf_hub_download

    timeout = constants.HF_HUB_ETAG_TIMEOUT
    reached = False

    def attempt():
        nonlocal reached
        try:
            metadata = get_hf_file_metadata(url, timeout=timeout)
            reached = True
            _check_metadata(metadata, hub, url)
            path = hf_hub_download(
                hub["repo"], hub["file"], revision=hub["revision"], etag_timeout=timeout
            )
            return Path(path).absolute()
        except (OSError, RuntimeError, errors.HTTPError) as error:
            raise _hub_error(error, hub, url, reached) from error

    return retry(attempt)


def _check_metadata(metadata, hub, url):
    # The client uses the ETag as a path and does not compare the commit.
    if not re.fullmatch(f"{COMMIT}|{SHA256}", metadata.etag or ""):
        raise ValueError(f"{url} has the ETag {metadata.etag!r}, expected a hash.")
    if metadata.commit_hash != hub["revision"]:
        raise ValueError(
            f"{url} is of commit {metadata.commit_hash!r}, expected {hub['revision']}."
        )
    _check_hub_url(metadata.location)


def _check_hub_url(url):
    check_url(url)
    parts = urlsplit(url)
    loopback = parts.hostname in ("127.0.0.1", "::1", "localhost")
    if parts.scheme != "https" and not loopback:
        raise ValueError(f"{url} is refused: the Hub is asked over https:// only.")


def _hub_error(error, hub, url, reached):
    """The client's exception as one of ours."""
    from huggingface_hub import constants

    if isinstance(error, FileNotFoundError) and error.__cause__:
        # The client says "check your connection", whatever it is.
        error = error.__cause__
    response = getattr(error, "response", None)
    if response is not None:
        return status_error(response.status_code, url, response.headers)
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(constants.HF_HUB_CACHE, hub["bytes"])
    if number is not None:
        return OSError(f"{error}: set HF_HOME to a folder that can be written.")
    kind = type(error).__name__
    return DownloadError(
        f"{url} failed: {kind} {error}", again=kind not in FINAL, reached=reached
    )


# The first host


def _from_first_host(name, entry, port, exclusive, trust):
    url, record, folder = entry["caffemodel"]["url"], _record(name), cache_folder()
    expected = _published(entry) or (record and record["source"]) or {}
    by_hand = folder / _file_name(url)
    if not by_hand.is_file():
        _check_online()
    if not expected and not trust:
        raise ValueError(_trust_needed(name, url, by_hand))
    # Where locks do nothing, nobody may touch the part of another process.
    part = folder / f"{name}.keras_fcn{'' if exclusive else _token()}.part"
    keep = exclusive  # the next call goes on where an interruption stopped this one
    try:
        original, found = _original(url, by_hand, part, expected)
        path = _ported(name, original, {"url": url, **found}, port)
        if not expected:
            logger.warning("%s is trusted from now on: %s", url, _facts(found))
        keep = False  # the hash is recorded, and half a gigabyte is much to keep
        return path
    except ValueError:
        keep = False
        raise
    finally:
        if not keep:
            forget(part)


def _original(url, by_hand, part, expected):
    """The verified caffemodel, put there by hand or downloaded, and its facts."""
    if by_hand.is_file():
        found = _measure(by_hand, DIGESTS)
        if not _agrees(found, expected):
            raise ValueError(_mismatch(by_hand, found, expected))
        return by_hand, found

    def get():
        download(url, part, copies=2)  # the other one is the port
        return part

    _sweep(part.parent, "*.keras_fcn.*", keep=part.name)
    return _verified(get, expected, url, part.parent)


def _ported(name, original, source, port):
    """Ports `original`, and records what it was and what became of it."""
    path = cache_folder() / f"{name}.h5"
    output = path.with_name(f"{name}.keras_fcn{_token()}.h5")
    try:
        port(original, output)
        # The record first: a file without one would count as put there by hand.
        _keep_record(name, _measure(output), source)
        _move(output, path)
    except ValueError as error:
        raise ValueError(
            f"{name} cannot be ported from {source['url']} ({_facts(source)}): {error}"
        ) from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full(path.parent, source["bytes"]) from error
        raise
    finally:
        output.unlink(missing_ok=True)
    return path


def _keep_record(name, found, source):
    path = cache_folder() / f"{name}.json"
    _write_json(path, {**found, "source": source})


def _write_json(path, facts):
    # Not files.write_bytes, which follows links: here they lead where strangers please.
    temporary = path.with_name(f"{path.stem}.keras_fcn{_token()}.json")
    temporary.write_text(json.dumps(facts, indent=1))
    _move(temporary, path)


# Files


def _verified(get, expected, url, root):
    """`get`'s file and its facts; a wrong one is removed and fetched once more."""
    for _ in range(2):
        path = get()
        found = _measure(path, DIGESTS)
        if _agrees(found, expected):
            return path, found
        _discard(path, root)
    raise ValueError(_mismatch(url, found, expected))


def _measure(path, digests=DIGESTS[:1]):
    """Length and hashes of a regular file; nothing of anything else."""
    return measure(path, digests) if path.is_file() else {}  # a FIFO would never end


def _agrees(found, expected):
    stated = [key for key in ("bytes", *DIGESTS) if key in expected]
    return all(found.get(key) == expected[key] for key in stated)


def _discard(path, root=None):
    """Removes `path` and what its links lead to inside `root`, nothing outside."""
    target = path.parent / os.readlink(path) if path.is_symlink() else None
    if path.is_dir() and target is None:
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    if target is not None and root is not None:
        target = Path(os.path.abspath(target))
        if target.is_relative_to(root):
            _discard(target, root)


def _move(temporary, path):
    """Makes `temporary` visible as `path`, whole, whatever happens."""
    with temporary.open("r+b") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)
    files.sync_folder(path.parent)


def _sweep_hub(entry):
    """Removes what the Hub's client has left behind of a repository."""
    if "hub" in entry:
        from huggingface_hub import constants

        folder = f"models--{entry['hub']['repo'].replace('/', '--')}"
        _sweep(Path(constants.HF_HUB_CACHE, folder, "blobs"), "*.incomplete")


def _sweep(folder, pattern, keep="/"):
    """Removes what transfers that were killed have left behind."""
    for path in folder.glob(pattern):
        # Another process sweeps, too; and what cannot be removed may stay.
        with contextlib.suppress(OSError):
            old = time.time() - path.lstat().st_mtime > files.ORPHAN_SECONDS
            if old and not path.name.startswith(keep):
                path.unlink()


def _token():
    return f".{secrets.token_hex(4)}"


@contextlib.contextmanager
def _lock(name, entry):
    """Holds off other fetches of `name`; yields False where locks do nothing."""
    folder, variable = cache_folder(), "KERAS_FCN_CACHE"
    if "hub" in entry:
        from huggingface_hub import constants

        folder, variable = Path(constants.HF_HUB_CACHE, ".locks"), "HF_HOME"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, "no permission to write", str(folder))
        lock = contextlib.ExitStack()
        exclusive = lock.enter_context(files.locked(folder / f"{name}.lock", name))
    except OSError as error:
        raise OSError(
            f"{name} is not in the cache, which cannot be written: {error}. Set "
            f"{variable} to a folder that can."
        ) from error
    with lock:
        yield exclusive


# Names and words


def _check_names(name, entry):
    """Raises `ValueError` for a name that could lead out of the cache."""
    names = [(name, CHECKPOINT_NAME)]
    if "hub" in entry:
        names += [
            (entry["hub"]["repo"], f"{FILE_NAME}/{FILE_NAME}"),
            (entry["hub"]["revision"], COMMIT),
            (entry["hub"]["file"], FILE_NAME),
            (entry["hub"]["sha256"], SHA256),
        ]
    if "caffemodel" in entry:
        check_url(entry["caffemodel"]["url"])
        names.append((_file_name(entry["caffemodel"]["url"]), FILE_NAME))
    if len(names) == 1:
        raise ValueError(f"{name} has neither `hub` nor `caffemodel` in the manifest.")
    for text, pattern in names:
        if not re.fullmatch(pattern, text):
            raise ValueError(
                f"{text!r}, said of {name!r}, cannot be a name or a hash; expected "
                f"{pattern}."
            )


def _file_name(url):
    return urlsplit(url).path.rsplit("/", 1)[-1]


def _check_online():
    for variable in ("KERAS_FCN_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").upper() in ("1", "ON", "YES", "TRUE"):
            raise DownloadError(f"{variable} forbids any request")


def _facts(facts):
    words = [f"{facts['bytes']:,} bytes"] if "bytes" in facts else []
    return ", ".join(
        words + [f"{kind} {facts[kind]}" for kind in DIGESTS if kind in facts]
    )


def _mismatch(what, found, expected):
    return (
        f"{what} has {_facts(found) or 'no content'}; expected {_facts(expected)}. "
        "It is another file, a damaged one or a web page."
    )


def _trust_needed(name, url, path):
    return (
        f"{name}: nobody has published a hash of {url}.\n"
        f"If you trust that host and the way to it: keras-fcn fetch {name} "
        "--trust-first-download; its hash is kept and holds from then on.\n"
        f"The same takes a file that you trust and have put at {path}, and then "
        "downloads nothing."
    )


def _by_hand(name, entry):
    """What to do where there is no network."""
    if "hub" in entry:
        from huggingface_hub import hf_hub_url

        facts, path = entry["hub"], cache_folder() / f"{name}.h5"
        url = hf_hub_url(facts["repo"], facts["file"], revision=facts["revision"])
    else:
        facts, url = entry["caffemodel"], entry["caffemodel"]["url"]
        path = cache_folder() / _file_name(url)
    size = []
    if "bytes" not in facts and "parameters" in entry:  # 4 bytes each, and a little
        size = [f"about {4e-6 * entry['parameters']:,.0f} MB"]
    known = ", ".join([*size, _facts(facts) or "no hash is published"])
    lines = [f"By hand: put {url} ({known}) at {path}"]
    if "hub" not in entry and not _published(entry):
        lines.append(f"Then, once: keras-fcn fetch {name} --trust-first-download")
    if "caffemodel" in entry:
        file = _file_name(entry["caffemodel"]["url"])
        lines.append(
            f"Or port the original: keras-fcn convert {file} "
            f"--checkpoint {name} --output {name}.h5"
        )
    return "\n".join(lines)
