#!/usr/bin/env python3
"""``make bench``: the short forms of the benchmarks, their figures beside the targets, into docs/benchmarks.md.

Each benchmark runs in a process of its own. Its figures go to docs/benchmarks.json, where those of
benchmarks that were not run stay; the table between the two markers of docs/benchmarks.md is made
from that file, and everything else in the document stays.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = Path(__file__).resolve().with_name("bench.py")
DOCUMENT = ROOT / "docs" / "benchmarks.md"
BEGIN, END = "<!-- make bench: begin -->", "<!-- make bench: end -->"

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A row of the table: a figure of a benchmark and what it is to be."""

    benchmark: str
    what: str
    figure: Callable[[Figures], float | None]
    """None: what was to be measured did not come about."""
    goal: float | None
    """None: only reported."""
    at_least: bool = False

    def row(self, figures: Figures | None) -> str:
        """The row, with the figure and whether it is met; without figures it says so."""
        goal = "report" if self.goal is None else f"{'≥' if self.at_least else '≤'} {self.goal:g}"
        if figures is None:
            return f"| `{self.benchmark}` | {self.what} | {goal} | not measured | | |"
        value = self.figure(figures)
        if value is None:
            return f"| `{self.benchmark}` | {self.what} | {goal} | not reached | | {figures['date']} |"
        if self.goal is None:
            met = ""
        else:
            met = "yes" if (value >= self.goal if self.at_least else value <= self.goal) else "**no**"
        return f"| `{self.benchmark}` | {self.what} | {goal} | {value:.4g} | {met} | {figures['date']} |"


TARGETS = (
    Target("overhead", "seconds of the Trainer to a bare loop, anchor model", lambda f: f["ratio"], 1.01),
    Target("overhead", "the same, a model of 10,000 parameters", lambda f: f["small_ratio"], 1.05),
    Target("overhead", "recording the loss, % of an anchor step", lambda f: f["loss_recording_percent_of_step"], 0.1),
    Target(
        "overhead",
        "callbacks and hooks with nothing registered, % of an anchor step",
        lambda f: f["callbacks_and_hooks_off_percent_of_step"],
        0.1,
    ),
    Target("peers", "tokens/s to transformers' Trainer with its GPT-2", lambda f: f["to_transformers"], 1.45, True),
    Target("peers", "tokens/s to the fastest peer", lambda f: f["to_fastest"], 1.05, True),
    Target("corpus", "the original generator's 72 s to ours", lambda f: 1 / f["ratio"], 15, True),
    Target("generate", "seconds of transformers' generate to ours", lambda f: 1 / f["ratio"], 1.5, True),
    Target("checkpoint", "stall to a synchronous verified save, 124 M parameters", lambda f: f["ratio"], 0.4),
    Target("resume", "first step at sample 10⁹ to that at sample 0", lambda f: f["ratio"], 1.2),
    Target("growth", "seconds at 100 times the size to 100 times the seconds, the worst", lambda f: f["ratio"], 1.1),
    Target("scaling", "tokens/s of two processes to one, same cores", lambda f: f["ratio"], 0.9, True),
    Target("memory", "peak memory of the Trainer's process to the bare loop's", lambda f: f["ratio"], 1.1),
    Target("gpu", "anchor model: tokens/s to the uncompiled bare loop", lambda f: f["to_bare_loop"], 4, True),
    Target("gpu", "anchor model: step to the replay of the recorded step alone", lambda f: f["step_to_replay"], 1.05),
    Target("gpu", "124 M GPT-2, bfloat16: model FLOPs utilisation", lambda f: f["gpt2_utilisation"], 0.45, True),
    Target("gpu", "the same: tokens/s to a nanoGPT-style loop", lambda f: f["gpt2_to_nanogpt_style"], 1, True),
    Target("gpu", "seconds to a passed gate, `walks_anchor.yaml`", lambda f: f["gate"] and f["gate"]["seconds"], None),
)


ON_A_GPU = {"gpu"}
"""What `bench_gpu.sh` measures on another machine, to be taken from its file."""


def measure(name: str) -> Figures:
    """Run one benchmark; fails as it fails."""
    line = [sys.executable, str(BENCH), name, "--json"]
    done = subprocess.run(line, cwd=ROOT, check=False, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"bench_report.py: the benchmark {name} failed (exit {done.returncode})")
    return {**json.loads(done.stdout), "date": _day(time.time())}


def _day(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).date().isoformat()


def _taken(name: str, file: Path) -> Figures:
    """The figures of a benchmark from ``file``, if the table can be made of them.

    Raises:
        SystemExit: there is no such file, or it holds something else.
    """
    try:
        figures = {**json.loads(file.read_text(encoding="utf-8")), "date": _day(file.stat().st_mtime)}
        section({name: figures})
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise SystemExit(
            f"bench_report.py: {file} does not hold the figures of {name} ({type(error).__name__}: {error}); "
            f"nothing was changed. Give the file that `bench.py {name} --json` or "
            f"`bench_gpu.sh` wrote"
        ) from error
    return figures


