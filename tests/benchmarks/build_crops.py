"""What `build-crops` costs beside the plain loop that it replaces, on real fields, in CPU-seconds of one process.

    COSMIC_RAY_DATA=DATA python tests/benchmarks/build_crops.py [--fields 48] [--recipe paper|better] [--ray]

Prints JSON: fields and nuclei; CPU-ms a field to decode, to decode and segment, for the plain loop (decode, segment,
measure, check), for step one (the loop, cutting, and the chunk's files), and for the whole job; bytes of scratch a
candidate; crops a second assembled. `--ray` adds the seconds that Ray Data takes for a task that does nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable

from cosmic_ray import storage
from cosmic_ray.config import validate
from cosmic_ray.imaging.build import build
from cosmic_ray.imaging.candidates import find_candidates
from cosmic_ray.imaging.catalogue import Entry, read_catalogue
from cosmic_ray.imaging.chunks import write_chunk
from cosmic_ray.imaging.job import BuildCrops
from cosmic_ray.imaging.parallel import each
from cosmic_ray.imaging.quality import check_objects
from cosmic_ray.imaging.read import read_field
from cosmic_ray.imaging.segment import measure, segment


def cpu_ms(call: Callable[[], object], fields: int) -> float:
    """CPU-milliseconds a field, all threads."""
    started = time.process_time()
    call()
    return round((time.process_time() - started) * 1e3 / fields, 2)


def plain(job: BuildCrops, entries: list[Entry], depth: int) -> None:
    """Decode (depth 0), segment (1), measure and check (2), one field after another."""
    for entry in entries:
        image = read_field(storage.read_bytes(entry.field_uri), entry.field_uri)
        if depth > 0:
            labels = segment(image, job.segmentation)
        if depth > 1:
            check_objects(labels, image, measure(labels, image), job.quality)


def nothing(index: int) -> dict:
    return {"index": index}


def ray_seconds(tasks: int = 64) -> dict[str, float]:
    """Wall seconds until Ray Data has done `tasks` empty tasks: the first time, and a task once it is warm."""
    units, times = [{"index": index} for index in range(tasks)], []
    for _ in range(3):
        started = time.monotonic()
        list(each(nothing, units, {}, None, 2**20, {}))
        times.append(time.monotonic() - started)
    return {"first_s": round(times[0], 2), "warm_s_per_task": round(min(times[1:]) / tasks, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fields", type=int, default=48)
    parser.add_argument("--recipe", choices=("paper", "better"), default="better")
    parser.add_argument("--ray", action="store_true")
    given = parser.parse_args()
    data = os.environ["COSMIC_RAY_DATA"]
    source = {"uri": f"{data}/images/coelho2009_U2OS", "pattern": "images/*.png"}
    with tempfile.TemporaryDirectory() as home:
        keys = {"out": f"{home}/out", "recipe": given.recipe, "source": source, "crop_px": 160, "workers": 0}
        job = validate(BuildCrops, keys)
        entries = read_catalogue(job.catalogues)[: given.fields]
        count = len(entries)
        plain(job, entries[:2], 2)
        figures: dict[str, object] = {"recipe": given.recipe, "fields": count}
        for depth, name in enumerate(("decode", "decode_segment", "plain_loop")):
            figures[f"{name}_ms"] = cpu_ms(lambda depth=depth: plain(job, entries, depth), count)
        figures["step_one_ms"] = cpu_ms(lambda: write_chunk(home, "chunk-00000", find_candidates(job, entries)), count)
        scratch = storage.size(f"{home}/candidates/chunk-00000.arrows")
        all_fields = len(read_catalogue(job.catalogues))
        results: dict = {}
        figures["whole_job_ms"] = cpu_ms(lambda: results.update(build(job)), all_fields)
        found = find_candidates(job, entries)
        candidates = sum(field["candidates"] for field in found.fields)
        figures |= {"candidates": candidates, "scratch_bytes_per_candidate": round(scratch / candidates)}
        figures["step_one_over_plain_loop"] = round(figures["step_one_ms"] / figures["plain_loop_ms"], 3)
        figures["crops"] = results["rows"]
    if given.ray:
        figures["ray"] = ray_seconds()
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
