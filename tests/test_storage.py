"""Storage: the same calls on disk and on a real S3 server; whole writes, one winner, clear errors, retries."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.session
import pytest
from faulty import FaultyProxy
from s3_servers import rclone_server, settings_of

from cosmic_ray import s3 as s3_calls
from cosmic_ray import storage
from cosmic_ray.errors import DataError, JobError, NotFoundError


def test_round_trip_on_disk_and_s3(home: str):
    uri = storage.join(home, "folder", "thing")
    with pytest.raises(NotFoundError, match="thing: not found"):
        storage.read_bytes(uri)
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, memoryview(b"second"))
    assert storage.read_bytes(uri) == b"second"
    assert storage.size(uri) == 6
    assert storage.exists(uri) and storage.exists(storage.join(home, "folder"))
    assert not storage.exists(storage.join(home, "fold"))
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_ranges(home: str):
    uri = storage.join(home, "letters")
    storage.write_bytes(uri, b"abcdefgh")
    assert storage.read_range(uri, 2, 3) == b"cde"
    assert storage.read_range(uri, 7, 1) == b"h"
    assert storage.read_range(uri, 8, 0) == b""
    for start, length in ((6, 3), (8, 1), (100, 5)):
        with pytest.raises(DataError, match=r"letters: ends early: \d of \d bytes at offset"):
            storage.read_range(uri, start, length)
    with pytest.raises(NotFoundError):
        storage.read_range(uri + "x", 0, 1)


def test_listing_and_delete(home: str):
    for path in ("a.tif", "b.png", "p1/c.tif", "p1/d.TIF", "p2/q/e.tif", "p1x/f.tif", "p1/.part-gone-1-2"):
        storage.write_bytes(storage.join(home, "in", path), b"x")
    folder = storage.join(home, "in")

    def found(pattern: str) -> list[str]:
        return [uri.removeprefix(folder + "/") for uri in storage.listing(folder, pattern)]

    assert found("**") == ["a.tif", "b.png", "p1/c.tif", "p1/d.TIF", "p1x/f.tif", "p2/q/e.tif"]
    assert found("*.tif") == ["a.tif"]
    assert found("**/*.tif") == ["a.tif", "p1/c.tif", "p1x/f.tif", "p2/q/e.tif"]
    assert found("p1/*") == ["p1/c.tif", "p1/d.TIF"]
    assert found("p?/*.[tT][iI][fF]") == ["p1/c.tif", "p1/d.TIF"]
    assert found("p[!2]/*.tif") == ["p1/c.tif"]
    assert found("b.png") == ["b.png"]
    assert storage.listing(storage.join(home, "nowhere")) == []
    storage.delete(storage.join(folder, "p1"))
    assert found("**") == ["a.tif", "b.png", "p1x/f.tif", "p2/q/e.tif"]
    storage.delete(storage.join(folder, "a.tif"))
    storage.delete(storage.join(folder, "a.tif"))
    assert not storage.exists(storage.join(folder, "a.tif"))


def test_linked_folders_are_listed_once(tmp_path: Path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.tif").touch()
    (tmp_path / "real" / "loop").symlink_to(tmp_path / "real")
    (tmp_path / "plates").symlink_to(tmp_path / "real")
    assert storage.listing(str(tmp_path / "plates")) == [str(tmp_path / "plates" / "a.tif")]


def test_names_mean_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert storage.absolute("runs/a") == str(tmp_path / "runs/a") == storage.absolute(f"file://{tmp_path}/runs/a")
    assert storage.absolute("s3://b/c/") == "s3://b/c"
    storage.write_bytes("rel/x", b"1")
    assert storage.read_bytes(f"file://{tmp_path}/rel/x") == b"1"
    assert storage.join("s3://b/", "c/", "/d") == "s3://b/c/d" and storage.name("s3://b/c/") == "c"
    with pytest.raises(JobError, match=r"gs://b/c.*use a path, file:// or s3://"):
        storage.read_bytes("gs://b/c")


def test_of_many_that_create_one_object_one_wins(home: str):
    for round_ in range(3):
        uri = storage.join(home, f"prize-{round_}")

        def attempt(number: int, uri: str = uri) -> bool:
            try:
                storage.create_bytes(uri, b"winner %d" % number)
                return True
            except FileExistsError:
                return False

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(attempt, range(8)))
        assert sum(won) == 1
        assert storage.read_bytes(uri) == b"winner %d" % won.index(True)


@pytest.mark.slow
def test_large_objects_go_in_parts_and_are_created_once(s3: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3_calls, "PART_BYTES", 5 * 2**20)
    uri, data = f"{s3}/large", os.urandom(12 * 2**20 + 5)
    storage.create_bytes(uri, data)
    assert (
        botocore.session.get_session().create_client("s3").head_object(Bucket=s3[5:], Key="large")["ETag"][-3:] == '-3"'
    )
    assert storage.read_bytes(uri) == data
    assert storage.read_range(uri, 11 * 2**20, 10) == data[11 * 2**20 :][:10]
    with pytest.raises(FileExistsError):
        storage.create_bytes(uri, data[::-1])
    assert storage.read_bytes(uri) == data
    storage.write_bytes(uri, data[::-1])
    assert storage.read_bytes(uri) == data[::-1]


WRITER = """
import sys
from cosmic_ray import storage
storage.write_bytes(sys.argv[1], bytes(300_000_000))
"""


def test_killed_in_mid_write_leaves_what_was_there(tmp_path: Path):
    target = tmp_path / "thing"
    storage.write_bytes(str(target), b"whole")
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
    deadline = time.monotonic() + 60
    while not any(part.stat().st_size for part in tmp_path.glob(".part-*")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert writer.returncode == -signal.SIGKILL
    assert target.read_bytes() == b"whole"
    assert list(tmp_path.glob(".part-*"))
    assert storage.listing(str(tmp_path)) == [str(target)]
    storage.sweep(str(tmp_path))
    assert list(tmp_path.iterdir()) == [target]


def test_sweep_spares_live_writers_and_other_hosts(tmp_path: Path):
    mine = tmp_path / f".part-{socket.gethostname()}-{os.getpid()}-abc"
    foreign = tmp_path / "deep" / ".part-other-host-1-abc"
    old = tmp_path / ".part-other-host-2-abc"
    foreign.parent.mkdir()
    for path in (mine, foreign, old):
        path.touch()
    os.utime(old, (0, 0))
    storage.sweep(str(tmp_path))
    assert mine.exists() and foreign.exists() and not old.exists()


FULL = """
import resource, signal, sys
from cosmic_ray import storage
from cosmic_ray.errors import DataError
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    storage.write_bytes(sys.argv[1], bytes(1_000_000))
except DataError as error:
    print(error)
