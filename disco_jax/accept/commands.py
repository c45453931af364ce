"""Runs the repository's commands with a deadline, and reads the JSON of their last line."""

import atexit
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
MESSAGE = 300  # characters of a failed command's output to show


class Failed(Exception):
    """A command failed or took too long; its message ends with the command's last words."""


class Commands:
    """Starts commands in the repository until a time limit, all with the same environment.

    Args:
      seconds: for all commands together.
      platform: `cpu` makes JAX ignore accelerators.
    """

    def __init__(self, seconds: float, platform: str):
        self._end = time.monotonic() + seconds
        cache = tempfile.mkdtemp()
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        self.environment = {
            # Runs that are started again need not compile again.
            "JAX_COMPILATION_CACHE_DIR": cache,
            **os.environ,
            # Several programs may use a device at once, one of them with an allocator of its own.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        if platform == "cpu":
            self.environment["JAX_PLATFORMS"] = "cpu"

    def start(self, *command: str) -> subprocess.Popen:
        """Starts `python COMMAND` in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str) -> str:
        """Runs `python COMMAND` and returns what it printed.

        Raises:
          Failed: if it fails, or is not done in time.
        """
        job = self.start(*command)
        try:
            printed, _ = job.communicate(timeout=max(self._end - time.monotonic(), 0.1))
        except subprocess.TimeoutExpired as error:
            os.killpg(job.pid, 9)
            job.communicate()
            raise Failed("it was not done within the time limit") from error
        if job.returncode:
            words = " ".join(printed.split())[-MESSAGE:]
            raise Failed(f"exit code {job.returncode}: {words}")
        return printed

    def run_json(self, *command: str) -> Any:
        """Returns the JSON of the last line that a command prints."""
        return json.loads(self.run(*command).strip().splitlines()[-1])
