"""Tests locks in buckets."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest

from disco_jax.errors import DataLost, UserError
from disco_jax.storage import conditional, lease, stores
from disco_jax.storage.lease import leased
from disco_jax.storage.urls import Url
from tests.object_stores import ForwardToGoogle


@pytest.fixture(params=["s3", "gcs_writable"])
def url(request, monkeypatch) -> Url:
    monkeypatch.setattr(lease, "SECONDS", 0.8)
    return Url(f"{request.getfixturevalue(request.param).url}/run/lock")


def holder(url) -> dict:
    return json.loads(stores.fetch(url)[0])


def on_another_host(url) -> None:
    """Changes the lock's object, as a process of another host would have written it."""
    replaced = None
    while replaced is None:  # its holder may renew it in between
        content, version = conditional.read(url)
        changed = json.dumps(json.loads(content) | {"id": "other", "machine": "another"}).encode()
        replaced = conditional.replace(url, changed, version)


def test_one_of_several_that_try_holds_a_lock_and_hands_it_on(url):
    held: list[str] = []

    def hold() -> None:
        try:
            with leased(url, patience=20) as lock:
                held.append(lock.id)
                assert holder(url)["id"] == lock.id
                time.sleep(0.5)
                lock.check()
                held.append(lock.id)
        except UserError:
            held.append("refused")

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(held) == 6
    assert all(held[i] == held[i + 1] for i in (0, 2, 4))  # never two at once
    assert holder(url) == lease.RELEASED


def test_a_lock_whose_holder_lives_is_refused(url):
    with leased(url), pytest.raises(UserError) as refused, leased(url):
        pass
    expected = f"workdir {url.parent} is in use by another run, process {os.getpid()} on "
    assert str(refused.value).startswith(expected)


def test_a_lock_of_a_killed_process_of_this_machine_is_free_at_once(url, monkeypatch):
    code = f"""
import os, signal
from disco_jax.storage.lease import leased
from disco_jax.storage.urls import Url
with leased(Url("{url}")):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    monkeypatch.setattr(lease, "SECONDS", 60.0)
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -9
    assert holder(url)["pid"] != os.getpid()
    began = time.monotonic()
    with leased(url):
        assert holder(url)["pid"] == os.getpid()
    assert time.monotonic() - began < 5
    # An ID that another process has by now is not the killed one's.
    dead = {"machine": lease._machine(), "pid": os.getpid(), "started": "1"}
    assert lease._is_dead(dead)
    assert not lease._is_dead(dead | {"machine": "another"})


def test_a_lock_that_another_host_no_longer_renews_is_taken_over(url, capfd):
    with leased(url):
        pass
    on_another_host(url)
    began = time.monotonic()
    with leased(url):
        assert lease.SECONDS < time.monotonic() - began < 5
        assert holder(url)["id"] != "other"
    assert "is locked by process" in capfd.readouterr().err


def test_a_run_that_lost_its_lock_is_told(url):
    with leased(url) as lock:
        on_another_host(url)
        time.sleep(lease.SECONDS / 2 + 0.1)
        with pytest.raises(UserError, match=r"run was taken over by process .*; this run stops"):
            lock.ensure()
        with pytest.raises(UserError, match="was taken over"):
            lock.check()
    assert holder(url)["id"] == "other"  # and it is left alone


def test_an_answer_that_is_lost_is_not_a_lost_lock(s3, monkeypatch):
    """The store has renewed the lock, but the process has not heard of it, and tries again."""
    url = Url(f"{s3.url}/run/lock")
    with leased(url) as lock:
        real = conditional.replace

        def renewed_unheard(*given):
            real(*given)
            raise DataLost("no answer")

        monkeypatch.setattr(conditional, "replace", renewed_unheard)
        monkeypatch.setattr(lease, "SECONDS", 0.0)
        with pytest.raises(DataLost):
            lock.ensure()
        monkeypatch.setattr(conditional, "replace", real)
        lock.ensure()
        lock.check()


def test_a_store_that_ignores_conditions_takes_no_run(gcs_writable, monkeypatch):
    monkeypatch.setattr(ForwardToGoogle, "checks", False)
    with (
        pytest.raises(UserError, match="its server ignores the conditions of writes"),
        leased(Url(f"{gcs_writable.url}/run/lock")),
    ):
        pass
