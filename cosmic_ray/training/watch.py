"""A watch over hangs: a process whose training no longer moves ends itself, so that the others can go on without it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time

EXIT_CODE = 75


class Watch:
    """Ends this process when nothing has moved for `timeout_s`.

    A collective that a dead or stopped rank never joins blocks all the others; so does a file system that no longer
    answers. A thread can see that, and only ending the process is sure to end the wait.
    """

    def __init__(self, timeout_s: float, what: str):
        self._timeout_s, self._what = timeout_s, what
        self._moved = time.monotonic()
        self._done = threading.Event()
        threading.Thread(target=self._look, name="watch", daemon=True).start()

    def beat(self) -> None:
        """Something has moved."""
        self._moved = time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._done.set()

    def _look(self) -> None:
        while not self._done.wait(self._timeout_s / 20):
            still_s = time.monotonic() - self._moved
            if still_s > self._timeout_s:
                print(f"{self._what}: no progress for {still_s:.0f} s; ending this process. Its stacks:",
                      file=sys.stderr, flush=True)  # fmt: skip
                faulthandler.dump_traceback(all_threads=True)
                os._exit(EXIT_CODE)
