"""A watch over hangs: a process whose training no longer moves ends itself, so that the others can go on without it."""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback

EXIT_CODE = 75


class Watch:
    """Ends this process when nothing has moved for `timeout_s`, and prints where it stood.

    A collective that a dead or stopped rank never joins blocks all the others; so does a file system that no longer
    answers. A thread can see that, and only ending the process is sure to end the wait. Should that thread be held up
    too, by code that keeps Python's lock, a timer outside Python ends the process.
    """

    def __init__(self, timeout_s: float, what: str):
        """Watch over the calling thread; `what` names this process."""
        self._timeout_s, self._what = timeout_s, what
        self._watched = threading.get_ident()
        self._moved = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Something has moved."""
        self._moved = time.monotonic()

    def close(self) -> None:
        """Watch no more."""
        self._done.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _look(self) -> None:
        while not self._done.wait(self._timeout_s / 20):
            faulthandler.dump_traceback_later(self._timeout_s, exit=True)
            still_s = time.monotonic() - self._moved
            if still_s > self._timeout_s:
                where = "".join(traceback.format_stack(sys._current_frames().get(self._watched)))
                text = f"{self._what}: no progress for {still_s:.0f} s; ending this process, which stands at\n{where}"
                print(text, file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
