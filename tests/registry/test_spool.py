"""What no server has taken yet: in order, whole, and gone once it is delivered."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cosmic_ray.errors import DataError
from cosmic_ray.registry import sender as sending
from cosmic_ray.registry import server
from cosmic_ray.registry.sender import Sender
from cosmic_ray.registry.spool import Event, Spool


def event(number: int) -> Event:
    return {"op": "metrics", "step": number, "time": 0, "values": {"train/loss": float(number)}}


def numbers(spool: Spool) -> list[int]:
    """Steps in a spool, which is empty then."""
    return [item["step"] for events in spool.segments() for item in events]


def kept(folder: Path) -> set[int]:
    """Steps in a spool that another has open."""
    return {json.loads(line)["step"] for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()}


def test_events_come_back_in_order_from_another_process_and_are_gone_then(home, monkeypatch):
    monkeypatch.setattr("cosmic_ray.registry.spool.SEGMENT_BYTES", 300)
    spool = Spool(f"{home}/spool")
    for start in range(0, 10, 2):
        spool.append([event(start), event(start + 1)])
    again = Spool(f"{home}/spool")
    again.append([event(10)])
    assert numbers(again) == list(range(11))
    assert not again
    assert not Spool(f"{home}/spool")


def test_what_comes_while_a_segment_is_delivered_is_not_lost(tmp_path):
    spool = Spool(str(tmp_path))
    spool.append([event(0)])
    found = []
    for events in spool.segments():
        found += [item["step"] for item in events]
        if found == [0]:
            spool.append([event(1)])
    assert found == [0, 1]


def test_a_delivery_that_fails_leaves_its_segment(tmp_path):
    spool = Spool(str(tmp_path))
    spool.append([event(0)])
    for _ in spool.segments():
        break
    assert numbers(Spool(str(tmp_path))) == [0]


def test_a_damaged_segment_is_left_out_by_name(tmp_path, capsys):
    spool = Spool(str(tmp_path))
    spool.append([event(0)])
    Path(tmp_path, "00000000.jsonl").write_bytes(b'{"op": "met')
    assert numbers(Spool(str(tmp_path))) == []
    assert "00000000.jsonl is damaged" in capsys.readouterr().err


class Server:
    """Takes events, or not."""

    def __init__(self) -> None:
        self.up, self.taken, self.gate = True, [], threading.Event()
        self.gate.set()

    def __call__(self, events: list[Event]) -> None:
        self.gate.wait()
        if not self.up:
            raise DataError("http://server", "no tracking server answers")
        self.taken += [item["step"] for item in events]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "BATCH_S", 0.02)
    monkeypatch.setattr(sending, "FIRST_RETRY_S", 0.02)


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_outage_is_said_once_and_bridged(tmp_path, capsys):
    taker = Server()
    sender = Sender(taker, Spool(str(tmp_path)), "http://server")
    sender.put(event(0))
    until(lambda: taker.taken == [0])
    taker.up = False
    for step in range(1, 5):
        sender.put(event(step))
        time.sleep(0.05)
    until(lambda: sender.away)
    sender.settle(1.0)
    assert kept(tmp_path) == {1, 2, 3, 4}
    taker.up = True
    sender.put(event(5))
    assert sender.close(10.0)
    assert sorted(set(taker.taken)) == [0, 1, 2, 3, 4, 5]
    said = capsys.readouterr().err
    assert said.count("The run goes on") == 1
    assert said.count("the server is back after") == 1


def test_what_a_server_never_took_is_there_for_the_next_process(tmp_path):
    taker = Server()
    taker.up = False
    sender = Sender(taker, Spool(str(tmp_path)), "http://server")
    sender.put(event(0))
    assert not sender.close(10.0)
    taker.up = True
    assert Sender(taker, Spool(str(tmp_path)), "http://server").close(10.0)
    assert set(taker.taken) == {0}


def test_a_server_that_hangs_holds_nobody_up_and_costs_nothing(tmp_path):
    taker = Server()
    taker.gate.clear()
    sender = Sender(taker, Spool(str(tmp_path)), "http://server")
    started = time.monotonic()
    for step in range(3):
        sender.put(event(step))
        sender.settle(0.1)
    assert not sender.close(0.2)
    assert time.monotonic() - started < 3
    assert kept(tmp_path) == {0, 1, 2}
    taker.gate.set()


def test_a_full_disk_keeps_events_in_memory(tmp_path, monkeypatch, capsys):
    taker = Server()
    taker.up = False
    sender = Sender(taker, Spool(str(tmp_path)), "http://server")

    def full(*_: object) -> None:
        raise DataError(str(tmp_path), "no room left")

    with monkeypatch.context() as patch:
        patch.setattr("cosmic_ray.storage.write_bytes", full)
        sender.put(event(0))
        until(lambda: sender.away)
        sender.settle(0.1)
    taker.up = True
    assert sender.close(10.0)
    assert set(taker.taken) == {0}
    assert "only in memory" in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_known_in_seconds(monkeypatch):
    monkeypatch.setattr(server, "_PROBE_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        with pytest.raises(DataError, match="no tracking server answers: ReadTimeout"):
            server.require(f"http://user:secret@127.0.0.1:{port}")
    with pytest.raises(DataError, match=r"http://\*\*\*@127\.0\.0\.1.*ConnectionError"):
        server.require(f"http://user:secret@127.0.0.1:{port}")
