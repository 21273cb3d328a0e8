"""Downloads over plain HTTP that survive cuts, restarts and servers that lie."""

import contextlib
import email.utils
import errno
import http.client
import json
import os
import random
import re
import shutil
import socket
import ssl
import sys
import threading
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from keras_fcn.progress import reporting

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
WAITS = (1, 2, 4, 8, 16)  # seconds before each further try, +-50 %
MAX_RETRY_AFTER = 120  # seconds that a server may ask us to wait
UNREACHABLE_SECONDS = 10  # for a host that never answered
SOCKET_SECONDS = 10  # for a connection, and between two bytes
SLOW_SECONDS, SLOW_RATE = 60, 1000  # seconds, bytes per second: slower is given up
MAX_BYTES = 2**31  # protobuf's own limit: no caffemodel is longer
BLOCK = 2**18


class DownloadError(OSError):
    """A transfer failed.

    Args:
        message: What happened, with the URL.
        again: Whether another try may succeed.
        after: Seconds the server asks us to wait first, or None.
        reached: Whether the host answered at all.
        progress: Whether the file grew before the failure.
    """

    def __init__(
        self, message, *, again=False, after=None, reached=True, progress=False
    ):
        super().__init__(message)
        self.again = again
        self.after = after
        self.reached = reached
        self.progress = progress


def download(url, path, *, copies=1):
    """Downloads `url` into `path`, from where an earlier call or process stopped.

    What has arrived stays in `path` when the transfer fails, with a note of its
    version in `path` + ".json". The content is the caller's to verify.

    Args:
        url: `http://` or `https://`, without credentials.
        path: `pathlib.Path` of the file; nobody else may write to it meanwhile.
        copies: Lengths of the file that the disk must have room for.

    Raises:
        ValueError: If `url` is not of that kind.
        DownloadError: If the file cannot be had.
        OSError: If the disk is full.
    """
    check_url(url)
    pace = _Pace()
    with _progress(url) as report:
        retry(lambda: _attempt(url, path, copies, pace, report))


def retry(attempt):
    """Calls `attempt` until it returns, and returns what it does.

    A `DownloadError` that allows it is tried five times more, at growing intervals; the
    count starts anew with every progress. A host that never answers is given up after
    `UNREACHABLE_SECONDS`.
    """
    start, failures, answered = time.monotonic(), 0, False
    while True:
        try:
            return attempt()
        except DownloadError as error:
            failures = 1 if error.progress else failures + 1
            answered = answered or error.reached
            if not error.again or failures > len(WAITS):
                raise
            wait = error.after
            if wait is None:
                wait = WAITS[failures - 1] * random.uniform(0.5, 1.5)
            late = time.monotonic() + wait - start > UNREACHABLE_SECONDS
            if late and not answered:
                raise
        time.sleep(wait)


def status_error(status, url, headers):
    """The `DownloadError` for an HTTP status, by the answer's `Retry-After`."""
    message = f"{url} answered {status} {http.client.responses.get(status, '')}".strip()
    after = _retry_after(headers.get("Retry-After"))
    if status not in RETRIED:
        return DownloadError(message)
    if after is not None and after > MAX_RETRY_AFTER:
        return DownloadError(f"{message}, and to come back in {after:,.0f} s")
    return DownloadError(message, again=True, after=after)


