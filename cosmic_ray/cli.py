"""The door: `cosmic-ray run | submit | status | render | describe | show | plan | verify | bench`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cosmic_ray import jobs
from cosmic_ray.config import Job
from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.progress import progress, say

app = typer.Typer(
    help="Train models that translate between nuclear morphology and gene expression, on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobFile = Annotated[
    str, typer.Argument(metavar="FILE", help="A job file: YAML with kind: and that kind's keys; - is standard input.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, as scaling.workers=2.")
]
AsJson = Annotated[bool, typer.Option("--json", help="End with one JSON object on standard output.")]
Address = Annotated[
    str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, as http://HEAD:8265.")
]


def main() -> None:
    """Run the command line; errors that a user can mend are one message, exit code 1, or 2 for a refused job."""
    try:
        app()
    except CosmicError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


@app.command()
def run(
    file: JobFile,
    overrides: Overrides = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved job and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a job here. The same file run again resumes, or finds the job done."""
    job = jobs.load(file, overrides or [])
    if dry_run:
        _print(job.resolved(), as_json)
        return
    from cosmic_ray.cluster import disconnect, interrupt_on_sigterm
    from cosmic_ray.pipeline import check
    from cosmic_ray.reach import require_lasting_tracking

    interrupt_on_sigterm()
    try:
        require_lasting_tracking(job)
        check(job)
        results = job.run()
    except KeyboardInterrupt:
        say("stopped; run the same command again to go on")
        raise typer.Exit(130) from None
    disconnect()
    _print(results, as_json)


@app.command()
def submit(
    file: JobFile,
    overrides: Overrides = None,
    address: Address = "http://127.0.0.1:8265",
    detach: Annotated[bool, typer.Option("--detach", help="Print the submission id and leave.")] = False,
) -> None:
    """Run a job on a Ray cluster; follow its log and end with its exit code."""
    from cosmic_ray import submit as cluster

    job = _for_a_cluster(file, overrides or [])
    submission = cluster.submit(job, address)
    say(f"submitted {submission}; cosmic-ray status {submission} --address {address}")
    if detach:
        print(submission)
        return
    try:
        sys.exit(cluster.follow(address, submission))
    except KeyboardInterrupt:
        known = f"cosmic-ray status {submission} --address {address}"
        say(f"{submission} goes on without this terminal; follow it: {known} --follow; save and stop: {known} --stop")
        sys.exit(130)


@app.command()
def status(
    submission: Annotated[str | None, typer.Argument(help="A submission id; all by default.")] = None,
    address: Address = "http://127.0.0.1:8265",
    follow: Annotated[bool, typer.Option("--follow", help="Print its log until it ends.")] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Ask it to save and stop.")] = False,
    as_json: AsJson = False,
) -> None:
    """Say what a cluster knows of the jobs submitted to it."""
    from cosmic_ray import submit as cluster

    if (follow or stop) and submission is None:
        raise JobError("SUBMISSION", None, "--follow and --stop need a submission id")
    if stop:
        cluster.stop(address, submission)
    if follow:
        sys.exit(cluster.follow(address, submission))
    found = cluster.status(address, submission)
    if as_json:
        print(json.dumps({"submissions": found}))
        return
    for about in found:
        print(f"{about['submission']}  {about['status']:<10}  {about['metadata'].get('kind', about['entrypoint'])}")


@app.command()
def render(
    file: JobFile,
    overrides: Overrides = None,
    image: Annotated[str, typer.Option(help="Container image that holds cosmic_ray.")] = "cosmic-ray:latest",
    name: Annotated[str | None, typer.Option(help="The RayJob's name; the file's by default.")] = None,
    workers: Annotated[int, typer.Option(help="Worker pods.")] = 1,
    cpus: Annotated[int, typer.Option(help="CPUs of each pod.")] = 8,
    memory_gib: Annotated[int, typer.Option(help="Memory of each pod, GiB.")] = 32,
    gpus: Annotated[int, typer.Option(help="GPUs of each worker pod.")] = 0,
    secret: Annotated[str | None, typer.Option(help="Kubernetes secret with credentials as variables.")] = None,
) -> None:
    """Print a job as a KubeRay RayJob, for kubectl apply -f -."""
    from importlib.metadata import version

    from cosmic_ray.reach import TRACKING, untold_tracking
    from cosmic_ray.render import Pods, render

    job = _for_a_cluster(file, overrides or [])
    if key := untold_tracking(job):
        say(f"{key} is not given: {TRACKING} in the pods' environment has to say where MLflow is")
    pods = Pods(
        image=image,
        ray_version=version("ray"),
        workers=workers,
        cpus=cpus,
        memory_gib=memory_gib,
        gpus=gpus,
        secret=secret,
    )
    print(render(job, name or (job.kind if file == "-" else Path(file).stem), pods), end="")


@app.command()
def describe(
    kind: Annotated[str | None, typer.Argument(help="A kind of job; without one, list the kinds.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the JSON Schema.")] = False,
) -> None:
    """Say what a kind of job takes: every key, type, default, meaning."""
    from rich.console import Console
    from rich.table import Table

    from cosmic_ray import describe as describing

    if kind is None:
        for known in jobs.KINDS:
            print(f"{known:<16} {(jobs.job_class(known).__doc__ or '').splitlines()[0]}")
        return
    job = jobs.job_class(kind)
    if as_json:
        print(json.dumps(describing.schema(job), indent=1))
        return
    table = Table("key", "type", "default", "meaning", title=f"kind: {kind}", title_justify="left", box=None)
    for key in describing.keys(job):
        table.add_row(key.path, key.type, key.default, key.meaning)
    Console(width=None if sys.stdout.isatty() else 160, markup=False).print(table)


