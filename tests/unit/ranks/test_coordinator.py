"""Agreement between ranks, in real processes over gloo."""

from __future__ import annotations

import json
import signal
import subprocess
import textwrap
import time

import psutil
import pytest
from rank_processes import finish, start_ranks

from accel_train.process.signals import StopSignal
from accel_train.ranks.coordinator import Coordinator

PRELUDE = """
import json, os, signal, sys, time
from datetime import timedelta
import torch.distributed as dist
from accel_train.errors import Interrupted
from accel_train.errors import LostPeer
from accel_train.ranks.coordinator import Coordinator
from accel_train.errors import PeerFailed
from accel_train.process.signals import StopSignal
dist.init_process_group("gloo", timeout=timedelta(seconds=20))
rank = dist.get_rank()
stop = StopSignal()
TIMEOUT = float(os.environ.get("TIMEOUT", "20"))
coordinator = Coordinator(stop, TIMEOUT)
def report(**values):
    print(json.dumps(values), flush=True)
with stop.installed():
"""


def start(body: str, world: int, **env: str) -> list[subprocess.Popen]:
    code = PRELUDE + textwrap.indent(textwrap.dedent(body), "    ")
    return start_ranks(f"{code}\ndist.destroy_process_group()\n", world, **env)


def test_one_process_needs_no_agreement():
    stop = StopSignal()
    coordinator = Coordinator(stop, 1.0)
    assert not coordinator.poll()
    assert coordinator.main_phase("work", lambda should_stop: should_stop()) is False
    stop.request("test")
    assert coordinator.poll()
    assert coordinator.drain()
    assert coordinator.gather("x", 3) == [3]


def test_a_flag_on_one_rank_stops_all_at_the_same_step():
    body = """
for step in range(1000):
    if step == 5 and rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    if coordinator.poll():
        break
report(step=step)
"""
    outputs = finish(start(body, 3))
    assert outputs == [[{"step": 6}]] * 3


def test_the_result_of_a_main_only_phase_reaches_every_rank():
    body = """
ran = []
value = coordinator.main_phase("work", lambda should_stop: ran.append(1) or {"answer": 42})
report(value=value, ran=len(ran))
"""
    outputs = finish(start(body, 2))
    assert outputs == [[{"value": {"answer": 42}, "ran": 1}], [{"value": {"answer": 42}, "ran": 0}]]


def test_gather_returns_all_values_in_rank_order():
    outputs = finish(start('report(values=coordinator.gather("x", rank * 10))', 3))
    assert outputs == [[{"values": [0, 10, 20]}]] * 3


def test_a_signal_to_a_waiting_rank_interrupts_the_main_process():
    body = """
def work(should_stop):
    started = time.monotonic()
    while not should_stop():
        assert time.monotonic() - started < 15, "the flag never arrived"
        time.sleep(0.01)
    raise Interrupted("stopped")
if rank == 1:
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
try:
    coordinator.main_phase("work", work)
except Interrupted:
    report(interrupted=True, after=coordinator.gather("after", rank))
"""
    outputs = finish(start(body, 2))
    assert outputs == [[{"interrupted": True, "after": [0, 1]}]] * 2


def test_an_error_of_the_main_process_ends_the_others_too():
    body = """
def work(should_stop):
    raise ValueError("no such graph")
try:
    coordinator.main_phase("corpus", work)
except Exception as error:
    report(kind=type(error).__name__, text=str(error))
"""
    main, other = finish(start(body, 2))
    assert main == [{"kind": "ValueError", "text": "no such graph"}]
    assert other == [{"kind": "PeerFailed", "text": "rank 0 failed (waiting for 'corpus'): ValueError: no such graph"}]


