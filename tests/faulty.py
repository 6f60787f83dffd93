"""A proxy in front of a real S3 server that spoils chosen answers, over real sockets."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

FAULTS = ("500", "503", "reset", "truncate", "lose-answer")


class FaultyProxy:
    """Forwards to the server at URL `target`; each request takes the next of `faults`, or None to be left alone.

    `500`, `503`: answered without asking the server. `reset`: the connection is reset. `truncate`: half of the body.
    `lose-answer`: the server does what was asked, and the connection is reset before its answer.
    """

    def __init__(self, target: str, faults: Iterable[str | None] = ()):
        self.faults = deque(faults)
        self.requests: list[str] = []
        self._target = urlsplit(target).netloc
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                self.raw_requestline = self.rfile.readline(65537)
                if self.raw_requestline and self.parse_request():
                    proxy._answer(self)
                else:
                    self.close_connection = True

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> FaultyProxy:
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        if request.headers.get("Expect") == "100-continue":
            request.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = request.rfile.read(int(request.headers.get("Content-Length") or 0))
        fault = self.faults.popleft() if self.faults else None
        self.requests.append(f"{request.command} {request.path} {fault or 'ok'}")
        if fault in ("500", "503"):
            return self._send(request, int(fault), {}, b"")
        if fault == "reset":
            return self._reset(request)
        status, headers, answer = self._forward(request, body)
        if fault == "lose-answer":
            return self._reset(request)
        self._send(request, status, headers, answer, cut=fault == "truncate")

    def _forward(self, request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self._target)
        headers = {name: value for name, value in request.headers.items() if name.lower() != "expect"}
        connection.request(request.command, request.path, body, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        return answer.status, dict(answer.getheaders()), data

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, cut: bool = False
    ) -> None:
        skipped = ("content-length", "transfer-encoding", "connection")
        length = headers.get("Content-Length", str(len(body))) if request.command == "HEAD" else str(len(body))
        request.send_response_only(status)
        for name, value in headers.items():
            if name.lower() not in skipped:
                request.send_header(name, value)
        request.send_header("Content-Length", length)
        request.end_headers()
        request.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self._reset(request)

    def _reset(self, request: BaseHTTPRequestHandler) -> None:
        request.wfile.flush()
        linger = struct.pack("ii", 1, 0)
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.connection.close()
        request.close_connection = True
