"""``accel-train evaluate`` and ``accel-train generate``: a run in use."""

from __future__ import annotations

import argparse
from dataclasses import fields

from accel_train.errors import EXIT_OK
from accel_train.runs import use
from accel_train.runs.record import strict_json
from accel_train.tasks.base import GenerationOptions


def evaluate(arguments: argparse.Namespace) -> int:
    """Print the verdict on the newest checkpoint of a run as one line of JSON."""
    print(strict_json(use.evaluate(arguments.run)))
    return EXIT_OK


def generate(arguments: argparse.Namespace) -> int:
    """Print what the newest checkpoint of a run writes, as it is written."""
    options = GenerationOptions(**{f.name: getattr(arguments, f.name) for f in fields(GenerationOptions)})
    for piece in use.generate(arguments.run, options):
        print(piece, end="", flush=True)
    return EXIT_OK
