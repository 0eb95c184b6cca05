"""The pipeline with the fault described in the environment; see ``faulty_train``."""

from __future__ import annotations

import json
import os
import sys

from faulty_train import Fault

from accel_train.pipeline.command import main as pipeline_main
from accel_train.process.work import pass_by

if __name__ == "__main__":
    described = os.environ.get("FAULT")
    sys.exit(pipeline_main(reached=Fault(**json.loads(described)).reached if described else pass_by))
