"""`train-seq2img`: its keys, what it refuses, what its run leaves."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from training_cells import DIGEST, Cells
from training_jobs import plain

import cosmic_ray
from cosmic_ray import storage
from cosmic_ray.errors import JobError
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.models.unet_imagen import ImagenConfig
from cosmic_ray.output import claim, read_manifest
from cosmic_ray.stores.embeddings import Embeddings
from cosmic_ray.training import checkpoint, run
from cosmic_ray.training.record import METRICS, MetricsFile
from cosmic_ray.training.seq2img_job import TrainSeq2Img

FILES = {"out": "o", "cells": "c", "split": "s", "latents": "l"}


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    return Cells.make(str(tmp_path_factory.mktemp("seq2img")))


def test_paper_is_appendix_a(cells: Cells) -> None:
    job = TrainSeq2Img(**FILES, recipe="paper")
    assert (job.epochs, job.global_batch, job.optim.rate(job.global_batch)) == (100, 16, 1.5e-4)
    assert (job.schedule.kind, job.ema, job.optim.clip, job.model.condition_drop) == ("constant", None, None, 0.1)
    assert (job.sampling.guidance, job.sampling.sampler, job.sampling.steps) == (1.0, "ddpm-time", 1000)
    assert cells.seq2img(recipe="paper").stage().model.network == ImagenConfig(64, 4)
    assert job.tracking.register_as == "seq2img"


def test_better_is_the_default_and_a_key_of_the_job_lies_over_it() -> None:
    job = TrainSeq2Img(**FILES, optim={"lr": 1e-3})
    assert job.recipe == "better" and job.ema == 0.999
    assert job.optim.lr == 1e-3 and job.optim.betas == (0.9, 0.99)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"cells": "nowhere"}, r"cells = 'nowhere'.*run the build-cells job"),
        ({"split": "nowhere"}, r"split = 'nowhere'.*run the split job"),
        ({"latents": "nowhere"}, r"latents = 'nowhere'.*run the fit-transcriptome job"),
        ({"model": {"preset": "small"}}, r"model.preset = 'small': draws 128x128 px; the cells' crops are 64x64"),
        ({"global_batch": 1000}, r"global_batch = 1000"),
        ({"scaling": {"workers": 9}}, r"scaling.workers|lanes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_starts(cells: Cells, changes: dict, text: str) -> None:
    job = TrainSeq2Img(**cells.keys("refused") | {"latents": cells.latents, "model": {"preset": "tiny"}} | changes)
    with pytest.raises(JobError, match=text):
        job.check()


def test_guidance_without_anything_to_lean_on_is_refused() -> None:
    """At the door, not after the training."""
    with pytest.raises(ValueError, match="guidance leans on training without latents"):
        TrainSeq2Img(**FILES, model={"condition_drop": 0.0})
    assert TrainSeq2Img(**FILES, model={"condition_drop": 0.0}, sampling={"guidance": 1.0})


def test_tokens_are_no_latents(cells: Cells) -> None:
    tokens = cells.embed("tokens", np.zeros((len(cells.store), 3, 4), np.float16))
    with pytest.raises(JobError, match=r"latents = .*these are tokens"):
        cells.seq2img().model_copy(update={"latents": tokens}).check()


def test_latents_of_other_cells_are_refused(cells: Cells, tmp_path) -> None:
    other = Cells.make(str(tmp_path), rows=60, genes=5)
    with pytest.raises(JobError, match=r"latents = .*made of another store"):
        cells.seq2img().model_copy(update={"latents": other.latents}).check()


@pytest.fixture(scope="module")
def finished(cells: Cells):
    """The job done without Ray: the plain loop, then everything that follows it."""
    job = cells.seq2img("finished", sampling={"steps": 3})
    assert job.loop([MetricsFile(storage.join(job.out, METRICS))], stream=plain_batches).run() == ("finished", 6)
    with claim(job) as output:
        stage = job.stage()
        results = run._finish(stage, output, stage.lineage(output) | {"step": 6}, None)
    return job, stage, results


def test_what_is_left_samples_as_the_trainer_would(cells: Cells, finished) -> None:
    job, stage, results = finished
    model = cosmic_ray.load_model(results["model"])
    averages = checkpoint.read_tensors(checkpoint.newest(f"{job.out}/checkpoints"), checkpoint.EMA)
    weights = model._network.state_dict()
    assert torch.equal(weights["first.weight"], averages["seq2img.first.weight"]), "the averages are what is exported"
    train = stage.latents[cells.opened_split().rows("train")]
    assert np.allclose(weights["condition_mean"], train.mean(0), atol=1e-6)
    assert np.allclose(weights["condition_std"], train.std(0, ddof=1), atol=1e-6)
    images = model.sample(Embeddings.open(cells.latents).vectors(np.arange(10)))
    assert images.shape == (10, 1, 64, 64) and images.dtype == np.uint8
    assert model.config.sampling.steps == 3 and model.config.latents.model == DIGEST
    assert model.config.lineage["latents"]["lineage"]["model"]["content_hash"] == DIGEST
    assert model.config.simulated and "simulated" in model.card


def test_the_picture_shows_real_cells_above_drawn_ones(cells: Cells, finished) -> None:
    job, stage, _ = finished
    image = np.asarray(Image.open(BytesIO(storage.read_bytes(f"{job.out}/generated.png"))))
    shown = min(8, len(stage.held_out))
    assert image.shape == (2 * 64, shown * 64)
    assert np.array_equal(image[:64, :64], cells.store.crops.crops(stage.held_out[:1])[0, 0])


def test_two_ranks_train_what_one_does(cells: Cells) -> None:
    """Float64, on a real store and the real network: lanes give the ranks unequal shares."""
    from training_jobs import undisturbed

    one, two = (cells.seq2img(name, precision="fp64", data={"lanes": 3}, steps=3) for name in ("one", "two"))
    plain(0, 1, one)
    undisturbed(two, 2)
    newest = (checkpoint.newest(f"{each.out}/checkpoints") for each in (one, two))
    wanted, found = (checkpoint.read_tensors(uri, checkpoint.WEIGHTS) for uri in newest)
    assert all(torch.allclose(found[key], value, rtol=0, atol=1e-9) for key, value in wanted.items())


@pytest.mark.slow
def test_a_ray_worker_trains_registers_and_publishes(cells: Cells, ray_local, tmp_path) -> None:
    tracking = {"uri": f"sqlite:///{tmp_path}/mlflow.db"}
    job = cells.seq2img("ray").model_copy(
        update={"tracking": type(TrainSeq2Img(**FILES).tracking)(**tracking), "steps": 3}
    )
    job.check()
    results = job.run()
    manifest = read_manifest(job.out)
    assert manifest["format"] == "cosmic-ray/train-seq2img" and manifest["simulated"]
    assert manifest["lineage"]["latents"]["content_hash"] == Embeddings.open(cells.latents).content_hash
    model = cosmic_ray.load_model("models:/seq2img@candidate", tracking=tracking["uri"])
    assert model.config.digest == results["content_hash"]
    assert job.run() == results, "a finished job is only looked at"
