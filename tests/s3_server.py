"""A real S3 server on this machine, and a proxy before it that takes the right to write away."""

import http.client
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import boto3
from moto.server import ThreadedMotoServer

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class S3Server:
    """The server's address, and a client that shares no code with RPG's way to it."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

    def bucket(self, name: str) -> str:
        """Make a bucket; returns its URI."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def content(self, bucket: str, prefix: str = "") -> dict[str, bytes]:
        """All objects below a prefix, by key."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


@contextmanager
def s3_server() -> Iterator[S3Server]:
    # A line a request, which pytest would keep.
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield S3Server(f"http://{host}:{port}")
    finally:
        server.stop()


class Proxy:
    """Passes requests on, unless told otherwise.

    Attributes:
        requests: (method, path) of all that came.
        refuses: whether to answer 403 AccessDenied instead; called with method and path.
        damages: whether to flip a bit in the middle of the answer; called with method and path.
        tells_checksums: whether answers come with the checksums that the client compares them with.
    """

    def __init__(self, endpoint: str) -> None:
        self.requests: list[tuple[str, str]] = []
        self.refuses: Callable[[str, str], bool] = lambda method, path: False
        self.damages: Callable[[str, str], bool] = lambda method, path: False
        self.tells_checksums = True
        target = urlsplit(endpoint).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # Or each answer waits 40 ms for the acknowledgement of its headers.
            disable_nagle_algorithm = True

            def _pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.requests.append((self.command, self.path))
                if proxy.refuses(self.command, self.path):
                    self._answer(403, {"Content-Type": "application/xml"}, _DENIED)
                    return
                connection = http.client.HTTPConnection(target)
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                content = response.read()
                connection.close()
                if content and proxy.damages(self.command, self.path):
                    middle = len(content) // 2
                    content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
                headers = dict(response.getheaders())
                if self.command != "HEAD":
                    headers.pop("Content-Length", None)
                self._answer(response.status, headers, content)

            def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
                self.send_response_only(status)
                for key, value in headers.items():
                    is_checksum = key.lower().startswith("x-amz-checksum")
                    if is_checksum and not proxy.tells_checksums:
                        continue
                    if key.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(key, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


_DENIED = (
    b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code>'
    b"<Message>Access Denied</Message></Error>"
)
