"""A key-value store that all ranks reach, and how a rank notices that another one is gone."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from accel_train.errors import Interrupted, LostPeer
from accel_train.process.work import abandonable

T = TypeVar("T")

# Every rank makes its stores in the same order, so the count names them.
_count = itertools.count()

_LOST_PEER_SIGNS = r"connection (closed|reset|refused)|timed out|broken pipe|nccl|gloo|recv operation"


def is_lost_peer(error: BaseException) -> bool:
    """Return whether a collective failed because another rank is gone: backends say so in words only."""
    theirs = dist.is_available() and (type(error) is RuntimeError or isinstance(error, dist.DistError))
    return theirs and re.search(_LOST_PEER_SIGNS, str(error), re.IGNORECASE) is not None


class RankStore:
    """A key-value store, served by rank 0 and polled by all ranks.

    The process group's own store may live in the launcher, and a launcher that is killed takes it along. This one
    lives as long as rank 0. An access that fails, or has no answer in time, means that rank 0 is gone: over a
    broken link an access without a timeout waits for ever and no signal is handled.

    Args:
        rank: the rank of this process; rank 0 serves the others.
        timeout_seconds: longest wait for an answer.

    Raises:
        LostPeer: from every method, when rank 0 is gone or silent.
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self.timeout_seconds = timeout_seconds
        """Longest wait for an answer."""
        self.phase = "start"
        """What the ranks are doing, for the message of the error."""
        exchange = dist.distributed_c10d._get_default_store()
        address_key, timeout = f"accel_train/store{next(_count)}", timedelta(seconds=timeout_seconds)
        host = os.environ.get("MASTER_ADDR", "localhost")
        self._serves = rank == 0
        port = 0 if self._serves else int(exchange.get(address_key))
        # PyTorch exports the class, but not by name.
        self._store = dist.TCPStore(host, port, is_master=self._serves, wait_for_workers=False, timeout=timeout)  # type: ignore[attr-defined]
        if self._serves:
            exchange.set(address_key, str(self._store.port))

    def set(self, key: str, value: str) -> None:
        """Store ``value`` under ``key``, where all ranks see it."""
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        """Return the value under ``key``, which must be there: see :meth:`has`."""
        return self._ask(lambda: bytes(self._store.get(key)).decode())

    def has(self, key: str) -> bool:
        """Return whether there is a value under ``key``."""
        return self._ask(lambda: bool(self._store.check([key])))

    def _ask(self, access: Callable[[], T]) -> T:
        deadline = time.monotonic() + self.timeout_seconds
        try:
            return access() if self._serves else abandonable(lambda _: access(), lambda: time.monotonic() > deadline)
        except Interrupted as error:
            silent = f"rank 0 has not answered for {self.timeout_seconds:g} s (waiting for '{self.phase}')"
            raise LostPeer(f"{silent}: it or the link to its machine is down", ranks=[0]) from error
        except RuntimeError as error:
            raise LostPeer(f"rank 0 is gone (waiting for '{self.phase}'): {first_line(error)}", ranks=[0]) from error


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
