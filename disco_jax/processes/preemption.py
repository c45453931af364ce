"""Preemption: stops on SIGTERM or SIGUSR1, which schedulers send before reclaiming a machine."""

import os
import signal
from types import FrameType

import jax
from jax.experimental.multihost_utils import reached_preemption_sync_point

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption:
    """Decides at every step whether to stop after it. All processes stop after the same step.

    Several processes agree through JAX's preemption service, which handles SIGTERM itself; SIGUSR1
    is forwarded to it as SIGTERM.
    """

    def __init__(self) -> None:
        self._received = ""
        # The service stops all processes one past the highest number that any of them has passed to
        # it. Step numbers would not work, because a resumed run has not passed the earlier ones.
        self._asked = 0
        self._alone = jax.process_count() == 1
        if self._alone:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        else:
            self._before = {signal.SIGUSR1: signal.signal(signal.SIGUSR1, self._hand_on)}

    def stops(self) -> bool:
        """Whether to stop after this step. Must be called once per step by all processes."""
        self._asked += 1
        return bool(self._received) if self._alone else reached_preemption_sync_point(self._asked)

    def asked(self) -> bool:
        """Whether to stop waiting for data. Always False with several processes."""
        return self._alone and bool(self._received)

    @property
    def reason(self) -> str:
        """The name of the signal, if this process received it."""
        return self._received or "a signal to one of the processes"

    def close(self) -> None:
        """Restores the previous signal handlers."""
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name

    def _hand_on(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        os.kill(os.getpid(), signal.SIGTERM)
