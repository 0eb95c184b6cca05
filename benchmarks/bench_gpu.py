"""Everything that needs a GPU, in runs short enough for a machine that is lent for minutes.

A run is a list of parts. Each is a process of its own with a limit of its own: a red test, a failed mode or a hang
ends that part and nothing else. As a part ends, ``PART.json`` (its figures) and ``PART.log`` (what it said) are there,
and ``gpu.json`` holds the figures of all parts so far.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]

ROOT = Path(__file__).resolve().parent.parent
RUN_SECONDS = 480.0
"""Longest time of a run: a machine is lent for ten minutes at a time, and starting it and copying take some."""
TESTS = "tests/integration/test_gpu.py"

START_SECONDS = 12.0
"""Assumed for estimates: a process until PyTorch is imported and the device is ready."""
COMPILE_SECONDS = {"anchor": 35.0, "gpt2": 90.0}
"""Assumed for estimates: compiling a model for the first time, forward and backward pass."""
LAUNCHED_STEP_SECONDS, REPLAYED_STEP_SECONDS = 0.006, 0.0012
"""Assumed for estimates: a step of the anchor model whose kernels are launched one by one, and one that is replayed."""


@dataclass(frozen=True)
class Part:
    """One process of a run.

    Args:
        name: of its files.
        command: line after the interpreter's name.
        limit: seconds until it is killed.
        estimate: seconds that it is expected to take on a GPU, from what it does.
        environment: variables beside those of this process.
        accepts: exit codes that are no failure.
    """

    name: str
    command: Sequence[str]
    limit: float
    estimate: float
    environment: Mapping[str, str]
    accepts: tuple[int, ...] = (0,)


def runs(out: Path, *, dry: bool) -> dict[str, list[Part]]:
    """Return the parts of every run.

    Args:
        out: folder of the results.
        dry: in small, on a CPU.
    """
    small = ["--dry"] if dry else []
    # One cache of compiled kernels for all parts, outside of the results, which are copied from machine to machine.
    shared = {"TORCHINDUCTOR_CACHE_DIR": str(Path(tempfile.gettempdir()) / "accel_train_inductor")}
    if dry:
        shared |= {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}

    two, compiled = 2 * START_SECONDS, COMPILE_SECONDS["anchor"]

    def part(name: str, limit: float, estimate: float, *command: str, accepts: tuple[int, ...] = (0,)) -> Part:
        return Part(name, command, limit, estimate, shared, accepts)

    def tests(name: str, selected: str, limit: float, estimate: float) -> Part:
        # Without the project's settings: they name plugins that the machine may lack.
        settings = ["-c", os.devnull, "--rootdir", ".", "--import-mode", "importlib", "-p", "no:cacheprovider"]
        line = ["-m", "pytest", "-v", "-ra", *settings, "-o", "markers=gpu: needs a CUDA device", "-k", selected, TESTS]
        return part(name, limit, estimate, *line)

    def steps(mode: str, limit: float, estimate: float) -> Part:
        name = mode.replace(",", "").replace(" ", "-")
        return part(name, limit, estimate, "benchmarks/bench_gpu_steps.py", mode, str(out / f"{name}.figures"), *small)

    def other(name: str, limit: float, estimate: float) -> Part:
        return part(name, limit, estimate, "benchmarks/bench_gpu_steps.py", name, str(out / f"{name}.figures"), *small)

    blocks = 14 * 50  # rounds and steps of a turn, see bench_gpu_steps
    launched, replayed = blocks * LAUNCHED_STEP_SECONDS, blocks * REPLAYED_STEP_SECONDS
    return {
        "probe": [part("probe", 60, START_SECONDS + 8, "benchmarks/bench_gpu_probe.py", str(out / "probe.figures"))],
        "tests": [
            # Processes that the tests start, and what they compute themselves.
            tests("tests-recording", "record", 215, 10 * START_SECONDS + compiled + 40),
            tests("tests-bits", "bits and not record", 200, 13 * START_SECONDS + 20),
            tests("tests-rest", "not bits and not record", 125, 3 * START_SECONDS + 40),
        ],
        "steps": [
            steps("kernel by kernel", 70, two + 2 * launched),
            steps("recorded", 70, two + launched + replayed),
            steps("recorded, not deterministic", 70, two + launched + replayed),
            steps("compiled", 115, two + 2 * compiled + launched),
            steps("compiled, recorded", 100, two + compiled / 2 + launched / 2 + replayed),
            steps("compiled, recorded, bfloat16", 115, two + 2 * compiled + launched / 2 + replayed),
        ],
        "large": [
            other("gpt2", 240, two + 2 * COMPILE_SECONDS["gpt2"] + 80 * 0.12 * 2),
            other("generate", 60, START_SECONDS + 10 * 1.5),
            other("gate", 170, 2 * START_SECONDS + 80),
        ],
    }


def run_part(part: Part, out: Path, limit: float, *, kill_after: float | None = None) -> Figures:
    """Run a part, write its files, and return what is in ``PART.json``.

    Args:
        part: the part.
        out: folder of its files.
        limit: seconds until it is killed.
        kill_after: seconds until it is killed as if memory had run out; for the test of what follows.
    """
    figures_file = out / f"{part.name}.figures"
    figures_file.unlink(missing_ok=True)
    environment = {**os.environ, **part.environment}
    began, how = time.monotonic(), "ended"
    with (out / f"{part.name}.log").open("w", encoding="utf-8") as said:
        process = subprocess.Popen(
            [sys.executable, *part.command],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit if kill_after is None else min(limit, kill_after))
        except subprocess.TimeoutExpired:
            how = f"killed after {limit:.0f} s" if kill_after is None else "killed on purpose"
        finally:
            _end_group(process)
    try:
        figures = json.loads(figures_file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it ended before it wrote them, or while it did
        figures = None
    figures_file.unlink(missing_ok=True)
    passed = how == "ended" and process.returncode in part.accepts
    found = {
        "part": part.name,
        "status": "passed" if passed else "failed",
        "how": how if how != "ended" else f"exit code {process.returncode}",
        "seconds": round(time.monotonic() - began, 1),
        "limit_seconds": part.limit,
        "estimated_seconds": round(part.estimate, 1),
        "figures": figures,
    }
    _write(out / f"{part.name}.json", found)
    return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of a part: the processes that it started are in its group."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(path: Path, content: Figures) -> None:
    """Write whole or not at all: the machine may be taken back at any moment."""
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def _say(line: str) -> None:
    print(line, flush=True)


def run(
    parts: Iterable[Part],
    out: Path,
    say: Callable[[str], None] = _say,
    *,
    fail: Sequence[str] = (),
    seconds: float = RUN_SECONDS,
) -> list[Figures]:
    """Run the parts one after the other within ``seconds`` and return what each came to; kill those in ``fail``."""
    deadline, done = time.monotonic() + seconds, []
    for part in parts:
        left = deadline - time.monotonic()
        if left < min(part.limit, part.estimate):
            say(f"{part.name:32} left out: it takes about {part.estimate:.0f} s, and {left:.0f} s are left")
            found: Figures = {"part": part.name, "status": "left out", "figures": None}
            _write(out / f"{part.name}.json", found)
        else:
            say(f"{part.name:32} running, at most {min(part.limit, left):.0f} s")
            found = run_part(part, out, min(part.limit, left), kill_after=1.0 if part.name in fail else None)
            say(f"{part.name:32} {found['status']} ({found['how']}) in {found['seconds']:.0f} s")
        done.append(found)
        _write(out / "gpu.json", combined(out))
    return done


def combined(out: Path) -> Figures:
    """Return the figures of all parts in ``out`` as ``bench_report.py --take gpu`` wants them.

    What is missing is None; parts of earlier runs into the same folder count.
    """
    order = [part.name for parts in runs(out, dry=False).values() for part in parts]
    files = [path for path in out.glob("*.json") if path.name != "gpu.json"]
    files.sort(key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem))
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    figures: dict[str, Figures] = {each["part"]: each["figures"] for each in parts if each["figures"] is not None}
    machine = next((each["machine"] for each in figures.values() if "machine" in each), None)
    modes = {each["mode"]: each for each in figures.values() if "mode" in each and each["mode"] != "gpt2"}
    exact = {mode: each for mode, each in modes.items() if "bfloat16" not in mode and "deterministic" not in mode}
    fastest = min(exact, key=lambda mode: exact[mode]["step_ms"]) if exact else None
    launched, bfloat16 = modes.get("kernel by kernel"), modes.get("compiled, recorded, bfloat16")
    gpt2 = figures.get("gpt2")
    return {
        "machine": machine,
        "status": {each["part"]: each["status"] for each in parts},
        "modes": modes,
        "fastest_mode": fastest,
        "to_bare_loop": launched["bare_step_ms"] / exact[fastest]["step_ms"] if launched and fastest else None,
        "step_to_replay": exact[fastest]["step_to_replay"] if fastest else None,
        "anchor_utilisation": bfloat16["utilisation"] if bfloat16 else None,
        "gpt2": gpt2,
        "gpt2_utilisation": gpt2["utilisation"] if gpt2 else None,
        "gpt2_to_nanogpt_style": 1 / gpt2["ratio"] if gpt2 else None,
        "generate": figures.get("generate"),
        "gate": figures.get("gate"),
        "probe": figures.get("probe"),
    }


def table(found: Figures) -> str:
    """Return the figures of :func:`combined` as Markdown, for people."""
    rows = {**found["modes"], **({"GPT-2 124 M, compiled, recorded, bfloat16": found["gpt2"]} if found["gpt2"] else {})}
    lines = [
        "| mode | step, ms | other loop, ms | ratio | replay alone, ms | tokens/s | TFLOP/s | peak memory, GB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in rows.items():
        replay, memory = figures["replay_ms"], figures["peak_memory_gb"]
        lines.append(
            f"| {name} | {figures['step_ms']:.3f} | {figures['bare_step_ms']:.3f} | {figures['ratio']:.3f} "
            f"| {'' if replay is None else f'{replay:.3f}'} | {figures['tokens_per_second']:,.0f} "
            f"| {figures['teraflops']:.2f} | {'' if memory is None else f'{memory:.2f}'} |"
        )
    ratios = {
        "anchor model, tokens/s to the uncompiled loop": found["to_bare_loop"],
        "anchor model, step to the replay alone": found["step_to_replay"],
        "anchor model, model FLOPs utilisation": found["anchor_utilisation"],
        "GPT-2 124 M, model FLOPs utilisation": found["gpt2_utilisation"],
        "GPT-2 124 M, tokens/s to a nanoGPT-style loop": found["gpt2_to_nanogpt_style"],
    }
    lines += ["", *(f"* {what}: {'unknown' if value is None else f'{value:.3f}'}" for what, value in ratios.items())]
    return "\n".join(lines)


def _plan(chosen: Mapping[str, Sequence[Part]]) -> str:
    lines = [f"{'part':32} {'estimate':>9} {'limit':>7}"]
    for name, parts in chosen.items():
        lines += [f"{part.name:32} {part.estimate:7.0f} s {part.limit:5.0f} s" for part in parts]
        lines.append(f"{'  ' + name:32} {sum(p.estimate for p in parts):7.0f} s {sum(p.limit for p in parts):5.0f} s")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what is asked for; 0 if every part passed, else 1."""
    names = list(runs(Path(), dry=False))
    parser = argparse.ArgumentParser(
        prog="bench_gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"{', '.join(names)}; default: all, in this order")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "results/gpu"), help="folder of the results")
    parser.add_argument("--dry", action="store_true", help="in small on a CPU: every part runs, nothing is measured")
    parser.add_argument("--plan", action="store_true", help="only show what each part is expected to take on a GPU")
    parser.add_argument("--fail", nargs="+", default=[], metavar="PART", help="kill these parts, to see the rest go on")
    options = parser.parse_args(arguments)
    out = Path(options.out).absolute()
    if unknown := set(options.runs) - set(names):
        parser.error(f"{', '.join(sorted(unknown))}: not among {', '.join(names)}")
    of_all = runs(out, dry=options.dry)
    chosen = {name: of_all[name] for name in options.runs or names}
    known = {part.name for parts in chosen.values() for part in parts}
    if unknown := set(options.fail) - known:
        parser.error(f"--fail {', '.join(sorted(unknown))}: not among {', '.join(sorted(known))}")
    if options.plan:
        print(_plan(chosen))
        return 0
    if not options.dry:
        import torch  # noqa: PLC0415 - a moment before it is needed: --help and --plan answer at once

        if not torch.cuda.is_available():
            raise SystemExit("bench_gpu.sh: no CUDA device here; --dry runs everything in small on a CPU")
    out.mkdir(parents=True, exist_ok=True)
    done: list[Figures] = []
    for name, parts in chosen.items():
        print(f"== {name}", flush=True)
        done += run(parts, out, fail=options.fail)
    print(f"\n{table(combined(out))}\n")
    print(
        f"{out} holds a .json and a .log of every part, and all figures in gpu.json. Into docs/benchmarks.md with them:"
    )
    print(f"    benchmarks/bench_report.py --take gpu {out}/gpu.json")
    return 0 if all(each["status"] == "passed" for each in done) else 1


if __name__ == "__main__":
    raise SystemExit(main())
