"""The matcher against cases worked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cosmic_ray.imaging.agreement import Counts, match_centres, match_objects

TRUE = np.zeros((8, 12), np.int32)
TRUE[0:4, 0:4] = 1  # 16 px
TRUE[0:4, 6:10] = 7  # 16 px
TRUE[5:8, 0:6] = 3  # 18 px


def test_iou_worked_by_hand():
    found = np.zeros_like(TRUE)
    found[0:4, 0:3] = 2  # 12 of 16: IoU 0.75
    found[0:4, 8:12] = 1  # 8 shared, union 24: IoU 0.33
    found[5:8, 0:3] = 4  # 9 of 18: IoU 0.5 exactly, which is no match
    found[5:8, 3:6] = 5  # the other half
    counts = match_objects(found, TRUE)
    assert counts == Counts(hits=1, found=4, true=3)
    assert (counts.precision, counts.recall) == (1 / 4, 1 / 3)
    assert counts.f1 == pytest.approx(2 / 7)
    assert match_objects(found, TRUE, iou=0.8).hits == 0
    assert match_objects(TRUE, TRUE) == Counts(3, 3, 3)
    assert match_objects(np.zeros_like(TRUE), TRUE) == Counts(0, 0, 3)


def test_an_iou_without_unique_partners_is_refused():
    with pytest.raises(ValueError, match=r"0\.4"):
        match_objects(TRUE, TRUE, iou=0.4)


def test_counts_add_up_over_fields():
    total = sum([Counts(1, 2, 3), Counts(4, 5, 6)], Counts())
    assert total == Counts(5, 7, 9)
    assert np.isnan(Counts().f1)


def test_centres_are_one_to_one():
    # two centres in object 1 count once; one lies in the background; object 3 is missed
    counts = match_centres(np.array([1.0, 2.4, 2.0, 4.0]), np.array([1.0, 1.0, 7.6, 11.0]), TRUE)
    assert counts == Counts(hits=2, found=4, true=3)
