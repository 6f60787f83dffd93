"""Parts of a simulation, written by several processes; those that are there already are not written again."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

from cosmic_ray import storage

T = TypeVar("T")

PARTS = "parts"
"""The folder of the parts, below a job's output."""

_FEW = 6
"""So few parts are written before a second process has started."""


def write_parts(
    uri: str, parts: Mapping[str, T], write: Callable[[T], None], processes: int, title: str, unit: str
) -> None:
    """Write every part that is missing below `uri`.

    Args:
        parts: file name in the folder of parts -> what `write` takes; once that file is there, the part is done.
        write: importable, as workers import it.
        processes: 0 takes one for each CPU that this process may use.
    """
    from cosmic_ray.progress import progress

    there = {storage.name(part) for part in storage.listing(storage.join(uri, PARTS))}
    missing = [part for name, part in parts.items() if name not in there]
    done, workers = len(parts) - len(missing), processes or len(os.sched_getaffinity(0))
    with progress(title, len(parts), unit) as shown:
        if done:
            shown.update(done, "already there")
        if len(missing) <= _FEW or workers == 1:
            for part in missing:
                write(part)
                done += 1
                shown.update(done)
            return
        with _pool(min(workers, len(missing))) as pool:
            for future in as_completed([pool.submit(write, part) for part in missing]):
                future.result()
                done += 1
                shown.update(done)


@contextmanager
def _pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes forked from a clean one that has imported what they need; error or Ctrl-C drops what has not begun."""
    from multiprocessing import get_context

    context = get_context("forkserver")
    modules = [f"{__package__}.{name}" for name in ("field", "files", "morphology")]
    context.set_forkserver_preload([*modules, "scipy.ndimage", "scipy.fft"])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=True, cancel_futures=True)
        raise
    pool.shutdown()


def _begin() -> None:
    """In a worker: Ctrl-C is the parent's to handle, and a worker whose parent was killed ends with it."""
    import signal
    import threading
    from multiprocessing import parent_process

    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=follow, name="follow parent", daemon=True).start()
