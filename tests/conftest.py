"""Fixtures for all tests: a real S3 server, a small Ray, the development data, crop stores to order."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import FaultyProxy
from making import make_store

from cosmic_ray.stores.crops import CropStore

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
    """The development data set, of COSMIC_RAY_DATA."""
    given = os.environ.get("COSMIC_RAY_DATA")
    if not given:
        pytest.skip("needs real images: set COSMIC_RAY_DATA to the folder that holds images/")
    root = Path(given)
    assert (root / "images").is_dir(), f"COSMIC_RAY_DATA={given} holds no images/"
    return root


@pytest.fixture(scope="session")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of one embedded MLflow store for the session: making one takes seconds. Made on first use."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def tracking(mlflow_store: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The session's MLflow store, to which MLFLOW_TRACKING_URI points for one test."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store)
    return mlflow_store


@pytest.fixture(scope="session")
def ray_local(s3_server: str) -> Iterator[None]:
    """A small Ray of this session's own: 4 logical CPUs, no dashboard; its workers know the S3 server."""
    import ray

    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    ray.init(
        address="local",
        num_cpus=4,
        object_store_memory=300 * 2**20,
        include_dashboard=False,
        configure_logging=False,
        log_to_driver=False,
    )
    yield
    ray.shutdown()


@pytest.fixture
def crop_store(tmp_path: Path) -> Callable[..., CropStore]:
    """`crop_store(rows, ...)` writes a small deterministic store and opens it; see `making.make_store`."""

    def make(rows: int = 64, out: str | None = None, **options: Any) -> CropStore:
        return make_store(out or str(tmp_path / f"store-{uuid.uuid4().hex[:8]}"), rows, **options)

    return make
