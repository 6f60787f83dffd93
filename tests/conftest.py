"""Fixtures for all tests: a real S3 server, a small Ray, the development data, crop stores to order."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pytest
from faulty import FaultyProxy

from cosmic_ray.config import Job
from cosmic_ray.output import claim
from cosmic_ray.stores.columns import image_column
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.manifest import CropSpec, Intensity
from cosmic_ray.stores.writer import encode_shard, publish_store, write_shard

AWS = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing-secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """Endpoint URL of moto's server on a real socket; the AWS variables point at it for the whole session."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**AWS, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}.items():
            patch.setenv(name, value)
        yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(s3_server: str) -> str:
    """URI of a fresh, empty bucket."""
    import botocore.session

    bucket = f"test-{uuid.uuid4().hex[:12]}"
    botocore.session.get_session().create_client("s3").create_bucket(Bucket=bucket)
    return f"s3://{bucket}"


@pytest.fixture
def faulty_s3(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """A proxy in front of the S3 server, in use: what its `faults` name happens to the next requests."""
    with FaultyProxy(s3_server) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place to write to: a folder, then a bucket."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """The development data set."""
    given = os.environ.get("COSMIC_RAY_DATA")
    root = Path(given) if given else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not (root / "images").is_dir():
        pytest.skip(f"no development data at {root} (set COSMIC_RAY_DATA)")
    return root


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """A small Ray of this session's own: 4 logical CPUs, no dashboard."""
    import ray

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(
        num_cpus=4,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


class MakeTestStore(Job):
    """The job that stands in the manifests of test stores."""

    kind: ClassVar[str] = "test-store"


@pytest.fixture
def crop_store(tmp_path: Path) -> Callable[..., CropStore]:
    """`crop_store(rows, ...)` writes a small deterministic store and opens it; see `make_store`."""

    def make(rows: int = 64, out: str | None = None, **options: Any) -> CropStore:
        return make_store(out or str(tmp_path / f"store-{uuid.uuid4().hex[:8]}"), rows, **options)

    return make


def make_store(
    out: str,
    rows: int,
    *,
    channels: int = 1,
    size: int = 16,
    rows_per_group: int = 8,
    groups_per_shard: int = 2,
    compression: str = "lz4",
    seed: int = 0,
    simulated: bool = True,
    columns: dict[str, Any] | None = None,
) -> CropStore:
    """Write and open a store of `rows` blobs of (channels, size, size); `columns` replaces or adds columns."""
    spec = CropSpec(channels=tuple(f"channel-{c}" for c in range(channels)), height=size, width=size)
    table = make_rows(rows, spec, seed)
    for name, values in (columns or {}).items():
        array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        index = table.column_names.index(name) if name in table.column_names else None
        table = table.append_column(name, array) if index is None else table.set_column(index, name, array)
    with claim(MakeTestStore(out=out)) as target:
        per_shard = rows_per_group * groups_per_shard
        entries = [
            write_shard(
                target.uri, index, encode_shard(table.slice(start, per_shard), spec, rows_per_group, compression)
            )
            for index, start in enumerate(range(0, rows, per_shard))
        ]
        intensity = Intensity(scope="stored", description="made for a test", masked=True)
        publish_store(target, spec, entries, {}, intensity, {}, {"kind": "test-store"}, simulated)
    return CropStore.open(out)


def make_rows(rows: int, spec: CropSpec, seed: int = 0) -> pa.Table:
    """`rows` masked discs of random radius and texture, with every column of a crop store."""
    rng = np.random.default_rng(seed)
    yy, xx = np.mgrid[: spec.height, : spec.width]
    radius = rng.uniform(0.2, 0.45, (rows, 1, 1)) * spec.height
    inside = (yy - spec.height / 2 + 0.5) ** 2 + (xx - spec.width / 2 + 0.5) ** 2 <= radius**2
    crops = rng.integers(1, 256, (rows, *spec.shape), dtype=np.uint8) * inside[:, None]
    area = inside.sum(axis=(1, 2)).astype(np.int32)
    text = {
        "crop_id": [f"crop-{seed}-{row:06}" for row in range(rows)],
        "source": ["simulated"] * rows,
        "plate": [f"plate-{row % 3}" for row in range(rows)],
        "well": [f"{'ABCDEFGH'[row % 8]}{row % 12 + 1:02}" for row in range(rows)],
        "site": [str(row % 4) for row in range(rows)],
        "field_uri": [f"fields/{row // 5:04}.tif" for row in range(rows)],
        "cell_line": [("U2OS", "HeLa")[row % 2] for row in range(rows)],
        "treatment": [""] * rows,
    }
    floats = {
        "centroid_x": rng.uniform(0, 1000, rows),
        "centroid_y": rng.uniform(0, 1000, rows),
        "eccentricity": rng.uniform(0, 0.9, rows),
        "mean_intensity": crops.sum(axis=(1, 2, 3)) / (area * spec.shape[0]),
        "pixel_size_um": np.full(rows, np.nan),
        "intensity_scale": np.ones(rows),
        "intensity_offset": np.zeros(rows),
    }
    columns: dict[str, pa.Array] = {name: pa.array(values) for name, values in text.items()}
    columns |= {name: pa.array(values.astype(np.float32)) for name, values in floats.items()}
    columns |= {"area_px": pa.array(area), "image": image_column(crops)}
    return pa.table(columns)
