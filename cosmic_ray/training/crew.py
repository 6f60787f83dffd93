"""How many workers a run has: as many as there is room for, between its fewest and its most.

Workers are started anew, from a checkpoint, whenever their number changes. A change that can wait (a node that was
announced to go, room for more) is made after they have saved, so it costs no step.
"""

from __future__ import annotations

import threading
import time

from cosmic_ray.errors import CosmicError
from cosmic_ray.progress import say
from cosmic_ray.training import room
from cosmic_ray.training.settings import Scaling

LOOK_S = 1.0
SETTLE_S = 5.0
"""Ray gives back what ended workers had within so long."""


class Crew:
    """The number of workers of each attempt, and when to change it."""

    def __init__(self, scaling: Scaling, gpus: float, stop: threading.Event):
        """`gpus` of a worker; `stop` ends waiting for room."""
        self.each = room.bundle(scaling, gpus)
        self.size = 0
        """Workers of the present attempt."""
        self._scaling, self._stop = scaling, stop
        self._looked = self._grew = 0.0
        self._grow_every_s = scaling.grow_every_s
        self._hoped_for = 0
        self._asked_for_more = False

    def gather(self) -> int:
        """Wait for room for the fewest workers; the number to start, at most the most.

        Raises:
            KeyboardInterrupt: asked to stop meanwhile.
            CosmicError: where there is no room for too long.
        """
        began, again, told = time.monotonic(), self.size > 0, False
        self._ask_for(self._scaling.most)
        while True:
            found = min(room.free(self.each, self._scaling.most if again else None), self._scaling.most)
            waited_s = time.monotonic() - began
            settled = not again or waited_s > SETTLE_S
            enough = found >= (self._hoped_for or self._scaling.most)
            if enough or (found >= self._scaling.fewest and settled):
                # Room that was there and is gone again: look less often, or the run would do nothing but start.
                self._grow_every_s *= 2 if found < self._hoped_for else 1
                self.size, self._hoped_for = found, 0
                return found
            if waited_s > self._scaling.patience_s:
                raise CosmicError(f"no room for {self._scaling.fewest} workers in {waited_s:.0f} s; {self._remedy()}")
            if settled and not told:
                say(f"waiting for room for {self._scaling.fewest} workers of {_shown(self.each)}; there is for {found}")
                told = True
            if self._stop.wait(LOOK_S / 2):
                raise KeyboardInterrupt

    def change(self, nodes: set[str]) -> str | None:
        """Why the workers, which are on `nodes`, should save and start again; None where they should not."""
        now = time.monotonic()
        if now - self._looked < LOOK_S:
            return None
        self._looked = now
        if going := nodes & room.leaving():
            return f"{len(going)} of the nodes that train will be taken away"
        if not nodes:
            self._grew = now  # the workers are on their way, and what they will take still looks free
        if self.size == self._scaling.most or now - self._grew < self._grow_every_s:
            return None
        self._grew = now
        more = min(room.free(self.each), self._scaling.most - self.size)
        if more <= 0:
            return None
        self._hoped_for = self.size + more
        return f"there is room for {more} more workers"

    def close(self) -> None:
        """Ask the autoscaler for nothing more."""
        if self._asked_for_more:
            self._ask_for(0)

    def _ask_for(self, workers: int) -> None:
        """A cluster that grows by itself learns what would be used; others take no notice."""
        if workers and self._scaling.fewest == self._scaling.most:
            return
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[dict(self.each)] * workers)
        self._asked_for_more = workers > 0

    def _remedy(self) -> str:
        return "give the cluster more nodes, or lower scaling.workers, and run the same file again"


def _shown(each: room.Bundle) -> str:
    return " and ".join(f"{amount:g} {name}s" for name, amount in each.items())
