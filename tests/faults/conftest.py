"""Makes ``harness``, ``faults`` and the scripts beside them importable by the tests and by what they launch."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "integration")]
