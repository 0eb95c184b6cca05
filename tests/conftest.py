"""Settings for all tests."""

import os

from hypothesis import settings

# Tests share the cores with each other: more threads than that wait for each other in loops that burn them.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Tests share two cores with real training processes: a slow example is no failure.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