def section(found: Mapping[str, Figures]) -> str:
    """What goes between the markers."""
    rows = [target.row(found.get(target.benchmark)) for target in TARGETS]
    lines = [
        *_machines(found),
        "",
        "| benchmark | what | target | measured | met | date |",
        "|---|---|---|---|---|---|",
        *rows,
    ]
    for name, table in (("overhead", _arithmetic), ("peers", _peers), ("growth", _growth)):
        if name in found:
            lines += ["", *table(found[name])]
    return "\n".join(lines)


def _machines(found: Mapping[str, Figures]) -> list[str]:
    """What the newest figures come from; those of a GPU may come from another machine than the rest."""
    lines = []
    for what, names in (("", found.keys() - ON_A_GPU), ("Rows of a GPU: ", found.keys() & ON_A_GPU)):
        if names:
            machine = max((found[name] for name in names), key=lambda figures: str(figures["date"]))["machine"]
            versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
            lines.append(
                f"{what}{machine['cores']} cores ({machine['processor'].strip()}), "
                f"{machine['gpu'] or 'no GPU'}, Python {machine['python']}, {versions}."
            )
    return lines


def _arithmetic(overhead: Figures) -> list[str]:
    return [
        f"A step of the anchor model ({overhead['parameters']:,} parameters, 64 sequences of 64) takes "
        f"{overhead['gigaflops_of_a_step']:.1f} GFLOP of matrix products and {overhead['step_ms']:.0f} ms: "
        f"{overhead['gigaflops_per_second']:.0f} GFLOP/s, {overhead['fraction_of_matrix_product_rate']:.2f} of the "
        f"{overhead['matrix_product_gigaflops_per_second']:.0f} GFLOP/s of a product of 2048 by 2048 matrices "
        "measured in turns with it.",
    ]


def _peers(peers: Figures) -> list[str]:
    rates = sorted(peers["tokens_per_second"].items(), key=lambda item: -item[1])
    lines = ["| trainer, anchor model | tokens/s (median) | ours to it (median of the rounds) |", "|---|---|---|"]
    ratios = peers["ours_to"]
    return lines + [
        f"| {name} | {rate:,.0f} | {f'{ratios[name]:.3f}' if name in ratios else ''} |" for name, rate in rates
    ]


def _growth(growth: Figures) -> list[str]:
    lines = [
        "| work | seconds at size 1 | 10 | 100 | the last to 100 times the first | peak memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name in (key.removesuffix("_seconds") for key in growth if key.endswith("_seconds")):
        seconds, memory = growth[f"{name}_seconds"], growth[f"{name}_peak_rss_mb"]
        times = " | ".join(f"{each:.3g}" for each in seconds)
        megabytes = ", ".join(f"{each:.0f}" for each in memory)
        lines.append(f"| {name} | {times} | {seconds[-1] / (100 * seconds[0]):.2f} | {megabytes} |")
    return lines


def write(document: Path, text: str) -> None:
    """Replace what stands between the markers.

    Raises:
        SystemExit: the document has no such markers.
    """
    content = document.read_text(encoding="utf-8")
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"bench_report.py: {document} has no lines {BEGIN!r} and {END!r} to write between")
    document.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    names = list(dict.fromkeys(target.benchmark for target in TARGETS))
    runnable = [name for name in names if name not in ON_A_GPU]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=runnable, default=runnable, help="benchmarks to run")
    parser.add_argument(
        "--take",
        nargs=2,
        metavar=("NAME", "FILE"),
        help="run nothing: take the figures of NAME from FILE; those of gpu are in what `bench_gpu.sh` wrote",
    )
    parser.add_argument("--document", type=Path, default=DOCUMENT, help="file to write into")
    options = parser.parse_args(arguments)
    store = options.document.with_suffix(".json")
    found: dict[str, Figures] = json.loads(store.read_text(encoding="utf-8")) if store.exists() else {}
    if options.take is not None:
        name, file = options.take
        if name not in names:
            parser.error(f"--take: {name} is none of {', '.join(names)}")
        found[name] = _taken(name, Path(file))
        store.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    for name in () if options.take is not None else options.only:
        print(f"{name} ...", end=" ", flush=True)
        began = time.perf_counter()
        found[name] = measure(name)
        print(f"{time.perf_counter() - began:.0f} s", flush=True)
        store.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    text = section(json.loads(store.read_text(encoding="utf-8")))  # as it will be read again: names in order
    print("\n" + text)
    write(options.document, text)


if __name__ == "__main__":
    main()
