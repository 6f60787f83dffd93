"""Room in the cluster: how many workers it can hold, and which of its nodes are about to go."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

from cosmic_ray.training.settings import Scaling

Bundle = Mapping[str, float]
_ANSWER_S = 5.0


def bundle(scaling: Scaling, gpus: float) -> dict[str, float]:
    """What Ray sets aside for one worker and the task that reads for it, on one node."""
    cpus = scaling.cpus_per_worker + scaling.cpus_per_reader
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def fits(nodes: Iterable[Bundle], each: Bundle) -> int:
    """Workers of `each` that fit on nodes with these resources."""
    return sum(int(min(node.get(name, 0.0) / amount + 1e-6 for name, amount in each.items())) for node in nodes)


def free(each: Bundle, enough: int | None = None) -> int:
    """Workers of `each` that fit beside what runs now, on nodes that are not about to go.

    `enough`: count only nodes that answer now, until there is room for so many: Ray takes its time to find out that a
    node is dead.
    """
    import ray
    from ray._private.state import available_resources_per_node

    staying = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving()
    there = {node: found for node, found in available_resources_per_node().items() if node in staying}
    if enough is None:
        return fits(there.values(), each)
    found = 0
    for node in _answering(there):
        found += fits([there[node]], each)
        if found >= enough:
            break
    return found


def leaving() -> set[str]:
    """Nodes that Ray was told will be taken away: preempted, or drained by the autoscaler."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def _answering(nodes: Iterable[str]) -> Iterator[str]:
    """Those of `nodes` that answer within a few seconds, as they do."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(_here)
    places = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes}
    asked = {ask.options(scheduling_strategy=place).remote(): node for node, place in places.items()}
    deadline = time.monotonic() + _ANSWER_S
    while asked:
        answers, _ = ray.wait(list(asked), timeout=max(0.0, deadline - time.monotonic()))
        if not answers:
            return
        node = asked.pop(answers[0])
        with suppress(ray.exceptions.RayError):
            ray.get(answers[0])
            yield node


def _here() -> None:
    """That it runs is the answer."""
