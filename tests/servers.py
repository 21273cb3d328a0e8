"""Loopback stubs of the Hub and of a plain host, and children that fetch from them.

A server answers as the real ones do, until its `fault` says otherwise: a function
`(request) -> handled` that is asked first. `log` holds (method, path, Range) of all
requests. Run as a script, this file is a fork server: see `Children`.
"""

import base64
import contextlib
import ctypes
import fcntl
import hashlib
import http.server
import importlib
import json
import os
import pathlib
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types

REVISION = "5" * 40
_PACKAGE = pathlib.Path(__file__).parent.parent / "keras_fcn"


def sha256(content):
    """Hash of bytes, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`, {path: bytes}, on a free port of 127.0.0.1.

    Args:
        hub: Whether to answer as the Hub does, with the commit and the hash as ETag.
    """

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, hub=False):
        super().__init__(("127.0.0.1", 0), Request)
        self.hub = hub
        self.files = {}
        self.log = []
        self.fault = None
        self.pace = 0  # seconds between blocks of the body
        self.version = None  # headers in place of a host's ETag
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=[0.02], daemon=True).start()

    def gets(self):
        """The GET requests so far."""
        return [entry for entry in self.log if entry[0] == "GET"]

    def handle_error(self, request, client_address):
        """Keeps quiet about clients that hang up."""


class Request(http.server.BaseHTTPRequestHandler):
    """One request, and the ways to answer it."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):  # noqa: N802
        """Answers with the file, or as the server's fault pleases."""
        server = self.server
        server.log.append((self.command, self.path, self.headers.get("Range")))
        if not (server.fault and server.fault(self)):
            self.send()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        """Keeps quiet."""

    def facts(self, body):
        """The headers of a sound answer."""
        if self.server.hub:
            revision = self.path.split("/resolve/")[-1].split("/")[0]
            return {"X-Repo-Commit": revision, "ETag": f'"{sha256(body)}"'}
        return self.server.version or {"ETag": f'"{sha256(body)[:16]}"'}

    def send(
        self, body=None, status=200, headers=(), length=True, ranges=True, stop=None
    ):
        """Sends the file, or the part of it that is asked for.

        Args:
            body: Bytes to send in the file's place.
            status: To send instead of 200.
            headers: Over those of a sound answer; None leaves one out.
            length: Whether to say how long it is.
            ranges: Whether to heed `Range`.
            stop: `(bytes, "FIN" or "RST")`: where to break off, and how.
        """
        body = self.server.files.get(self.path) if body is None else body
        if body is None:
            return self.send(b"", 404)
        answer, start = self.facts(body), self._start(body) if ranges else 0
        if start >= len(body) > 0:
            answer["Content-Range"] = f"bytes */{len(body)}"
            status, body = 416, b""
        elif start and status == 200:
            status = 206
            answer["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
        body = body[start:]
        answer |= {"Content-Length": len(body)} if length else {"Connection": "close"}
        self.send_response(status)
        for key, value in (answer | dict(headers)).items():
            if value is not None:
                self.send_header(key, str(value))
        self.end_headers()
        if not length:
            self.close_connection = True
        if self.command != "HEAD":
            self._send_body(body if stop is None else body[: stop[0]])
            if stop is not None:
                self.hang_up(stop[1])
        return True

    def _send_body(self, body):
        for at in range(0, len(body), 2**16):
            self.wfile.write(body[at : at + 2**16])
            if self.server.pace:
                threading.Event().wait(self.server.pace)

    def _start(self, body):
        condition = self.headers.get("If-Range")
        if condition not in (None, *self.facts(body).values()):
            return 0
        return int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])

    def hang_up(self, how):
        """Closes the connection politely (FIN) or not (RST)."""
        if how == "RST":
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True
        self.rfile.close()
        self.connection.close()

    def drip(self, content, seconds):
        """Sends `content` byte by byte, `seconds` apart."""
        with contextlib.suppress(OSError):
            for byte in content:
                self.wfile.write(bytes([byte]))
                threading.Event().wait(seconds)
        self.close_connection = True
        return True


