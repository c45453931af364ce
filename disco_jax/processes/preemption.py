"""Stopping when told to: SIGTERM or SIGUSR1, as schedulers send before they take a machine away."""

import os
import signal
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Knows, at every step, whether to stop after it; the same step on every process.

    Several processes agree by JAX's preemption service, which listens for SIGTERM itself: a SIGUSR1
    is handed on to it as one.
    """

    def __init__(self) -> None:
        self._received = ""
        # The processes agree on the highest number that any of them has asked with, and one more.
        # Steps would not do: one that goes on from a checkpoint has asked with none before.
        self._asked = 0
        self._alone = jax.process_count() == 1
        if self._alone:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        else:
            self._before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._hand_on)}

    def stops(self) -> bool:
        """To be asked once a step, by all processes."""
        self._asked += 1
        return bool(self._received) if self._alone else reached_preemption_sync_point(self._asked)

    def asked(self) -> bool:
        """Whether to wait for nothing more: where other processes are to stop too, never."""
        return self._alone and bool(self._received)

    @property
    def reason(self) -> str:
        """The signal's name, where this process was sent it."""
        return self._received or "a signal to one of the processes"

    def close(self) -> None:
        """Puts back what signals did before."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
