"""Worked by hand: schedule, learning-rate rule, parameter groups, averages, meter, metrics file, watch."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from cosmic_ray.training import meter, watch
from cosmic_ray.training.ema import Ema, decay_at
from cosmic_ray.training.meter import Meter
from cosmic_ray.training.optim import finish_gradient, groups
from cosmic_ray.training.record import MetricsFile, read_metrics
from cosmic_ray.training.schedule import factor
from cosmic_ray.training.settings import Optim, Schedule


def test_schedule_by_hand():
    cosine = Schedule(kind="cosine", warmup=0.2, final=0.1)
    found = [factor(cosine, step, 10) for step in range(10)]
    fall = [0.1 + 0.9 * (1 + math.cos(math.pi * done / 8)) / 2 for done in range(8)]
    assert found == pytest.approx([0.5, 1.0, *fall])
    assert [factor(Schedule(kind="constant", warmup=0.0), step, 10) for step in (0, 9)] == [1.0, 1.0]


@given(st.sampled_from(["cosine", "constant"]), st.floats(0, 0.99), st.floats(0, 1), st.integers(1, 2000), st.data())
def test_schedule_rises_then_never_rises_again(kind, warmup, final, steps, data):
    schedule = Schedule(kind=kind, warmup=warmup, final=final)
    step = data.draw(st.integers(0, steps - 1))
    now, after = factor(schedule, step, steps), factor(schedule, step + 1, steps)
    assert 0 <= now <= 1 + 1e-12
    assert after >= now if step + 1 < round(warmup * steps) else after <= 1 + 1e-12
    assert after <= now + 1e-12 or step + 1 <= round(warmup * steps)


def test_learning_rate_rule():
    """App. A's 1.5e-4 at batch 256, where base and actual rate agree; MAE's 2.4e-3 at 4096."""
    assert Optim().rate(256) == pytest.approx(1.5e-4)
    assert Optim().rate(4096) == pytest.approx(2.4e-3)
    assert Optim(lr_rule="sqrt").rate(1024) == pytest.approx(3e-4)
    assert Optim(lr_rule="fixed").rate(7) == pytest.approx(1.5e-4)


def test_only_matrices_decay():
    network = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2), nn.Conv2d(1, 2, 3))
    network[2].bias.requires_grad_(False)
    decayed, kept = groups(network, Optim(weight_decay=0.3))
    assert [p.ndim for p in decayed["params"]] == [2, 4] and decayed["weight_decay"] == 0.3
    assert [p.ndim for p in kept["params"]] == [1, 1, 1] and kept["weight_decay"] == 0.0
    (everything,) = groups(network, Optim(decay="all"))
    assert len(everything["params"]) == 5


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_gradients_are_divided_then_clipped_once(clip):
    weights = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(3))]
    weights[0].grad, weights[1].grad = torch.tensor([6.0, 0.0]), torch.tensor([8.0])
    norm = finish_gradient(weights, torch.tensor(5.0, dtype=torch.float64), clip)
    assert norm.item() == pytest.approx(2.0)
    scale = min(1.0, (clip or 9) / 2.0) / 5
    assert weights[0].grad.tolist() == pytest.approx([6 * scale, 0.0], rel=1e-5)
    assert weights[1].grad.tolist() == pytest.approx([8 * scale], rel=1e-5)
    assert weights[2].grad is None


def test_no_element_at_all_is_no_gradient():
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.zeros(2)
    assert finish_gradient([weight], torch.tensor(0.0), 1.0).item() == 0
    assert weight.grad.tolist() == [0.0, 0.0]


def test_average_by_hand():
    network = nn.Linear(1, 1, bias=False)
    network.weight.data.fill_(1.0)
    ema = Ema({"net": network}, 0.9)
    network.weight.data.fill_(2.0)
    ema.update(0)
    assert decay_at(0.9, 0) == 0.1
    assert ema.averages["net.weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    network.weight.data.fill_(4.0)
    ema.update(200)
    assert decay_at(0.9, 200) == 0.9
    assert ema.averages["net.weight"].item() == pytest.approx(0.9 * 1.9 + 0.1 * 4)
    with ema.applied():
        assert network.weight.item() == pytest.approx(2.11)
    assert network.weight.item() == 4.0


def test_meter_weighs_by_count_and_leaves_pauses_out(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(meter.time, "perf_counter", lambda: now[0])
    found = Meter(global_batch=30)
    for total, count, wait in ((6.0, 2.0, 0.5), (2.0, 6.0, 0.0)):
        now[0] += 1.0
        found.add({"loss": (total, count)}, {"lr": 0.1}, wait)
    with found.paused():
        now[0] += 50.0
    line = found.line()
    assert line == pytest.approx({"loss": 1.0, "lr": 0.1, "images_per_s": 30.0, "data_wait_share": 0.25})


def test_metrics_are_cut_at_the_checkpoint_that_a_run_resumes_from(home):
    uri = f"{home}/metrics.jsonl"
    first = MetricsFile(uri)
    first.on_start({"step": 0})
    for step in (5, 10, 15):
        first.on_step(step, {"train/loss": step / 10})
    first.on_eval(15, {"val/loss": math.nan})
    first.on_saving(15)
    assert [line["step"] for line in read_metrics(uri)] == [5, 10, 15, 15]
    assert read_metrics(uri)[-1] == {"step": 15, "val/loss": None}
    again = MetricsFile(uri)
    again.on_start({"step": 10})
    again.on_step(15, {"train/loss": 7.0})
    again.on_saving(20)
    assert read_metrics(uri) == [
        {"step": 5, "train/loss": 0.5},
        {"step": 10, "train/loss": 1.0},
        {"step": 15, "train/loss": 7.0},
    ]


STUCK = {
    "waiting": "time.sleep(60)",
    "keeping Python's lock": "ctypes.PyDLL(None).sleep(60)",
}


@pytest.mark.parametrize("how", STUCK)
def test_a_process_that_no_longer_moves_is_ended_and_says_where(how):
    code = (
        "import ctypes, time\nfrom cosmic_ray.training.watch import Watch\nwatched = Watch(0.6, 'worker 3 of 4')\n"
        "def moving():\n    for _ in range(10): time.sleep(0.1); watched.beat()\n"
        f"def stuck(): {STUCK[how]}\nmoving(); print('moved', flush=True); stuck()"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=40)
    assert time.monotonic() - started < 30
    assert done.returncode != 0
    assert done.stdout == "moved\n"
    assert "in stuck" in done.stderr
    if how == "waiting":
        assert done.returncode == watch.EXIT_CODE
        assert "worker 3 of 4: no progress for" in done.stderr
