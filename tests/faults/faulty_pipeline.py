"""The pipeline with an observer that injects the fault described in the environment; see ``faulty_train``."""

from __future__ import annotations

import json
import os
import sys

from faulty_train import Fault

from accel_train.pipeline.run import pipeline_main

if __name__ == "__main__":
    described = os.environ.get("FAULT")
    sys.exit(pipeline_main(observer=Fault(**json.loads(described)) if described else None))
