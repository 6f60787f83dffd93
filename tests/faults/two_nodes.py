"""Run a `build-crops` job on a Ray of two nodes on this machine, and lose one of them on the way where asked to.

    python tests/faults/two_nodes.py JOB.yaml [lose | hold FOLDER]

`hold` opens FOLDER as descriptor 700 of this process: /proc/self/fd/700 is then a folder that no other process sees.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from cosmic_ray import jobs


def main() -> None:
    job = jobs.load(sys.argv[1])
    if "hold" in sys.argv:
        os.dup2(os.open(sys.argv[3], os.O_RDONLY), 700, inheritable=False)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 * 2**20})
    other = cluster.add_node(num_cpus=1, object_store_memory=100 * 2**20)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    if "lose" in sys.argv:
        threading.Thread(target=lose, args=(cluster, other, Path(job.out)), daemon=True).start()
    results = job.run()
    nodes = sum(1 for node in ray.nodes() if node["Alive"])
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps({"nodes": nodes, "content_hash": results["content_hash"]}))


def lose(cluster: Cluster, node, out: Path) -> None:
    """Kill a node as soon as a few chunks are done: the tasks that it ran are lost."""
    while len(list(out.glob("candidates/*.json"))) < 6:
        time.sleep(0.01)
    cluster.remove_node(node, allow_graceful=False)


if __name__ == "__main__":
    main()