class Repositories(Server):
    """A Hub that takes what is pushed: `create_repo` and `upload_folder`."""

    def __init__(self):
        super().__init__(hub=True)
        self.RequestHandlerClass = Upload
        self.large = {}
        self.tokens = set()

    def commit(self, repo, lines):
        """Takes the lines of a commit, and returns its id."""
        revision = hashlib.sha1(json.dumps(lines).encode()).hexdigest()
        siblings = []
        for line in lines:
            facts, path = line["value"], line["value"].get("path")
            if line["key"] == "file":
                content = base64.b64decode(facts["content"])
                siblings.append({"rfilename": path, "size": len(content)})
            elif line["key"] == "lfsFile":
                content = self.large[facts["oid"]]
                lfs = {"size": len(content), "sha256": facts["oid"], "pointerSize": 9}
                siblings.append({"rfilename": path, "size": len(content), "lfs": lfs})
            else:
                continue
            self.files[f"/{repo}/resolve/{revision}/{path}"] = content
        info = {"id": repo, "sha": revision, "siblings": siblings}
        for name in ("main", revision):
            path = f"/api/models/{repo}/revision/{name}?blobs=true"
            self.files[path] = json.dumps(info).encode()
        return revision


class Upload(Request):
    """A request that may change a repository, in the legacy protocol of Git LFS."""

    def do_PUT(self):  # noqa: N802
        """Takes a large file."""
        self.server.large[self.path.rsplit("/", 1)[-1]] = self._body()
        self.send(b"")

    def do_POST(self):  # noqa: N802
        """Answers what `HfApi` asks on its way to a commit."""
        body = self._body()
        self.server.log.append((self.command, self.path, None))
        self.server.tokens.add(self.headers.get("Authorization"))
        if not (self.server.fault and self.server.fault(self)):
            self.send(json.dumps(self._answer(body)).encode())

    def _body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        content = b""  # in chunks
        while length := int(self.rfile.readline(), 16):
            content += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, body):
        url, parts = self.server.url, self.path.split("/")
        if self.path.endswith("/objects/batch"):
            objects = json.loads(body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{url}/lfs/{item['oid']}"}}
            return {"objects": objects}
        if parts[-2] == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            repo = "/".join(parts[3:5])
            revision = self.server.commit(repo, lines)
            url = f"{url}/{repo}/commit/{revision}"
            return {"commitOid": revision, "commitUrl": url}
        asked = json.loads(body)
        if parts[-2] == "preupload":
            modes = {True: "lfs", False: "regular"}
            return {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": modes[file["path"].endswith((".h5", ".png"))],
                        "shouldIgnore": False,
                    }
                    for file in asked["files"]
                ]
            }
        if parts[-1] == "create":
            return {"url": f"{url}/{asked['organization']}/{asked['name']}"}
        return {"errors": [], "warnings": []}  # validate-yaml


def port(original, output):
    """Stands for the converter: `CAFFE...` becomes `HDF5....`, all else is refused."""
    content = pathlib.Path(original).read_bytes()
    if not content.startswith(b"CAFFE"):
        raise ValueError("it is no caffemodel")
    pathlib.Path(output).write_bytes(ported(content))


def ported(content):
    """What `port` makes of a caffemodel's bytes."""
    return b"HDF5" + content[5:]


def slow_port(original, output):
    """As `port`, with time to be killed in."""
    content = ported(pathlib.Path(original).read_bytes())
    with open(output, "wb") as file:
        for at in range(0, len(content), 2**14):
            file.write(content[at : at + 2**14])
            file.flush()
            time.sleep(0.002)


def fat_port(original, output):
    """As `port`, with ten times the output."""
    pathlib.Path(output).write_bytes(pathlib.Path(original).read_bytes() * 10)


