"""Secrets are cut out of whatever is sent to MLflow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmic_ray.registry.scrub import scrub, scrub_text


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("s3://anonymous@bucket/a", "s3://anonymous@bucket/a"),
        ("s3://KEY:SECRET@bucket/a", "s3://***@bucket/a"),
        ("https://user:pass@host:5000/x?y=1", "https://***@host:5000/x?y=1"),
        ("failed: postgresql://me:pw@db/mlflow is down", "failed: postgresql://***@db/mlflow is down"),
        ("https://h/k?X-Amz-Signature=abc123&x=1", "https://h/k?X-Amz-Signature=***&x=1"),
        ("https://h/k?X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F2026", "https://h/k?X-Amz-Credential=***"),
        ("key AKIAIOSFODNN7EXAMPLE was refused", "key *** was refused"),
        ("mail@example.org and /plain/path", "mail@example.org and /plain/path"),
    ],
)
def test_uris_lose_their_secrets(text, clean):
    assert scrub_text(text) == clean


def test_values_under_telling_keys_are_hidden_and_sizes_are_not():
    tree = {"aws_secret_access_key": "abc", "nested": [{"password": "x", "tokens": 196, "lr": 1e-4}], "key": "dna"}
    assert scrub(tree) == {
        "aws_secret_access_key": "***",
        "nested": [{"password": "***", "tokens": 196, "lr": 1e-4}],
        "key": "dna",
    }


def test_this_processes_own_secrets_are_hidden_wherever_they_stand(monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalrXUtnFEMI/K7MDENG")
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "eyJhbGciOi")
    assert scrub({"note": "got wJalrXUtnFEMI/K7MDENG with eyJhbGciOi"}) == {"note": "got *** with ***"}


@given(
    user=st.text(st.characters(exclude_characters="/@?# ", exclude_categories=["Z", "C"]), min_size=1),
    host=st.from_regex(r"[a-z]{1,9}", fullmatch=True),
)
def test_no_userinfo_survives(user, host):
    assert scrub_text(f"https://{user}@{host}/x") == (
        f"https://{user}@{host}/x" if user == "anonymous" else f"https://***@{host}/x"
    )


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner)))
def test_scrubbing_twice_is_scrubbing_once(value):
    assert scrub(scrub(value)) == scrub(value)
