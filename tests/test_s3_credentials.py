"""Temporary credentials that expire in mid-run, and buckets that are read without any."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_servers import ExpiringProxy, Issuer, rclone_server, settings_of

from cosmic_ray import s3 as s3_calls
from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.ingest.plan import Plan
from cosmic_ray.ingest.selection import Selection
from cosmic_ray.ingest.stream import batches, plain_batches
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.training import checkpoint

KINDS = ("process", "process that does not tell when", "file")
LIFE_S = 2

pytestmark = pytest.mark.slow


@pytest.fixture(params=[KINDS[0], *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in KINDS[1:])])
def kind(request: pytest.FixtureRequest) -> str:
    """Where the profile has its temporary credentials from."""
    return request.param


@pytest.fixture
def expiring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., ExpiringProxy]]:
    """`expiring(kind, count)`: s3://bucket in `tmp_path` takes `count` keys, one after another, from now on."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    closing = []

    def begin(kind: str, count: int) -> ExpiringProxy:
        issuer = Issuer(LIFE_S, count)
        server = rclone_server(tmp_path, issuer.keys)
        # The server's clock is before ours: a key is refused while its holder still thinks it good.
        proxy = ExpiringProxy(server.__enter__(), issuer, early_s=0.4)
        closing.extend([lambda: server.__exit__(None, None, None), lambda: proxy.__exit__()])
        issuer.start()
        of_profile = issuer.file(tmp_path) if kind == "file" else issuer.process(tmp_path, told=kind == "process")
        for name, value in {**settings_of(proxy.url), **of_profile}.items():
            monkeypatch.setenv(name, value)
        return proxy

    yield begin
    for thread in threading.enumerate():
        if thread.name.startswith("row-groups"):
            thread.join(30)
    for close in reversed(closing):
        close()


def local_store(crop_store: Callable[..., CropStore], tmp_path: Path) -> tuple[CropStore, Plan]:
    store = crop_store(200, size=32, out=str(tmp_path / "bucket" / "store"))
    return store, Plan.fitted(store.content_hash, Selection.all(store), 24, 7, lanes=4)


def expected(store: CropStore, plan: Plan, k: int) -> np.ndarray:
    samples = plan.step(k)
    return store.crops(store.group_starts[samples.row_group] + samples.row)


