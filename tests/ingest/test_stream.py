"""The stream gives the crops that the plan says, in one process and through Ray Data, and ends well when it must."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pytest
import torch
from faulty import FaultyProxy

from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError
from cosmic_ray.ingest.chunks import read_chunks
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import Batch, batches, plain_batches
from cosmic_ray.ingest.windows import Here, Stored, Windows
from cosmic_ray.stores.crops import CropStore

Stream = Callable[..., Iterator[Batch]]


@pytest.fixture
def store(crop_store: Callable[..., CropStore]) -> CropStore:
    """200 crops of 16 x 16 in 25 row groups and 13 shards."""
    return crop_store(200)


@pytest.fixture(params=["plain", pytest.param("ray", marks=pytest.mark.slow)])
def stream(request: pytest.FixtureRequest) -> Stream:
    """Both ways from a store to batches."""
    if request.param == "plain":
        return plain_batches
    request.getfixturevalue("ray_local")
    return batches


def make_plan(store: CropStore, batch: int = 24, **options) -> Plan:
    return Plan.fitted(store.content_hash, Selection.all(store), batch, 7, lanes=options.pop("lanes", 4), **options)


def taken(source: Iterator[Batch]) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Step, copied images and positions of each batch: the stream's own memory is used again."""
    return [(batch.step, batch.images.numpy().copy(), batch.positions.numpy().copy()) for batch in source]


def expected(store: CropStore, plan: Plan, k: int, lanes: range) -> np.ndarray:
    samples = plan.rank_step(k, lanes)
    return store.crops(store.group_starts[samples.row_group] + samples.row)


def damage(store: CropStore, group: int, change: Callable[[bytearray], bytes]) -> str:
    """Change the bytes of the shard that holds a row group; gives the shard's URI."""
    shard = store.row_groups[group].shard
    Path(shard).write_bytes(change(bytearray(Path(shard).read_bytes())))
    return shard


def test_every_batch_is_what_the_plan_says(store: CropStore, stream: Stream) -> None:
    """Three epochs and their boundaries, in the middle of batches."""
    plan = make_plan(store)
    steps = plan.steps(3)
    got = taken(stream(store.uri, plan, 0, 1, 0, steps))
    assert [step for step, _, _ in got] == list(range(steps))
    for step, images, positions in got:
        assert np.array_equal(images, expected(store, plan, step, range(4)))
        assert np.array_equal(positions, plan.step(step).position)


def test_ranks_in_the_middle_of_an_epoch_together_are_the_global_batch(store: CropStore, stream: Stream) -> None:
    plan = make_plan(store, lanes=3)
    parts = [taken(stream(store.uri, plan, rank, 2, 5, 9)) for rank in range(2)]
    for k, first, second in zip(range(5, 9), *parts, strict=True):
        assert first[0] == second[0] == k
        assert np.array_equal(np.concatenate([first[1], second[1]]), expected(store, plan, k, range(3)))
        assert np.array_equal(np.concatenate([first[2], second[2]]), plan.step(k).position)


def test_both_ways_give_the_same_bytes(store: CropStore, ray_local: None) -> None:
    plan = make_plan(store, remainder="drop", window=2)
    first, second = (taken(stream(store.uri, plan, 0, 1, 3, 20)) for stream in (plain_batches, batches))
    for ours, theirs in zip(first, second, strict=True):
        assert ours[0] == theirs[0] and all(map(np.array_equal, ours[1:], theirs[1:]))


def test_only_selected_rows_are_seen(crop_store: Callable[..., CropStore]) -> None:
    store = crop_store(120, channels=3)
    mask = np.arange(120) % 5 == 0
    plan = Plan.fitted(store.content_hash, Selection(store.rows_per_group, mask), 6, 1, lanes=4)
    seen = []
    for batch in plain_batches(store.uri, plan, 0, 1, 0, plan.steps(1)):
        rows = store.group_starts[batch.samples.row_group] + batch.samples.row
        assert np.array_equal(batch.images, store.crops(rows)) and batch.images.shape[1:] == (3, 16, 16)
        seen += rows.tolist()
    assert sorted(seen) == np.flatnonzero(mask).tolist()


