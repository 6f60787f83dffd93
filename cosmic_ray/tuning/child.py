"""One trial as a process: a whole training job on the search's cluster, which saves and stops when its input ends.

    python -m cosmic_ray.tuning.child FOLDER

FOLDER/job.json is the job; FOLDER/ending.json becomes how it ended.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from cosmic_ray.cluster import disconnect
from cosmic_ray.errors import CosmicError, FencedError
from cosmic_ray.jobs import make
from cosmic_ray.pipeline import check

JOB, ENDING = "job.json", "ending.json"
_HELD_S = 120.0
"""What a killed search left running has stopped by then."""


def main() -> None:
    """Run the job, and say how it ended."""
    folder = Path(sys.argv[1])
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # Ray's workers block it, and what they start inherits
    threading.Thread(target=_stop_at_end_of_input, daemon=True).start()
    try:
        _run(json.loads((folder / JOB).read_text()))
        ending: dict[str, Any] = {"ending": "finished", "error": None}
    except KeyboardInterrupt:
        ending = {"ending": "stopped", "error": None}
    except CosmicError as error:
        ending = {"ending": "failed", "error": str(error)}
    except Exception as error:
        traceback.print_exc()
        ending = {"ending": "failed", "error": f"{type(error).__name__}: {error}"}
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    (folder / ENDING).write_text(json.dumps(ending))
    disconnect()


def _run(tree: dict[str, Any]) -> None:
    """Run the job, once nobody else does."""
    job, deadline = make(tree), time.monotonic() + _HELD_S
    while True:
        try:
            check(job)
            job.run()
            return
        except FencedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(1.0)


def _stop_at_end_of_input() -> None:
    """As a Ctrl-C: whoever started this process wants it to stop, or is gone."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    main()
