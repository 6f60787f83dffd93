"""`pretrain-mae`: recipes, refusals before work starts, the plain loop on a real store, what is exported."""

from __future__ import annotations

import json
import re
import shutil
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image
from training_jobs import plain, undisturbed

import cosmic_ray
from cosmic_ray import storage
from cosmic_ray.cluster import Resources
from cosmic_ray.errors import JobError
from cosmic_ray.ingest.stream import plain_batches
from cosmic_ray.models.mae import MAEConfig
from cosmic_ray.output import claim
from cosmic_ray.training import beginning, checkpoint, run
from cosmic_ray.training.beginning import exported_weights
from cosmic_ray.training.mae_export import exported_model
from cosmic_ray.training.mae_job import PretrainMAE
from cosmic_ray.training.preflight import require_resources
from cosmic_ray.training.record import METRICS, MetricsFile, read_metrics

FILES = {"out": "o", "crops": "c", "split": "s"}
ONE_NODE = Resources(nodes=1, node_cpus=(2.0,), cpus=2.0, gpus=0.0, memory_bytes=8e9, object_store_bytes=1e9)
THREE_SMALL_NODES = Resources(3, (2.0, 2.0, 2.0), 6.0, 0.0, 24e9, 3e9)


def test_paper_is_appendix_a(crops):
    job = PretrainMAE(**FILES, recipe="paper")
    assert (job.epochs, job.global_batch, job.optim.rate(job.global_batch)) == (10, 256, 1.5e-4)
    assert job.model.preset == "large"
    assert (job.schedule.kind, job.schedule.warmup, job.ema, job.optim.clip) == ("constant", 0.0, None, None)
    assert job.optim.betas == (0.9, 0.999) and job.optim.decay == "all", "AdamW as PyTorch has it: nothing is stated"
    stage = PretrainMAE(out="o", crops=crops.store.uri, split=crops.split, recipe="paper", global_batch=8).stage()
    config = stage.model
    assert config == MAEConfig.of("large", "paper")
    assert (config.mask_ratio, config.decoder_dim, config.decoder_depth, config.decoder_heads) == (0.75, 512, 1, 16)
    assert config.channels == 3 and config.encoder.img_size == 224
    assert stage.parameters == pytest.approx(307e6, rel=0.02)


def test_a_job_may_differ_from_the_paper_in_one_key():
    job = PretrainMAE(**FILES, recipe="paper", optim={"lr": 1e-3}, ema=0.99)
    assert job.optim.lr == 1e-3 and job.optim.betas == (0.9, 0.999)
    assert job.ema == 0.99 and job.schedule.kind == "constant"


def test_better_is_the_default():
    job = PretrainMAE(**FILES)
    assert job.recipe == "better" and job.schedule.kind == "cosine" and job.ema == 0.9999


def test_how_is_not_what():
    """Workers, memory and tracking may change between interruptions; what is trained may not."""
    job = PretrainMAE(**FILES)
    other = PretrainMAE(**FILES, scaling={"workers": 4}, micro_batch=8, tracking=None, checkpoint={"every": 5})
    assert job.fingerprint() == other.fingerprint()
    assert job.fingerprint() != PretrainMAE(**FILES, seed=1).fingerprint()


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"crops": "nowhere"}, "crops"),
        ({"split": "nowhere"}, "split"),
        ({"global_batch": 10**6}, "global_batch"),
        ({"scaling": {"workers": 9}}, "scaling.workers"),
        ({"model": {"preset": "tiny", "img_size": 33}}, "model"),
        ({"model": {"preset": "tiny", "mask_ratio": 0.999}}, "model"),
        ({"init_from": "models:/fm/latest"}, "init_from"),
        ({"tracking": {"alias": "latest"}}, "tracking.alias"),
    ],
)
def test_refused_before_work_starts(crops, changes, key):
    with pytest.raises(JobError) as error:
        crops.job("refused", **changes).check()
    assert error.value.key == key


def test_a_full_disk_is_refused_before_work_starts(crops, monkeypatch):
    monkeypatch.setattr(checkpoint, "room", lambda path: 1000)
    with pytest.raises(JobError, match=r"out = .*still to come, at most 3 at a time, take"):
        crops.job("refused").check()


@pytest.mark.parametrize(
    ("scaling", "found", "text"),
    [
        ({"workers": 4}, ONE_NODE, r"nodes have 2, which is room for 1 \(scaling.workers=1, or a smaller"),
        ({"workers": 4}, THREE_SMALL_NODES, r"nodes have 2, 2, 2, which is room for 3 \(scaling.workers=3"),
        ({"workers": 2, "gpus_per_worker": 1}, ONE_NODE, "2 workers of 1 GPUs, and the cluster has 0"),
        ({"workers": [3, 4]}, ONE_NODE, r"scaling.workers = \(3, 4\): 3 workers of 1 CPUs.*room for 1"),
        ({}, Resources(1, (8.0,), 8.0, 0.0, 1e6, 1e9), r"data.window = 4: 1 readers hold 0.2 GB of open windows"),
    ],
)
def test_too_little_of_the_cluster_is_refused(crops, scaling, found, text):
    with pytest.raises(JobError, match=text):
        require(crops.job("refused", scaling=scaling), found)