def check_url(url):
    """Raises `ValueError` unless `url` is HTTP(S) with a host and no credentials."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number, half an IPv6 address
        sound = False
    if not sound or "@" in parts.netloc:
        raise ValueError(
            f"{url!r} is no URL to download from: expected http:// or https://, a host "
            "and no user name or password."
        )


def check_space(folder, need):
    """Raises `OSError` if the disk of `folder` has less than `need` bytes free."""
    if shutil.disk_usage(folder).free < need:
        raise disk_full(folder, need)


def disk_full(folder, need):
    """The `OSError` that says how many bytes `folder` lacks."""
    free = shutil.disk_usage(folder).free
    return OSError(
        errno.ENOSPC,
        f"The disk is too full: {need:,} bytes needed, {free:,} free. Make room, or "
        "point to another disk: KERAS_FCN_CACHE for weights, HF_HOME for files of the "
        "Hub, TFDS_DATA_DIR for data sets",
        str(folder),
    )


def forget(path):
    """Removes a download that is complete or no longer wanted, and its note."""
    path.unlink(missing_ok=True)
    _note(path).unlink(missing_ok=True)


class _Pace:
    """Gives up a transfer that crawls, and knows whether it gets anywhere."""

    def __init__(self):
        self.since = time.monotonic()
        self.received = 0
        self.longest = 0

    def count(self, num_bytes, url):
        self.received += num_bytes
        now = time.monotonic()
        if now - self.since < SLOW_SECONDS:
            return
        if self.received < SLOW_RATE * SLOW_SECONDS:
            raise DownloadError(
                f"{url} sent {self.received:,} bytes in {now - self.since:.0f} s, too "
                "slow to wait for"
            )
        self.since, self.received = now, 0


def _attempt(url, path, copies, pace, report):
    """One request: the whole file, or the rest of what `path` holds."""
    pace.count(0, url)
    have, version, total = _left_behind(url, path)
    if have and have == total:
        return
    try:
        response = _open(url, have, version)
        if response is None:
            _take_note(path, url, version, have)
            return
        with response:
            have, total = _place(response, url, path, have, version, total)
            check_space(path.parent, copies * (total or 0) - have)
            _receive(response, url, path, have, total, pace, report)
    except DownloadError as error:
        pace.since += error.after or 0
        length = path.stat().st_size if path.exists() else 0
        error.progress = length > pace.longest
        pace.longest = max(pace.longest, length)
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            need = copies * (total or path.stat().st_size + BLOCK)
            forget(path)
            raise disk_full(path.parent, need) from error
        raise


def _place(response, url, path, have, version, total):
    """Where the answer's bytes belong: `(have, total)`, total None if unknown."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity" or response.status not in (200, 206):
        raise DownloadError(
            f"{url} answered {response.status} with Content-Encoding {encoding}; "
            "expected 200 or 206 and the file as it is"
        )
    if response.status == 206:
        begin, end, length = _content_range(response.headers)
        seen = {response.headers.get(key) for key in ("ETag", "Last-Modified")} - {None}
        asked = have and (begin, end) == (have, length - 1)
        if not asked or total not in (None, length) or (seen and version not in seen):
            forget(path)  # bytes of another version, or of another place
            raise DownloadError(f"{url} sent a wrong part of the file", again=True)
        return have, length
    forget(path)
    if (response.length or 0) > MAX_BYTES:
        raise DownloadError(f"{url} announces {response.length:,} bytes, too many")
    _take_note(path, url, _version(response.headers), response.length)
    return 0, response.length


def _receive(response, url, path, have, total, pace, report):
    """Appends the answer's body to the `have` bytes that `path` holds."""
    report(have, total)
    with path.open("r+b" if have else "wb") as file:
        file.seek(have)
        while block := _read(response, url):
            file.write(block)
            have += len(block)
            report(have, total)
            pace.count(len(block), url)
            if have > MAX_BYTES:
                break
    if have > MAX_BYTES:
        forget(path)  # or the next call would go on with it
        raise DownloadError(f"{url} sends more than {MAX_BYTES:,} bytes")
    if have != total and (total is not None or have == 0):
        raise DownloadError(
            f"{url} was cut after {have:,} of {total or 'unknown'} bytes", again=True
        )
    if total is None:
        _take_note(path, url, _version(response.headers), have)


def _read(response, url):
    try:
        return response.read1(BLOCK)  # `read` would wait for a dripping block's end
    except (http.client.HTTPException, OSError) as error:
        raise DownloadError(f"{url} broke off: {_reason(error)}", again=True) from error