def test_a_failure_waits_for_ranks_that_come_late():
    """The store leaves with rank 0: not before the others know why, and with which code to leave."""
    body = """
from accel_train.errors import ConfigError

def work(should_stop):
    raise ConfigError("walks.graph.p_in", 0.1, "is too small")

try:
    if rank == 1:
        time.sleep(1.5)
    coordinator.main_phase("check", work)
except (ConfigError, PeerFailed) as error:
    report(kind=type(error).__name__, code=error.exit_code)
os._exit(0)
"""
    outputs = finish(start(body, 2))
    assert outputs == [[{"kind": "ConfigError", "code": 2}], [{"kind": "PeerFailed", "code": 2}]]


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_failure_of_another_rank_is_heard_while_waiting(culprit):
    body = """
try:
    if rank == int(os.environ["CULPRIT"]):
        error = OSError("disk full")
        coordinator.announce_failure(error)
        report(left=True)
    else:
        coordinator.gather("checkpoint files", rank)
except PeerFailed as error:
    report(text=str(error), code=error.exit_code)
time.sleep(1)
"""
    outputs = finish(start(body, 2, CULPRIT=str(culprit)))
    heard = f"rank {culprit} failed (waiting for 'checkpoint files'): OSError: disk full"
    assert outputs[1 - culprit] == [{"text": heard, "code": 1}]
    assert outputs[culprit] == [{"left": True}]


@pytest.mark.parametrize("late", [0, 2])
def test_a_missing_rank_is_named_when_the_wait_is_over(late):
    body = """
try:
    if rank != int(os.environ["LATE"]):
        coordinator.gather("checkpoint files", rank)
    else:
        time.sleep(3)
except LostPeer as error:
    report(text=str(coordinator.named(error)))
time.sleep(2 if int(os.environ["LATE"]) == 0 else 0)
"""
    outputs = finish(start(body, 3, TIMEOUT="1.5", LATE=str(late)))
    expected = [{"text": f"rank {late} did not arrive at 'checkpoint files' within 1.5 s"}]
    assert outputs == [[] if rank == late else expected for rank in range(3)]


class TestWaitingForTheDevice:
    """With a stand-in for the event that is recorded behind a collective: a kernel that never ends, or ends late."""

    def test_all_return_when_their_devices_are_done(self):
        body = """
began, done_at = time.monotonic(), time.monotonic() + (0.2 if rank == 0 else 1.6)
coordinator.poll()
coordinator.wait_for_device("step 3", lambda: time.monotonic() > done_at)
coordinator.wait_for_device("step 4", lambda: True)
report(waited=time.monotonic() > done_at, stop=coordinator.drain(), gathered=coordinator.gather("after", rank))
"""
        assert finish(start(body, 2)) == [[{"waited": True, "stop": False, "gathered": [0, 1]}]] * 2

    def test_a_rank_that_dies_before_it_arrives_is_missed_at_once(self):
        """By the agreement in flight, long before the timeout."""
        body = """
began = time.monotonic()
if rank == 1:
    os._exit(0)
coordinator.poll()
try:
    coordinator.wait_for_device("step 3", lambda: False)
except LostPeer as error:
    report(text=str(coordinator.named(error)), soon=time.monotonic() - began < 15)
os._exit(0)
"""
        survivor, _ = finish(start(body, 2, TIMEOUT="40"))
        assert survivor[0]["soon"]
        assert "rank 1 does not answer any more" in survivor[0]["text"]

    @pytest.mark.parametrize("signalled", [True, False])
    def test_a_rank_that_dies_while_it_waits_is_named(self, signalled):
        """Within seconds once the launcher has signalled this one, else when the timeout is over."""
        body = """
began = time.monotonic()
coordinator.poll()
if rank == 1:
    threading.Timer(1.5, os._exit, [0]).start()
elif os.environ["SIGNALLED"] == "True":
    threading.Timer(2.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
try:
    coordinator.wait_for_device("step 3", lambda: False)
except LostPeer as error:
    report(text=str(error), ranks=list(error.ranks), seconds=time.monotonic() - began)
os._exit(0)
"""
        timeout = 60 if signalled else 4
        body = "import threading\n" + body
        survivor, _ = finish(start(body, 2, TIMEOUT=str(timeout), SIGNALLED=str(signalled)))
        assert survivor[0]["ranks"] in ([1], [])
        assert "rank 1 has been silent" in survivor[0]["text"] or "has not finished 'step 3'" in survivor[0]["text"]
        assert survivor[0]["seconds"] < 20
        if signalled:
            assert survivor[0]["ranks"] == [1]

    def test_a_rank_that_dies_between_the_agreement_and_its_first_heartbeat_is_named(self):
        body = """
coordinator.poll()
if rank == 1:
    time.sleep(0.5)
    os._exit(0)
signal.setitimer(signal.ITIMER_REAL, 1.0)
signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
began = time.monotonic()
try:
    coordinator.wait_for_device("step 3", lambda: False)
except LostPeer as error:
    report(text=str(error), ranks=list(error.ranks), soon=time.monotonic() - began < 15)
os._exit(0)
"""
        survivor, _ = finish(start(body, 2, TIMEOUT="50"))
        assert survivor == [{"text": "rank 1 has been silent for 5 s in 'step 3'", "ranks": [1], "soon": True}]

    def test_a_failure_of_another_rank_is_heard(self):
        body = """
coordinator.poll()
if rank == 1:
    coordinator.announce_failure(OSError("disk full"))
    report(told=True)
    time.sleep(3)
else:
    try:
        coordinator.wait_for_device("step 3", lambda: False)
    except PeerFailed as error:
        report(text=str(error))
os._exit(0)
"""
        outputs = finish(start(body, 2))
        assert outputs[0] == [{"text": "rank 1 failed (waiting for 'step 3'): OSError: disk full"}]

    def test_a_failure_of_its_own_is_raised_as_what_it_is(self):
        body = """
failure = OSError("disk full") if rank == 0 else None
coordinator.poll(failure)
try:
    coordinator.wait_for_device("step 3", lambda: False)
except Exception as error:
    report(text=f"{type(error).__name__}: {error}")
time.sleep(2 if rank == 0 else 0)
os._exit(0)
"""
        outputs = finish(start(body, 2))
        assert outputs[0] == [{"text": "OSError: disk full"}]
        assert outputs[1] == [{"text": "PeerFailed: rank 0 failed (waiting for 'step 3'): OSError: disk full"}]

    def test_one_process_polls_nothing(self):
        asked = []
        Coordinator(StopSignal(), 1.0).wait_for_device("step 3", lambda: bool(asked.append(1)))
        assert asked == []


