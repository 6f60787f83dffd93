"""seq2img as an objective: the loss worked by hand, keyed randomness, any cut and any ranks, what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from training_toys import GLOBAL_BATCH, Recorder, Samples, on_ranks, settings

from cosmic_ray.ingest import keyed
from cosmic_ray.models.diffusion import Diffusion
from cosmic_ray.models.seq2img import Seq2ImgConfig
from cosmic_ray.models.unet import UNetConfig
from cosmic_ray.models.unet_imagen import ImagenConfig
from cosmic_ray.training.loop import Loop
from cosmic_ray.training.objective import Share
from cosmic_ray.training.optim import Optim
from cosmic_ray.training.seq2img import BANDS, NAME, Seq2ImgObjective

SIZE, WIDTH = 16, 6
CONFIGS = {
    "paper": Seq2ImgConfig("paper", ImagenConfig(SIZE, WIDTH, dim=8, token_dim=16, widths=(1, 2))),
    "better": Seq2ImgConfig("better", UNetConfig(SIZE, (8, 32), (1, 1), attention_from=1, condition_size=WIDTH)),
}
RECIPES = tuple(CONFIGS)


def objective(recipe: str, stirred: bool = True) -> Seq2ImgObjective:
    """In float64, no weight at zero, so that everything matters."""
    made = Seq2ImgObjective(CONFIGS[recipe], seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in made.network.parameters() if stirred else ():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    made.network.double()
    return made


def share(positions: torch.Tensor, step: int = 0) -> Share:
    """Square nuclei as bright as the condition's first entry says."""
    condition = keyed.normal(7, positions, "condition", WIDTH)
    images = torch.zeros(len(positions), 1, SIZE, SIZE, dtype=torch.uint8)
    images[:, :, 3:12, 4:13] = (128 + 100 * condition[:, 0].tanh()).to(torch.uint8)[:, None, None, None]
    return Share(step, positions, {"images": images, "condition": condition})


class Cells(Samples):
    """The toys' samples, as images and conditions."""

    def _share(self, step: int, positions: torch.Tensor) -> Share:
        largest = super()._share(step, positions).largest
        made = share(positions, step)
        return Share(step, positions, made.tensors, largest)

    def held_out(self) -> Iterator[Share]:
        return iter(super().held_out())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_loss_by_hand(recipe: str) -> None:
    made, given_share = objective(recipe), share(torch.arange(100, 105))
    total, count = made.losses(made.networks(), given_share, 3, NAME)["loss"]
    positions, channels = given_share.positions, 3 if recipe == "paper" else 1
    images = given_share.tensors["images"].double() / 255
    if recipe == "better":
        flipped = zip(images, (keyed.bits(3, positions, "flip", 2) >> 31).tolist(), strict=True)
        images = torch.stack([image.flip([d for d, f in ((-1, a), (-2, b)) if f]) for image, (a, b) in flipped])
    x0 = (images * 2 - 1).expand(-1, channels, -1, -1)
    noise = keyed.normal(3, positions, "noise", channels * SIZE**2).double().reshape(x0.shape)
    if recipe == "paper":
        time = keyed.uniform(3, positions, "time", 1)[:, 0].double()
    else:
        time = (
            positions.double() * (5**0.5 - 1) / 2 + keyed.uniform(3, torch.zeros(1).long(), "time", 1)[0, 0].item()
        ) % 1.0
    drop = keyed.uniform(3, positions, "drop", 1)[:, 0] < 0.1
    logsnr = made.diffusion.logsnr(time.double())
    alpha, sigma = (f.sqrt()[:, None, None, None] for f in (logsnr.sigmoid(), (-logsnr).sigmoid()))
    said = made.network(alpha * x0 + sigma * noise, logsnr, given_share.tensors["condition"].double(), drop)
    wanted = x0 if recipe == "paper" else alpha * noise - sigma * x0
    snr = logsnr.exp()
    weight = snr.clamp(max=5) / (1 if recipe == "paper" else snr + 1)
    assert count == 5
    torch.testing.assert_close(total, ((said - wanted) ** 2).mean((1, 2, 3)) @ weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(recipe: str) -> None:
    made, whole = objective(recipe), share(torch.arange(40, 52))

    def summed(cuts: list[int]) -> tuple[list[float], torch.Tensor]:
        made.network.zero_grad()
        bounds = [0, *sorted(set(cuts)), len(whole)]
        sums = [0.0, 0.0]
        for start, stop in itertools.pairwise(bounds):
            loss, count = made.losses(made.networks(), whole.part(start, stop), 5, NAME)["loss"]
            loss.backward()
            sums = [sums[0] + loss.item(), sums[1] + count.item()]
        return sums, torch.cat([p.grad.flatten() for p in made.network.parameters()])

    sums, gradient = summed([])

    @examples(max_examples=6, deadline=None)
    @given(st.lists(st.integers(1, 11), max_size=5))
    def holds(cuts: list[int]) -> None:
        found, other = summed(cuts)
        assert found == pytest.approx(sums, rel=1e-11)
        torch.testing.assert_close(other, gradient, rtol=0, atol=1e-9)

    holds()


@pytest.mark.parametrize("recipe", RECIPES)
def test_held_out_metrics_do_not_depend_on_the_cut_and_never_change(recipe: str) -> None:
    made, whole = objective(recipe), share(torch.arange(9))
    with torch.no_grad():
        once = made.metrics(made.networks(), whole, 5)
        again = made.metrics(made.networks(), Share(7, whole.positions, whole.tensors), 5)
        parts = [made.metrics(made.networks(), whole.part(a, b), 5) for a, b in ((0, 2), (2, 9))]
    assert set(once) == {"loss", "x0_error", "x0_error_null", *(f"x0_error_band{i}" for i in range(4))}
    for name, (total, count) in once.items():
        assert again[name] == (total, count)
        assert sum(part[name][0] for part in parts).item() == pytest.approx(total.item(), rel=1e-10)
        assert sum(part[name][1] for part in parts).item() == pytest.approx(count.item(), rel=1e-6)


def test_held_out_errors_by_hand() -> None:
    """A new network says v = 0, hence x0 = alpha * x: the error of that, in every band, with or without condition."""
    made, whole = objective("better", stirred=False), share(torch.arange(9))
    with torch.no_grad():
        found = made.metrics(made.networks(), whole, 5)
    x0 = whole.tensors["images"].double() / 127.5 - 1
    draws = keyed.uniform(5, whole.positions, "held-out time", 4).double()
    errors = []
    for band, (low, high) in enumerate(BANDS):
        logsnr = low + (high - low) * draws[:, band]
        abar = logsnr.sigmoid()[:, None, None, None]
        noise = keyed.normal(5, whole.positions, f"held-out noise {band}", SIZE**2).double().reshape(x0.shape)
        errors.append((((1 - abar) * x0 - (abar * (1 - abar)).sqrt() * noise) ** 2).mean((1, 2, 3)))
        torch.testing.assert_close(found[f"x0_error_band{band}"][0], errors[-1].sum(), rtol=1e-6, atol=0)
    torch.testing.assert_close(found["x0_error"][0], torch.stack(errors).sum(), rtol=1e-6, atol=0)
    assert found["x0_error_null"] == found["x0_error"]
    assert found["x0_error"][1] == 36


@pytest.mark.parametrize("recipe", RECIPES)
def test_held_out_loss_estimates_the_training_loss(recipe: str) -> None:
    """Of the bands, each log-SNR weighs as often as training meets it: against training's own times there."""
    made, whole = objective(recipe), share(torch.arange(600))
    with torch.no_grad():
        total, count = made.metrics({NAME: lambda x, *_: torch.zeros_like(x)}, whole, 5)["loss"]
        x0, _ = made._inputs(whole, None)
        logsnr = made.diffusion.logsnr(made._times(5, torch.arange(600)))
        inside = (logsnr > -8) & (logsnr < 8)
        noise = torch.randn(x0.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        alpha, sigma = (f.sqrt()[:, None, None, None] for f in (logsnr.sigmoid(), (-logsnr).sigmoid()))
        wanted = x0 if recipe == "paper" else alpha * noise - sigma * x0
        trained = ((wanted**2).mean((1, 2, 3)) * made.diffusion.weight(logsnr))[inside].mean()
    assert (total / count).item() == pytest.approx(trained.item(), rel=0.1)


class TestRandomness:
    def test_better_spreads_the_times_of_every_batch(self) -> None:
        made = objective("better")
        times = made._times(3, torch.arange(10_000, 10_064))
        for size in (8, 16, 64):
            gaps = times[:size].sort().values.diff()
            assert gaps.max() < 2.7 / size, size
        assert made._times(4, torch.arange(2)).tolist() != made._times(3, torch.arange(2)).tolist()

    @pytest.mark.parametrize("recipe", RECIPES)
    def test_times_are_uniform(self, recipe: str) -> None:
        times = objective(recipe)._times(3, torch.arange(4000)).sort().values
        assert (times - torch.arange(4000) / 4000).abs().max() < 0.03

    def test_a_tenth_of_the_conditions_is_withheld(self) -> None:
        seen = []

        def network(x: torch.Tensor, logsnr: torch.Tensor, condition: torch.Tensor, drop: torch.Tensor) -> torch.Tensor:
            seen.append(drop)
            return x

        made = objective("better")
        made.losses({NAME: network}, share(torch.arange(2000)), 3, NAME)
        assert seen[0].float().mean().item() == pytest.approx(0.1, abs=0.02)


def weights_on_rank(rank: int, world: int, folder: str, recipe: str, strategy: str) -> dict[str, torch.Tensor]:
    made = Seq2ImgObjective(CONFIGS[recipe], seed=0)
    optim = {NAME: Optim(lr=0.003, lr_rule="fixed", clip=1.0)}
    given_settings = settings(folder, steps=4, optim=optim, strategy=strategy, checkpoint_every=100, micro_batch=7)
    told = Recorder()
    loop = Loop(made, given_settings, Cells(rank, world), [told])
    loop.run()
    return {"weights": dict(loop.state.ema.averages), "val": told.metrics("val/loss")}


@pytest.mark.parametrize(
    ("recipe", "strategy"),
    [("better", "ddp"), *[pytest.param(r, s, marks=pytest.mark.exhaustive)
                          for r, s in (("paper", "ddp"), ("better", "fsdp2"), ("paper", "fsdp2"))]],
)  # fmt: skip
def test_ranks_train_the_same_weights(recipe: str, strategy: str, tmp_path: Any) -> None:
    alone = weights_on_rank(0, 1, str(tmp_path / "alone"), recipe, "ddp")
    both = on_ranks(2, weights_on_rank, str(tmp_path / "both"), recipe, strategy)
    assert both[0]["val"] == pytest.approx(alone["val"], rel=1e-9)
    if strategy == "ddp":
        for key, value in alone["weights"].items():
            torch.testing.assert_close(both[0]["weights"][key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("recipe", [pytest.param("paper", marks=pytest.mark.exhaustive), "better"])
def test_it_learns_what_the_condition_says(recipe: str, tmp_path: Any) -> None:
    """Brightness follows the condition, so that withholding it costs where noise hides the image."""
    made, told = Seq2ImgObjective(CONFIGS[recipe], seed=0), Recorder()
    steps, rate = (150, 0.004) if recipe == "paper" else (250, 0.01)
    optim = {NAME: Optim(lr=rate, lr_rule="fixed", clip=1.0)}
    changes = {"steps": steps, "precision": "fp32", "eval_every": steps, "checkpoint_every": 1000, "optim": optim}
    Loop(made, settings(str(tmp_path), **changes), Cells(), [told]).run()
    error, null = (told.metrics(f"val/{name}")[steps] for name in ("x0_error", "x0_error_null"))
    assert error < 0.08
    assert null > 1.1 * error


@pytest.mark.parametrize("recipe", RECIPES)
def test_bfloat16_gives_nearly_the_same_loss(recipe: str) -> None:
    made, whole = objective(recipe), share(torch.arange(GLOBAL_BATCH))
    made.network.float()
    exact, _ = made.losses(made.networks(), whole, 3, NAME)["loss"]
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = made.losses(made.networks(), whole, 3, NAME)["loss"]
    rough.backward()
    assert rough.dtype == torch.float32
    assert rough.item() == pytest.approx(exact.item(), rel=0.03)
    assert all(p.grad.isfinite().all() for p in made.network.parameters())


class TestBadInput:
    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"condition": torch.zeros(3, WIDTH + 1)}, "condition must be floating"),
            ({"condition": torch.zeros(3, WIDTH).int()}, "condition must be floating"),
            ({"images": torch.zeros(3, 2, SIZE, SIZE, dtype=torch.uint8)}, "channels"),
            ({"images": torch.zeros(3, 1, SIZE, SIZE + 1, dtype=torch.uint8)}, "H, H"),
        ],
    )
    def test_it_is_named(self, changes: dict[str, torch.Tensor], problem: str) -> None:
        made, whole = objective("better"), share(torch.arange(3))
        bad = Share(0, whole.positions, {**whole.tensors, **changes})
        with pytest.raises(ValueError, match=problem):
            made.losses(made.networks(), bad, 3, NAME)

    def test_floating_images_are_refused(self) -> None:
        made, whole = objective("better"), share(torch.arange(3))
        bad = Share(0, whole.positions, {**whole.tensors, "images": whole.tensors["images"].float()})
        with pytest.raises(TypeError, match="uint8"):
            made.losses(made.networks(), bad, 3, NAME)


class TestConfig:
    def test_recipes_at_a_preset(self) -> None:
        paper, better = (Seq2ImgConfig.of("tiny", recipe, condition_size=10) for recipe in RECIPES)
        assert (paper.shape, better.shape) == ((3, 64, 64), (1, 64, 64))
        assert paper.diffusion == Diffusion.imagen() and better.diffusion == Diffusion.better(64)
        assert paper.network.dim == 32 and better.network.condition_size == 10

    def test_crops(self) -> None:
        images = torch.tensor([-1.0, 1.0, 0.0, 1.2])[None, None, None]
        assert CONFIGS["better"].to_crops(images).tolist() == [[[[0, 255, 128, 255]]]]
        grey = CONFIGS["paper"].to_crops(torch.cat((images, images, images - 0.3), 1))
        assert grey.dtype == torch.uint8 and grey[0, 0, 0].tolist() == [0, 242, 115, 255]

    def test_statistics_reach_the_better_network_only(self) -> None:
        statistics = (torch.ones(WIDTH), torch.full((WIDTH,), 2.0))
        assert Seq2ImgObjective(CONFIGS["better"], 0, statistics).network.condition_std.tolist() == [2.0] * WIDTH
        assert not list(Seq2ImgObjective(CONFIGS["paper"], 0, statistics).network.buffers())
