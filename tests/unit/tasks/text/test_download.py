"""Every way in which a download can fail, from a real server on loopback."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import time
from pathlib import Path

import pytest
from web import Request, Web, fails, gives, redirects, stalls, truncates

from accel_train.errors import DownloadError, Interrupted
from accel_train.tasks.text import download as module
from accel_train.tasks.text.download import download, is_url

CONTENT = bytes(itertools.islice(itertools.cycle(range(256)), 1_000_000))
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def fetch(web: Web, path: Path, **options) -> str:
    return download(web.url, path, **{"timeout": 0.5, "attempts": 3, "first_pause": 0.01, **options})


def test_a_file_arrives_with_its_digest(tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    with Web(gives(CONTENT)) as web:
        digest = fetch(web, tmp_path / "a", progress=lambda done, total: seen.append((done, total)))
    assert digest == DIGEST
    assert (tmp_path / "a").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_truncated_file_is_taken_up_where_it_broke(tmp_path: Path) -> None:
    said: list[str] = []
    with Web(truncates(CONTENT, 300_000), gives(CONTENT)) as web:
        assert fetch(web, tmp_path / "a", on_retry=said.append) == DIGEST
        assert web.ranges == [None, "bytes=300000-"]
    assert said == ["attempt 1 of 3: the connection ended after 300000 of 1000000 bytes; next in 0.01 s"]


def test_a_file_that_changed_meanwhile_is_fetched_from_its_start(tmp_path: Path) -> None:
    other = CONTENT[::-1]
    with Web(truncates(CONTENT, 300_000), gives(other, etag='"2"')) as web:
        assert fetch(web, tmp_path / "a") == hashlib.sha256(other).hexdigest()
        assert web.ranges == [None, "bytes=300000-"]


def test_without_a_validator_nothing_is_taken_up(tmp_path: Path) -> None:
    with Web(truncates(CONTENT, 300_000, etag=None), gives(CONTENT, etag=None)) as web:
        assert fetch(web, tmp_path / "a") == DIGEST
        assert web.ranges == [None, None]


def test_another_part_than_was_asked_for_is_not_put_in_its_place(tmp_path: Path) -> None:
    def wrong(request: Request) -> None:
        request.send_response(206)
        request.send_header("Content-Range", f"bytes 0-9/{len(CONTENT)}")
        request.send_header("Content-Length", "10")
        request.end_headers()
        request.wfile.write(CONTENT[:10])

    with Web(truncates(CONTENT, 300_000), wrong, gives(CONTENT)) as web:
        assert fetch(web, tmp_path / "a") == DIGEST


@pytest.mark.parametrize(
    ("answer", "says", "requests"),
    [
        (fails(404), "cannot be had: the server answers 404", 1),
        (fails(403), "cannot be had: the server answers 403", 1),
        (fails(500), "in 3 attempts: the server answers 500", 3),
        (fails(503), "in 3 attempts: the server answers 503", 3),
        (truncates(CONTENT, 1000, etag=None), "the connection ended after 1000 of 1000000 bytes", 3),
        (stalls(b"some"), "no answer for 0.5 s", 3),
        (redirects(lambda request: request.path), "redirects in a circle", None),
        (redirects(lambda _: "file:///etc/passwd"), "check the address", 1),
        (redirects(lambda _: "ftp://127.0.0.1/corpus.txt"), "leads to an address that is not http", 1),
    ],
    ids=["404", "403", "500", "503", "truncated", "stalled", "circle", "to a file", "to ftp"],
)
def test_what_went_wrong_is_said(tmp_path: Path, answer, says: str, requests: int | None) -> None:
    with Web(answer) as web:
        with pytest.raises(DownloadError) as caught:
            fetch(web, tmp_path / "a")
        assert requests is None or len(web.ranges) == requests
    assert says in str(caught.value)
    assert web.url in str(caught.value)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with Web(gives(CONTENT)) as web:
        url = web.url
    with pytest.raises(DownloadError, match=r"in 2 attempts: .*refused"):
        download(url, tmp_path / "a", attempts=2, first_pause=0.01)


def test_a_wrong_digest_or_size_is_refused(tmp_path: Path) -> None:
    with Web(gives(CONTENT)) as web:
        assert fetch(web, tmp_path / "a", sha256=DIGEST.upper(), size=len(CONTENT)) == DIGEST
        with pytest.raises(DownloadError, match=f"has SHA-256 {DIGEST}, {'0' * 64} was expected"):
            fetch(web, tmp_path / "a", sha256="0" * 64)
        with pytest.raises(DownloadError, match="has 1000000 bytes, 5 were expected"):
            fetch(web, tmp_path / "a", size=5)


def answer_without_length(request: Request) -> None:
    request.send_response(200)
    request.end_headers()
    request.wfile.write(CONTENT)
    request.close_connection = True


def answer_in_gzip(request: Request) -> None:
    request.send_response(200)
    request.send_header("Content-Encoding", "gzip")
    request.send_header("Content-Length", "2")
    request.end_headers()
    request.wfile.write(b"\x1f\x8b")


@pytest.mark.parametrize(
    ("answer", "options", "says"),
    [
        (gives(CONTENT), {"size": 100}, "has 1000000 bytes, 100 were expected"),
        (answer_without_length, {"size": 100}, "sends more than 100 bytes"),
        (answer_in_gzip, {}, "is sent in the encoding gzip"),
    ],
)
def test_what_cannot_get_better_is_not_tried_again(tmp_path: Path, answer, options: dict[str, int], says: str) -> None:
    with Web(answer) as web, pytest.raises(DownloadError, match=says):
        fetch(web, tmp_path / "a", first_pause=30, **options)
    assert len(web.ranges) == 1


@pytest.mark.parametrize("answer", [gives(CONTENT), answer_without_length], ids=["announced", "unannounced"])
def test_a_disk_that_is_too_small_is_named_and_nothing_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer
) -> None:
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 500_000))
    with Web(answer) as web, pytest.raises(DownloadError, match=r"0 MB free|all that is free"):
        fetch(web, tmp_path / "a", first_pause=30)
    assert len(web.ranges) == 1


def test_a_disk_that_fills_up_is_not_taken_for_the_network(tmp_path: Path) -> None:
    with Web(gives(CONTENT)) as web, pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        fetch(web, Path("/dev/full"), first_pause=30)
    assert len(web.ranges) == 1


def test_a_few_redirections_are_followed(tmp_path: Path) -> None:
    with Web(redirects(lambda request: f"{request.path}x"), gives(CONTENT)) as web:
        assert fetch(web, tmp_path / "a") == DIGEST


def test_a_stop_is_answered_in_the_middle_and_in_a_pause(tmp_path: Path) -> None:
    with Web(gives(CONTENT)) as web, pytest.raises(Interrupted):
        fetch(web, tmp_path / "a", should_stop=lambda: True)
    began = time.monotonic()
    with Web(fails(500)) as web, pytest.raises(Interrupted):
        fetch(web, tmp_path / "a", first_pause=30, should_stop=lambda: True)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("content", [None, b"a", b""], ids=["no answer", "a byte", "only headers"])
def test_a_silent_server_does_not_keep_a_stop_waiting(tmp_path: Path, content: bytes | None) -> None:
    answer = stalls(content) if content is not None else lambda request: request.server.released.wait(30)
    asked = []

    def should_stop() -> bool:
        asked.append(time.monotonic())
        return len(asked) > 3

    with Web(answer) as web, pytest.raises(Interrupted):
        fetch(web, tmp_path / "a", timeout=30, should_stop=should_stop)
    assert asked[-1] - asked[0] < 5


def test_a_server_that_sends_more_than_was_expected_is_cut_off(tmp_path: Path) -> None:
    def endless(request: Request) -> None:
        request.send_response(200)
        request.end_headers()
        while not request.server.released.is_set():
            request.wfile.write(CONTENT)

    with Web(endless) as web, pytest.raises(DownloadError, match="sends more than 3000000 bytes"):
        fetch(web, tmp_path / "a", size=3_000_000)
    assert (tmp_path / "a").stat().st_size <= 3_000_000


@pytest.mark.parametrize("url", ["http://h/España.txt", "http://[::1/a", "http://h:x/", "http://h/a b"])
def test_what_is_no_address_is_not_tried_again(tmp_path: Path, url: str) -> None:
    said: list[str] = []
    with pytest.raises(DownloadError, match="is no address"):
        download(url, tmp_path / "a", on_retry=said.append)
    assert said == []


def test_addresses_are_told_from_paths() -> None:
    assert is_url("https://example.org/a.txt")
    assert is_url("HTTP://example.org")
    assert not is_url("data/a.txt")
    assert not is_url("file:///etc/passwd")
