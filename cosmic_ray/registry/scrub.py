"""Secrets never reach a log, a manifest or MLflow: they are cut out of whatever is sent there."""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "***"
_SECRET_KEY = re.compile(r"secret|passw|passphrase|token|credential|api_?key|access_?key|private_?key", re.IGNORECASE)
_SECRET_VARIABLES = re.compile(r"SECRET|PASSWORD|TOKEN|CREDENTIAL|ACCESS_KEY|API_KEY")
_USERINFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/@\s?#]+)@")
_QUERY = re.compile(
    r"(?P<name>[?&][^=&\s]*(?:signature|credential|token|secret|key|sig)[^=&\s]*=)[^&\s]+", re.IGNORECASE
)
_AWS_KEY_ID = re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}\b")


def scrub(value: Any) -> Any:
    """`value` (JSON-like) without secrets, which become `***`.

    Hidden are: values under keys that name a secret; the user and password of a URI (`s3://anonymous@` is none);
    signatures in a URI's query; AWS key ids; and the values of this process's secret variables, wherever they stand.
    """
    if isinstance(value, dict):
        return {key: HIDDEN if _names_secret(key, inner) else scrub(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(inner) for inner in value]
    return scrub_text(value) if isinstance(value, str) else value


def scrub_text(text: str) -> str:
    """`scrub` for one string."""
    for secret in _own_secrets():
        text = text.replace(secret, HIDDEN)
    text = _USERINFO.sub(_without_user, text)
    text = _QUERY.sub(rf"\g<name>{HIDDEN}", text)
    return _AWS_KEY_ID.sub(HIDDEN, text)


def _names_secret(key: object, value: object) -> bool:
    """A number under such a key (`tokens: 196`) is a size, not a secret."""
    return isinstance(key, str) and isinstance(value, str) and bool(_SECRET_KEY.search(key))


def _own_secrets() -> list[str]:
    found = [value for name, value in os.environ.items() if _SECRET_VARIABLES.search(name) and len(value) >= 8]
    return sorted(found, key=len, reverse=True)


def _without_user(match: re.Match[str]) -> str:
    return match[0] if match["user"] == "anonymous" else f"{match['scheme']}{HIDDEN}@"
