"""A server on loopback that does what it is told to, and counts what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; answers are functions of it."""

    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        self.server.ranges.append(self.headers.get("Range"))
        number = len(self.server.ranges)
        answers = self.server.answers
        with suppress(BrokenPipeError, ConnectionResetError):
            answers[min(number, len(answers)) - 1](self)

    def log_message(self, *_: object) -> None:
        """Silent."""


class Web(ThreadingHTTPServer):
    """Gives ``answers`` in turn, the last one for ever; to be used as a context manager."""

    daemon_threads = True

    def __init__(self, *answers: Answer) -> None:
        super().__init__(("127.0.0.1", 0), Request)
        self.answers = answers
        self.ranges: list[str | None] = []
        """The ``Range`` header of every request so far."""
        self.released = threading.Event()
        """Ends the silence of :func:`stalls`."""

    def __enter__(self) -> Web:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/corpus.txt"


def gives(content: bytes, etag: str | None = '"1"') -> Answer:
    """All of ``content``, or the part that is asked for when the validator agrees."""

    def answer(request: Request) -> None:
        wanted = request.headers.get("Range")
        start = 0
        if wanted is not None and request.headers.get("If-Range") == etag:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        else:
            request.send_response(200)
        if etag is not None:
            request.send_header("ETag", etag)
        request.send_header("Content-Length", str(len(content) - start))
        request.end_headers()
        request.wfile.write(content[start:])

    return answer


def truncates(content: bytes, after: int, etag: str | None = '"1"') -> Answer:
    """The first ``after`` bytes of what was announced, then the connection ends."""

    def answer(request: Request) -> None:
        request.send_response(200)
        if etag is not None:
            request.send_header("ETag", etag)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        request.wfile.write(content[:after])
        request.close_connection = True

    return answer


def stalls(content: bytes = b"", announced: int = 100) -> Answer:
    """``content``, then silence."""

    def answer(request: Request) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(announced))
        request.end_headers()
        request.wfile.write(content)
        request.wfile.flush()
        request.server.released.wait(30)

    return answer


def fails(code: int) -> Answer:
    """An answer without content."""

    def answer(request: Request) -> None:
        request.send_response(code)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def redirects(to: Callable[[Request], str]) -> Answer:
    """To another address."""

    def answer(request: Request) -> None:
        request.send_response(302)
        request.send_header("Location", to(request))
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer
