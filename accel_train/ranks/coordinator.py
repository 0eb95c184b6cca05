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

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from accel_train.errors import EXIT_FAILED, Interrupted, LostPeer, PeerFailed, RunError
from accel_train.process.signals import StopSignal
from accel_train.process.work import StopCheck
from accel_train.ranks.store import RankStore, first_line

log = logging.getLogger(__name__)

T = TypeVar("T")

_POLL_SECONDS = 0.01
_DEVICE_POLL_SECONDS = 0.0005
_FLAG_POLL_SECONDS = 0.05
_HEARTBEAT_SECONDS = 1.0
_ROLL_CALL_SECONDS = 5.0
# What the agreement between steps carries: the largest of all ranks' values.
_GO_ON, _STOP, _FAILED = 0.0, 1.0, 2.0


class Coordinator:
    """Agreement between the ranks of one run.

    Args:
        stop: this rank's stop flag.
        timeout_seconds: longest wait for another rank before :class:`LostPeer`.
    """

    def __init__(self, stop: StopSignal, timeout_seconds: float) -> None:
        self.stop, self.timeout = stop, timeout_seconds
        distributed = dist.is_available() and dist.is_initialized()
        self.world_size = dist.get_world_size() if distributed else 1
        self.rank = dist.get_rank() if distributed else 0
        self.is_main = self.rank == 0
        self._sequence = self._device_waits = 0
        self._work: dist.Work | None = None
        self._failure: BaseException | None = None
        self._is_leaving = self._stop_agreed = False
        if self.world_size > 1:
            self._store = RankStore(self.rank, timeout_seconds)
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_seconds))
            self._flag = torch.zeros(1)

    # -- between steps ---------------------------------------------------------------------

    def poll(self, failure: BaseException | None = None) -> bool:
        """Return whether all ranks are to stop at this step boundary; called by every rank at every one.

        With several ranks the answer is that of one step ago.

        Args:
            failure: an error in this rank's background work; ends the run on all ranks.

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
            # Before the agreement: whoever reads its result finds the reason in the store.
            self._failure = failure
            self.announce_failure(failure)
        self._flag.fill_(_FAILED if failure is not None else _STOP if self.stop.requested else _GO_ON)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def drain(self) -> bool:
        """Finish the agreement in flight, if there is one, and return its answer; raises as :meth:`poll`."""
        if self.world_size == 1:
            return self.stop.requested
        if self._work is not None:
            work, self._work = self._work, None
            self._finish(work)
            answer = self._flag.item()
            if answer == _FAILED:
                if self._failure is not None:
                    raise self._failure
                self._raise_announced("the next step")
            self._stop_agreed |= answer == _STOP
        return self._stop_agreed

    @staticmethod
    def _finish(agreement: dist.Work) -> None:
        try:
            agreement.wait()
        except RuntimeError as error:
            raise LostPeer(f"another rank is gone (stop agreement failed: {first_line(error)})") from error

    def wait_for_device(self, name: str, is_done: Callable[[], bool]) -> None:
        """Return when the device has done what this rank gave it; called by every rank at the same places.

        On a GPU a collective with a rank that is gone never ends, and a host that waits for it in a copy from the
        device answers no signal and names nobody. Here it polls, and meanwhile hears of other ranks: by the agreement
        in flight, by what they announce, and by the heartbeats of those that wait, too.

        Args:
            name: what the device computes; stands in the messages.
            is_done: asks the device without waiting for it.

        Raises:
            BaseException: what :meth:`poll` was given, on the rank that has it.
            LostPeer: another rank is gone, or the device is not done within the timeout.
            PeerFailed: another rank failed.
        """
        if self.world_size == 1:
            return
        self._device_waits += 1
        self._store.phase = name
        began = time.monotonic()
        # What takes less than that costs no look at the store.
        next_look = began + _HEARTBEAT_SECONDS
        seen: dict[int, tuple[str, float]] = {}
        while not is_done():
            now = time.monotonic()
            if now >= next_look:
                next_look = now + _HEARTBEAT_SECONDS
                self._store.set(f"device/{self.rank}", f"{self._device_waits} {now}")
                if self._failure is not None:
                    raise self._failure
                if self._store.has("failure"):
                    self._raise_announced(name)
                if self._work is None or self._work.is_completed():
                    if self._work is not None:
                        self._finish(self._work)
                    self._look_for_waiting_ranks(seen, name)
            if now - began > self.timeout:
                raise LostPeer(f"the device has not finished '{name}' within {self.timeout:g} s")
            time.sleep(_DEVICE_POLL_SECONDS)
        self._store.set(f"device/{self.rank}", f"{self._device_waits + 1} on its way")

    def _look_for_waiting_ranks(self, seen: dict[int, tuple[str, float]], name: str) -> None:
        """Raise when a rank is silent that has come to this wait, too: the agreement before it says so of all.

        A few seconds are enough once a signal has come: a launcher signals the others when one process is gone, and
        kills them soon after. ``seen`` holds what each rank said last, and when that was new.
        """
        patience = min(self.timeout, _ROLL_CALL_SECONDS) if self.stop.requested else self.timeout
        now = time.monotonic()
        for rank in set(range(self.world_size)) - {self.rank}:
            key = f"device/{rank}"
            said = self._store.get(key) if self._store.has(key) else ""
            if seen.setdefault(rank, (said, now))[0] != said:
                seen[rank] = said, now
            is_further = int((said or "0").split()[0]) > self._device_waits
            if not is_further and now - seen[rank][1] > patience:
                raise LostPeer(f"rank {rank} has been silent for {patience:g} s in '{name}'", ranks=[rank])

    # -- main-only phases ------------------------------------------------------------------

    def main_phase(self, name: str, work: Callable[[StopCheck], T]) -> T:
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
        return self._lead(key, name, work) if self.is_main else self._follow(key, name)  # type: ignore[no-any-return]

    def announce_failure(self, error: BaseException) -> None:
        """Tell ranks that wait in a phase or a gather that this one is leaving."""
        if self.world_size > 1:
            try:
                self._store.set("failure", json.dumps(self._described(error)))
            except LostPeer as lost:
                log.warning("the other ranks could not be told of the failure: %s", lost)

    def named(self, error: LostPeer) -> LostPeer:
        """Return ``error`` with the ranks that are gone, and tell those that wait; a second call does nothing.

        Where it is not known which ranks are gone, those that are left answer a roll call of a few seconds. Rank 0
        returns after all that are left, since the store ends with its process.
        """
        if self._is_leaving or 0 in error.ranks:
            return error
        self._is_leaving = True
        self._store.timeout_seconds = _ROLL_CALL_SECONDS
        try:
            if not self._store.has("failure"):
                self._store.set("failure", json.dumps(self._described(error)))
            if not error.ranks:
                self._store.set(f"roll/{self.rank}", "")
                error = _with_ranks(error, self._silent("roll", range(1, self.world_size)))
            self._store.set(f"left/{self.rank}", "")
            if self.is_main:
                self._silent("left", set(range(self.world_size)).difference(error.ranks))
        except LostPeer:
            return error if error.ranks else _with_ranks(error, [0])
        return error

    def _silent(self, key: str, ranks: Iterable[int]) -> list[int]:
        """Return those of ``ranks`` that have not posted ``key/rank`` after a few seconds."""
        end = time.monotonic() + _ROLL_CALL_SECONDS
        while (silent := [rank for rank in ranks if not self._store.has(f"{key}/{rank}")]) and time.monotonic() <= end:
            time.sleep(_POLL_SECONDS)
        return silent

    def _described(self, error: BaseException) -> dict[str, Any]:
        """Return what the other ranks are told of an error; :func:`_heard` is the inverse."""
        return {
            "rank": self.rank,
            "error": f"{type(error).__name__}: {error}",
            "message": str(error),
            "exit_code": getattr(error, "exit_code", EXIT_FAILED),
            "lost": list(error.ranks) if isinstance(error, LostPeer) else None,
        }

    def _raise_announced(self, name: str) -> NoReturn:
        raise _heard(json.loads(self._store.get("failure")), name)

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return every rank's ``value`` (JSON-serialisable) in rank order, on every rank; also a barrier."""
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

    def _lead(self, key: str, name: str, work: Callable[[StopCheck], Any]) -> Any:
        try:
            with self._heartbeat(key):
                result = work(self._stop_reader(key, name))
        except BaseException as error:
            outcome = {**self._described(error), "interrupted": isinstance(error, Interrupted)}
            self._store.set(f"{key}/outcome", json.dumps(outcome))
            if isinstance(error, Interrupted):
                self._await_ranks(key, name)
            elif isinstance(error, Exception) and not isinstance(error, LostPeer):
                # The store leaves with this process: some seconds for the others to read how the phase ended.
                self._silent(key, range(1, self.world_size))
            raise
        encoded = json.dumps({"value": result})
        self._store.set(f"{key}/outcome", encoded)
        # Collectives may follow: start them only when nobody is still polling.
        self._store.set(f"{key}/{self.rank}", "ready")
        self._await_ranks(key, name)
        return json.loads(encoded)["value"]

    def _follow(self, key: str, name: str) -> Any:
        posted, next_beat, beats = False, 0.0, {0: ("", time.monotonic())}
        while not self._store.has(f"{key}/outcome"):
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + _HEARTBEAT_SECONDS
                self._beat(key)
            if self.stop.requested and not posted:
                self._store.set(f"{key}/stop", str(self.rank))
                posted = True
            if self._store.has("failure") and not self._store.has(f"{key}/outcome"):
                self._raise_announced(name)
            self._check_beats(beats, key, name)
            time.sleep(_POLL_SECONDS)
        outcome = json.loads(self._store.get(f"{key}/outcome"))
        self._store.set(f"{key}/{self.rank}", "ready")
        if outcome.get("interrupted"):
            raise Interrupted(outcome["message"])
        if "error" in outcome:
            raise _heard(outcome, name)
        return outcome["value"]

    def _stop_reader(self, key: str, name: str) -> StopCheck:
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
                self._check_beats(beats, key, name)
            return self.stop.requested

        return should_stop

    def _beat(self, key: str) -> None:
        self._store.set(f"{key}/beat/{self.rank}", str(time.monotonic()))

    def _check_beats(self, beats: dict[int, tuple[str, float]], key: str, name: str) -> None:
        """Raise when a rank is silent; ``beats`` holds the last heartbeat of each and when it was new."""
        now = time.monotonic()
        for rank, (beat, seen_at) in beats.items():
            beat_key = f"{key}/beat/{rank}"
            newest = self._store.get(beat_key) if self._store.has(beat_key) else ""
            if newest != beat:
                beats[rank] = newest, now
            elif now - seen_at > self.timeout:
                raise LostPeer(f"rank {rank} has been silent for {self.timeout:g} s in '{name}'", ranks=[rank])

    @contextmanager
    def _heartbeat(self, key: str) -> Iterator[None]:
        done = threading.Event()

        def beat() -> None:
            self._beat(key)
            while not done.wait(_HEARTBEAT_SECONDS):
                self._beat(key)

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _await_ranks(self, key: str, name: str) -> None:
        """Poll until every rank has posted ``key/rank``; the error after the timeout names those that did not."""
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
                late = ", ".join(map(str, missing))
                raise LostPeer(f"rank {late} did not arrive at '{name}' within {self.timeout:g} s", ranks=missing)
            time.sleep(_POLL_SECONDS / 5)


def _heard(notice: Mapping[str, Any], name: str) -> RunError:
    """Return the error of a rank that waits for ``name`` and hears of another rank's."""
    if notice["lost"] is not None:
        return LostPeer(notice["message"], ranks=notice["lost"])
    return PeerFailed(notice["rank"], name, notice["error"], notice["exit_code"])


def _with_ranks(error: LostPeer, silent: Sequence[int]) -> LostPeer:
    who = f"rank {', '.join(map(str, silent))} does not answer any more: " if silent else ""
    return LostPeer(f"{who}{error}", ranks=silent)
