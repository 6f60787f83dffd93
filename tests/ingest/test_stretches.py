"""A stretch gives each lane its share, batch after batch, however little a lane holds; and back from draw to batch."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmic_ray.ingest.stretches import Stretch


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any), st.data())
def test_batches_partition_the_rows_and_every_draw_finds_its_batch(rows: list[int], data: st.DataObject) -> None:
    batch, base = data.draw(st.integers(1, sum(rows))), data.draw(st.integers(0, 40))
    stretch = Stretch(rows, batch)
    ends = [min(max((k + 1) * batch - base, 0), sum(rows)) for k in range(-(-(base + sum(rows)) // batch))]
    drawn = np.array([stretch.drawn(end) for end in ends])
    assert drawn.sum(axis=1).tolist() == ends and drawn[-1].tolist() == rows
    assert np.diff(drawn, axis=0, prepend=0).min() >= 0
    for lane, held in enumerate(rows):
        if held:
            wanted = np.searchsorted(drawn[:, lane], np.arange(held), side="right")
            assert stretch.batches_of(lane, np.arange(held), base).tolist() == wanted.tolist()
    share = np.multiply.outer(np.array(ends), np.array(rows)) / sum(rows)
    assert np.abs(drawn - share).max() < (1 if stretch.even else len(rows))


def test_a_lane_with_less_than_a_row_a_batch() -> None:
    stretch = Stretch([1, 7, 8], 4)
    assert not stretch.even
    assert [stretch.drawn(x).tolist() for x in (4, 8, 12, 16)] == [[0, 2, 2], [1, 3, 4], [1, 5, 6], [1, 7, 8]]
    assert stretch.batches_of(0, np.arange(1), 0).tolist() == [1]