def test_an_answer_to_stop_is_not_forgotten():
    """It may be read at a log, and acted on after an evaluation."""
    body = """
if rank == 1:
    stop.request("test")
coordinator.poll()
answers = [coordinator.poll(), coordinator.drain(), coordinator.poll()]
report(answers=answers)
"""
    assert finish(start(body, 2)) == [[{"answers": [True, True, True]}]] * 2


def said_without_rank_2(body: str) -> list[list[dict]]:
    """What ranks 0 and 1 of three say when they leave at once; rank 2 sleeps through it."""
    leave = """
    else:
        time.sleep(60)
except LostPeer as error:
    began = time.monotonic()
    report(text=str(coordinator.named(error)))
    report(soon=time.monotonic() - began < 3)
    os._exit(0)
"""
    ranks = start(f"try:\n{body.strip(chr(10))}{leave}", 3)
    try:
        return finish(ranks[:2])
    finally:
        ranks[2].kill()
        ranks[2].communicate()


def test_rank_0_tells_the_others_whom_it_gave_up():
    """Rank 1 came later and still waits: it must neither take rank 0 for gone nor keep it waiting."""
    outputs = said_without_rank_2("""
    if rank < 2:
        coordinator.timeout = (1.0, 20.0)[rank]
        coordinator.gather("checkpoint files", rank)
""")
    assert outputs == [[{"text": "rank 2 did not arrive at 'checkpoint files' within 1 s"}, {"soon": True}]] * 2


def test_work_that_misses_a_rank_ends_the_others_with_its_name():
    outputs = said_without_rank_2("""
    if rank < 2:
        def work(should_stop):
            raise LostPeer("rank 2 has been silent", ranks=[2])
        coordinator.main_phase("evaluation", work)
""")
    assert outputs == [[{"text": "rank 2 has been silent"}, {"soon": True}]] * 2


