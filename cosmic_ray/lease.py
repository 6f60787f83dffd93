"""A folder for one run at a time, on any storage that can create an object only where there is none.

Leases are numbered: `_lease-00001.json`, `_lease-00002.json`, ... The highest number owns the folder. Its owner
rewrites it every few seconds and marks it released at the end; it stays. Who finds it released, or its owner dead,
creates the next number, which at most one can, and only then removes the lower ones. So a takeover has no moment in
which two hold the folder, and an owner that was thought dead learns from the higher number that it was replaced.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError, FencedError, NotFoundError

BEAT_S = 5.0
SILENT_S = 20.0
"""An owner on another machine is dead when its lease has not changed for so long, by this machine's clock."""
_PREFIX = "_lease-"


class Lease:
    """A claim on a folder."""

    def __init__(self, folder: str):
        self._folder = folder
        self._number = 0
        self._token = uuid.uuid4().hex
        self._beats = 0
        self._confirmed = 0.0
        self._lost = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def acquire(self) -> None:
        """Own the folder.

        Raises:
            FencedError: where a live run owns it; names its host and process.
        """
        while True:
            numbers = self._numbers()
            last = max(numbers, default=0)
            if last and not self._over(last):
                continue
            self._number = last + 1
            try:
                storage.create_bytes(self._uri(self._number), self._record())
            except FileExistsError:
                continue
            # A very slow claimant may create a number that later owners have passed and swept.
            if max(self._numbers()) == self._number:
                break
        for number in numbers:
            storage.delete(self._uri(number))
        self._confirmed = time.monotonic()
        self._thread.start()

    def release(self) -> None:
        """Let the next run have it."""
        self._stop.set()
        self._thread.join()
        if self._lost:
            return
        # Without storage the lease stays as it is, and this process is found dead instead.
        with suppress(CosmicError):
            storage.write_bytes(self._uri(self._number), self._record(released=True))

    def require(self, now: bool = False) -> None:
        """Make sure that the folder is still ours: by the last beat, or by asking storage `now`.

        Raises:
            FencedError: where another run has taken it over.
        """
        if not self._number:
            raise FencedError(f"{self._folder}: already published; nothing more is written here")
        if now or time.monotonic() - self._confirmed > SILENT_S / 2:
            self._confirm()
        if self._lost:
            raise FencedError(f"{self._folder}: this run's claim was taken over by another run")

    def _confirm(self) -> None:
        asked = time.monotonic()
        held = self._read(self._number)
        # The token matters on a server that ignores the condition of a put: there two may create one number.
        mine = held is not None and held["token"] == self._token
        self._lost = self._lost or not mine or max(self._numbers()) != self._number
        self._confirmed = asked

    def _beat(self) -> None:
        while not self._lost and not self._stop.wait(BEAT_S):
            try:
                self._confirm()
                if not self._lost:
                    storage.write_bytes(self._uri(self._number), self._record())
            except CosmicError:
                # Storage is away for now: `require` asks again before anything is published.
                continue

    def _over(self, number: int) -> bool:
        """Whether lease `number` has ended. False: look again, it has just been replaced.

        Raises:
            FencedError: where its owner lives.
        """
        held = self._read(number)
        if held is None:
            return False
        if held["released"]:
            return True
        if held["machine"] == this_machine():
            alive = is_alive(held["pid"], held["born"])
        else:
            time.sleep(SILENT_S)
            alive = self._read(number) != held
        if alive:
            raise FencedError(
                f"{self._folder}: process {held['pid']} on {held['host']} is writing here; "
                "wait for it to end, or choose another out"
            )
        return True

    def _numbers(self) -> list[int]:
        found = storage.listing(self._folder, f"{_PREFIX}*.json")
        return [int(storage.name(uri).removeprefix(_PREFIX).removesuffix(".json")) for uri in found]

    def _uri(self, number: int) -> str:
        return storage.join(self._folder, f"{_PREFIX}{number:05}.json")

    def _read(self, number: int) -> dict[str, Any] | None:
        try:
            return storage.read_json(self._uri(number))
        except NotFoundError:
            return None

    def _record(self, released: bool = False) -> bytes:
        self._beats += 1
        me = psutil.Process()
        owner = {"host": socket.gethostname(), "machine": this_machine(), "pid": me.pid, "born": me.create_time()}
        return json.dumps({**owner, "token": self._token, "beat": self._beats, "released": released}).encode()


def this_machine() -> str:
    """This boot of this machine and its space of process numbers: containers share host names and numbers."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return f"{socket.gethostname()}:{psutil.boot_time()}"


def is_alive(pid: int, born: float) -> bool:
    """Whether the process of this machine with that number, begun at `born` (s since 1970), runs."""
    try:
        process = psutil.Process(pid)
        return abs(process.create_time() - born) < 2.0 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