def _open(url, have, version):
    """The answer to a GET of all but the first `have` bytes; None if that is all."""
    headers = {"User-Agent": "keras_fcn", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version}
    opener = urllib.request.build_opener(_Redirects, _Http, _Https)
    request = urllib.request.Request(url, headers=headers)
    try:
        return opener.open(request, timeout=SOCKET_SECONDS)
    except urllib.error.HTTPError as error:
        with error:
            if (
                error.code == 416
                and error.headers["Content-Range"] == f"bytes */{have}"
            ):
                return None
            if error.code == 416 and have:
                # What we hold is no part of the file: once more, from zero.
                return _open(url, 0, None)
            raise status_error(error.code, url, error.headers) from error
    except urllib.error.URLError as error:
        raise DownloadError(
            f"{url} cannot be reached: {_reason(error.reason)}",
            again=not isinstance(error.reason, ssl.SSLCertVerificationError),
            reached=False,
        ) from error
    except DownloadError:  # of a redirect
        raise
    except (http.client.HTTPException, OSError) as error:
        raise DownloadError(
            f"{url} gave no answer: {_reason(error)}", again=True
        ) from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows no redirect that leaves HTTPS, or plain HTTP for another host."""

    def redirect_request(self, request, fp, code, msg, headers, newurl):
        old, new = urlsplit(request.full_url), urlsplit(newurl)
        try:
            check_url(newurl)
        except ValueError as error:
            raise DownloadError(f"{request.full_url} leads astray: {error}") from error
        if old.scheme == "https" and new.scheme == "http":
            raise DownloadError(f"{request.full_url} leads off HTTPS to {newurl}")
        if old.scheme == "http" and old.hostname != new.hostname:
            raise DownloadError(f"{request.full_url} leads to another host: {newurl}")
        return super().redirect_request(request, fp, code, msg, headers, newurl)


class _Punctual:
    """A connection whose answer must begin in time: headers can drip, too."""

    def getresponse(self):
        hang_up = threading.Timer(SLOW_SECONDS, self.sock.shutdown, [socket.SHUT_RDWR])
        hang_up.daemon = True
        hang_up.start()
        try:
            return super().getresponse()
        finally:
            hang_up.cancel()


class _HTTPConnection(_Punctual, http.client.HTTPConnection):
    pass


class _HTTPSConnection(_Punctual, http.client.HTTPSConnection):
    pass


class _Http(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_HTTPConnection, request)


class _Https(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_HTTPSConnection, request, context=self._context)


def _left_behind(url, path):
    """`(have, version, total)` of what `path` holds of `url`; have 0 if of no use."""
    try:
        note = json.loads(_note(path).read_text())
        have, version, total = path.stat().st_size, note["version"], note["total"]
    except (OSError, ValueError, KeyError, TypeError):
        return 0, None, None
    if note["url"] != url or have > (total or have) or (have != total and not version):
        return 0, None, None
    return have, version, total


def _take_note(path, url, version, total):
    part = _note(path).with_suffix(".tmp")
    part.write_text(json.dumps({"url": url, "version": version, "total": total}))
    os.replace(part, _note(path))


def _note(path):
    return path.with_name(f"{path.name}.json")


def _version(headers):
    """What `If-Range` may name: a strong ETag, else the date, else None."""
    etag = headers.get("ETag")
    if etag and not etag.startswith("W/"):
        return etag
    return headers.get("Last-Modified")


def _content_range(headers):
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", headers.get("Content-Range", ""))
    return map(int, match.groups()) if match else (None, None, 0)


def _retry_after(value):
    """Seconds of a `Retry-After` header, a number or a date; None if neither."""
    with contextlib.suppress(TypeError, ValueError):
        return max(0.0, float(value))
    with contextlib.suppress(TypeError, ValueError):
        date = email.utils.parsedate_to_datetime(value)
        return max(0.0, date.timestamp() - time.time())
    return None


def _reason(error):
    return str(error) or type(error).__name__


@contextlib.contextmanager
def _progress(url):
    """Yields `report(have, total)`: a bar on a terminal, else one line at the start."""
    if not sys.stderr.isatty():
        print(f"Downloading {url}", file=sys.stderr)
        yield lambda have, total: None
        return
    from rich.progress import DownloadColumn, TransferSpeedColumn

    columns = DownloadColumn(), TransferSpeedColumn()
    with reporting(url.rsplit("/", 1)[-1], *columns) as report:
        yield report
