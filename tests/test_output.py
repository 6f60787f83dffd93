"""Claims: one run at a time on an output, dead owners replaced, lost owners refused; real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import ClassVar

import pytest

from cosmic_ray import lease, output, storage
from cosmic_ray.config import Job
from cosmic_ray.errors import DataError, FencedError, JobError, NotFoundError
from cosmic_ray.output import claim

OWNER = """
import sys, time
from typing import ClassVar
from cosmic_ray.config import Job
from cosmic_ray.output import claim

class Made(Job):
    kind: ClassVar[str] = "made"
    size: int = 1

with claim(Made(out=sys.argv[1])) as target:
    target.write("part-0", b"half done")
    print("claimed", flush=True)
    sys.stdin.read()
    target.publish({"format": "cosmic-ray/made"})
"""


class Made(Job):
    kind: ClassVar[str] = "made"
    incidental: ClassVar[frozenset[str]] = frozenset({"workers"})
    size: int = 1
    workers: int = 1


def owner(out: str) -> subprocess.Popen:
    """Another process that holds `out`, until its standard input ends; then it publishes."""
    process = subprocess.Popen([sys.executable, "-c", OWNER, out], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"claimed\n"
    return process


def test_publish_then_find_it_done(home: str):
    job = Made(out=storage.join(home, "out"))
    with pytest.raises(NotFoundError, match=r"out: nothing is published here: no manifest\.json"):
        output.read_manifest(job.out)
    with claim(job) as target:
        assert not target.done
        target.write("data/a", b"1")
        target.publish({"format": "cosmic-ray/made", "rows": 3})
    before = storage.listing(job.out)
    with claim(job) as target:
        assert target.done and target.manifest() == {"format": "cosmic-ray/made", "rows": 3}
        with pytest.raises(FencedError, match="already published"):
            target.write("data/b", b"2")
    assert storage.listing(job.out) == before
    assert sorted(map(storage.name, before)) == ["_lease-00001.json", "a", "job.json", "manifest.json"]


def test_only_the_same_job_resumes(tmp_path: Path):
    out = str(tmp_path / "out")
    with pytest.raises(ZeroDivisionError), claim(Made(out=out)) as target:
        target.write("part-0", b"kept")
        raise ZeroDivisionError
    with pytest.raises(JobError, match=r"holds another job: it differs in size \(choose another out") as refused:
        claim(Made(out=out, size=2)).__enter__()
    assert refused.value.key == "out" and refused.value.exit_code == 2
    with claim(Made(out=out, workers=8)) as target:
        assert storage.read_bytes(target.at("part-0")) == b"kept"
        target.publish({})
    with pytest.raises(JobError, match="differs in size"):
        claim(Made(out=out, size=2)).__enter__()


def test_a_live_owner_is_named_and_a_killed_one_replaced_at_once(home: str):
    out = storage.join(home, "out")
    first = owner(out)
    try:
        with pytest.raises(FencedError, match=rf"out: process {first.pid} on \S+ is writing here; wait"):
            claim(Made(out=out)).__enter__()
        first.send_signal(signal.SIGSTOP)
        with pytest.raises(FencedError, match=f"process {first.pid}"):
            claim(Made(out=out)).__enter__()
    finally:
        first.kill()
        first.wait()
    started = time.monotonic()
    with claim(Made(out=out)) as target:
        assert time.monotonic() - started < 3
        assert storage.read_bytes(target.at("part-0")) == b"half done"
        target.publish({})


def test_of_many_claimants_one_gets_it(home: str):
    """The dead owner's folder is claimed by eight at once, round after round."""
    out = storage.join(home, "out")
    for round_ in range(4):
        gone = {**ELSEWHERE, "machine": lease.this_machine(), "pid": 2**22 + 1}
        storage.write_bytes(storage.join(out, f"_lease-{round_ * 10 + 5:05}.json"), json.dumps(gone).encode())
        holders, refused, finish, barrier = [], [], threading.Event(), threading.Barrier(8)

        def attempt(finish=finish, barrier=barrier, holders=holders, refused=refused) -> None:
            barrier.wait()
            try:
                with claim(Made(out=out)):
                    holders.append(threading.get_ident())
                    finish.wait(30)
            except FencedError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=attempt) for _ in range(8)]
        for thread in threads:
            thread.start()
        while len(holders) + len(refused) < 8 and any(thread.is_alive() for thread in threads):
            time.sleep(0.01)
        finish.set()
        for thread in threads:
            thread.join()
        assert (len(holders), len(refused)) == (1, 7)
        assert all(f"process {os.getpid()}" in text for text in refused)


