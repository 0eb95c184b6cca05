"""A file from the network, with everything that can go wrong on the way.

A connection that breaks is taken up where it broke if the server allows it. What cannot get
better by itself (an address that does not exist, a redirect loop, a wrong checksum) is an error
at once; everything else is tried again, after ever longer pauses.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_train.errors import DownloadError, Interrupted
from accel_train.files.atomic import naming, sha256_file
from accel_train.process.work import StopCheck, WorkContext, abandonable, never

_BLOCK_BYTES = 1 << 18
_RETRIED = frozenset({408, 416, 425, 429, 500, 502, 503, 504})


def is_url(place: str) -> bool:
    """Whether ``place`` is an address that :func:`download` understands."""
    return re.match(r"https?://", place, re.IGNORECASE) is not None


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    timeout: float = 30.0,
    attempts: int = 5,
    first_pause: float = 1.0,
    should_stop: StopCheck = never,
    progress: Callable[[int, int | None], None] = lambda _done, _total: None,
    on_retry: Callable[[str], None] = lambda _message: None,
) -> str:
    """Fetch ``url`` into ``path``; returns the SHA-256 (hex) of what came.

    Args:
        url: an ``http`` or ``https`` address; redirections are followed, ten at most.
        path: written from the start; whoever calls removes it after a failure.
        sha256: the digest that it must have, in hexadecimal digits.
        size: the bytes that it must have.
        timeout: seconds that the server may be silent.
        attempts: connections tried before giving up.
        first_pause: seconds before the second attempt; doubles with every further one.
        should_stop: asked ten times a second; an attempt that waits for the server is left behind then.
        progress: receives the bytes so far and, if it is known, their total.
        on_retry: receives a line for people before every pause.

    Raises:
        DownloadError: it cannot be had, or is not what was expected.
        Interrupted: ``should_stop()`` turned true.
    """
    transfer, pause = _Transfer(url, path, size, timeout, progress), first_pause
    # A server may be silent for the whole timeout.
    for attempt in range(1, attempts + 1):
        reason = abandonable(transfer.attempt, should_stop)
        if reason is None:
            break
        if attempt == attempts:
            rule = f"could not be fetched in {attempts} attempts: {reason}; check the network and try again"
            raise DownloadError(url, rule)
        on_retry(f"attempt {attempt} of {attempts}: {reason}; next in {pause:g} s")
        WorkContext(should_stop=should_stop).wait_for("corpus", never, pause, lambda: f"waiting to fetch {url} again")
        pause *= 2
    transfer.check_size(path.stat().st_size)
    digest = sha256_file(path)
    if sha256 is not None and digest != sha256.lower():
        rule = f"has SHA-256 {digest}, {sha256.lower()} was expected (text.corpus_sha256); check address and digest"
        raise DownloadError(url, rule)
    return digest


@dataclass
class _Transfer:
    """One file on its way, over as many attempts as it takes."""

    url: str
    path: Path
    size: int | None
    timeout: float
    progress: Callable[[int, int | None], None]
    done: int = 0
    total: int | None = None
    validator: str | None = None
    """``ETag`` or ``Last-Modified``: proves that the rest belongs to the same file."""

    def check_size(self, found: int | None) -> None:
        if self.size is not None and found not in {None, self.size}:
            rule = f"has {found} bytes, {self.size} were expected (text.corpus_bytes); check address and size"
            raise DownloadError(self.url, rule)

    def attempt(self, is_abandoned: StopCheck) -> str | None:
        """Fetch what is missing; return why that failed if another attempt may not, None when all is there."""
        headers = {"User-Agent": "accel_train", "Accept-Encoding": "identity"}
        if self.done and self.validator:
            headers |= {"Range": f"bytes={self.done}-", "If-Range": self.validator}
        try:
            request = urllib.request.Request(self.url, headers=headers)
            with urllib.request.build_opener(_OverHttpOnly).open(request, timeout=self.timeout) as response:
                return self._receive(response, is_abandoned)
        except urllib.error.HTTPError as error:
            error.close()
            reason = f"the server answers {error.code} {str(error.reason).splitlines()[0]}"
            if error.code == 416:  # the file has changed under us
                self.done = 0
            if error.code in _RETRIED:
                return reason
            what = "redirects in a circle" if 300 <= error.code < 400 else f"cannot be had: {reason}"
            raise DownloadError(self.url, f"{what}; check the address (text.corpus)") from error
        except (http.client.InvalidURL, ValueError) as error:
            raise DownloadError(self.url, f"is no address ({error}); check it (text.corpus)") from error
        except http.client.HTTPException as error:
            return f"{type(error).__name__}: {error}"
        except OSError as error:
            if isinstance(error, DownloadError) or error.filename is not None:
                raise  # for good, or the disk, not the network
            cause = error.reason if isinstance(error, urllib.error.URLError) else error
            return f"no answer for {self.timeout:g} s" if isinstance(cause, TimeoutError) else str(cause)

    def _receive(self, response: Any, is_abandoned: StopCheck) -> str | None:
        headers = response.headers
        if response.status != 206:
            length = headers.get("Content-Length", "")
            self.done, self.total = 0, int(length) if length.isdecimal() else None
            self.validator = headers.get("ETag") or headers.get("Last-Modified")
            if self.validator is not None and self.validator.startswith("W/"):
                self.validator = None  # says that it means the same, not that it has the same bytes
        elif not self._is_continued_by(headers.get("Content-Range", "")):
            self.done, self.validator = 0, None
            return "the server sends another part than was asked for"
        self.check_size(self.total)
        encoding = headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            rule = f"is sent in the encoding {encoding}, which was not asked for; fetch it by other means"
            raise DownloadError(self.url, rule)
        if self.path.is_file():
            os.truncate(self.path, self.done)  # before the free space is looked at
        missing, free = (self.total or 0) - self.done, shutil.disk_usage(self.path.parent).free
        if missing > free:
            rule = f"has {missing / 1e6:.0f} MB, but {self.path.parent} has {free / 1e6:.0f} MB free"
            raise DownloadError(self.url, rule)
        most, why = (self.done + free, "all that is free") if self.size is None else (self.size, "text.corpus_bytes")
        file = self.path.open("ab")
        try:
            # What has arrived, however little: a slow server shows progress too.
            while block := response.read1(_BLOCK_BYTES):
                if is_abandoned():
                    raise Interrupted
                if self.done + len(block) > most:
                    raise DownloadError(self.url, f"sends more than {most} bytes ({why}); check address and size")
                with naming(self.path):
                    file.write(block)
                self.done += len(block)
                self.progress(self.done, self.total)
        finally:
            with naming(self.path):
                file.close()
        if self.total is not None and self.done < self.total:
            return f"the connection ended after {self.done} of {self.total} bytes"
        return None

    def _is_continued_by(self, part: str) -> bool:
        found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", part)
        return found is not None and int(found[1]) == self.done and found[2] in {"*", str(self.total)}


class _OverHttpOnly(urllib.request.HTTPRedirectHandler):
    """Follows no redirection out of the web; that to a file is an ``HTTPError`` already."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if not is_url(newurl):
            raise DownloadError(req.full_url, f"leads to an address that is not http ({newurl})")
        return super().redirect_request(req, fp, code, msg, headers, newurl)
