"""The bytes that a server sends for a stream, counted at its door: those that are used, and few more."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler

import pytest
from faulty import FaultyProxy

from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.stores.crops import CropStore

BATCH = 64

pytestmark = pytest.mark.slow


class CountingProxy(FaultyProxy):
    """Counts the bytes of the answers about shards: row groups and footers."""

    sent = 0

    def _send(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes, cut: bool = False
    ) -> None:
        assert "/shards/" in request.path or "manifest" in request.path, "a stream lists nothing"
        if "/shards/" in request.path:
            self.sent += len(body)
        super()._send(request, status, headers, body, cut)


@pytest.fixture(scope="module")
def store(s3_server: str) -> CropStore:
    """1,024 crops of 128 x 128 in 32 row groups and 4 shards: the footers, read once by each rank, weigh little."""
    import botocore.session
    from making import make_store

    botocore.session.get_session().create_client("s3").create_bucket(Bucket="bytes-read")
    return make_store("s3://bytes-read/store", 1024, size=128, rows_per_group=32, groups_per_shard=8)


@pytest.fixture
def proxy(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingProxy]:
    with CountingProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def plan(store: CropStore) -> Plan:
    return Plan.fitted(store.content_hash, Selection.all(store), BATCH, 3, lanes=8, window=2)


def crop_bytes(store: CropStore) -> float:
    """Mean stored bytes of a crop."""
    return sum(group.nbytes for group in store.row_groups) / len(store)


def drawn(stream: Callable, plan: Plan, world: int, first: int, last: int) -> int:
    """Crops that the ranks together take of these steps."""
    return sum(
        len(batch) for rank in range(world) for batch in stream("s3://bytes-read/store", plan, rank, world, first, last)
    )


@pytest.mark.parametrize("world", [4, *(pytest.param(w, marks=pytest.mark.exhaustive) for w in (1, 8))])
def test_bytes_read_are_bytes_used(world: int, store: CropStore, plan: Plan, proxy: CountingProxy) -> None:
    used = drawn(plain_batches, plan, world, 0, plan.steps(2)) * crop_bytes(store)
    assert used == pytest.approx(2 * 1024 * crop_bytes(store))
    assert used <= proxy.sent <= 1.1 * used


@pytest.mark.parametrize(
    ("before", "after"), [(4, 2), *(pytest.param(*w, marks=pytest.mark.exhaustive) for w in ((1, 1), (1, 8), (8, 4)))]
)
def test_a_resumed_stream_reads_only_its_open_windows_again(
    before: int, after: int, store: CropStore, plan: Plan, proxy: CountingProxy
) -> None:
    """Of each lane one window is partly drawn, and read once more: by the one rank that has the lane now."""
    at = plan.steps(1) // 2 + 1
    drawn(plain_batches, plan, before, 0, at)
    proxy.sent = 0
    used = drawn(plain_batches, plan, after, at, plan.steps(2)) * crop_bytes(store)
    firsts = {piece.lane: piece for piece in reversed(plan.pieces(at, range(plan.spec.lanes)))}
    again = sum(piece.start for piece in firsts.values()) * crop_bytes(store)
    assert 0 < again <= plan.spec.lanes * plan.largest_window(range(plan.spec.lanes)) * crop_bytes(store)
    assert used + 0.9 * again <= proxy.sent <= 1.1 * (used + again)
