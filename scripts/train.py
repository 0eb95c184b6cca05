#!/usr/bin/env python3
"""Train one experiment: ``accelerate launch scripts/train.py --config FILE``, or plain ``python``."""

import sys
from pathlib import Path

# Launchers start this file from anywhere, and the package need not be installed.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accel_train.commands.main import train_main

if __name__ == "__main__":
    sys.exit(train_main())