def test_a_rank_that_waits_answers_the_roll_call():
    """Rank 0 lost somebody in a collective and does not know whom; rank 1 is in none."""
    outputs = said_without_rank_2("""
    if rank == 0:
        raise LostPeer("another rank is gone: no answer in step 7")
    elif rank == 1:
        coordinator.gather("checkpoint files", rank)
""")
    text = "rank 2 does not answer any more: another rank is gone: no answer in step 7"
    assert [said[0] for said in outputs] == [{"text": text}] * 2


def test_a_lost_rank_does_not_hide_an_announced_failure():
    body = """
try:
    if rank == 1:
        coordinator.announce_failure(OSError("disk full"))
        coordinator.named(LostPeer("rank 2 is gone", ranks=[2]))
        coordinator._store.set("named", "")
    else:
        while not coordinator._store.has("named"):
            time.sleep(0.01)
        coordinator.gather("checkpoint files", rank)
except PeerFailed as error:
    report(text=str(error))
"""
    main, _ = finish(start(body, 2))
    assert main == [{"text": "rank 1 failed (waiting for 'checkpoint files'): OSError: disk full"}]


def test_a_killed_peer_is_noticed_at_the_next_agreement():
    body = """
steps = 0
try:
    while True:
        assert not coordinator.poll()
        steps += 1
        if steps == 3:
            report(going=True)
        time.sleep(0.01)
except LostPeer as error:
    report(lost=str(error)[:20])
    sys.stdout.flush()
    os._exit(0)
"""
    survivor, victim = start(body, 2)
    assert json.loads(victim.stdout.readline()) == {"going": True}
    victim.kill()
    out, err = survivor.communicate(timeout=60)
    assert victim.wait() == -signal.SIGKILL
    assert survivor.returncode == 0, err
    assert json.loads(out.splitlines()[-1]) == {"lost": "another rank is gone"}


def freeze(victim: subprocess.Popen, survivor: subprocess.Popen) -> str:
    """Stop ``victim`` and let it live, as behind a link that lost its packets; what ``survivor`` says, soon after."""
    try:
        victim.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        out, err = survivor.communicate(timeout=30)
        assert time.monotonic() - began < 10
        assert psutil.Process(victim.pid).status() == psutil.STATUS_STOPPED
    finally:
        victim.kill()
        victim.wait()
    assert survivor.returncode == 0, err
    return json.loads(out)["text"]


def test_a_frozen_main_process_does_not_hang_those_that_wait_for_it():
    body = """
def work(should_stop):
    report(pid=os.getpid())
    time.sleep(60)
try:
    coordinator.main_phase("evaluation", work)
except LostPeer as error:
    report(text=str(error))
    sys.stdout.flush()
    os._exit(0)
"""
    main, other = start(body, 2, TIMEOUT="1.5")
    assert json.loads(main.stdout.readline()) == {"pid": main.pid}
    assert freeze(main, other).startswith("rank 0 has not answered for 1.5 s (waiting for 'evaluation')")


def test_work_on_the_main_process_ends_when_a_waiting_rank_goes_silent():
    body = """
def work(should_stop):
    report(going=True)
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        should_stop()
        time.sleep(0.01)
try:
    coordinator.main_phase("evaluation", work)
except LostPeer as error:
    report(text=str(error))
    sys.stdout.flush()
    os._exit(0)
"""
    main, other = start(body, 2, TIMEOUT="1.5")
    assert json.loads(main.stdout.readline()) == {"going": True}
    assert freeze(other, main) == "rank 1 has been silent for 1.5 s in 'evaluation'"


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_rank_is_named_in_the_roll_call(frozen):
    body = """
try:
    while True:
        assert not coordinator.poll()
        if rank == int(os.environ["FROZEN"]):
            report(going=True)
        time.sleep(0.05)
except LostPeer as error:
    report(text=str(coordinator.named(error)))
    sys.stdout.flush()
    os._exit(0)
"""
    ranks = start(body, 2, TIMEOUT="1.5", FROZEN=str(frozen))
    assert json.loads(ranks[frozen].stdout.readline()) == {"going": True}
    said = freeze(ranks[frozen], ranks[1 - frozen])
    assert said.startswith(f"rank {frozen} does not answer any more: another rank is gone"), said
