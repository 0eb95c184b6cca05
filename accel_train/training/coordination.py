"""What the ranks agree on, and how they wait for each other.

Two mechanisms, because a rank blocked inside a collective cannot run a Python signal handler:

* between steps, an asynchronous all-reduce of one number on a gloo group of its own: launched
  at one step boundary and read at the next, so all ranks leave at the same step and the wait
  hides behind the step's arithmetic;
* around everything that only the main process does (corpus, evaluation, commit of a
  checkpoint), polling of a key-value store: waiting ranks post their stop
  flags there, the main process its result, and all of them heartbeats. Nobody sits in a
  collective, so signals are seen at once and a long evaluation cannot run into the group's
  timeout; a rank that dies or is cut off meanwhile is missed after that time all the same.

With one process all of it is a local flag.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist

from accel_train.interrupt import Interrupted
from accel_train.training.preemption import StopSignal

log = logging.getLogger(__name__)

T = TypeVar("T")

# Every rank makes its boards in the same order, so the count names them.
_boards = itertools.count()

_POLL_SECONDS = 0.01
_FLAG_POLL_SECONDS = 0.05
_HEARTBEAT_SECONDS = 1.0
_ROLL_CALL_SECONDS = 3.0
# What the agreement between steps carries: the largest of all ranks' values.
_GO_ON, _STOP, _FAILED = 0.0, 1.0, 2.0


class LostPeer(RuntimeError):
    """Another rank is gone or silent: nothing may be saved, the process must leave.

    Args:
        message: what was waited for, and whom, where that is known.
        is_named: whether ``message`` says which rank it is.
    """

    def __init__(self, message: str, *, is_named: bool = False) -> None:
        self.is_named = is_named
        super().__init__(message)


class PeerFailed(RuntimeError):
    """Another rank failed while this one was waiting for it.

    Args:
        rank: the rank that failed.
        phase: what this one was waiting for.
        message: its error.
        kind: name of its exception's class.
    """

    def __init__(self, rank: int, phase: str, message: str, kind: str) -> None:
        self.kind = kind
        super().__init__(f"rank {rank} failed (waiting for '{phase}'): {kind}: {message}")


_LOST_PEER_SIGNS = (
    "connection closed",
    "connection reset",
    "connection refused",
    "timed out",
    "broken pipe",
    "nccl",
    "gloo",
    "recv operation",
)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone: backends say so in words only."""
    theirs = dist.is_available() and (type(error) is RuntimeError or isinstance(error, dist.DistError))
    return theirs and any(sign in str(error).lower() for sign in _LOST_PEER_SIGNS)


class _Caller(threading.Thread):
    """Makes calls that may never return, one after the other, so that whoever wants the answer can give up."""

    def __init__(self) -> None:
        super().__init__(name="store", daemon=True)
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        while True:
            call, answer = self._calls.get()
            try:
                answer.set_result(call())
            except BaseException as error:
                answer.set_exception(error)

    def call(self, call: Callable[[], T], timeout_seconds: float) -> T:
        answer: Future[T] = Future()
        self._calls.put((call, answer))
        return answer.result(timeout_seconds)


class _Board:
    """The key-value store that ranks poll: a server inside rank 0.

    The process group's own store lives in the launcher, and a launcher that is killed would take
    it along; this one lives as long as the ranks need each other. An access that fails, or that
    has no answer in time, means that rank 0 is gone: over a link that lost its packets the store
    itself would wait for ever, deaf to signals.
    """

    def __init__(self, rank: int, timeout_seconds: float) -> None:
        self._timeout = timeout_seconds
        self.phase = "start"
        exchange = dist.distributed_c10d._get_default_store()
        address_key, timeout = f"accel_train/board{next(_boards)}", timedelta(seconds=timeout_seconds)
        host = os.environ.get("MASTER_ADDR", "localhost")
        serves = rank == 0
        port = 0 if serves else int(exchange.get(address_key))
        self._store = dist.TCPStore(  # type: ignore[attr-defined] # exported, but not by name
            host, port, is_master=serves, wait_for_workers=False, timeout=timeout
        )
        self._caller = None if serves else _Caller()
        if serves:
            exchange.set(address_key, str(self._store.port))

    def give_up_after(self, seconds: float) -> None:
        """From now on wait so long for an answer."""
        self._timeout = seconds

    def set(self, key: str, value: str) -> None:
        self._ask(lambda: self._store.set(key, value))

    def get(self, key: str) -> str:
        return self._ask(lambda: bytes(self._store.get(key)).decode())

    def has(self, key: str) -> bool:
        return self._ask(lambda: bool(self._store.check([key])))

    def _ask(self, access: Callable[[], T]) -> T:
        try:
            return access() if self._caller is None else self._caller.call(access, self._timeout)
        except TimeoutError as error:
            raise LostPeer(
                f"rank 0 has not answered for {self._timeout:g} s (waiting for '{self.phase}'): "
                "it or the link to its machine is down",
                is_named=True,
            ) from error
        except RuntimeError as error:
            raise LostPeer(
                f"rank 0 is gone (waiting for '{self.phase}'): {first_line(error)}", is_named=True
            ) from error


