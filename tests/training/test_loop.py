"""The step loop with a toy objective: weighting, accumulation, workers, resumption, stopping, NaN."""

from __future__ import annotations

import pytest
import torch
from training_toys import GLOBAL_BATCH, Adversaries, Recorder, Regression, Samples, on_ranks, settings

from cosmic_ray.ingest import keyed
from cosmic_ray.training import checkpoint
from cosmic_ray.training.ema import decay_at
from cosmic_ray.training.errors import NonFiniteError
from cosmic_ray.training.loop import Loop
from cosmic_ray.training.schedule import factor


def trained(folder, objective=Regression, data=None, **changes):
    """Weights, averages and what was told, after a whole run in this process."""
    toy, recorder = objective(), Recorder()
    loop = Loop(toy, settings(str(folder), **changes), data or Samples(), [recorder])
    loop.run()
    weights = {key: value.clone() for net in toy.networks().values() for key, value in net.state_dict().items()}
    averages = {} if loop.state.ema is None else dict(loop.state.ema.averages)
    return weights, averages, recorder


def trained_on_rank(rank, world, folder, objective, changes):
    return trained(folder, objective, Samples(rank, world), **changes)[:2]


def assert_close(found, wanted, tolerance):
    for one, other in zip(found[:2], wanted[:2], strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert torch.allclose(one[key], other[key], rtol=0, atol=tolerance), key


def by_hand(steps):
    """The same training written as one plain loop over whole batches: mean loss, clip, torch's AdamW, EMA."""
    toy, given = Regression(), settings("")
    net = toy.net.double()
    matrices, rest = ([p for p in net.parameters() if (p.ndim >= 2) is kind] for kind in (True, False))
    optim = given.optim["net"]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}],
        betas=optim.betas,
        fused=True,
    )
    averages = {f"net.{key}": p.detach().clone() for key, p in net.named_parameters()}
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * factor(given.schedule, step, given.steps)
        positions = torch.arange(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH)
        inputs = keyed.normal(1, positions, "inputs", 5).double()
        mask = torch.arange(4)[None] <= keyed.bits(3, positions, "kept", 1) % 4
        optimizer.zero_grad()
        ((net(inputs) - inputs[:, :4].sin()) ** 2)[mask].mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.3)
        optimizer.step()
        for key, p in net.named_parameters():
            averages[f"net.{key}"].lerp_(p.detach(), 1 - decay_at(0.9, step))
    return net.state_dict(), averages


def test_one_process_agrees_with_a_plain_loop(tmp_path):
    found = trained(tmp_path)
    assert_close(found, by_hand(20), 1e-12)
    recorder = found[2]
    assert list(recorder.metrics("train/loss")) == [5, 10, 15, 20]
    assert list(recorder.metrics("val/loss")) == [5, 10, 15, 20]
    assert recorder.metrics("train/loss")[20] < recorder.metrics("train/loss")[5]
    assert min(recorder.metrics("train/grad_norm").values()) > 0.3, "clipping was to bite"
    assert 0 <= recorder.metrics("train/data_wait_share")[20] <= 1