"""


def test_no_room_leaves_what_was_there(tmp_path: Path):
    target = tmp_path / "thing"
    storage.write_bytes(str(target), b"whole")
    said = subprocess.run([sys.executable, "-c", FULL, str(target)], capture_output=True, text=True, check=True).stdout
    assert said.startswith(f"{target}: the file system refused: File too large (free disk space")
    assert list(tmp_path.iterdir()) == [target] and target.read_bytes() == b"whole"


def test_local_refusals_name_the_path(tmp_path: Path):
    storage.write_bytes(str(tmp_path / "file"), b"")
    with pytest.raises(DataError, match="below: the file system refused: File exists"):
        storage.write_bytes(str(tmp_path / "file" / "below"), b"x")
    with pytest.raises(DataError, match="refused: Is a directory"):
        storage.read_bytes(str(tmp_path))
    storage.write_bytes(str(tmp_path / "bad.json"), b"{")
    with pytest.raises(DataError, match=r"bad\.json: not valid JSON"):
        storage.read_json(str(tmp_path / "bad.json"))


@pytest.mark.slow
def test_s3_errors_say_what_to_mend(s3: str, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(DataError, match="there is no bucket 'nobody-has-this'"):
        storage.read_bytes("s3://nobody-has-this/key")
    with pytest.raises(DataError, match="there is no bucket"):
        storage.listing("s3://nobody-has-this/key")
    with pytest.raises(DataError, match="whole bucket"):
        storage.delete(s3)
    with pytest.raises(JobError) as refused:
        storage.read_bytes("s3://AKIAKEY:hidden@bucket/key")
    assert "hidden" not in str(refused.value) and "AKIAKEY" not in str(refused.value)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    with pytest.raises(DataError, match=r"no S3 credentials were found \(set the AWS variables"):
        storage.read_bytes(f"{s3}/key")


@pytest.mark.slow
def test_public_buckets_are_read_without_credentials(s3: str, monkeypatch: pytest.MonkeyPatch):
    storage.write_bytes(f"{s3}/plates/a.tif", b"pixels")
    public = s3.replace("s3://", "s3://anonymous@") + "/plates"
    with pytest.raises(DataError, match=r"access refused.*not public: leave out anonymous@"):
        storage.read_bytes(f"{public}/a.tif")
    bucket = s3.removeprefix("s3://")
    rule = {"Effect": "Allow", "Principal": "*", "Action": ["s3:GetObject", "s3:ListBucket"]}
    policy = {
        "Version": "2012-10-17",
        "Statement": [{**rule, "Resource": f"arn:aws:s3:::{bucket}{e}"} for e in ("", "/*")],
    }
    botocore.session.get_session().create_client("s3").put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert storage.listing(public) == [f"{public}/a.tif"]
    assert storage.read_bytes(storage.listing(public)[0]) == b"pixels"


@pytest.mark.slow
def test_a_server_that_is_not_there_is_said_quickly(s3_server: str, monkeypatch: pytest.MonkeyPatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setattr(s3_calls, "FIRST_DEADLINE_S", 1.0)
        started = time.monotonic()
        with pytest.raises(DataError, match=r"s3://b/k: no answer in 1 s: Could not connect.*AWS_ENDPOINT_URL"):
            storage.read_bytes("s3://b/k")
        assert time.monotonic() - started < 5


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["503", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ("500", "reset"))])
def test_writes_survive_what_passes(fault: str, s3: str, faulty_s3: FaultyProxy):
    faulty_s3.faults.extend([fault, fault, None])
    storage.write_bytes(f"{s3}/x", b"data")
    assert len(faulty_s3.requests) == 3
    assert storage.read_bytes(f"{s3}/x") == b"data"


@pytest.mark.slow
@pytest.mark.parametrize(
    "fault", ["truncate", *(pytest.param(f, marks=pytest.mark.exhaustive) for f in ("503", "reset"))]
)
def test_reads_survive_what_passes(fault: str, s3: str, faulty_s3: FaultyProxy):
    data = os.urandom(200_000)
    storage.write_bytes(f"{s3}/x", data)
    faulty_s3.faults.extend([fault, fault, None])
    assert storage.read_range(f"{s3}/x", 1000, 150_000) == data[1000:151_000]
    assert len(faulty_s3.requests) == 4


@pytest.mark.slow
def test_a_lost_answer_does_not_look_like_another_writer(s3: str, faulty_s3: FaultyProxy):
    faulty_s3.faults.extend([None, "lose-answer"])
    storage.create_bytes(f"{s3}/x", b"mine")
    assert [line.split()[0] for line in faulty_s3.requests] == ["GET", "PUT", "PUT", "GET"]
    with pytest.raises(FileExistsError):
        storage.create_bytes(f"{s3}/x", b"another's")


@pytest.mark.slow
def test_a_lost_answer_to_a_large_write(s3: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(s3_calls, "PART_BYTES", 5 * 2**20)
    data = os.urandom(11 * 2**20)
    faulty_s3.faults.extend([None] * 4 + ["lose-answer"])
    storage.write_bytes(f"{s3}/x", data)
    assert storage.read_bytes(f"{s3}/x") == data
    verbs = [line.split()[0] for line in faulty_s3.requests]
    assert verbs[:6] == ["POST", "PUT", "PUT", "PUT", "POST", "POST"]


@pytest.mark.slow
def test_parts_of_two_versions_are_not_mixed(s3: str):
    storage.write_bytes(f"{s3}/x", b"new")
    with pytest.raises(DataError, match="replaced while it was read"):
        s3_calls.get_range(f"{s3}/x", 0, 2, tag='"of-the-old-one"')


@pytest.mark.slow
def test_a_server_that_stays_bad_is_given_up(s3: str, faulty_s3: FaultyProxy, monkeypatch: pytest.MonkeyPatch):
    faulty_s3.faults.extend(["503"] * 100)
    monkeypatch.setattr(s3_calls, "RETRY_DEADLINE_S", 1.5)
    with pytest.raises(DataError, match=r"no answer in 2 s: 503"):
        storage.read_bytes(f"{s3}/x")
    assert len(faulty_s3.requests) >= 2


ACCESS, SECRET = "EXAMPLEACCESSKEY0001", "ExampleSecretOfTheTestServer000000000001"


@pytest.fixture
def signed_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URI of a bucket of an S3 server that checks signatures."""
    with rclone_server(tmp_path, {ACCESS: SECRET}) as url:
        for name, value in {**settings_of(url), "AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET}.items():
            monkeypatch.setenv(name, value)
        yield "s3://bucket"


@pytest.mark.slow
def test_signatures_are_checked_and_secrets_are_kept(signed_server: str, monkeypatch: pytest.MonkeyPatch):
    uri = f"{signed_server}/folder/x"
    storage.create_bytes(uri, b"signed")
    with pytest.raises(FileExistsError):  # though this server knows no conditional put
        storage.create_bytes(uri, b"other")
    assert storage.read_bytes(uri) == b"signed" and storage.listing(signed_server) == [uri]
    wrong = SECRET[::-1]
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", wrong)
    with pytest.raises(DataError, match=r"x: access refused: the secret key is wrong \(check AWS_SECRET") as error:
        storage.read_bytes(uri)
    assert wrong not in str(error.value) and SECRET not in str(error.value)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "UNKNOWNACCESSKEY0001")
    with pytest.raises(DataError, match="the server does not know this access key"):
        storage.read_bytes(uri)
