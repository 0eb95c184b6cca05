#!/usr/bin/env python3
"""Make a folder of the packages that a GPU machine without a network lacks, to be put on its ``PYTHONPATH``.

Takes what accel_train needs, and what that needs, at the versions of requirements.lock, leaves out what the machine
has, and unpacks the wheels for its Python and platform into the folder. Run it in the environment of ``make setup``:

    .venv/bin/python benchmarks/bench_gpu_wheels.py .gpu_site
    PYTHONPATH=.gpu_site benchmarks/bench_gpu.sh probe            (there)
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements.lock"
THERE = ROOT / "benchmarks" / "gpu_machine.txt"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def names(lines: Iterable[str]) -> set[str]:
    """Return the package names of lines such as ``name==1.2``; comments and empty lines count for nothing."""
    return {canonicalize_name(line.partition("==")[0].strip()) for line in lines if line.strip() and line[0] != "#"}


def missing(there: Iterable[str], python: str) -> list[str]:
    """Return ``name==version`` of everything that accel_train needs on Linux and ``python`` and ``there`` lacks.

    What is there is taken to bring along what it needs itself.
    """
    environment = {"python_version": python, "sys_platform": "linux", "extra": ""}
    locked = {canonicalize_name(line.partition("==")[0]): line.strip() for line in LOCK.read_text().splitlines()}
    seen, todo, wanted = set(there), ["accel_train"], set()
    while todo:
        for requirement in map(Requirement, distribution(todo.pop()).requires or []):
            name = canonicalize_name(requirement.name)
            if name not in seen and (requirement.marker is None or requirement.marker.evaluate(environment)):
                seen.add(name)
                wanted.add(locked.get(name, name))
                todo.append(name)
    return sorted(wanted)


def unpack(wheels: Path, folder: Path) -> None:
    """Unpack every wheel of one folder into another: what installing them would do, for wheels without scripts."""
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="is made, or added to")
    parser.add_argument("--there", type=Path, default=THERE, help="what the machine has, as `pip list --format=freeze`")
    parser.add_argument("--python", default="3.12", help="version of its Python")
    parser.add_argument("--list", action="store_true", help="only show what would be fetched")
    options = parser.parse_args(arguments)
    if not options.there.is_file():
        raise SystemExit(
            f"bench_gpu_wheels.py: --there {options.there}: no such file; give what pip list printed there"
        )
    wanted = missing(names(options.there.read_text(encoding="utf-8").splitlines()), options.python)
    print(f"missing there: {', '.join(wanted) or 'nothing'}")
    if options.list or not wanted:
        return
    with tempfile.TemporaryDirectory() as wheels:
        line = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        line += ["--only-binary=:all:", "--implementation", "cp", "--python-version", options.python, "--dest", wheels]
        line += [word for platform in PLATFORMS for word in ("--platform", platform)]
        if subprocess.run([*line, *wanted], check=False).returncode:
            raise SystemExit("bench_gpu_wheels.py: pip could not fetch them all, see above; nothing was unpacked")
        options.folder.mkdir(parents=True, exist_ok=True)
        unpack(Path(wheels), options.folder)
    print(f"put it on PYTHONPATH there: {options.folder}")


if __name__ == "__main__":
    main()
