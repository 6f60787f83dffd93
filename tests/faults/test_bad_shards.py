"""Shards that go bad in the middle of a run: it ends and names them, or goes on without them if the job says so."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import ledger
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.cloudpickle
from ledger import Ledger, LedgerJob
from training_jobs import Crops, stop_after

from cosmic_ray.errors import CosmicError
from cosmic_ray.output import read_manifest
from cosmic_ray.training.record import read_metrics

GOOD, STEPS = 6, 40
ray.cloudpickle.register_pickle_by_value(ledger)  # Ray's processes do not see this folder


def flipped(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    for at in range(4, len(data) // 2, 64):
        data[at] ^= 1
    shard.write_bytes(data)


def truncated(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 3])


def missing(shard: Path) -> None:
    shard.unlink()


def of_another_schema(shard: Path) -> None:
    pq.write_table(pa.table({"crop": [b"1" * 40_000] * 40}), shard, compression="none")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "spoil",
    [
        flipped,
        pytest.param(truncated, marks=pytest.mark.exhaustive),
        pytest.param(missing, marks=pytest.mark.exhaustive),
        pytest.param(of_another_schema, marks=pytest.mark.exhaustive),
    ],
)
def test_a_bad_shard_ends_the_run_or_leaves_the_plan(spoil: Callable[[Path], None], tmp_path: Path, ray_local: None):
    crops = Crops.make(str(tmp_path))
    scaling = {"workers": 2, "cpus_per_worker": 0.5}
    keys = crops.keys(steps=STEPS, scaling=scaling, log_every=1, checkpoint={"every": 10})
    job = LedgerJob(**keys, ledger=str(tmp_path / "ledger"))
    group = crops.store.row_groups[4]
    left = [row.shard != group.shard for row in crops.store.row_groups for _ in range(row.rows)]
    ids = crops.store.metadata(["crop_id"])["crop_id"].to_pylist()
    stop_after(job, 2, GOOD)
    spoil(Path(group.shard))

    with pytest.raises(CosmicError, match=group.shard):
        job.run()
    assert not Path(job.out, "manifest.json").exists()

    results = job.model_copy(update={"on_bad_shard": "exclude"}).run()
    train = set(crops.opened_split().rows("train").tolist())
    gone = sum(not left[row] for row in train)
    (told,) = read_manifest(job.out)["exclusions"]
    assert (told["step"], told["shard"], told["crops"]) == (GOOD, group.shard, 40) and told["problem"]
    assert results["excluded_crops"] == gone > 0 and results["steps"] == STEPS
    lines = [line for line in read_metrics(f"{job.out}/metrics.jsonl") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(GOOD + 1, STEPS + 1))
    assert {line["train/excluded_crops"] for line in lines} == {gone}

    taken, plan, epochs = Ledger(job.ledger), job.stage().plan, defaultdict(Counter)
    for step in range(STEPS):
        for name, epoch in zip(taken.batch(step), plan.step(step).epoch.tolist(), strict=True):
            epochs[epoch][name] += 1
            assert step < GOOD or left[ids.index(name)], "a crop that was left out"
    remaining = {ids[row] for row in train if left[row]}
    assert remaining <= set(epochs[0]) and max(epochs[0].values()) == 1
    for epoch in sorted(epochs)[1:-1]:
        assert epochs[epoch] == Counter(dict.fromkeys(remaining, 1))
    assert len(epochs) >= 4
