"""A local S3 server (moto), and one that answers every request with an error, each with a user's environment."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from pyarrow import fs

SECRET = "c2VjcmV0/for+the/tests"


@contextlib.contextmanager
def credentials(endpoint: str) -> Iterator[None]:
    """The environment of a user of the server, with a cache of its own."""
    ours = ("AWS_", "XDG_CACHE_HOME")
    before = {name: value for name, value in os.environ.items() if name.startswith(ours)}
    for name in before:
        del os.environ[name]
    given = {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "AKIATESTS", "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="lgt-cache-") as cache:
        os.environ.update(given | {"XDG_CACHE_HOME": cache})
        try:
            yield
        finally:
            for name in (*given, "XDG_CACHE_HOME"):
                os.environ.pop(name, None)
            os.environ.update(before)


class Server:
    """A server with one bucket, which is still there when it is started again."""

    def __init__(self, bucket: str):
        self.url, self._port = f"s3://{bucket}", 0
        self.start()

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self._port, verbose=False)
        self._server.start()
        host, self._port = self._server.get_host_and_port()
        self.endpoint = f"http://{host}:{self._port}"

    def stop(self) -> None:
        self._server.stop()


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[Server]:
    """Serves one empty bucket, in the environment of its user."""
    server = Server(bucket)
    try:
        with credentials(server.endpoint):
            fs.S3FileSystem(endpoint_override=server.endpoint, allow_bucket_creation=True).create_dir(bucket)
            yield server
    finally:
        server.stop()


@contextlib.contextmanager
def refusing_server(code: str, status: int, accepts: str | None = None) -> Iterator[None]:
    """Answers as S3 does where it refuses: by a code in XML. It takes what is written with the key `accepts`."""
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>refused</Message></Error>".encode()

    class Refusing(BaseHTTPRequestHandler):
        def refuse(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if accepts is not None and accepts in self.headers.get("Authorization", ""):
                self.send_response(200)
                self.send_header("ETag", '"x"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = refuse

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        with credentials(f"http://127.0.0.1:{server.server_port}"):
            yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
