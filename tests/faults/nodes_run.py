"""Run a ledger job on a Ray of several nodes on this machine; lines on standard input change the cluster.

    python tests/faults/nodes_run.py JOB.json NODES

`add` starts another node; `lose` kills the newest one with all that runs on it; `drain` announces that it will go;
`stop` asks the run to save and stop.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path

import psutil
import ray
import ray._private.utils
from ledger import LedgerJob
from ray.cluster_utils import Cluster

from cosmic_ray.errors import CosmicError

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def main() -> None:
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
            ray._private.utils.set_sigterm_handler = lambda *_: None  # it takes the main thread only
            nodes.append(cluster.add_node(**NODE))
        elif word == "lose":
            lose(nodes.pop())
        elif word == "drain":
            drain(cluster, nodes.pop())
        elif word == "stop":
            os.kill(os.getpid(), signal.SIGINT)


def lose(node) -> None:
    """SIGKILL to the raylet and to all that it runs, as when a machine goes away."""
    for info in node.all_processes["raylet"]:
        raylet = psutil.Process(info.process.pid)
        for process in [raylet, *raylet.children(recursive=True)]:
            process.kill()


def drain(cluster: Cluster, node) -> None:
    from ray._raylet import GcsClient
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    gcs = GcsClient(address=cluster.address)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, why = gcs.drain_node(node.node_id, reason, "spot", 2**62)
    assert accepted, why


if __name__ == "__main__":
    main()
