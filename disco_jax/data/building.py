"""A pool of processes that help to build shared files."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor


def workers(count: int | None) -> ProcessPoolExecutor:
    """Returns a pool of processes that end with this one, however it ends.

    They are spawned: forked ones would inherit this process's threads.
    """
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(count, mp_context=context, initializer=_end_with_parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
