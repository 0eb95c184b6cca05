"""The table of docs/benchmarks.md is what was measured."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench  # noqa: E402
import bench_report  # noqa: E402

MACHINE = {"cores": 2, "processor": "a processor", "gpu": None, "python": "3.11", "versions": {"torch": "2.13"}}


def figures(**values):
    return {"machine": MACHINE, "date": "2026-01-01", **values}


def test_the_document_shows_the_stored_figures():
    """Nobody edits the table by hand."""
    stored = json.loads(bench_report.DOCUMENT.with_suffix(".json").read_text())
    assert bench_report.section(stored) in bench_report.DOCUMENT.read_text()


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.2, "| 1.2 | yes |"), (1.21, "| 1.21 | **no** |"), (0.5, "| 0.5 | yes |")]
)
def test_a_row_says_whether_its_target_is_met(ratio, verdict):
    table = bench_report.section({"resume": figures(ratio=ratio)})
    (row,) = [line for line in table.splitlines() if line.startswith("| `resume`")]
    assert verdict in row


@pytest.mark.parametrize(("to_fastest", "verdict"), [(1.05, "yes"), (1.04, "**no**")])
def test_some_targets_are_lower_bounds(to_fastest, verdict):
    rates = {"accel_train": 2.0, "other": 1.0}
    peers = figures(to_fastest=to_fastest, to_transformers=2.0, tokens_per_second=rates, ours_to={"other": 2.1})
    table = bench_report.section({"peers": peers})
    (row,) = [line for line in table.splitlines() if "to the fastest peer" in line]
    assert f"| ≥ 1.05 | {to_fastest:g} | {verdict} |" in row
    assert "| other | 1 | 2.100 |" in table


def test_what_was_not_measured_says_so():
    table = bench_report.section({"resume": figures(ratio=1.0)})
    assert table.count("not measured") == len(bench_report.TARGETS) - 1


def test_text_outside_the_markers_and_earlier_figures_stay(tmp_path, monkeypatch):
    document = tmp_path / "doc.md"
    document.write_text(f"before\n{bench_report.BEGIN}\nold\n{bench_report.END}\nafter\n")
    document.with_suffix(".json").write_text(json.dumps({"memory": figures(ratio=1.07)}))
    monkeypatch.setattr(bench_report, "measure", lambda name: figures(ratio=1.1))
    bench_report.main(["--only", "resume", "--document", str(document)])
    content = document.read_text()
    assert content.startswith("before\n")
    assert content.endswith("\nafter\n")
    assert "old" not in content
    assert "| 1.1 | yes |" in content
    assert "| 1.07 | yes |" in content
    assert set(json.loads(document.with_suffix(".json").read_text())) == {"memory", "resume"}


def test_growth_is_shown_by_size():
    sizes = figures(ratio=0.5, corpus_seconds=[0.1, 1.0, 5.0], corpus_peak_rss_mb=[300, 310.4, 400])
    assert "| corpus | 0.1 | 1 | 5 | 0.50 | 300, 310, 400 |" in bench_report.section({"growth": sizes})


def test_the_arithmetic_of_a_step_is_shown():
    overhead = figures(
        ratio=1.0,
        small_ratio=1.0,
        loss_recording_percent_of_step=0.0,
        callbacks_and_hooks_off_percent_of_step=0.0,
        parameters=928_000,
        gigaflops_of_a_step=24.5,
        step_ms=300.4,
        gigaflops_per_second=81.6,
        fraction_of_matrix_product_rate=0.63,
        matrix_product_gigaflops_per_second=129.5,
    )
    assert "300 ms: 82 GFLOP/s, 0.63 of the 130 GFLOP/s" in bench_report.section({"overhead": overhead})


GPU = {
    "machine": {**MACHINE, "gpu": "a GPU", "cores": 16},
    **dict.fromkeys(["to_bare_loop", "step_to_replay", "gpt2_utilisation", "gpt2_to_nanogpt_style", "gate"]),
}
"""What `bench_gpu.sh` writes when no part has measured anything."""


def test_what_a_gpu_has_not_measured_yet_is_not_reached():
    rows = [
        line for line in bench_report.section({"gpu": {**GPU, "date": "2026-01-01"}}).splitlines() if "`gpu`" in line
    ]
    assert len(rows) == 5
    assert all("not reached" in row for row in rows)


@pytest.mark.parametrize(("seconds", "shown"), [(250.0, "| report | 250 | | "), (None, "| report | not reached | | ")])
def test_figures_of_another_machine_are_taken_with_its_name(seconds, shown, tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(f"{bench_report.BEGIN}\n{bench_report.END}\n")
    document.with_suffix(".json").write_text(json.dumps({"memory": figures(ratio=1.07)}))
    elsewhere = tmp_path / "gpu.json"
    elsewhere.write_text(json.dumps({**GPU, "gate": {"seconds": seconds}}))
    bench_report.main(["--take", "gpu", str(elsewhere), "--document", str(document)])
    content = document.read_text()
    (row,) = [line for line in content.splitlines() if "walks_anchor.yaml" in line]
    assert shown in row.replace("|  |", "| | ")
    assert "2 cores (a processor), no GPU" in content
    assert "Rows of a GPU: 16 cores (a processor), a GPU" in content


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"seconds": 1.0}'])
def test_a_file_without_the_figures_changes_nothing(content, tmp_path):
    document = tmp_path / "doc.md"
    document.write_text(f"{bench_report.BEGIN}\n{bench_report.END}\n")
    stored = json.dumps({"memory": figures(ratio=1.07)})
    document.with_suffix(".json").write_text(stored)
    elsewhere = tmp_path / "found.json"
    if content is not None:
        elsewhere.write_text(content)
    with pytest.raises(SystemExit, match="does not hold the figures of gpu"):
        bench_report.main(["--take", "gpu", str(elsewhere), "--document", str(document)])
    assert document.with_suffix(".json").read_text() == stored


def test_figures_of_an_unknown_benchmark_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        bench_report.main(["--take", "gpus", str(tmp_path / "x"), "--document", str(tmp_path / "doc.md")])
    assert "gpus is none of overhead, peers" in capsys.readouterr().err


def test_a_document_without_markers_is_left_alone(tmp_path):
    document = tmp_path / "doc.md"
    document.write_text("nothing")
    with pytest.raises(SystemExit, match="has no lines"):
        bench_report.write(document, "text")
    assert document.read_text() == "nothing"


def test_a_benchmark_that_fails_ends_it(monkeypatch):
    monkeypatch.setattr(bench_report, "ROOT", ROOT / "nowhere")
    with pytest.raises((SystemExit, OSError)):
        bench_report.measure("resume")


def test_measure_runs_bench_py_and_dates_its_figures(monkeypatch):
    def run(line, **options):
        assert Path(line[1]) == ROOT / "benchmarks" / "bench.py"
        assert Path(line[1]).is_file()
        return subprocess.CompletedProcess(line, 0, stdout=json.dumps({"arguments": line[2:]}))

    monkeypatch.setattr(subprocess, "run", run)
    found = bench_report.measure("resume")
    assert found["arguments"] == ["resume", "--json"]
    assert len(found["date"]) == len("2026-01-01")


def test_every_target_is_of_a_benchmark_that_exists():
    assert {target.benchmark for target in bench_report.TARGETS} <= {*bench.BENCHMARKS, *bench_report.ON_A_GPU}
