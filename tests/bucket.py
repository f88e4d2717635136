"""A bucket in memory that stands in for Google Cloud Storage: for fsspec as `gs://`, for TensorStore as a local server.

Like the real one it has objects and no folders: making a folder does nothing, nothing can be appended to or renamed in
place, and an object is there, whole, once it is closed.
"""

import io
import json
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest
from etils.epath import backend
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem


class Bucket(AbstractFileSystem):
    """The file system; all instances share `objects`, whose keys are `bucket/name`."""

    protocol = ("gs", "gcs")
    objects: ClassVar[dict[str, bytes]] = {}
    generations: ClassVar[dict[str, int]] = {}

    @classmethod
    def put_object(cls, key: str, data: bytes) -> int:
        """Store an object; return its generation, a number that is new each time."""
        cls.generations[key] = cls.generations.get(key, 0) + 1
        cls.objects[key] = data
        return cls.generations[key]

    def info(self, path, **kwargs):
        key = self._strip_protocol(path)
        if key in self.objects:
            size, generation = len(self.objects[key]), self.generations[key]
            return {"name": key, "size": size, "type": "file", "generation": generation}
        if any(name.startswith(f"{key}/") for name in list(self.objects)):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(path)

    def ls(self, path, detail=True, **kwargs):
        key = self._strip_protocol(path)
        start = f"{key}/"
        names = {
            start + name[len(start) :].split("/")[0] for name in list(self.objects) if name.startswith(start)
        }
        entries = [self.info(name) for name in sorted(names)] or [self.info(key)]
        return entries if detail else [entry["name"] for entry in entries]

    def _open(self, path, mode="rb", **kwargs):
        if mode == "rb":
            self.info(path)
            if path not in self.objects:
                raise IsADirectoryError(path)
            return io.BytesIO(self.objects[path])
        if mode != "wb":
            raise ValueError(f"objects cannot be opened with mode {mode!r}")
        return _Upload(path)

    def rm(self, path, recursive=False, maxdepth=None):
        key = self._strip_protocol(path)
        inside = [name for name in list(self.objects) if recursive and name.startswith(f"{key}/")]
        if key not in self.objects and not inside:
            raise FileNotFoundError(path)
        for name in [key, *inside]:
            self.objects.pop(name, None)

    def cp_file(self, path1, path2, **kwargs):
        if self.isfile(path1):
            self.put_object(self._strip_protocol(path2), self.objects[self._strip_protocol(path1)])


class _Upload(io.BytesIO):
    def __init__(self, key: str):
        super().__init__()
        self.key = key

    def close(self):
        if not self.closed:
            Bucket.put_object(self.key, self.getvalue())
        super().close()


class _Server(BaseHTTPRequestHandler):
    """The part of the JSON API that TensorStore speaks: https://cloud.google.com/storage/docs/json_api."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        key, query = self._asked()
        if key.endswith("/"):
            prefix, bucket = key + query.get("prefix", ""), key
            names = [name[len(bucket) :] for name in sorted(Bucket.objects) if name.startswith(prefix)]
            after = [name for name in names if name >= query.get("startOffset", "")]
            self._answer(200, json.dumps({"items": [{"name": name, "size": "0"} for name in after]}).encode())
        elif key not in Bucket.objects:
            self._answer(404)
        elif query.get("ifGenerationNotMatch") == str(Bucket.generations[key]):
            self._answer(304)
        else:
            data, status = Bucket.objects[key], 200
            headers = {"x-goog-generation": Bucket.generations[key]}
            if wanted := self.headers.get("Range"):
                first, last = wanted.removeprefix("bytes=").split("-")
                whole, status = len(data), 206
                data = data[int(first) : int(last) + 1 if last else None] if first else data[-int(last) :]
                start = int(first) if first else whole - len(data)
                headers["Content-Range"] = f"bytes {start}-{start + len(data) - 1}/{whole}"
            self._answer(status, data, headers)

    def do_POST(self):
        key, query = self._asked()
        data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        key += query["name"]
        current = Bucket.generations[key] if key in Bucket.objects else 0
        if query.get("ifGenerationMatch", str(current)) != str(current):
            self._answer(412)
            return
        generation = Bucket.put_object(key, data)
        about = {"name": query["name"], "size": str(len(data)), "generation": str(generation)}
        self._answer(200, json.dumps(about).encode())

    def do_DELETE(self):
        key, _ = self._asked()
        self._answer(404 if Bucket.objects.pop(key, None) is None else 204)

    def _asked(self) -> tuple[str, dict[str, str]]:
        """Bucket and object, as `bucket/name`, or `bucket/` of a list or an upload; and the query."""
        url = urllib.parse.urlsplit(self.path)
        bucket, _, name = url.path.partition("/b/")[2].partition("/o")
        return f"{bucket}/{urllib.parse.unquote(name[1:])}", dict(urllib.parse.parse_qsl(url.query))

    def _answer(self, status: int, body: bytes = b"", headers: dict | None = None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": len(body)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def bucket_server() -> Iterator[None]:
    """The server that TensorStore asks; it reads the address but once in a process."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", f"http://127.0.0.1:{server.server_port}")
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
        yield
    server.shutdown()
    server.server_close()


@pytest.fixture
def bucket(bucket_server, tmp_path, monkeypatch) -> Iterator[str]:
    """The address of an empty bucket; copies of models in it go to `tmp_path`, which is the home directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in Bucket.protocol:
        monkeypatch.setitem(_registry, name, Bucket)
    filesystem = backend._FileSystemSpecBackend._get_filesystem
    filesystem.cache_clear()
    Bucket.objects.clear()
    yield "gs://bucket"
    filesystem.cache_clear()
