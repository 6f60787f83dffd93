"""Hand a job file to a Ray cluster through Ray Jobs, follow its log, bring back its exit code."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import sys
import time
import uuid
from typing import Any

import yaml

from cosmic_ray.config import Job
from cosmic_ray.errors import CosmicError, JobError
from cosmic_ray.progress import say
from cosmic_ray.reach import TRACKING, relative, untold_tracking, uris
from cosmic_ray.registry.scrub import scrub_text

_AGENT_WAIT_S = 120
_STOP_WAIT_S = 600
"""Ray kills what is still there so long after a stop; by default after 3 s, in which no checkpoint is saved."""
_POLL_S = 1.0
# What they tell (a package is uploaded, a socket closed) is Ray's business, in the middle of the job's log.
_NOISY = ("ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk", "ray._private.runtime_env.packaging")


def entrypoint(path: str) -> str:
    """The command that runs a job file on the head node, where `cosmic_ray` is installed."""
    return f"cosmic-ray run {shlex.quote(path)}"


def submit(job: Job, address: str) -> str:
    """Send the resolved job to the cluster at `address` and return the submission id at once.

    The job file and MLFLOW_TRACKING_URI travel, nothing else: the cluster's nodes hold `cosmic_ray` themselves (see
    `cluster/`), and data has URIs.

    Raises:
        JobError: where no cluster answers at `address`.
    """
    environment = _environment()
    if TRACKING not in environment and (key := untold_tracking(job)):
        say(f"{key} is not given: {TRACKING} in the nodes' environment has to say where MLflow is")
    wanted = {
        "entrypoint": _with_job(job),
        "runtime_env": {"env_vars": environment},
        "metadata": {"kind": job.kind, "out": job.out},
    }
    return _submitted(_client(address), wanted, address)


def follow(address: str, submission: str) -> int:
    """Print the job's log until it ends.

    Returns:
        0 where it succeeded, 130 where it was stopped, else the job's own exit code (1 where Ray does not know it).
    """
    client = _client(address)
    asyncio.run(_tail(client, submission))
    while not (about := client.get_job_info(submission)).status.is_terminal():
        time.sleep(_POLL_S)  # the log has ended, or its connection has
    status = str(about.status.value)
    if status == "SUCCEEDED":
        return 0
    reason = (about.message or "no message").splitlines()[0]
    say(f"{submission}: {status.lower()}: {reason}")
    return 130 if status == "STOPPED" else int(about.driver_exit_code or 1)


def status(address: str, submission: str | None = None) -> list[dict[str, Any]]:
    """What the cluster knows of one submission, or of all, newest first.

    Raises:
        CosmicError: for an unknown submission.
    """
    client = _client(address)
    known = [about for about in client.list_jobs() if about.submission_id]  # others are drivers that just connected
    known.sort(key=lambda about: about.start_time or 0, reverse=True)
    found = [about for about in known if submission in (None, about.submission_id)]
    if submission and not found:
        raise CosmicError(f"{submission}: the cluster at {address} does not know this submission")
    return [
        {
            "submission": about.submission_id,
            "status": str(about.status.value),
            "entrypoint": about.entrypoint,
            "metadata": about.metadata or {},
            "message": about.message,
        }
        for about in found
    ]


def stop(address: str, submission: str) -> None:
    """Ask a running submission to stop; it gets a SIGTERM, on which a training job saves before it ends."""
    _client(address).stop_job(submission)


def require_no_secrets(job: Job) -> None:
    """Refuse a job whose URIs hold passwords or keys: a cluster shows its jobs to everyone, logs and dashboard alike.

    Raises:
        JobError: naming the key.
    """
    for key, uri in uris(job):
        if (shown := scrub_text(uri)) != uri:
            remedy = "leave it to the environment of the nodes: AWS's variables, MLFLOW_TRACKING_USERNAME and _PASSWORD"
            raise JobError(key, shown, "holds a secret, which a cluster shows to everyone", remedy)


def _with_job(job: Job) -> str:
    """The command that runs a job, the job's text included.

    As a file it would lie in a working directory of Ray's, which Ray removes and makes again, under the running job,
    whenever another node that shares its session folder (several nodes on one machine do) needs it first.
    """
    end = f"END-{uuid.uuid4().hex}"
    return f"{entrypoint('-')} <<'{end}'\n{yaml.safe_dump(job.resolved(), sort_keys=False)}{end}\n"


def _environment() -> dict[str, str]:
    """What the job finds in its environment.

    Raises:
        JobError: where MLFLOW_TRACKING_URI is a relative path.
    """
    found = {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}
    tracking = os.environ.get(TRACKING)
    if tracking and scrub_text(tracking) != tracking:
        say(f"{TRACKING} holds a password, which Ray would show to everyone: the nodes need it from elsewhere")
    elif tracking:
        if error := relative(TRACKING, tracking):
            raise error
        found[TRACKING] = tracking
    return found


def _submitted(client: Any, wanted: dict[str, Any], address: str) -> str:
    """Submit; a cluster that has only just started is asked again until its job agent is up."""
    deadline = time.monotonic() + _AGENT_WAIT_S
    while True:
        try:
            return client.submit_job(**wanted)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise CosmicError(f"{address}: the cluster did not take the job: {error}") from None
            time.sleep(1)


async def _tail(client: Any, submission: str) -> None:
    async for lines in client.tail_job_logs(submission):
        sys.stdout.write(lines)
        sys.stdout.flush()


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        return JobSubmissionClient(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        remedy = "give the head's dashboard, http://HEAD:8265, reachable from here"
        raise JobError("--address", address, f"no Ray cluster answers: {error}", remedy) from None