@app.command()
def show(
    uri: Annotated[str, typer.Argument(help="Anything this platform published.")],
    montage: Annotated[str, typer.Option(help="Where a crop store's montage PNG goes.")] = "montage.png",
    as_json: AsJson = False,
) -> None:
    """Print what a published folder holds; a montage of a crop store, or of the crops of a cell store, too."""
    from cosmic_ray import storage
    from cosmic_ray.output import read_manifest
    from cosmic_ray.stores.manifest import CELLS, FORMAT
    from cosmic_ray.stores.show import glance
    from cosmic_ray.stores.show import montage as drawn

    manifest = read_manifest(uri)
    if manifest.get("format") not in (FORMAT, CELLS):
        _print(manifest, as_json)
        return
    about, crops = glance(uri)
    if crops is not None:
        storage.write_bytes(montage, drawn(crops))
        about["montage"] = montage
    _print(about, as_json)


@app.command()
def plan(
    source: Annotated[
        str, typer.Argument(metavar="FILE|STORE", help="A job file (.yaml) that trains, or the URI of a crop store.")
    ],
    step: Annotated[int, typer.Option(help="Which global batch, counted across epochs from 0.")],
    overrides: Overrides = None,
    seed: Annotated[int | None, typer.Option(help="The job's seed.")] = None,
    global_batch: Annotated[int | None, typer.Option(help="The job's global batch, by default 256.")] = None,
    split: Annotated[str | None, typer.Option(help="URI of the job's split.")] = None,
    part: Annotated[str | None, typer.Option(help="Which part of the split, by default train.")] = None,
    lanes: Annotated[int | None, typer.Option(help="The job's data.lanes.")] = None,
    window: Annotated[int | None, typer.Option(help="The job's data.window.")] = None,
    remainder: Annotated[str | None, typer.Option(help="The job's data.remainder.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print the crop ids of one global batch: what was in it where the loss jumped? A job's own file says all; with a
    STORE, give what the job does not leave at its default.
    """
    options = {"seed": seed, "global_batch": global_batch, "split": split, "part": part}
    options |= {"lanes": lanes, "window": window, "remainder": remainder}
    given = {key: value for key, value in options.items() if value is not None}
    if source.endswith((".yaml", ".yml")):
        found = _step_of_job(source, overrides or [], step, given)
    else:
        from cosmic_ray.ingest.show import plan_step

        if overrides:
            raise JobError(overrides[0], source, "a store takes no overrides", "give a job file, or options")
        found = plan_step(source, step=step, **{"seed": 0, "global_batch": 256, **given})
    if as_json:
        print(json.dumps(found))
        return
    say(f"step {found['step']}, epoch {found['epoch']}, {len(found['crop_ids'])} crops")
    print("\n".join(found["crop_ids"]))


@app.command()
def verify(
    uri: Annotated[str, typer.Argument(help="URI of a crop store or a cell store.")],
    as_json: AsJson = False,
) -> None:
    """Read a crop store or a cell store again from end to end and check every sum; exit 1 where something is wrong."""
    from cosmic_ray.stores.cells_verify import verify_published

    with progress("verify", None, "shards") as shown:
        problems = verify_published(uri, shown)
    if as_json:
        print(json.dumps({"uri": uri, "problems": problems}))
    else:
        print("\n".join(problems) or f"{uri}: whole")
    sys.exit(1 if problems else 0)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(
    context: typer.Context,
    name: Annotated[str | None, typer.Argument(help="A benchmark; without one, list them.")] = None,
) -> None:
    """Run one of tests/benchmarks from a checkout; what follows NAME goes to it (--help among them)."""
    folder = Path(__file__).parents[1] / "tests" / "benchmarks"
    known = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    if not known:
        raise JobError("bench", str(folder), "the benchmarks are part of a checkout, not of the installed package")
    if name in (None, "-h", "--help"):
        print("\n".join(known))
        return
    if name not in known:
        raise JobError("NAME", name, "unknown benchmark", f"one of {', '.join(known)}")
    sys.exit(subprocess.call([sys.executable, str(folder / f"{name}.py"), *context.args], env=os.environ))


def _for_a_cluster(file: str, overrides: list[str]) -> Job:
    """A job that may go to another machine.

    Raises:
        JobError: for what would mean another thing there.
    """
    from cosmic_ray.reach import require_reachable
    from cosmic_ray.submit import require_no_secrets

    job = jobs.load(file, overrides)
    require_reachable(job)
    require_no_secrets(job)
    return job


def _step_of_job(file: str, overrides: list[str], step: int, given: dict[str, Any]) -> dict[str, Any]:
    from cosmic_ray.ingest.show import crops_of_step
    from cosmic_ray.training.base import TrainingJob

    for key, value in given.items():
        raise JobError(f"--{key.replace('_', '-')}", value, "the job file says this", "override its key as KEY=VALUE")
    job = jobs.load(file, overrides)
    if not isinstance(job, TrainingJob):
        raise JobError("kind", job.kind, "this kind has no plan", "give the file of a job that trains, as pretrain-mae")
    stage = job.stage()
    return crops_of_step(stage.store, stage.plan, step)


def _print(result: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(result))
    else:
        import yaml

        print(yaml.safe_dump(result, sort_keys=False, allow_unicode=True, width=120), end="")


if __name__ == "__main__":
    main()
