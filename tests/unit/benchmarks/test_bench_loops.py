"""What of the benchmarks of loops a CPU without peers can check."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from accel_train.config.sections import ModelConfig
from accel_train.model.size import count_parameters
from accel_train.model.transformer import TransformerLM

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_loops  # noqa: E402
import bench_peers  # noqa: E402
import bench_turns  # noqa: E402

SHAPE = ModelConfig(d_model=32, n_layers=2, n_heads=2, max_seq_len=16)


@pytest.mark.parametrize("vocab_size", [50, 400])
def test_the_operations_counted_are_those_of_the_matrix_products(vocab_size):
    model = TransformerLM(SHAPE, vocab_size)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    # A sum's gradient needs no product with it, and no gradient goes to tokens.
    assert counter.get_total_flops() == 3 * 16 * bench_loops.flops_per_token(SHAPE, vocab_size)


def test_contestants_train_in_turns(tmp_path, capsys):
    """Real processes: one block each, one at a time, another first in every round; both stay to the end."""
    log = tmp_path / "log"
    contestant = tmp_path / "contestant.py"
    contestant.write_text(
        f"""
import sys, time
sys.path[:0] = [{str(ROOT / "benchmarks")!r}, {str(ROOT)!r}]
import bench_turns

name, steps, block = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
turns = bench_turns.Turns(steps, block, sys.stdin, sys.stdout)
with open({str(log)!r}, "ab", buffering=0) as log:
    while not turns.over:
        time.sleep(0.01 if name == "fast" else 0.03)
        log.write(name[0].encode())
        turns.step()
"""
    )
    lines = {name: [sys.executable, str(contestant), name, "8", "2"] for name in ("fast", "slow")}
    seconds = bench_turns.in_turns(lines, rounds=3)
    assert log.read_text()[4:] == "ffss" + "ssff" + "ffss"
    assert [len(each) for each in seconds.values()] == [3, 3]
    assert all(a >= 0.02 and b >= 0.06 for a, b in zip(*seconds.values(), strict=True))
    shown = capsys.readouterr()
    assert shown.out == "", "standard output is for figures"
    assert shown.err.splitlines() == ["starting fast, slow", "round 1 of 3", "round 2 of 3", "round 3 of 3"]


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit('no such optimizer')", r"(?s)peer ended \(exit 1\).*no such optimizer"),
        ("print('Welcome!'); input()", r"peer reported 'Welcome!' where it should be ready"),
        ("print('ready'); input(); print('loss 3.2'); input()", r"peer reported 'loss 3.2' where the seconds"),
        ("print('ready'); input(); print(0.1); raise SystemExit('lost')", r"(?s)peer ended badly \(exit 1\).*lost"),
    ],
    ids=["before", "greeting", "chatter", "at-the-end"],
)
def test_a_contestant_that_fails_ends_it_with_what_it_said(program, message):
    with pytest.raises(RuntimeError, match=message):
        bench_turns.in_turns({"peer": [sys.executable, "-u", "-c", program]}, rounds=1)


def test_a_contestant_with_more_steps_than_turns_is_refused():
    baton, report = io.StringIO("go\n"), io.StringIO()
    turns = bench_turns.Turns(6, 2, baton, report)
    for _ in range(3):
        turns.step()
    with pytest.raises(SystemExit, match="no turn is left after 4 of 6 steps"):
        turns.step()


def test_peers_are_compared_round_by_round(monkeypatch):
    """The machine is half as fast in every second round and no slower peer for it; every process is started anew."""
    seconds = {
        "accel_train": [1.0, 2.0, 1.0],
        "nanogpt_style": [1.1, 2.2, 1.1],
        "nanogpt_style_our_model": [1.02, 2.04, 1.02],
        "transformers": [1.5, 3.0, 1.5],
    }
    started = []

    def in_turns(lines, rounds):
        started.append((set(lines), rounds))
        # One start in which transformers' process is lucky.
        return {**seconds, "transformers": [1.2, 2.4, 1.2]} if len(started) == 2 else seconds

    monkeypatch.setattr(bench_peers, "in_turns", in_turns)
    found = bench_peers.bench_peers(starts=3, rounds=3)
    assert [rounds for _, rounds in started] == [3, 3, 3]
    assert all(names >= {"accel_train", "nanogpt_style"} for names, _ in started)
    assert (found["starts"], found["rounds"]) == (3, 9)
    assert found["fastest"] == "nanogpt_style"
    assert found["to_fastest"] == pytest.approx(1.1)
    assert found["to_transformers"] == pytest.approx(1.5)
    assert found["to_fastest_loop_around_our_model"] == pytest.approx(1.02)
    assert found["missing"] == ["lightning"]


def test_the_model_that_peers_train_is_ours_in_plain_pytorch():
    plain, ours = bench_peers.plain_model(), bench_peers.our_model()
    tokens = torch.randint(bench_loops.VOCAB, (2, 64))
    torch.testing.assert_close(plain(tokens), ours(tokens), atol=1e-5, rtol=1e-5)
    assert count_parameters(plain) == count_parameters(ours)
    assert not any(type(module).__module__.startswith("accel_train") for module in plain.modules())
