"""Makes ``harness`` importable by the tests and by the processes they launch."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
