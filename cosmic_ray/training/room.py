"""Room in the cluster: how many workers it can hold, and which of its nodes are about to go."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

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


def free(each: Bundle, answering: bool = False) -> int:
    """Workers of `each` that fit beside what runs now, on nodes that are not about to go.

    `answering`: ask every node, since Ray takes its time to find out that one is dead.
    """
    import ray
    from ray._private.state import available_resources_per_node

    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]} - leaving()
    if answering:
        alive = _answering(alive)
    return fits((there for node, there in available_resources_per_node().items() if node in alive), each)


def leaving() -> set[str]:
    """Nodes that Ray was told will be taken away: preempted, or drained by the autoscaler."""
    from ray._private.state import state

    return set(state.get_draining_nodes())


def _answering(nodes: set[str]) -> set[str]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(_here)
    asked = {
        ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(): node
        for node in nodes
    }
    answers, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
    for ref in silent:
        ray.cancel(ref)
    found = set()
    for ref in answers:
        try:
            ray.get(ref)
            found.add(asked[ref])
        except ray.exceptions.RayError:
            continue
    return found


def _here() -> None:
    """That it runs is the answer."""
