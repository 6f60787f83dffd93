"""Run a ledger job on a Ray of several nodes on this machine, and change the cluster while it runs.

    python tests/faults/nodes_run.py JOB.json NODES

reads one word a line from standard input: `add` starts another node; `lose` kills the newest one that trains with all
that runs on it; `drain` announces that it will go; `stop` asks the run to save and stop. `Nodes` is the other end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from ledger import Ledger, LedgerJob

from cosmic_ray.errors import CosmicError
from cosmic_ray.training import checkpoint

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
SCALING = {"cpus_per_worker": 0.5, "cpus_per_reader": 0.25, "hang_timeout_s": 60.0, "grow_every_s": 1.0}
"""Of a job whose workers fit one to a node."""
PATIENCE_S = 200


class Nodes:
    """This file as a process of its own, with room for one worker on each node; killed with all below it in the end."""

    def __init__(self, keys: dict[str, Any], nodes: int):
        """`keys`: of a LedgerJob, but for its ledger."""
        self.out, self.ledger = keys["out"], f"{keys['out']}-ledger"
        path = Path(f"{self.out}.json")
        path.write_text(json.dumps({**keys, "ledger": self.ledger}))
        tests = Path(__file__).parents[1]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tests}:{tests / 'training'}"}
        environment.pop("RAY_ADDRESS", None)
        self.lines: list[tuple[float, str]] = []
        """What it said, and when, in seconds since 1970."""
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(path), str(nodes)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, text=True,
        )  # fmt: skip
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def __enter__(self) -> Nodes:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def tell(self, word: str) -> None:
        self._process.stdin.write(f"{word}\n")
        self._process.stdin.flush()

    def step(self) -> int:
        """Steps of the newest checkpoint."""
        newest = checkpoint.newest(f"{self.out}/checkpoints")
        return int(newest.rsplit("-", 1)[1]) if newest else 0

    def text(self) -> str:
        return "".join(line for _, line in list(self.lines))

    def told(self, text: str, times: int = 1) -> None:
        """Wait until it has said `text` so often."""
        self.wait(lambda: len(re.findall(text, self.text())) >= times, text)

    def go_on(self, steps: int) -> None:
        """Wait until so many more steps are committed."""
        wanted = self.step() + steps
        self.wait(lambda: self.step() >= wanted, f"step {wanted}")

    def take(self, step: int) -> None:
        """Wait until a step is taken, committed or not."""
        self.wait(lambda: any(step in attempt.taken for attempt in Ledger(self.ledger).attempts()), f"step {step}")

    def wait(self, ready: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not ready():
            assert self._process.poll() is None, f"ended while waiting for {what}:\n{self.text()}"
            assert time.monotonic() < deadline, f"no {what} in {PATIENCE_S} s:\n{self.text()}"
            time.sleep(0.1)

    def rank(self, rank: int, world: int) -> psutil.Process:
        """The process that trains as `rank`, as the driver last said."""
        return psutil.Process(int(re.findall(rf"worker {rank} of {world}: process (\d+)", self.text())[-1]))

    def end(self) -> int:
        """Wait for the end; the exit code."""
        code = self._process.wait(PATIENCE_S)
        self._listener.join(10)
        return code

    def kill(self) -> None:
        """SIGKILL to the driver and all below it: Ray's daemons, the workers."""
        if self._process.poll() is not None:
            return
        me = psutil.Process(self._process.pid)
        for each in [me, *me.children(recursive=True)]:
            try:
                each.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait(30)

    def _listen(self) -> None:
        for line in self._process.stdout:
            self.lines.append((time.time(), line))


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    job = LedgerJob(**json.loads(Path(sys.argv[1]).read_text()))
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    nodes = [cluster.add_node(**NODE) for _ in range(int(sys.argv[2]) - 1)]
    ray.init(address=cluster.address, log_to_driver=True)
    cluster.wait_for_nodes()
    threading.Thread(target=obey, args=(cluster, nodes), daemon=True).start()
    try:
        print(json.dumps(job.run()))
        code = 0
    except KeyboardInterrupt:
        code = 130
    except CosmicError as error:
        print(f"error: {error}", flush=True)
        code = error.exit_code
    ray.shutdown()
    cluster.shutdown()
    sys.exit(code)


def obey(cluster: Cluster, nodes: list) -> None:
    for line in sys.stdin:
        word = line.strip()
        if word == "add":
            import ray._private.utils

            ray._private.utils.set_sigterm_handler = lambda *_: None  # it takes the main thread only
            nodes.append(cluster.add_node(**NODE))
        elif word == "lose":
            lose(that_trains(nodes))
        elif word == "drain":
            drain(cluster, that_trains(nodes))
        elif word == "stop":
            os.kill(os.getpid(), signal.SIGINT)


def that_trains(nodes: list) -> Any:
    """Take the newest node that runs a worker out of `nodes`, which do not have the head."""
    return nodes.pop(max(i for i, node in enumerate(nodes) if any(map(_is_worker, processes(node)))))


def processes(node: Any) -> list[psutil.Process]:
    """The raylet of a node and all that it runs."""
    raylets = [psutil.Process(info.process.pid) for info in node.all_processes["raylet"]]
    return [process for raylet in raylets for process in [raylet, *raylet.children(recursive=True)]]


def _is_worker(process: psutil.Process) -> bool:
    return "RayTrainWorker" in " ".join(process.cmdline())


def lose(node: Any) -> None:
    """SIGKILL to the raylet and to all that it runs, as when a machine goes away."""
    for process in processes(node):
        process.kill()


def drain(cluster: Cluster, node: Any) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    gcs = GcsClient(address=cluster.address)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = gcs.drain_node(node.node_id, reason, "spot", 2**62)
    assert accepted, why


if __name__ == "__main__":
    main()