def require(job: PretrainMAE, found: Resources) -> float:
    return require_resources(job.stage(), found)


def test_a_network_larger_than_memory_is_refused(crops):
    job = crops.job("refused", model={"preset": "large"})
    with pytest.raises(JobError, match=r"model.preset = .large.: 307 M parameters take 6.1 GB.*smaller preset"):
        require(job, Resources(1, (8.0,), 8.0, 0.0, 4e9, 1e9))


def test_a_range_of_workers_needs_room_for_the_fewest(crops):
    assert require(crops.job("refused", scaling={"workers": [1, 9]}), ONE_NODE) == 0
    with pytest.raises(ValueError, match=r"a range is written \[fewest, most\]"):
        PretrainMAE(**FILES, scaling={"workers": [4, 2]})


def test_a_gpu_is_taken_where_there_is_one(crops):
    job = crops.job("refused", scaling={"workers": 2})
    assert require(job, Resources(1, (8.0,), 8.0, 2.0, 8e9, 1e9)) == 1
    assert require(crops.job("refused"), ONE_NODE) == 0


def test_two_workers_train_what_one_does(crops):
    """Float64 on a real store and the real network: lanes give the ranks unequal shares."""
    job = crops.job("two", precision="fp64", data={"lanes": 3})
    undisturbed(job, 2)
    alone = crops.job("one", precision="fp64", data={"lanes": 3})
    plain(0, 1, alone)
    one, two = (checkpoint.newest(f"{each.out}/checkpoints") for each in (alone, job))
    for name in (checkpoint.WEIGHTS, checkpoint.EMA):
        wanted, found = (checkpoint.read_tensors(uri, name) for uri in (one, two))
        for key, value in wanted.items():
            assert torch.allclose(found[key], value, rtol=0, atol=1e-9), key


def test_trains_on_train_reports_val_and_never_sees_test(crops):
    """A test crop of another size of numbers would change nothing, were it read: so the rows that are read are told."""
    job = crops.job("parts")
    found = job.stage()
    trained = {
        found.store.group_starts[group] + row
        for step in range(2 * found.plan.steps_per_epoch)
        for group, row in zip(*found.plan.step(step)[:2], strict=True)
    }
    split = crops.opened_split()
    assert trained == set(split.rows("train").tolist())
    assert not trained & {*split.rows("val").tolist(), *split.rows("test").tolist()}


def test_names_of_a_share_are_its_crops(crops):
    job = crops.job("names")
    loop = job.loop(stream=plain_batches, rank=1, world=2)
    share = next(loop.data.shares(3, 4))
    ids = crops.store.metadata(["crop_id"])["crop_id"].to_pylist()
    rows = [ids.index(name) for name in share.names()]
    assert np.array_equal(crops.store.crops(np.array(rows)), share.tensors["images"].numpy())
    assert share.part(2, 5).names() == share.names()[2:5]


@pytest.fixture(scope="module")
def finished(crops, tmp_path_factory):
    """The job done without Ray: the plain loop, then everything that follows it."""
    job = crops.job("finished")
    loop = job.loop([MetricsFile(storage.join(job.out, METRICS))], stream=plain_batches)
    assert loop.run() == ("finished", 12)
    with claim(job) as output:
        stage = job.stage()
        results = run._finish(stage, output, stage.lineage(output) | {"step": 12}, None)
    return job, stage, results


def test_metrics_of_a_run(finished):
    lines = read_metrics(f"{finished[0].out}/{METRICS}")
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == [2, 4, 6, 8, 10, 12]
    assert [line["step"] for line in lines if "val/loss" in line] == [6, 12]
    wanted = {"loss", "pixel_error", "lr", "grad_norm", "images_per_s", "data_wait_share"}
    assert {key for line in lines for key in line} == {"step", "val/loss", "val/pixel_error"} | {
        f"train/{name}" for name in wanted
    }
    assert lines[-1]["val/loss"] < lines[3]["val/loss"] + 1


