"""The parts of the GPU's script, on a CPU: what each leaves behind, and that none ends another."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_gpu  # noqa: E402
import bench_gpu_steps  # noqa: E402
import bench_gpu_wheels  # noqa: E402
from bench_gpu import Part  # noqa: E402


def part(name: str, program: str, limit: float = 60, **others) -> Part:
    return Part(name, ["-c", program], limit, others.pop("estimate", 1.0), others.pop("environment", {}), **others)


def left(out: Path, name: str) -> dict:
    return json.loads((out / f"{name}.json").read_text())


class TestParts:
    def test_none_ends_another_and_each_leaves_its_files(self, tmp_path):
        figures = f"import json, pathlib; pathlib.Path({str(tmp_path / 'good.figures')!r}).write_text(json.dumps([1]))"
        parts = [
            part("red", "print('an assertion failed'); raise SystemExit(1)"),
            part("hangs", "import time; print('waiting', flush=True); time.sleep(60)", limit=1.5),
            part("killed", "import time; time.sleep(60)"),
            part("good", figures),
        ]
        said: list[str] = []
        done = bench_gpu.run(parts, tmp_path, said.append, fail=["killed"])
        assert [each["status"] for each in done] == ["failed", "failed", "failed", "passed"]
        assert [each["how"] for each in done] == ["exit code 1", "killed after 2 s", "killed on purpose", "exit code 0"]
        assert [left(tmp_path, each.name) for each in parts] == done
        assert left(tmp_path, "good")["figures"] == [1]
        assert "an assertion failed" in (tmp_path / "red.log").read_text()
        assert "waiting" in (tmp_path / "hangs.log").read_text()
        assert sum("running, at most" in line for line in said) == 4

    def test_a_hanging_part_takes_its_children_along(self, tmp_path):
        program = (
            "import subprocess, sys, time, pathlib; "
            "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
            f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(child.pid)); time.sleep(60)"
        )
        bench_gpu.run_part(part("hangs", program), tmp_path, 2)
        pid = int((tmp_path / "pid").read_text())
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and _lives(pid):
            time.sleep(0.05)
        assert not _lives(pid)

    def test_what_does_not_fit_into_the_run_any_more_is_left_out_and_said(self, tmp_path):
        said: list[str] = []
        parts = [part("short", "pass", estimate=1), part("long", "raise SystemExit(1)", limit=100, estimate=50)]
        done = bench_gpu.run(parts, tmp_path, said.append, seconds=20)
        assert [each["status"] for each in done] == ["passed", "left out"]
        assert left(tmp_path, "long")["status"] == "left out"
        assert any("left out: it takes about 50 s" in line for line in said)

    def test_what_it_computes_with_stands_in_its_environment(self, tmp_path):
        program = "import os; raise SystemExit(os.environ['ASKED'] != 'yes')"
        assert (
            bench_gpu.run_part(part("one", program, environment={"ASKED": "yes"}), tmp_path, 60)["status"] == "passed"
        )

    def test_figures_that_were_cut_off_are_none(self, tmp_path):
        program = f"import pathlib; pathlib.Path({str(tmp_path / 'one.figures')!r}).write_text('[1, ')"
        assert bench_gpu.run_part(part("one", program), tmp_path, 60)["figures"] is None

    def test_figures_of_an_earlier_run_are_not_taken_for_new_ones(self, tmp_path):
        (tmp_path / "one.figures").write_text("[1]")
        assert bench_gpu.run_part(part("one", "raise SystemExit(1)"), tmp_path, 60)["figures"] is None


def _lives(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


class TestRuns:
    def test_each_is_expected_to_end_within_its_eight_minutes(self, tmp_path):
        for parts in bench_gpu.runs(tmp_path, dry=False).values():
            assert all(each.estimate <= each.limit for each in parts)
            assert sum(each.estimate for each in parts) <= bench_gpu.RUN_SECONDS

    def test_every_mode_is_a_part_of_its_own(self, tmp_path):
        runs = bench_gpu.runs(tmp_path, dry=False)
        lines = [each.command for parts in runs.values() for each in parts if "bench_gpu_steps.py" in each.command[0]]
        assert {line[1] for line in lines} == {*bench_gpu_steps.CONTESTS, *bench_gpu_steps.OTHERS}
        names = [each.name for parts in runs.values() for each in parts]
        assert len(names) == len(set(names))

    def test_every_gpu_test_is_selected_by_one_part(self, tmp_path):
        """By the words in their names, recording and bits first."""
        words = [each.command[each.command.index("-k") + 1] for each in bench_gpu.runs(tmp_path, dry=False)["tests"]]
        assert words == ["record", "bits and not record", "not bits and not record"]
        source = (ROOT / bench_gpu.TESTS).read_text()
        assert all(word in source for word in ("_record", "_bits"))

    def test_without_a_gpu_it_says_what_runs_without_one(self, tmp_path):
        if torch.cuda.is_available():
            pytest.skip("there is one")
        with pytest.raises(SystemExit, match="no CUDA device here; --dry runs everything"):
            bench_gpu.main(["probe", "--out", str(tmp_path)])

    @pytest.mark.parametrize("arguments", [["prob"], ["probe", "--fail", "gate"]])
    def test_an_unknown_run_or_part_is_refused(self, arguments, capsys):
        with pytest.raises(SystemExit):
            bench_gpu.main(arguments)
        assert "not among probe" in capsys.readouterr().err

    def test_the_plan_needs_no_device(self, capsys):
        assert bench_gpu.main(["--plan", "steps"]) == 0
        shown = capsys.readouterr().out
        assert "compiled-recorded-bfloat16" in shown
        assert "probe" not in shown


MODE = {
    "step_ms": 1.0,
    "bare_step_ms": 4.0,
    "ratio": 0.25,
    "replay_ms": None,
    "step_to_replay": None,
    "tokens_per_second": 4_096_000.0,
    "teraflops": 12.0,
    "utilisation": None,
    "peak_memory_gb": 1.5,
    "machine": {"gpu": "a GPU"},
}


def stored(out: Path, **figures: dict) -> None:
    for name, found in figures.items():
        (out / f"{name}.json").write_text(json.dumps({"part": name, "status": "passed", "figures": found}))


class TestFigures:
    def test_modes_of_the_same_arithmetic_and_promises_are_compared(self, tmp_path):
        def mode(name, **changes):
            return {**MODE, "mode": name, **changes}

        stored(
            tmp_path,
            one=mode("kernel by kernel", step_ms=4.0, bare_step_ms=6.0),
            two=mode("recorded", step_ms=1.5, replay_ms=1.4, step_to_replay=1.07),
            three=mode("recorded, not deterministic", step_ms=1.0),
            four=mode("compiled, recorded, bfloat16", step_ms=0.5, utilisation=0.3),
            gpt2=mode("gpt2", ratio=0.8, utilisation=0.46),
        )
        found = bench_gpu.combined(tmp_path)
        assert (found["fastest_mode"], found["to_bare_loop"], found["step_to_replay"]) == ("recorded", 4.0, 1.07)
        assert (found["anchor_utilisation"], found["gpt2_utilisation"]) == (0.3, 0.46)
        assert found["gpt2_to_nanogpt_style"] == 1.25
        assert "gpt2" not in found["modes"]
        shown = bench_gpu.table(found)
        assert "| recorded | 1.500 | 4.000 | 0.250 | 1.400 | 4,096,000 | 12.00 | 1.50 |" in shown
        assert "GPT-2 124 M, model FLOPs utilisation: 0.460" in shown

    def test_what_has_not_run_is_unknown(self, tmp_path):
        stored(tmp_path, compiled={**MODE, "mode": "compiled"})
        found = bench_gpu.combined(tmp_path)
        assert found["to_bare_loop"] is found["gpt2"] is found["gate"] is None
        assert "GPT-2 124 M, model FLOPs utilisation: unknown" in bench_gpu.table(found)


def test_both_loops_train_the_same_model_in_turns(monkeypatch):
    """In processes of their own, as on a GPU: recorded by a stand-in for the graph."""
    found = bench_gpu_steps.measure("recorded", dry=True)
    assert found["ratio"] > 0
    assert found["tokens_per_second"] == pytest.approx(8 * 16 / (found["step_ms"] / 1e3))
    assert found["step_to_replay"] > 0
    assert found["last_losses"][0] == pytest.approx(found["last_losses"][1], abs=1e-4)


@pytest.mark.slow
def test_a_dry_run_executes_every_part(tmp_path, capfd):
    """With one part killed in every run: no other is touched."""
    killed = ["tests-bits", "compiled", "generate"]
    assert bench_gpu.main(["--dry", "--out", str(tmp_path), "--fail", *killed]) == 1
    status = json.loads((tmp_path / "gpu.json").read_text())["status"]
    assert {name for name, each in status.items() if each != "passed"} == set(killed)
    for parts in bench_gpu.runs(tmp_path, dry=True).values():
        assert all((tmp_path / f"{each.name}.{kind}").exists() for each in parts for kind in ("json", "log"))
    assert left(tmp_path, "gate")["figures"]["status"] == "completed"
    assert left(tmp_path, "gpt2")["figures"]["replay_ms"] > 0


def test_only_what_a_machine_lacks_is_fetched():
    there = {"torch", "accelerate", "numpy", "safetensors", "scipy", "tqdm", "pyyaml", "tokenizers", "filelock"}
    wanted = {line.partition("==")[0] for line in bench_gpu_wheels.missing(there, "3.12")}
    assert {"pydantic", "pydantic_core", "typing-inspection", "matplotlib", "pillow"} <= wanted
    assert not wanted & {"torch", "sympy", "filelock"}
    locked = bench_gpu_wheels.LOCK.read_text().splitlines()
    assert set(bench_gpu_wheels.missing(there, "3.12")) <= set(locked)


def test_a_list_of_packages_that_is_missing_is_one_line(tmp_path):
    with pytest.raises(SystemExit, match="no such file; give what pip list printed"):
        bench_gpu_wheels.main([str(tmp_path / "site"), "--there", str(tmp_path / "nowhere.txt")])


def test_names_are_read_from_a_list_of_packages():
    assert bench_gpu_wheels.names(["# there", "", "PyYAML==6.0", "hf_xet"]) == {"pyyaml", "hf-xet"}