def test_micro_batches_cut_a_slice(store: CropStore) -> None:
    plan = make_plan(store)
    parts = [
        (batch.step, batch.images.numpy().copy(), batch.positions.tolist(), batch.last, batch.samples.row.tolist())
        for batch in plain_batches(store.uri, plan, 0, 1, 2, 4, micro=10)
    ]
    assert [(step, len(images), last) for step, images, _, last, _ in parts] == [
        (step, size, last) for step in (2, 3) for size, last in ((10, False), (10, False), (4, True))
    ]
    for k in (2, 3):
        mine = [part for part in parts if part[0] == k]
        assert np.array_equal(np.concatenate([part[1] for part in mine]), expected(store, plan, k, range(4)))
        assert [position for part in mine for position in part[2]] == plan.step(k).position.tolist()
        assert [row for part in mine for row in part[4]] == plan.step(k).row.tolist()


def test_a_slice_may_be_empty_and_the_steps_still_come(crop_store: Callable[..., CropStore]) -> None:
    """As many lanes as crops in a batch: a lane's share is one row on average, and none at times."""
    store = crop_store(34, rows_per_group=10)
    plan = Plan.fitted(store.content_hash, Selection(store.rows_per_group, np.arange(34) % 10 < 4), 4, 0)
    assert plan.spec.lanes == 4
    sizes = np.array([[len(b) for b in plain_batches(store.uri, plan, r, 4, 0, 40)] for r in range(4)])
    assert (sizes.sum(axis=0) == 4).all() and sizes.shape == (4, 40)


def test_staging_memory_is_used_again_but_not_too_soon(store: CropStore) -> None:
    plan = make_plan(store)
    source = plain_batches(store.uri, plan, 0, 1, 0, 4)
    first = next(source)
    kept, address = first.images.clone(), first.images.data_ptr()
    second = next(source)
    assert torch.equal(first.images, kept) and second.images.data_ptr() != address
    assert next(source).images.data_ptr() == address
    source.close()


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda data: bytes(data[:-40]), "ends early"),
        (lambda data: bytes(data[:2000]), "ends early"),
        (lambda data: bytes(data[:100] + bytes([data[100] ^ 1]) + data[101:]), "do not match"),
    ],
    ids=["footer", "truncated", "flipped"],
)
def test_a_damaged_shard_is_named(store: CropStore, change: Callable[[bytearray], bytes], problem: str) -> None:
    plan = make_plan(store)
    shard = damage(store, 4, change)
    with pytest.raises(DataError, match=problem) as caught:
        taken(plain_batches(store.uri, plan, 0, 1, 0, plan.steps(1)))
    assert caught.value.uri == shard


@pytest.mark.slow
def test_a_damaged_shard_is_named_through_ray(store: CropStore, ray_local: None) -> None:
    """And the batches before it are delivered first."""
    plan = make_plan(store, window=1)
    order = [group for read in plan.reads(range(4), 0, plan.steps(1)) for group in read.row_groups]
    other = {group.shard for group in store.row_groups} - {store.row_groups[g].shard for g in order[:4]}
    late = next(g for g in order[4:] if store.row_groups[g].shard in other)
    Path(shard := store.row_groups[late].shard).unlink()
    came = []
    with pytest.raises(DataError) as caught:
        for batch in batches(store.uri, plan, 0, 1, 0, plan.steps(1)):
            came.append(batch.step)
    assert type(caught.value) is NotFoundError and caught.value.uri == shard and "missing" in caught.value.problem
    assert came == list(range(len(came))) and came


