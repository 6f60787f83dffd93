"""Two staging buffers in turn: one with the consumer, one being filled."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Staging:
    """Hands out one of two buffers at a time, page-locked where CUDA is there, so that copies to it run beside work."""

    def __init__(self, rows: int, shape: tuple[int, int, int]):
        import torch

        self._cuda = torch.cuda.is_available()
        room = max(rows, 1)
        self._buffers = [torch.empty((room, *shape), dtype=torch.uint8, pin_memory=self._cuda) for _ in range(2)]
        self._copied: list[torch.cuda.Event | None] = [None, None]

    def take(self, rows: int) -> torch.Tensor:
        """The other buffer's first `rows`, uint8 (rows, C, H, W), once the device has copied what was in it."""
        import torch

        if self._cuda:
            # The consumer has enqueued its copy of the buffer that it holds; this marks the end of that copy.
            self._copied[0] = torch.cuda.Event()
            self._copied[0].record()
        self._buffers.reverse()
        self._copied.reverse()
        if self._copied[0] is not None:
            self._copied[0].synchronize()
        return self._buffers[0][:rows]
