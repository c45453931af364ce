"""Checks what these tests need of the machine. What is missing is a failure, not a skip."""

import shutil
import socket

import pytest


def need(*programs: str, package: str = "", host: str = "") -> None:
    """Fails with what is missing: programs of a Debian package, or the name of a host."""
    if missing := [program for program in programs if shutil.which(program) is None]:
        pytest.fail(f"{', '.join(missing)} missing; apt-get install {package}", pytrace=False)
    if host:
        try:
            socket.gethostbyname(host)
        except OSError:
            pytest.fail(
                f"no host has the name {host}; add a line '127.0.0.1 {host}' to /etc/hosts",
                pytrace=False,
            )
