"""The wire between workers and the driver: what rank 0 tells goes one way, the wish to stop the other.

`ray.train.report` takes about two seconds a call and is a collective, so nothing goes through it. A small actor on the
driver's node holds the events until the driver takes them; it outlives any group of workers. A thread of each worker
talks to it a few times a second, so that a training step costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cosmic_ray.errors import CosmicError, DataError

EXCHANGE_S = 0.2
SAY = "say"
"""An event for the driver's user, beside those for its callbacks."""
_PATIENCE_S = 30.0


@ray.remote(num_cpus=0, max_restarts=0)
class _Wire:
    """Events that the driver has not taken, the wish to stop, the error that no restart would mend, and the placement
    groups and nodes that workers have."""

    def __init__(self) -> None:
        self._events: list[tuple] = []
        self._stopping = False
        self._failure: dict[str, Any] | None = None
        self._places: set[Any] = set()
        self._nodes: set[str] = set()

    def exchange(self, events: list[tuple]) -> bool:
        self._events += events
        return self._stopping

    def take(self) -> list[tuple]:
        events, self._events = self._events, []
        return events

    def stop(self) -> None:
        self._stopping = True

    def fail(self, failure: dict[str, Any]) -> None:
        self._failure = self._failure or failure

    def failure(self) -> dict[str, Any] | None:
        return self._failure

    def go_on(self) -> None:
        """Forget the last attempt: its wish to stop, and a failure that another of its workers told too late."""
        self._stopping, self._failure = False, None

    def placed(self, group: Any, node: str) -> None:
        self._places.add(group)
        self._nodes.add(node)

    def nodes(self) -> set[str]:
        return self._nodes

    def places(self) -> list[Any]:
        places, self._places, self._nodes = list(self._places), set(), set()
        return places


def make_wire() -> Any:
    """A wire on this node; it ends with this process."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return _Wire.options(scheduling_strategy=here).remote()


def free_places(wire: Any) -> None:
    """Give back the CPUs and GPUs of workers that died: a controller that was killed leaves them reserved."""
    for group in ray.get(wire.places.remote()):
        ray.util.remove_placement_group(group)


class Link:
    """A worker's end of the wire; a callback of the loop on rank 0."""

    def __init__(self, wire: Any, greeting: str):
        """`greeting` is said by the driver, to its user."""
        self._wire = wire
        self._events: list[tuple] = [(SAY, greeting)]
        self._lock = threading.Lock()
        self._stopping = False
        self._done = threading.Event()
        if (group := ray.util.get_current_placement_group()) is not None:
            wire.placed.remote(group, ray.get_runtime_context().get_node_id())
        self._thread = threading.Thread(target=self._run, name="wire", daemon=True)
        self._thread.start()

    def stopping(self) -> bool:
        """Whether the driver wishes this run to save and stop."""
        return self._stopping

    def fail(self, error: CosmicError) -> None:
        """Tell an error that is the user's to mend: the driver will not start again."""
        failure = {"text": str(error), "exit_code": error.exit_code, "type": type(error).__name__}
        if isinstance(error, DataError):
            failure |= {"uri": error.uri, "problem": error.problem}
        ray.get(self._wire.fail.remote(failure), timeout=_PATIENCE_S)

    def on_start(self, info: Mapping[str, Any]) -> None:
        """Told to the driver, as all that follows."""
        self._put("on_start", dict(info))

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._put("on_step", step, dict(metrics))

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._put("on_eval", step, dict(metrics))

    def on_saving(self, step: int) -> None:
        """Hands over what was told so far: a run that resumes from this checkpoint will not tell it again."""
        self._put("on_saving", step)
        self._exchange()

    def on_checkpoint(self, step: int, uri: str) -> None:
        self._put("on_checkpoint", step, uri)

    def close(self) -> None:
        """Hand over the rest."""
        self._done.set()
        self._thread.join()
        self._exchange()

    def _put(self, *event: Any) -> None:
        with self._lock:
            self._events.append(event)

    def _run(self) -> None:
        while not self._done.wait(EXCHANGE_S):
            self._exchange()

    def _exchange(self) -> None:
        with self._lock:
            events, self._events = self._events, []
            answer = self._wire.exchange.remote(events)
        try:
            self._stopping |= ray.get(answer, timeout=_PATIENCE_S)
        except ray.exceptions.GetTimeoutError:
            with self._lock:
                self._events = events + self._events  # told twice at worst; nobody counts them
        except ray.exceptions.RayError:
            self._done.set()  # the driver is gone, and Ray will end this process too
