"""How far this process has come: numbers that the training loop sets and the watcher is sent."""

from collections.abc import Iterator
from contextlib import contextmanager


class Pulse:
    """The latest steps, and whether another one has to finish within `stall_timeout` seconds."""

    def __init__(self) -> None:
        self.dispatched = 0  # the last step given to the devices
        self.finished = 0  # the last step whose metrics have been read
        self.busy = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context for what may take long, or has a time-out of its own."""
        before, self.busy = self.busy, False
        try:
            yield
        finally:
            self.busy = before


pulse = Pulse()  # of this process
