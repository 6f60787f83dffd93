"""A real Ray cluster of several nodes on this one machine, to try `cosmic-ray submit` on; Ctrl-C ends it.

python cluster/local.py --nodes 3 --cpus 2
cosmic-ray submit jobs/quickstart.yaml out=$PWD/runs/submitted --address http://127.0.0.1:8265
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from pathlib import Path

from ray.cluster_utils import Cluster


def main() -> None:
    """Start the head and its nodes, say where they are, and wait."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, default=2, help="nodes, the head among them")
    parser.add_argument("--cpus", type=int, default=2, help="logical CPUs of each node")
    parser.add_argument("--store-mb", type=int, default=300, help="object store of each node, MB")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="where jobs are submitted")
    given = parser.parse_args()

    # Submitted jobs start `cosmic-ray` by name, and this environment may not be activated.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    # Any free port for the agents that take jobs: where another Ray holds the usual one, they would stay without.
    node = {
        "num_cpus": given.cpus,
        "object_store_memory": given.store_mb * 2**20,
        "dashboard_agent_listen_port": 0,
    }
    dashboard = {"include_dashboard": True, "dashboard_port": given.dashboard_port}
    cluster = Cluster(initialize_head=True, head_node_args={**node, **dashboard})
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        for _ in range(given.nodes - 1):
            cluster.add_node(**node)
        print(f"{given.nodes} nodes, {given.cpus} CPUs each; GCS {cluster.address}", flush=True)
        print(f"ready: --address http://127.0.0.1:{given.dashboard_port}", flush=True)
        stop.wait()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
