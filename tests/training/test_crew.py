"""How many workers a run starts with, and when it changes their number, for a room that is told here."""

from __future__ import annotations

import threading

import pytest

from cosmic_ray.errors import CosmicError
from cosmic_ray.training import crew, room
from cosmic_ray.training.crew import Crew
from cosmic_ray.training.settings import Scaling

NODE = {"CPU": 4.0, "GPU": 2.0}


class Room:
    """What `room` would find."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.free, self.going = 0, set()
        monkeypatch.setattr(room, "free", lambda each, enough=None: self.free)
        monkeypatch.setattr(room, "leaving", lambda: self.going)
        monkeypatch.setattr(crew, "LOOK_S", 0.0)
        monkeypatch.setattr(crew, "SETTLE_S", 0.05)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, ray_local: None) -> Room:
    return Room(monkeypatch)


def crew_of(workers: int | list[int], **keys: float) -> Crew:
    return Crew(Scaling(workers=workers, **keys), 0.0, threading.Event())


def test_bundles_that_fit_are_counted_node_by_node():
    each = room.bundle(Scaling(cpus_per_worker=1.5, cpus_per_reader=0.25), 1.0)
    assert each == {"CPU": 1.75, "GPU": 1.0}
    assert room.fits([NODE, NODE], each) == 4
    assert room.fits([NODE, {"CPU": 8.0}], each) == 2, "no GPU there"
    assert room.fits([{"CPU": 1.0}, {"CPU": 1.0}], {"CPU": 1.75}) == 0, "two halves hold no whole"
    assert room.fits([{"CPU": 1.0}], {"CPU": 0.1}) == 10, "though 0.1 is no exact number"


@pytest.mark.slow
def test_starts_with_what_there_is_and_grows_into_what_comes(told: Room):
    found = crew_of([1, 4], grow_every_s=1e-6)
    told.free = 2
    assert found.gather() == 2
    told.free = 3
    assert found.change(set()) is None, "the workers are on their way"
    assert found.change({"a"}) == "there is room for 2 more workers"
    told.free = 4
    assert found.gather() == 4
    assert found.change({"a"}) is None, "as many as it may be"
    found.close()


@pytest.mark.slow
def test_room_that_is_gone_again_is_looked_for_less_often(told: Room):
    found = crew_of([1, 4], grow_every_s=1e-6)
    told.free = 1
    assert found.gather() == 1
    for _ in range(60):
        if found.change({"a"}) is None:
            break
        assert found.gather() == 1, "somebody else took it"
    else:
        pytest.fail("the run does nothing but start again")
    found.close()


@pytest.mark.slow
def test_a_node_that_goes_is_left_and_others_do_not_matter(told: Room):
    found = crew_of(2)
    told.free, told.going = 2, {"other"}
    assert found.gather() == 2
    assert found.change({"a", "b"}) is None
    told.going = {"b"}
    assert found.change({"a", "b"}) == "1 of the nodes that train will be taken away"


@pytest.mark.slow
def test_waits_for_the_fewest_until_patience_ends_or_it_is_stopped(told: Room):
    told.free = 1
    with pytest.raises(CosmicError, match=r"no room for 2 workers in 0 s; give the cluster more nodes"):
        crew_of(2, patience_s=0.05).gather()
    waiting = crew_of(2)
    waiting._stop.set()
    with pytest.raises(KeyboardInterrupt):
        waiting.gather()
