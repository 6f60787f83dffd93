"""How a training run can end other than well."""

from __future__ import annotations

from cosmic_ray.errors import CosmicError

_SHOWN = 20


class NonFiniteError(CosmicError):
    """A loss or a gradient was not finite: the run stops, and the step's weights are never saved."""

    def __init__(self, step: int, what: str, suspects: list[str], batch: list[str]):
        """Args:
        step: the global batch, from 0.
        what: which number was not finite, and its value.
        suspects: ids of the samples whose loss was not finite; all of the batch where only the gradient was.
        batch: ids of all samples of the global batch.
        """
        self.step, self.what, self.suspects, self.batch = step, what, suspects, batch
        shown = ", ".join(suspects[:_SHOWN]) + (f" and {len(suspects) - _SHOWN} more" if len(suspects) > _SHOWN else "")
        super().__init__(
            f"step {step}: {what}; nothing of this step was saved. Samples: {shown}. "
            "The newest checkpoint is whole: lower optim.lr, set optim.clip, or look at these crops"
        )
