"""The store that ranks poll, and the signs of a rank that is gone."""

from __future__ import annotations

import json
import signal
import time

import pytest
import torch.distributed as dist
from rank_processes import finish, start_ranks

from accel_train.ranks.store import first_line, is_lost_peer

PRELUDE = """
import json, os, time
from datetime import timedelta
import torch.distributed as dist
from accel_train.errors import LostPeer
from accel_train.ranks.store import RankStore
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
rank = dist.get_rank()
def report(**values):
    print(json.dumps(values), flush=True)
store = RankStore(rank, 20)
def leave():
    store.set(f"done/{rank}", "")
    while rank == 0 and not store.has("done/1"):
        time.sleep(0.01)
    os._exit(0)
"""


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("Timed out waiting 8000ms for recv operation to complete"), True),
        (dist.DistBackendError("NCCL communicator was aborted"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("connection closed"), False),
        (ConnectionResetError("Connection reset by peer"), False),
    ],
    ids=["closed", "timed out", "nccl", "arithmetic", "another class", "a file server's"],
)
def test_a_lost_peer_shows_in_class_and_words(error, lost):
    assert is_lost_peer(error) is lost


def test_the_first_line_of_an_error_without_words_is_its_class():
    assert first_line(RuntimeError("\none\ntwo")) == "one"
    assert first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_every_rank_reads_what_the_other_stored():
    body = """
store.set(f"from/{rank}", f"rank {rank}: \u00e4")
while not store.has(f"from/{1 - rank}"):
    time.sleep(0.01)
report(other=store.get(f"from/{1 - rank}"), absent=store.has("nobody"))
leave()
"""
    outputs = finish(start_ranks(PRELUDE + body, 2))
    assert outputs == [[{"other": f"rank {1 - rank}: \u00e4", "absent": False}] for rank in range(2)]


def test_two_stores_keep_their_keys_apart():
    body = """
other = RankStore(rank, 20)
if rank == 0:
    store.set("key", "")
while not store.has("key"):
    time.sleep(0.01)
report(other=other.has("key"))
leave()
"""
    assert finish(start_ranks(PRELUDE + body, 2)) == [[{"other": False}]] * 2


def test_a_store_whose_server_has_left_names_rank_0():
    body = """
store.phase = "evaluation"
if rank == 0:
    while not store.has("seen"):
        time.sleep(0.01)
    os._exit(0)
store.set("seen", "")
try:
    while True:
        store.has("key")
except LostPeer as error:
    report(text=str(error), ranks=error.ranks)
    os._exit(0)
"""
    _, (heard,) = finish(start_ranks(PRELUDE + body, 2))
    assert heard["ranks"] == [0]
    assert heard["text"].startswith("rank 0 is gone (waiting for 'evaluation'): ")


def test_a_store_whose_server_is_frozen_is_given_up():
    """A server that does not answer, as behind a link that loses its packets."""
    body = """
if rank == 0:
    report(ready=True)
    time.sleep(60)
store.timeout_seconds = 0.5
report(ready=True)
try:
    while True:
        store.has("key")
except LostPeer as error:
    report(text=str(error), ranks=error.ranks)
    os._exit(0)
"""
    server, client = start_ranks(PRELUDE + body, 2)
    try:
        assert [json.loads(process.stdout.readline()) for process in (server, client)] == [{"ready": True}] * 2
        server.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        (heard,) = finish([client])[0]
        assert time.monotonic() - began < 10
    finally:
        server.kill()
        server.communicate()
    assert heard["ranks"] == [0]
    assert heard["text"].startswith("rank 0 has not answered for 0.5 s (waiting for 'start')")
