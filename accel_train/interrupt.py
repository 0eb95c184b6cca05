"""The one exception by which interruptible work says that it was told to stop.

Lower floors know nothing of signals: they poll a ``should_stop`` callable and raise this,
and whoever passed the callable decides what follows. It is an exception rather than a return
value so that half-made results cannot be mistaken for results.
"""


class Interrupted(Exception):
    """Work was abandoned because ``should_stop()`` turned true."""
