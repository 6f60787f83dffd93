"""The model card: what a model is, what it was made from, how it fared, and what it is not good for; as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from cosmic_ray.registry.lineage import flat
from cosmic_ray.registry.scrub import scrub


class _Text(NamedTuple):
    what: str
    use: str
    limits: str


_CARDS = {
    "encoder": _Text(
        "An encoder of nucleus crops: a masked autoencoder's encoder, which maps uint8 crops to embeddings",
        "embeddings = model.embed(crops)  # uint8 (N, H, W) -> float32 (N, D)",
        """\
- It has seen crops made as its training crops were: the same stain, mask, intensity mapping and um per pixel. Others
  give embeddings, but not comparable ones.
- An embedding also holds what is not biology: plate, site, focus, batch. Judge differences within a batch, or on data
  split by it.""",
    ),
    "transcriptome-encoder": _Text(
        "An encoder of transcriptomes: raw counts of cells to latents",
        "latents = model.embed(adata)  # raw counts (N, genes) -> float32 (N, D)",
        """\
- It takes raw counts of the genes that it was fitted on; a sequencing depth or chemistry that it has not seen gives
  latents, but not comparable ones.
- It does not see a cell's batch: one of an unseen batch gets the latent that its counts give it, uncorrected.
- A latent also holds what is not biology: depth, batch, ambient RNA.""",
    ),
    "seq2img": _Text(
        "A diffusion model of nuclei given their cells' transcriptomes: latents to uint8 crops",
        "images = model.sample(latents, cell_ids, seed=0)  # float32 (N, D) -> uint8 (N, C, H, W)",
        """\
- It takes latents of the transcriptome encoder of its lineage, and none other.
- What it draws is a sample of what cells with such a transcriptome looked like in its training data: one of many, not
  a measurement of this cell. What the latent does not tell, it makes up.
- It knows the stain, the optics and the batches that it was trained on, and imitates those, artefacts too.""",
    ),
    "img2seq": _Text(
        "A model of expression given a nucleus's image: features of the morphology FM to log-normalised expression",
        "found = model.sample(features, cell_ids)  # float32 (N, D) -> found.mean, found.samples, found.interval(0.9)",
        """\
- It takes features of the morphology FM of its lineage, and none other.
- For most genes a nucleus's shape says little: read the interval, and the per-gene correlations on held-out cells,
  before the mean.
- Where cell type and batch were confounded in training, it may have learnt the batch.""",
    ),
}


def model_card(
    kind: str,
    name: str,
    *,
    recipe: str,
    facts: Mapping[str, Any],
    lineage: Mapping[str, Any],
    metrics: Mapping[str, float],
    simulated: bool,
    job: Mapping[str, Any],
) -> str:
    """The card of a model.

    Args:
        kind: a key of `registry.kinds.KINDS`.
        name: of the model.
        recipe: `paper` or `better`; of a transcriptome encoder its method.
        facts: what describes the network: architecture, parameters, widths...
        lineage: as in the model folder.
        metrics: last values, by name; each says in its name on which part of the split it was measured.
        simulated: whether any training data was simulated.
        job: the resolved job; secrets are cut out.
    """
    text = _CARDS[kind]
    warning = "> **Trained on simulated data.** Its numbers say nothing about real cells.\n\n" if simulated else ""
    return (
        f"# {name}\n\n{warning}{text.what} (recipe `{recipe}`).\n\n"
        "```python\nimport cosmic_ray\n\n"
        f'model = cosmic_ray.load_model("models:/{name}@candidate")\n{text.use}\n```\n\n'
        f"## Network\n\n{_table(facts)}\n## Made from\n\n{_table(lineage)}\n## Measured\n\n{_table(metrics)}\n"
        f"## Limits\n\n{text.limits}\n- For research. Nothing here was checked for diagnosis.\n\n"
        f"## Job\n\n{_table(job)}"
    )


def _table(facts: Mapping[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |\n" for key, value in flat(scrub(dict(facts)))]
    return "| | |\n|---|---|\n" + "".join(rows) if rows else "Nothing.\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