def test_a_row_group_damaged_on_its_way_is_read_again(store: CropStore, capsys: pytest.CaptureFixture) -> None:
    """Storage is whole: the run goes on, and says so."""
    plan = make_plan(store)

    class Spoiling(Here):
        asked = 0

        def ask(self, group: int) -> Callable[[], Stored]:
            self.asked += 1
            data = bytearray(super().ask(group)().data)
            data[len(data) // 2] ^= self.asked == 3
            return lambda: Stored(bytes(data))

    windows = Windows(store, plan, range(4), 0, plan.steps(1), source=Spoiling(store))
    for k in range(plan.steps(1)):
        out = np.empty((len(plan.positions(k, range(4))), store.spec.nbytes), np.uint8)
        windows.fill(k, out)
        assert np.array_equal(out.reshape(-1, *store.spec.shape), expected(store, plan, k, range(4)))
    windows.close()
    captured = capsys.readouterr()
    assert (captured.out + captured.err).count("it was read again") == 1


def test_chunks_hold_the_row_groups_in_the_order_of_need(store: CropStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the sizes of the chunks, and from the middle of the stream, too; their memory is used again."""
    plan = make_plan(store)
    groups = [group for read in plan.reads(range(4), 2, plan.steps(2)) for group in read.row_groups]
    for nbytes, ahead, skip in ((1, 1, 0), (20_000, 50_000, 0), (2**20, 2**20, 7)):
        monkeypatch.setattr("cosmic_ray.ingest.chunks.CHUNK_BYTES", nbytes)
        came = []
        for chunk in read_chunks(pa.table({}), store.places, plan, range(4), 2, plan.steps(2), skip, ahead):
            row = chunk.to_pylist()[0]
            assert row["error"] == "" and row["first"] == skip + len(came)
            at = 0
            for group, size, footer in zip(row["row_groups"], row["sizes"][::2], row["sizes"][1::2], strict=True):
                assert row["stored"][at : at + size] == store.stored(group)
                at += size + footer
                assert row["stored"][at - footer : at] == store.stored_footer(store.row_groups[group].shard)
                came.append(group)
            assert at == len(row["stored"])
        assert came == groups[skip:]


def test_another_store_is_refused(store: CropStore, crop_store: Callable[..., CropStore], stream: Stream) -> None:
    with pytest.raises(DataError, match="made for"):
        next(stream(crop_store(200, seed=1).uri, make_plan(store), 0, 1, 0, 5))


def test_more_ranks_than_lanes_are_refused(store: CropStore) -> None:
    with pytest.raises(JobError, match=r"scaling\.workers"):
        next(plain_batches(store.uri, make_plan(store), 0, 5, 0, 5))


@pytest.mark.slow
def test_a_killed_reader_is_started_again_where_it_stood(
    crop_store: Callable[..., CropStore], ray_local: None, capsys: pytest.CaptureFixture
) -> None:
    """Long before the end of its stream, which is longer than what waits in the object store."""
    store = crop_store(200, size=64, compression="none")
    plan = make_plan(store)
    source = batches(store.uri, plan, 0, 1, 0, 10**6)
    got = [(batch.step, batch.images.numpy().copy()) for batch in itertools.islice(source, 3)]
    os.kill(reading_process().pid, signal.SIGKILL)
    got += [(batch.step, batch.images.numpy()[:1].copy()) for batch in itertools.islice(source, 3997)]
    source.close()
    said = capsys.readouterr()
    assert "starting it again at its row group" in said.out + said.err
    assert [step for step, _ in got] == list(range(4000))
    for step, images in [*got[:6], *got[900::200], got[-1]]:
        assert np.array_equal(images, expected(store, plan, step, range(4))[: len(images)])


@pytest.mark.slow
def test_closing_early_ends_the_task(store: CropStore, ray_local: None) -> None:
    source = batches(store.uri, make_plan(store), 0, 1, 0, 10**6)
    next(source)
    assert reading_process()
    began = time.monotonic()
    source.close()
    assert time.monotonic() - began < 5
    deadline = time.monotonic() + 10
    while reading_process() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert reading_process() is None


@pytest.mark.slow
def test_from_s3(crop_store: Callable[..., CropStore], s3: str) -> None:
    store = crop_store(100, out=storage.join(s3, "store"))
    plan = make_plan(store)
    for step, images, _ in taken(plain_batches(store.uri, plan, 0, 1, 2, plan.steps(2))):
        assert np.array_equal(images, expected(store, plan, step, range(4)))


@pytest.mark.slow
def test_a_server_that_fails_now_and_then_costs_only_time(
    crop_store: Callable[..., CropStore], s3: str, faulty_s3: FaultyProxy
) -> None:
    store = crop_store(100, out=storage.join(s3, "store"))
    plan = make_plan(store)
    wanted = [expected(store, plan, k, range(4)) for k in range(plan.steps(1))]
    faulty_s3.faults.extend(["503", None, "reset", None, "truncate", None, "500"])
    got = taken(plain_batches(store.uri, plan, 0, 1, 0, plan.steps(1)))
    assert not faulty_s3.faults and all(np.array_equal(batch[1], k) for batch, k in zip(got, wanted, strict=True))


def reading_process() -> psutil.Process | None:
    """The Ray worker of this test's cluster that runs the reading task."""
    for process in psutil.Process().children(recursive=True):
        try:
            if any("read_chunks" in part for part in process.cmdline()):
                return process
        except psutil.Error:
            continue
    return None
