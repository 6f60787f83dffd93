"""A background thread between a run and its tracking server: the run never waits for the network.

Events are handed over in order and in batches. While the server is away they go to the spool, and from there to the
server when it is back.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from cosmic_ray.errors import CosmicError
from cosmic_ray.progress import say
from cosmic_ray.registry.scrub import scrub_text
from cosmic_ray.registry.spool import Event, Spool

BATCH_S = 2.0
FIRST_RETRY_S, LAST_RETRY_S = 2.0, 60.0


class Sender:
    """Delivers events through `deliver`, which raises where the server is away and may be given an event twice."""

    def __init__(self, deliver: Callable[[list[Event]], None], spool: Spool, server: str):
        self._deliver, self._spool, self._server = deliver, spool, server
        self._lock = threading.Lock()
        self._waiting: deque[Event] = deque()
        self._sending: list[Event] = []
        self._sending_is_spooled = False
        self._begun = self._ended = 0
        self._away_since: float | None = None
        self._retry_s, self._retry_at = FIRST_RETRY_S, 0.0
        self._wake, self._idle, self._stop = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)
        self._thread.start()

    @property
    def away(self) -> bool:
        """Whether the last contact failed."""
        return self._away_since is not None

    @property
    def pending(self) -> bool:
        """Whether something from this or an earlier process waits in the spool."""
        return bool(self._spool)

    def put(self, event: Event) -> None:
        """Hand over one event; returns at once."""
        with self._lock:
            self._waiting.append(event)
            self._idle.clear()

    def settle(self, patience_s: float) -> None:
        """See that everything handed over outlives this process: waits `patience_s` for the server, then spools it."""
        self._wake.set()
        if not self.away:
            self._idle.wait(patience_s)
        self._set_aside(sending_too=True)

    def close(self, patience_s: float) -> bool:
        """Try the server a last time, spool what it does not take in `patience_s`, and stop.

        A delivery that still hangs is left to die with the process.

        Returns:
            Whether the server has everything.
        """
        begun, deadline = self._begun, time.monotonic() + patience_s
        self._retry_at = 0.0
        self._wake.set()
        while not self._idle.wait(0.05) and time.monotonic() < deadline:
            if self.away and self._ended > begun:
                break
        self._stop.set()
        self._wake.set()
        self._set_aside(sending_too=True)
        self._thread.join(1.0)
        return not self._spool

    def _run(self) -> None:
        while not self._stop.is_set():
            self._wake.wait(BATCH_S)
            self._wake.clear()
            if self._stop.is_set():
                return
            if time.monotonic() >= self._retry_at:
                self._send()
            elif self.away:
                self._set_aside()

    def _send(self) -> None:
        with self._lock:
            kept = [] if self._sending_is_spooled else self._sending
            self._sending, self._sending_is_spooled = [*kept, *self._waiting], False
            self._waiting.clear()
            self._begun += 1
        try:
            for events in self._spool.segments():
                self._deliver(events)
            if self._sending:
                self._deliver(self._sending)
        except Exception as error:
            self._lost(error)
        else:
            self._reached()
        self._ended += 1

    def _lost(self, error: Exception) -> None:
        self._set_aside(sending_too=True)
        if not self.away:
            reason = error if isinstance(error, CosmicError) else f"{self._server}: {type(error).__name__}: {error}"
            say(
                f"tracking: {scrub_text(str(reason)).strip()}. The run goes on; what it would log is kept and "
                "delivered when the server is back, or when the same job is run again."
            )
            self._away_since = time.monotonic()
        self._retry_at = time.monotonic() + self._retry_s
        self._retry_s = min(2 * self._retry_s, LAST_RETRY_S)

    def _reached(self) -> None:
        with self._lock:
            self._sending = []
            if self._spool:
                self._wake.set()
            elif not self._waiting:
                self._idle.set()
        if self._away_since is not None:
            say(f"tracking: the server is back after {time.monotonic() - self._away_since:.0f} s; all is delivered")
        self._away_since, self._retry_s = None, FIRST_RETRY_S

    def _set_aside(self, sending_too: bool = False) -> None:
        """Move what waits to the spool; with what is being sent, which may or may not arrive."""
        with self._lock:
            held = [] if self._sending_is_spooled or not sending_too else self._sending
            try:
                self._spool.append([*held, *self._waiting])
            except (CosmicError, OSError) as error:
                say(f"tracking: what waits for the server cannot be kept on disk, only in memory: {error}")
                return
            self._waiting.clear()
            self._sending_is_spooled |= sending_too