ELSEWHERE = {"host": "node-7", "machine": "another", "pid": 1, "born": 0.0, "token": "", "beat": 1, "released": False}


def test_an_owner_elsewhere_is_dead_when_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "SILENT_S", 0.4)
    out, at = str(tmp_path), str(tmp_path / "_lease-00001.json")
    storage.write_bytes(at, json.dumps(ELSEWHERE).encode())

    def beat() -> None:
        time.sleep(0.2)
        storage.write_bytes(at, json.dumps({**ELSEWHERE, "beat": 2}).encode())

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(FencedError, match="process 1 on node-7 is writing here"):
        claim(Made(out=out)).__enter__()
    beating.join()
    with claim(Made(out=out)) as target:
        target.publish({})


def test_a_lost_claim_neither_writes_nor_publishes(home: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    out = storage.join(home, "out")
    with claim(Made(out=out)) as target:
        storage.write_bytes(storage.join(out, "_lease-00002.json"), b"{}")
        with pytest.raises(FencedError, match="taken over"):
            target.publish({})
        with pytest.raises(FencedError, match="taken over"):
            target.write("x", b"")
    assert not storage.exists(storage.join(out, "manifest.json"))
    assert storage.read_bytes(storage.join(out, "_lease-00002.json")) == b"{}"


def test_a_claim_lost_twice_over_is_noticed(tmp_path: Path):
    """The one that took over has ended and been followed: the first number above ours is gone again."""
    out = str(tmp_path)
    with claim(Made(out=out)) as target:
        storage.delete(f"{out}/_lease-00001.json")
        storage.write_bytes(f"{out}/_lease-00003.json", b"{}")
        with pytest.raises(FencedError):
            target.publish({})


def test_two_owners_of_one_number_both_stop(tmp_path: Path):
    """What a server that ignores the condition of a put would make of two claims at once."""
    with claim(Made(out=str(tmp_path))) as target:
        storage.write_bytes(target.at("_lease-00001.json"), json.dumps(ELSEWHERE).encode())
        with pytest.raises(FencedError):
            target.publish({})


def test_two_publications_of_one_output(tmp_path: Path):
    with claim(Made(out=str(tmp_path))) as target:
        storage.write_bytes(target.at("manifest.json"), b"{}")
        with pytest.raises(FencedError, match="another run published its manifest first"):
            target.publish({"rows": 1})


@pytest.mark.slow
def test_a_storage_outage_does_not_end_the_claim(s3: str, faulty_s3, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    with claim(Made(out=f"{s3}/out")) as target:
        faulty_s3.faults.extend(["503", "reset", "503"])
        while faulty_s3.faults:
            time.sleep(0.05)
        target.write("x", b"1")
        target.publish({})
    assert output.read_manifest(f"{s3}/out") == {}


def test_manifests_are_canonical_and_damaged_ones_refused(tmp_path: Path):
    text = output.encode({"b": [1, {"z": 1, "a": 2}], "a": "é"})
    assert text == b'{\n"a": "\\u00e9",\n"b": [1,{"a":2,"z":1}]\n}\n'
    assert json.loads(text) == {"a": "é", "b": [1, {"z": 1, "a": 2}]}
    with pytest.raises(ValueError):
        output.encode({"a": float("nan")})
    for damaged in (b"[]", b'{"a":'):
        storage.write_bytes(str(tmp_path / "manifest.json"), damaged)
        with pytest.raises(DataError, match=r"manifest\.json: not"):
            output.read_manifest(str(tmp_path))