@pytest.mark.parametrize("micro_batch", [1, 5, 7, 24])
def test_accumulation_changes_nothing(tmp_path, micro_batch):
    whole = trained(tmp_path / "whole")
    cut = trained(tmp_path / "cut", micro_batch=micro_batch)
    assert_close(cut, whole, 1e-12)
    assert cut[2].metrics("train/loss")[20] == pytest.approx(whole[2].metrics("train/loss")[20], abs=1e-12)


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"micro_batch": 5}),
        (2, {"micro_batch": 5, "strategy": "fsdp2"}),
        pytest.param(2, {}, marks=pytest.mark.exhaustive),
        pytest.param(3, {"micro_batch": 3}, marks=pytest.mark.exhaustive),
        pytest.param(3, {"micro_batch": 4, "strategy": "fsdp2"}, marks=pytest.mark.exhaustive),
        pytest.param(4, {"micro_batch": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_unequal_shares_give_the_trajectory_of_one_process(tmp_path, world, changes):
    alone = trained(tmp_path / "alone")
    on_ranks(world, trained_on_rank, str(tmp_path / "many"), Regression, changes)
    newest = checkpoint.newest(str(tmp_path / "many"))
    for name, wanted in ((checkpoint.WEIGHTS, alone[0]), (checkpoint.EMA, alone[1])):
        for key, value in checkpoint.read_tensors(newest, name).items():
            assert torch.allclose(
                value, wanted[key if name == checkpoint.EMA else key.removeprefix("net.")], rtol=0, atol=1e-9
            )


def test_two_optimisers_take_turns(tmp_path):
    alone = trained(tmp_path / "alone", Adversaries)
    ranks = on_ranks(2, trained_on_rank, str(tmp_path / "two"), Adversaries, {"micro_batch": 4})
    for found in ranks:
        assert_close(found, alone, 1e-9)
    assert {"train/generator/loss", "train/discriminator/loss", "train/generator/lr"} <= set(alone[2].told[1][2])


@pytest.mark.parametrize("resumed_at", [1, 10])
def test_a_resumed_run_ends_bit_for_bit_alike(tmp_path, resumed_at):
    whole = trained(tmp_path / "whole", precision="fp32")
    halves = tmp_path / "halves"
    asked = iter([False] * (resumed_at - 1) + [True])
    loop = Loop(Regression(), settings(str(halves), precision="fp32"), Samples(), stopping=lambda: next(asked))
    assert loop.run() == ("stopped", resumed_at)
    again = trained(halves, precision="fp32")
    assert again[2].told[0][1]["step"] == resumed_at
    assert_close(again, whole, 0)
    both = [checkpoint.newest(str(folder)) for folder in (tmp_path / "whole", halves)]
    for name in (checkpoint.WEIGHTS, checkpoint.EMA, checkpoint.OPTIMIZER):
        one, other = (checkpoint.read_tensors(uri, name) for uri in both)
        assert all(torch.equal(one[key], other[key]) for key in one), name


def stopped_and_resumed(rank, world, folder, changes):
    """A rank that stops when rank 1 alone asks for it, and the same run gone on with."""
    asked = iter([False] * 6 + [rank == 1] * 9)
    given = settings(folder, precision="fp32", **changes)
    first = Loop(Regression(), given, Samples(rank, world), stopping=lambda: next(asked)).run()
    return first, trained(folder, Regression, Samples(rank, world), precision="fp32", **changes)[0]


@pytest.mark.parametrize(
    ("world", "strategy"),
    [(2, "ddp"), *(pytest.param(*case, marks=pytest.mark.exhaustive) for case in ((3, "ddp"), (2, "fsdp2")))],
)
def test_ranks_stop_together_and_resume_bit_for_bit(tmp_path, world, strategy):
    changes = {"strategy": strategy, "micro_batch": 5}
    whole = on_ranks(world, trained_on_rank, str(tmp_path / "whole"), Regression, changes | {"precision": "fp32"})
    ranks = on_ranks(world, stopped_and_resumed, str(tmp_path / "halves"), changes)
    assert [ending for ending, _ in ranks] == [("stopped", 7)] * world
    assert len(whole) == world
    one, other = (checkpoint.newest(str(tmp_path / folder)) for folder in ("whole", "halves"))
    assert checkpoint.digest(one) == checkpoint.digest(other)


def test_another_strategy_and_number_of_workers_go_on(tmp_path):
    """Stopped with two FSDP2 ranks, ended alone: the checkpoint knows neither."""
    alone = trained(tmp_path / "alone")
    asked = {"strategy": "fsdp2", "steps": 20}
    on_ranks(2, stop_at_six, str(tmp_path / "moved"), asked)
    moved = trained(tmp_path / "moved")
    assert moved[2].told[0][1]["step"] == 6
    assert_close(moved, alone, 1e-9)


def stop_at_six(rank, world, folder, changes):
    asked = iter([False] * 5 + [True] * 9)
    Loop(Regression(), settings(folder, **changes), Samples(rank, world), stopping=lambda: next(asked)).run()


def poisoned(rank, world, folder):
    try:
        trained(folder, Regression, Samples(rank, world, poison=12 * GLOBAL_BATCH + 20), micro_batch=6)
    except NonFiniteError as error:
        return error.step, error.suspects, len(error.batch), str(error)


def test_nan_stops_all_ranks_and_names_step_and_crops(tmp_path):
    ranks = on_ranks(2, poisoned, str(tmp_path))
    assert ranks[0] == ranks[1]
    step, suspects, batch, text = ranks[0]
    assert step == 12
    assert f"crop-{12 * GLOBAL_BATCH + 20}" in suspects
    assert len(suspects) < batch == GLOBAL_BATCH, "only the bad micro-batch is suspected"
    assert "step 12" in text and suspects[0] in text
    assert checkpoint.newest(str(tmp_path)).endswith("step-00000010"), "nothing bad was saved"


def test_a_gradient_that_overflows_stops_too(tmp_path):
    class Overflow(Regression):
        def losses(self, networks, share, seed, phase):
            total, count = super().losses(networks, share, seed, phase)["loss"]
            return {"loss": (total + 0 * total.sqrt().sub(total.detach().sqrt()).sqrt(), count)}

    with pytest.raises(NonFiniteError, match="grad_norm is"):
        trained(tmp_path, Overflow)
    assert checkpoint.newest(str(tmp_path)) is None


def test_batchnorm_is_refused(tmp_path):
    toy = Regression()
    toy.net[1] = torch.nn.BatchNorm1d(16)
    with pytest.raises(TypeError, match=r"net\.1 is a BatchNorm"):
        Loop(toy, settings(str(tmp_path)), Samples())


def test_bf16_follows_float32(tmp_path):
    single = trained(tmp_path / "single", precision="fp32")[2].metrics("train/loss")
    half = trained(tmp_path / "half", precision="bf16")[2].metrics("train/loss")
    assert half[20] != single[20]
    assert half[20] == pytest.approx(single[20], rel=0.05)