def test_the_exported_encoder_gives_the_trainers_own_embedding(finished):
    job, found, results = finished
    crops = found.store.crops(np.arange(6))
    model = cosmic_ray.load_model(results["model"])
    own = exported_model(found.model, checkpoint.newest(f"{job.out}/checkpoints"))
    from cosmic_ray.ingest.augment import prepare

    wanted = own.embed(prepare(torch.from_numpy(crops), 32, "better"))
    assert np.allclose(model.embed(crops), wanted.numpy(), atol=1e-6)
    averages = checkpoint.read_tensors(checkpoint.newest(f"{job.out}/checkpoints"), checkpoint.EMA)
    assert torch.equal(own.mask_token, averages["mae.mask_token"]), "the averages are what is exported"
    assert model.config.lineage["store"]["content_hash"] == found.store.content_hash
    assert model.config.simulated and "simulated" in model.card


def test_the_picture_shows_crops_masks_and_reconstructions(finished):
    image = np.asarray(Image.open(BytesIO(storage.read_bytes(f"{finished[0].out}/reconstructions.png"))))
    assert image.shape == (3 * 32, 8 * 32)
    seen, masked, made = image.reshape(3, 32, 8, 32).transpose(0, 2, 1, 3)
    hidden = masked == 128
    assert 0.5 < hidden.mean() < 0.9
    assert np.array_equal(seen[~hidden], made[~hidden]), "visible patches are shown as they are"


def test_results_say_what_came_out(finished):
    results = finished[2]
    assert json.loads(json.dumps(results)) == results
    assert results["steps"] == 12 and results["train_loss"] > 0 and results["val_loss"] > 0
    assert re.fullmatch("[0-9a-f]{64}", results["content_hash"])


@pytest.mark.parametrize("what", ["run", "checkpoint", "model"])
def test_pretraining_goes_on_from_other_weights(crops, finished, what):
    job, _, results = finished
    newest = checkpoint.newest(f"{job.out}/checkpoints")
    uri = {"run": job.out, "checkpoint": newest, "model": results["model"]}[what]
    begun = crops.job(f"from-{what}", init_from=uri, seed=5)
    weights = begun.loop(stream=plain_batches).state.networks["mae"].state_dict()
    exported = exported_weights(newest)
    same = {key for key, value in weights.items() if torch.equal(value, exported[f"mae.{key}"])}
    if what == "model":
        assert {key for key in weights if key.startswith("encoder.")} <= same
        assert "head.weight" not in same, "only the encoder was exported"
    else:
        assert same == set(weights)


def test_weights_of_another_network_are_refused(crops, finished):
    wide = crops.job("wide", init_from=finished[0].out, model={"preset": "tiny", "img_size": 32})
    with pytest.raises(JobError, match=r"init_from = .*another network"):
        wide.loop(stream=plain_batches)


def test_nothing_at_init_from_is_refused(crops):
    with pytest.raises(JobError, match=r"init_from = '.*/nowhere': nothing is there"):
        crops.job("nowhere", init_from=f"{crops.folder}/nowhere").check()
    with pytest.raises(JobError, match=r"init_from = .*: no model is here"):
        crops.job("nowhere", init_from=crops.folder).loop(stream=plain_batches)


def test_what_a_run_started_from_is_kept(crops, finished, tmp_path):
    """An alias moves, a folder goes: a resumed run and its workers have what the driver read first."""
    source = str(tmp_path / "model")
    shutil.copytree(finished[2]["model"], source)
    job = crops.job("kept", init_from=source, seed=5)
    wanted = job.loop(stream=plain_batches).state.networks["mae"].state_dict()
    with claim(job) as output:
        told = beginning.keep(source, output)
    shutil.rmtree(source)
    begun = job.loop(stream=plain_batches).state.networks["mae"].state_dict()
    assert all(torch.equal(begun[key], wanted[key]) for key in wanted)
    with claim(job) as output:
        assert beginning.keep("models:/gone@candidate", output) == told
    assert told["uri"] == source and re.fullmatch("[0-9a-f]{64}", told["weights"])


def test_another_order_does_not_resume(crops):
    """The fingerprint guards the folder; the cursor guards the checkpoint itself."""
    plain(0, 1, crops.job("ordered", steps=4))
    with pytest.raises(JobError, match="the cursor belongs to plan"):
        crops.job("ordered", seed=9).loop(stream=plain_batches).run()


@pytest.mark.exhaustive
def test_compiled_blocks_train_alike(crops):
    """Compiled kernels round differently; the weights follow those of eager ones."""
    for name, compiled in (("eager", False), ("compiled", True)):
        plain(0, 1, crops.job(name, compile=compiled, optim={"lr": 1e-3}, steps=4))
    one, other = (
        checkpoint.read_tensors(checkpoint.newest(f"{crops.folder}/{name}/checkpoints"), checkpoint.WEIGHTS)
        for name in ("eager", "compiled")
    )
    for key, value in one.items():
        assert torch.allclose(other[key], value, rtol=0, atol=1e-4), key