class Coordinator:
    """Agreement between the ranks of one run.

    Args:
        stop: this rank's stop flag.
        timeout_seconds: longest wait for another rank before :class:`LostPeer`.
    """

    def __init__(self, stop: StopSignal, timeout_seconds: float) -> None:
        self.stop = stop
        self.timeout = timeout_seconds
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0
        self.is_main = self.rank == 0
        self._sequence = 0
        self._work: dist.Work | None = None
        self._failure: BaseException | None = None
        if self.world_size > 1:
            self._store = _Board(self.rank, timeout_seconds)
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            self._flag = torch.zeros(1)

    # -- between steps ---------------------------------------------------------------------

    def poll(self, failure: BaseException | None = None) -> bool:
        """At every step boundary, on every rank: whether all ranks are to stop here.

        With several ranks the answer reflects the flags as they were one step ago.

        Args:
            failure: what has gone wrong on this rank beside the loop; ends the run on all ranks.

        Raises:
            BaseException: ``failure``, on the rank that has it.
            PeerFailed: on the other ranks.
        """
        if self.world_size == 1:
            if failure is not None:
                raise failure
            return self.stop.requested
        if self.drain():
            return True
        if failure is not None:
            # Before the agreement: whoever reads its result finds the reason on the board.
            self._failure = failure
            self.announce_failure(failure)
        self._flag.fill_(_FAILED if failure is not None else _STOP if self.stop.requested else _GO_ON)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def drain(self) -> bool:
        """Finish the agreement in flight, if there is one, and return its answer; raises as :meth:`poll`."""
        if self._work is None:
            return self.world_size == 1 and self.stop.requested
        work, self._work = self._work, None
        try:
            work.wait()
        except RuntimeError as error:
            raise LostPeer(f"another rank is gone (stop agreement failed: {first_line(error)})") from error
        answer = self._flag.item()
        if answer == _FAILED:
            if self._failure is not None:
                raise self._failure
            self._raise_announced("the next step")
        return answer == _STOP

    # -- main-only phases ------------------------------------------------------------------

    def main_phase(self, name: str, work: Callable[[Callable[[], bool]], T]) -> T:
        """Run ``work(should_stop)`` on the main process; every rank returns its result.

        Args:
            name: what is being done; stands in the messages of ranks that wait in vain.
            work: called on the main process only. ``should_stop()`` is true once any rank has
                been asked to stop. The result must be JSON-serialisable.

        Raises:
            Interrupted: on all ranks, if ``work`` raised it.
            PeerFailed: on the other ranks, if ``work`` raised anything else.
            LostPeer: a rank went silent for longer than the timeout.
        """
        if self.world_size == 1:
            return work(lambda: self.stop.requested)
        self._sequence += 1
        self._store.phase = name
        key = f"phase{self._sequence}"
        result = self._lead(key, name, work) if self.is_main else self._follow(key, name)
        return cast(T, result)

    def announce_failure(self, error: BaseException) -> None:
        """Tell ranks that wait in a phase or a gather that this one is leaving."""
        if self.world_size > 1:
            notice = {"rank": self.rank, "error": str(error), "kind": type(error).__name__}
            try:
                self._store.set("failure", json.dumps(notice))
            except LostPeer as lost:
                log.warning("the other ranks could not be told of the failure: %s", lost)

    def named(self, error: LostPeer) -> LostPeer:
        """``error``, its message completed by the ranks that do not answer a last call of a few seconds."""
        if error.is_named:
            return error
        self._store.give_up_after(_ROLL_CALL_SECONDS)
        try:
            silent = self._call_the_roll()
        except LostPeer:
            silent = [0]
        who = f"rank {_listed(silent)} does not answer any more: " if silent else ""
        return LostPeer(f"{who}{error}", is_named=True)

    def _call_the_roll(self) -> list[int]:
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self._store.set(f"roll/{self.rank}", "")
        deadline = time.monotonic() + _ROLL_CALL_SECONDS
        while silent := [rank for rank in others if not self._store.has(f"roll/{rank}")]:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL_SECONDS)
        self._store.set(f"roll/{self.rank}/read", "")
        if self.is_main:
            # The board leaves with this process: not before those who answered have read it.
            answered = [rank for rank in others if rank not in silent]
            while not all(self._store.has(f"roll/{rank}/read") for rank in answered):
                if time.monotonic() > deadline + _ROLL_CALL_SECONDS:
                    break
                time.sleep(_POLL_SECONDS)
        return silent

    def _raise_announced(self, name: str) -> NoReturn:
        notice = json.loads(self._store.get("failure"))
        raise PeerFailed(notice["rank"], name, notice["error"], notice["kind"])

    def gather(self, name: str, value: Any) -> list[Any]:
        """Every rank's ``value`` (JSON-serialisable) in rank order, on every rank; also a barrier."""
        if self.world_size == 1:
            return [value]
        self._sequence += 1
        self._store.phase = name
        key = f"gather{self._sequence}"
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        self._await_ranks(key, name)
        values = [json.loads(self._store.get(f"{key}/{rank}")) for rank in range(self.world_size)]
        self._store.set(f"{key}/read/{self.rank}", "")
        if self.is_main:
            # The store lives in this process, which may be about to leave: not before all have read.
            self._await_ranks(f"{key}/read", name)
        return values

    def _lead(self, key: str, name: str, work: Callable[[Callable[[], bool]], T]) -> T:
        try:
            with self._heartbeat(key):
                result = work(self._stop_reader(key, name))
        except BaseException as error:
            outcome = {"error": str(error), "kind": type(error).__name__, "interrupted": isinstance(error, Interrupted)}
            self._store.set(f"{key}/outcome", json.dumps(outcome))
            if isinstance(error, Interrupted):
                self._await_ranks(key, name)
            raise
        encoded = json.dumps({"value": result})
        self._store.set(f"{key}/outcome", encoded)
        # Collectives may follow: start them only when nobody is still polling.
        self._store.set(f"{key}/{self.rank}", "ready")
        self._await_ranks(key, name)
        return cast(T, json.loads(encoded)["value"])

    def _follow(self, key: str, name: str) -> Any:
        posted, beat, seen_at = False, "", time.monotonic()
        own_beats, next_beat = 0, 0.0
        while not self._store.has(f"{key}/outcome"):
            if time.monotonic() >= next_beat:
                own_beats, next_beat = own_beats + 1, time.monotonic() + _HEARTBEAT_SECONDS
                self._store.set(f"{key}/beat/{self.rank}", str(own_beats))
            if self.stop.requested and not posted:
                self._store.set(f"{key}/stop", str(self.rank))
                posted = True
            if self._store.has(f"{key}/beat"):
                newest = self._store.get(f"{key}/beat")
                if newest != beat:
                    beat, seen_at = newest, time.monotonic()
            if self._store.has("failure") and not self._store.has(f"{key}/outcome"):
                self._raise_announced(name)
            if time.monotonic() - seen_at > self.timeout:
                raise LostPeer(f"rank 0 has been silent for {self.timeout:g} s in '{name}'", is_named=True)
            time.sleep(_POLL_SECONDS)
        outcome = json.loads(self._store.get(f"{key}/outcome"))
        self._store.set(f"{key}/{self.rank}", "ready")
        if outcome.get("interrupted"):
            raise Interrupted(outcome["error"])
        if "error" in outcome:
            raise PeerFailed(0, name, outcome["error"], outcome["kind"])
        return outcome["value"]

    def _stop_reader(self, key: str, name: str) -> Callable[[], bool]:
        """``should_stop`` for the main process: its own flag, and at intervals everybody's.

        It raises :class:`LostPeer` when a waiting rank has been silent for longer than the timeout: work
        that takes hours must not go on for ranks that are gone.
        """
        next_look = next_count = 0.0
        beats = {rank: ("", time.monotonic()) for rank in range(1, self.world_size)}

        def should_stop() -> bool:
            nonlocal next_look, next_count
            now = time.monotonic()
            if not self.stop.requested and now >= next_look:
                next_look = now + _FLAG_POLL_SECONDS
                if self._store.has(f"{key}/stop"):
                    self.stop.request(f"a signal to rank {self._store.get(f'{key}/stop')}")
            if now >= next_count:
                next_count = now + _HEARTBEAT_SECONDS
                for rank, (beat, seen_at) in beats.items():
                    beat_key = f"{key}/beat/{rank}"
                    newest = self._store.get(beat_key) if self._store.has(beat_key) else ""
                    if newest != beat:
                        beats[rank] = (newest, now)
                    elif now - seen_at > self.timeout:
                        raise LostPeer(f"rank {rank} has been silent for {self.timeout:g} s in '{name}'", is_named=True)
            return self.stop.requested

        return should_stop

    @contextmanager
    def _heartbeat(self, key: str) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            count = 0
            while True:
                count += 1
                self._store.set(f"{key}/beat", str(count))
                if done.wait(_HEARTBEAT_SECONDS):
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _await_ranks(self, key: str, name: str) -> None:
        """Poll until every rank has posted ``key/rank``; the timeout names those that did not."""
        deadline = time.monotonic() + self.timeout
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        while True:
            # Looked for first: a rank may have come here, gone on, and failed afterwards.
            failed = self._store.has("failure")
            missing = [rank for rank in others if not self._store.has(f"{key}/{rank}")]
            if not missing:
                return
            if failed:
                self._raise_announced(name)
            if time.monotonic() > deadline:
                late = f"rank {_listed(missing)} did not arrive at '{name}' within {self.timeout:g} s"
                raise LostPeer(late, is_named=True)
            time.sleep(_POLL_SECONDS / 5)


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def first_line(error: BaseException) -> str:
    """The first line of what ``error`` says, or its kind."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
