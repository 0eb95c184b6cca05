"""Settings for all tests."""

from hypothesis import settings

# Tests share two cores with real training processes: a slow example is no failure.
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")
