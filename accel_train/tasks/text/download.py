"""A file from the network, with everything that can go wrong on the way.

A connection that breaks is taken up where it broke if the server allows it. What cannot get
better by itself (an address that does not exist, a redirect loop, a wrong checksum) is an error
at once; everything else is tried again, after ever longer pauses.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accel_train.errors import DownloadError, Interrupted
from accel_train.files.atomic import naming
from accel_train.process.work import abandonable

_BLOCK_BYTES = 1 << 18
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
_POLL_SECONDS = 0.1

StopCheck = Callable[[], bool]


class _Again(Exception):
    """This attempt failed; another one may not."""


@dataclass
class _Progress:
    """What an attempt leaves to the next one."""

    done: int = 0
    total: int | None = None
    validator: str | None = None
    """``ETag`` or ``Last-Modified``: proves that the rest belongs to the same file."""


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
    should_stop: StopCheck = lambda: False,
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
    state, pause = _Progress(), first_pause
    for attempt in range(1, attempts + 1):
        try:
            # A server may be silent for the whole timeout.
            abandonable(lambda gone: _attempt(url, path, state, size, timeout, gone, progress), should_stop)
            break
        except _Again as reason:
            if attempt == attempts:
                raise DownloadError(
                    url, f"could not be fetched in {attempts} attempts: {reason}; check the network and try again"
                ) from reason
            on_retry(f"attempt {attempt} of {attempts}: {reason}; next in {pause:g} s")
            _wait(pause, should_stop)
            pause *= 2
    return _accept(url, path, sha256, size)


def _accept(url: str, path: Path, sha256: str | None, size: int | None) -> str:
    found = path.stat().st_size
    if size is not None and found != size:
        raise DownloadError(url, _not_expected(found, size))
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 is not None and digest != sha256.lower():
        raise DownloadError(
            url, f"has SHA-256 {digest}, {sha256.lower()} was expected (text.corpus_sha256); check address and digest"
        )
    return digest


def _not_expected(found: int | None, size: int) -> str:
    return f"has {found} bytes, {size} were expected (text.corpus_bytes); check address and size"


def _attempt(
    url: str,
    path: Path,
    state: _Progress,
    size: int | None,
    timeout: float,
    is_abandoned: StopCheck,
    progress: Callable[[int, int | None], None],
) -> None:
    headers = {"User-Agent": "accel_train", "Accept-Encoding": "identity"}
    if state.done and state.validator:
        headers |= {"Range": f"bytes={state.done}-", "If-Range": state.validator}
    try:
        with _opener().open(urllib.request.Request(url, headers=headers), timeout=timeout) as response:
            _receive(url, response, path, state, size, is_abandoned, progress)
    except urllib.error.HTTPError as error:
        error.close()
        reason = f"the server answers {error.code} {str(error.reason).splitlines()[0]}"
        if error.code in _RETRIED:
            raise _Again(reason) from error
        if error.code == 416:  # the file has changed under us
            state.done = 0
            raise _Again(reason) from error
        what = "redirects in a circle" if 300 <= error.code < 400 else f"cannot be had: {reason}"
        raise DownloadError(url, f"{what}; check the address (text.corpus)") from error
    except urllib.error.URLError as error:
        if isinstance(error.reason, str) and "unknown url type" in error.reason:
            raise DownloadError(url, f"leads to an address that is not http ({error.reason})") from error
        raise _Again(_named(error.reason, timeout)) from error
    except (http.client.InvalidURL, ValueError) as error:
        raise DownloadError(url, f"is no address ({error}); check it (text.corpus)") from error
    except DownloadError:
        raise
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the disk, not the network
        raise _Again(_named(error, timeout)) from error


def _named(error: object, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer for {timeout:g} s"
    return f"{type(error).__name__}: {error}" if isinstance(error, http.client.HTTPException) else str(error)


def _receive(
    url: str,
    response: Any,
    path: Path,
    state: _Progress,
    size: int | None,
    is_abandoned: StopCheck,
    progress: Callable[[int, int | None], None],
) -> None:
    resumed = response.status == 206 and _continues(response, state)
    if not resumed:
        if response.status == 206:
            state.done, state.validator = 0, None
            raise _Again("the server sends another part than was asked for")
        state.done = 0
        length = response.headers.get("Content-Length")
        state.total = int(length) if length is not None and length.isdecimal() else None
        state.validator = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if state.validator is not None and state.validator.startswith("W/"):
            state.validator = None  # says that it means the same, not that it has the same bytes
    if size is not None and state.total not in {None, size}:
        raise DownloadError(url, _not_expected(state.total, size))
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise DownloadError(
            url, f"is sent in the encoding {encoding}, which was not asked for; fetch it by other means"
        )
    if path.is_file():
        os.truncate(path, state.done)  # before the free space is looked at
    missing = (state.total or 0) - state.done
    free = shutil.disk_usage(path.parent).free
    if missing > free:
        raise DownloadError(url, f"has {missing / 1e6:.0f} MB, but {path.parent} has {free / 1e6:.0f} MB free")
    most, why = (state.done + free, "all that is free") if size is None else (size, "text.corpus_bytes")
    file = path.open("ab")
    try:
        # What has arrived, however little: a slow server shows progress too.
        while block := response.read1(_BLOCK_BYTES):
            if is_abandoned():
                raise Interrupted
            if state.done + len(block) > most:
                raise DownloadError(url, f"sends more than {most} bytes ({why}); check address and size")
            with naming(path):
                file.write(block)
            state.done += len(block)
            progress(state.done, state.total)
    finally:
        with naming(path):
            file.close()
    if state.total is not None and state.done < state.total:
        raise _Again(f"the connection ended after {state.done} of {state.total} bytes")


def _continues(response: Any, state: _Progress) -> bool:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
    return found is not None and int(found[1]) == state.done and found[2] in {"*", str(state.total)}


def _opener() -> urllib.request.OpenerDirector:
    """Follows redirections over http and https, and no other way: no file of this machine can be asked for."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    return opener


def _wait(seconds: float, should_stop: StopCheck) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if should_stop():
            raise Interrupted
        time.sleep(min(_POLL_SECONDS, seconds))