def test_a_stream_goes_on_over_expiries_and_ends_with_one_error(
    kind: str,
    expiring: Callable[..., ExpiringProxy],
    crop_store: Callable[..., CropStore],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store, plan = local_store(crop_store, tmp_path)
    proxy = expiring(kind, count=6)
    proxy.pause_s = 0.1
    monkeypatch.setattr(s3_calls, "RETRY_DEADLINE_S", 8.0)
    seen = 0
    with pytest.raises(DataError, match=r"s3://bucket/store/.*no new credentials in 8 s") as error:
        for batch in plain_batches("s3://bucket/store", plan, 0, 1, 0, 10**6):
            assert np.array_equal(batch.images.numpy(), expected(store, plan, batch.step))
            seen += 1
    assert len(set(proxy.used)) >= 3 and seen > 20
    assert "renew what AWS_PROFILE names" in str(error.value) and "secret-of" not in str(error.value)
    reason = "the old ones have expired" if kind == "file" else "the issuer has no more keys"
    assert reason in str(error.value)


@pytest.mark.exhaustive
def test_a_stream_through_ray_data_goes_on_over_expiries(
    expiring: Callable[..., ExpiringProxy], crop_store: Callable[..., CropStore], tmp_path: Path
) -> None:
    local_store(crop_store, tmp_path)
    proxy = expiring("process", count=100)
    proxy.pause_s = 0.1
    # A Ray of its own: workers have the environment that Ray was started in.
    command = [sys.executable, __file__, str(tmp_path / "bucket" / "store")]
    said = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert said.returncode == 0, said.stderr[-2000:]
    assert len(set(proxy.used)) >= 4


def streamed_through_ray(local: str) -> None:
    """Run in a process of its own: every byte of 90 steps of s3://bucket/store is that of the store at `local`."""
    import ray

    ray.init(address="local", num_cpus=2, object_store_memory=200 * 2**20, include_dashboard=False)
    store = CropStore.open(local)
    plan = Plan.fitted(store.content_hash, Selection.all(store), 24, 7, lanes=4)
    for batch in batches("s3://bucket/store", plan, 0, 1, 0, 200):
        assert np.array_equal(batch.images.numpy(), expected(store, plan, batch.step))
    ray.shutdown()


def test_a_checkpoint_is_written_over_expiries(
    kind: str, expiring: Callable[..., ExpiringProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_calls, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr(s3_calls, "_PARALLEL", 1)
    proxy = expiring(kind, count=30)
    proxy.pause_s = 0.6
    weights = {"encoder.weight": torch.randn(6 * 2**20, generator=torch.Generator().manual_seed(0))}
    where = checkpoint.publish("s3://bucket/run/checkpoints", 7, {checkpoint.WEIGHTS: lambda: weights}, {"step": 7}, 0)
    assert len(set(proxy.used)) >= 2
    assert checkpoint.newest("s3://bucket/run/checkpoints") == where
    assert torch.equal(checkpoint.read_tensors(where, checkpoint.WEIGHTS)["encoder.weight"], weights["encoder.weight"])


@pytest.mark.parametrize("says", ["ExpiredToken", "InvalidAccessKeyId"])
def test_expiry_of_all_threads_makes_one_new_client(
    says: str, expiring: Callable[..., ExpiringProxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = expiring("file", count=20)
    (tmp_path / "bucket" / "x").write_bytes(bytes(range(256)))
    storage.read_range("s3://bucket/x", 9, 2)
    proxy.says = says  # a key that the server never knew is refused for good, so only after the first answer
    made, make = [], s3_calls._made
    monkeypatch.setattr(s3_calls, "_made", lambda anonymous: made.append(anonymous) or make(anonymous))
    with ThreadPoolExecutor(8) as pool:
        while len(set(proxy.refused)) < 2:
            assert set(pool.map(lambda _: storage.read_range("s3://bucket/x", 9, 2), range(64))) == {b"\x09\x0a"}
    # One at the start, and a few in the time for which a refused key is still in the file; not one for every thread.
    assert len(made) <= 1 + 4 * len(set(proxy.used))


def test_keys_in_the_environment_cannot_be_renewed(
    expiring: Callable[..., ExpiringProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = expiring("process", count=1)
    proxy.issuer.start(ago_s=1000)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, next(iter(proxy.issuer.keys)))
    with pytest.raises(DataError, match=r"bucket/x: access refused: the temporary credentials have expired \(set new"):
        storage.size("s3://bucket/x")
    assert len(proxy.refused) == 1


@pytest.mark.parametrize(
    ("process", "said"),
    [
        ("false", "Error when retrieving credentials from custom-process"),
        ("echo please log in", "Expecting value"),
        ("no-such-program", "No such file or directory: 'no-such-program'"),
    ],
)
def test_a_process_that_hands_out_nothing_is_said(
    process: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config").write_text(f"[profile issued]\ncredential_process = {process}\n")
    monkeypatch.setattr(s3_calls, "FIRST_DEADLINE_S", 0.5)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"AWS_CONFIG_FILE": str(tmp_path / "config"), "AWS_PROFILE": "issued"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(DataError, match=said):
        storage.read_bytes("s3://bucket/x")
    monkeypatch.setenv("AWS_PROFILE", "another")
    with pytest.raises(DataError, match=r"S3 cannot be used: .*profile \(another\) could not be found"):
        storage.read_bytes("s3://bucket/x")


def test_a_public_bucket_gets_no_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A public bucket of others refuses whoever signs with keys that it does not know."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "x").write_bytes(b"pixels")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "EXAMPLETEMPORARY0000")
    issuer = Issuer(1, 1)
    issuer.start(ago_s=1000)
    with rclone_server(tmp_path, {}) as url, ExpiringProxy(url, issuer) as proxy:
        for name, value in settings_of(proxy.url).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DataError, match="access refused"):
            storage.read_bytes("s3://bucket/x")
        assert storage.read_bytes("s3://anonymous@bucket/x") == b"pixels"
        assert storage.listing("s3://anonymous@bucket") == ["s3://anonymous@bucket/x"]
        assert proxy.used == ["", ""] and proxy.refused == ["EXAMPLETEMPORARY0000"]


def test_a_server_that_checks_signatures_takes_none_from_strangers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "x").write_bytes(b"pixels")
    with rclone_server(tmp_path, {"EXAMPLEACCESSKEY0001": "secret"}) as url:
        for name, value in settings_of(url).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(DataError, match=r"x: access refused: .*not public: leave out anonymous@"):
            storage.read_bytes("s3://anonymous@bucket/x")


if __name__ == "__main__":
    streamed_through_ray(os.path.abspath(sys.argv[1]))