class Children:
    """Processes that call `fetch`, forked from one that has imported it already.

    A job is a dict: `name`, `entry` and `trust` for `fetch`; `cache` and `hub_cache`
    folders; `environment` variables; `port`, the name of a function here; whether the
    Hub's client may send `telemetry`; and what to take away: `locks`, `links`,
    `network`, `waits` (False each), `tmpfs` {folder: bytes}, `readonly` [folders],
    `user` to become.
    """

    def __init__(self, hub_url):
        self._results = tempfile.TemporaryDirectory()
        variables = {
            "HF_ENDPOINT": hub_url,
            "HF_HOME": self._results.name,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | variables,
            text=True,
        )
        self._ask({})

    def _ask(self, command):
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, **job):
        """Starts a job and returns its process id."""
        return self._ask({"job": job, "results": self._results.name})

    def wait(self, pid):
        """The job's result: `path`, or `error` and `message`; `seconds`, `files`.

        None if it was killed.
        """
        status = self._ask({"wait": pid})
        if os.WIFSIGNALED(status):
            return None
        return json.loads(pathlib.Path(self._results.name, str(pid)).read_text())

    def run(self, **job):
        """Starts a job and waits for its result."""
        return self.wait(self.start(**job))

    def close(self):
        """Ends the fork server."""
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()
        self._results.cleanup()


def _serve_forks():
    hub = import_alone("hub")
    # All that fetch needs: the children may be unable to read the installation.
    from huggingface_hub import errors, file_download  # noqa: F401

    "localhost".encode("idna")
    for line in sys.stdin:
        command = json.loads(line)
        answer = None
        if "wait" in command:
            answer = os.waitpid(command["wait"], 0)[1]
        elif "job" in command:
            answer = os.fork()
            if answer == 0:
                _child(hub, command["results"], command["job"])
        print(json.dumps(answer), flush=True)


def _child(hub, results, job):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.dup2(2, 1)  # the parent listens to the other one
    with open(pathlib.Path(results, str(os.getpid())), "w") as file:
        json.dump(_run(hub, **job), file)
    os._exit(0)


def import_alone(module):
    """Imports `keras_fcn.<module>` without the package around it: no Keras, no wait."""
    if "keras_fcn" not in sys.modules:
        package = sys.modules["keras_fcn"] = types.ModuleType("keras_fcn")
        package.__path__ = [str(_PACKAGE)]
    return importlib.import_module(f"keras_fcn.{module}")


def _run(hub, name, entry, cache, hub_cache, **options):
    result = {}
    start = time.monotonic()
    try:
        _take_away(hub_cache, **options)
        os.environ |= {"KERAS_FCN_CACHE": cache} | options.get("environment", {})
        path = hub.fetch(
            name,
            entry,
            globals()[options.get("port", "port")],
            trust_first_download=options.get("trust", False),
        )
        result = {"path": str(path), "sha256": sha256(path.read_bytes())}
    except Exception as error:  # whatever it is, the parent is told
        kinds = [OSError, ValueError, type(error)]
        kind = next(kind for kind in kinds if isinstance(error, kind))
        result = {"error": kind.__name__, "message": str(error)}
    files = [p for root in (cache, hub_cache) for p in pathlib.Path(root).rglob("*")]
    files = [str(path) for path in files if path.is_file()]
    return result | {"seconds": time.monotonic() - start, "files": files}


def _take_away(hub_cache, **options):
    from huggingface_hub import constants

    constants.HF_HUB_CACHE = hub_cache
    constants.DOWNLOAD_CHUNK_SIZE = 2**16
    constants.HF_HUB_DISABLE_TELEMETRY = not options.get("telemetry")
    if not options.get("waits", True):
        time.sleep = lambda seconds: None
    if not options.get("locks", True):
        fcntl.flock = lambda file, how: None
    if not options.get("links", True):
        constants.HF_HUB_DISABLE_SYMLINKS = True
    if not options.get("network", True):
        _unshare(0x40000000)  # CLONE_NEWNET
    if options.get("tmpfs") or options.get("readonly"):
        _unshare(0x00020000)  # CLONE_NEWNS
        _mount("--make-rprivate", "/")
    for folder, size in options.get("tmpfs", {}).items():
        _mount("-t", "tmpfs", "-o", f"size={size}", "none", folder)
    for folder in options.get("readonly", []):
        _mount("--bind", folder, folder)
        _mount("-o", "remount,bind,ro", folder)
    if options.get("user"):
        os.setuid(options["user"])


def _unshare(flags):
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        raise OSError(ctypes.get_errno(), "unshare")


def _mount(*arguments):
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    sys.modules["servers"] = sys.modules["__main__"]
    _serve_forks()
