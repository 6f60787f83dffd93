"""The model card: what a model is, what it was made from, how it fared, and what it is not good for; as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cosmic_ray.registry.lineage import flat
from cosmic_ray.registry.scrub import scrub

_LIMITS = """\
- It has seen crops made as its training crops were: the same stain, mask, intensity mapping and um per pixel. Others
  give embeddings, but not comparable ones.
- An embedding also holds what is not biology: plate, site, focus, batch. Judge differences within a batch, or on data
  split by it.
- For research. Nothing here was checked for diagnosis."""


def encoder_card(
    name: str,
    *,
    recipe: str,
    facts: Mapping[str, Any],
    lineage: Mapping[str, Any],
    metrics: Mapping[str, float],
    simulated: bool,
    job: Mapping[str, Any],
) -> str:
    """The card of a crop encoder.

    Args:
        name: of the model.
        recipe: `paper` or `better`.
        facts: what describes the network: architecture, parameters, embedding width...
        lineage: as in the model folder.
        metrics: last values, by name; each says in its name on which part of the split it was measured.
        simulated: whether any training data was simulated.
        job: the resolved job; secrets are cut out.
    """
    warning = "> **Trained on simulated images.** Its numbers say nothing about real nuclei.\n\n" if simulated else ""
    return (
        f"# {name}\n\n{warning}"
        "An encoder of nucleus crops: a masked autoencoder's encoder, which maps uint8 crops to embeddings "
        f"(recipe `{recipe}`).\n\n"
        "```python\nimport cosmic_ray\n\n"
        f'model = cosmic_ray.load_model("models:/{name}@candidate")\n'
        "embeddings = model.embed(crops)  # uint8 (N, H, W) -> float32 (N, D)\n```\n\n"
        f"## Network\n\n{_table(facts)}\n## Made from\n\n{_table(lineage)}\n## Measured\n\n{_table(metrics)}\n"
        f"## Limits\n\n{_LIMITS}\n\n## Job\n\n{_table(job)}"
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |\n" for key, value in flat(scrub(dict(facts)))]
    return "| | |\n|---|---|\n" + "".join(rows) if rows else "Nothing.\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
