"""Tasks on Ray: an error of the user's comes back as it was raised."""

from __future__ import annotations

import pyarrow as pa
import pytest

from cosmic_ray import storage
from cosmic_ray.errors import CosmicError, DataError, JobError, packed, unpacked
from cosmic_ray.imaging.parallel import _call, each
from cosmic_ray.imaging.read import FieldError


@pytest.mark.parametrize(
    "error",
    [
        JobError("source.uri", "ftp://x", "unknown scheme", "use a path"),
        DataError("s3://bucket/a", "no answer"),
        FieldError("a.tif", "truncated", "3 bytes"),
        CosmicError("said"),
    ],
)
def test_an_error_that_was_packed_is_the_same_error(error):
    back = unpacked(packed(error))
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))
    assert back.exit_code == error.exit_code


def test_a_task_returns_its_error_beside_the_results_of_others():
    said = _call(pa.table({"unit": ['{"uri": "s3://a"}', '{"uri": "ftp://a"}']}), storage.is_local, {})
    good, bad = said["result"].to_pylist()
    assert good == "false"
    assert '{"error": ' in bad


@pytest.mark.slow
def test_a_job_error_in_a_task_on_ray_exits_2(ray_local):
    units = [{"uri": "ftp://a"}, {"uri": "ftp://a"}]
    with pytest.raises(JobError) as caught:
        list(each(storage.is_local, units, {}, workers=1, memory_bytes=2**20, seen={}))
    assert (caught.value.exit_code, caught.value.key, caught.value.value) == (2, "uri", "ftp://a")
