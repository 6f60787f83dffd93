"""`report`: one self-contained HTML page of a whole run, and its figures as `summary.json`."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from cosmic_ray import storage
from cosmic_ray.config import Job, Uri
from cosmic_ray.errors import JobError
from cosmic_ray.output import MANIFEST, claim, encode, read_manifest

HTML, SUMMARY = "report.html", "summary.json"


class Report(Job):
    """Gather what went in, what was left out, how training went and what the embedding knows, on one HTML page.

    Below `out`: `report.html`, which needs nothing beside it, and `summary.json` with its figures.
    """

    kind: ClassVar[str] = "report"

    title: str = "Morphology foundation model"
    """The page's heading."""

    crops: Uri
    """URI of the crop store."""

    split: Uri
    """URI of its split."""

    training: Uri | None = None
    """URI of the training run: its curves and reconstructions."""

    embeddings: Uri | None = None
    """URI of the embeddings of these crops."""

    runs: dict[str, Uri] = {}
    """Name -> URI of further training runs: their curves and pictures."""

    evaluations: dict[str, Uri] = {}
    """Name -> URI of an evaluation of generated cells: generated beside real nuclei, metrics, genes, planted truth."""

    comparisons: dict[str, Uri] = {}
    """Name -> URI of a comparison of arms: its figures and verdicts."""

    seed: int = 0
    """Decides which crops are drawn where not all are."""

    def check(self) -> None:
        """Check that every input is published."""
        for key, uri in self._inputs().items():
            if not storage.exists(storage.join(uri, MANIFEST)):
                raise JobError(key, uri, "nothing is published there", "run the job that makes it first")

    def _inputs(self) -> dict[str, str]:
        """Key -> URI of everything that is given."""
        plain = {key: getattr(self, key) for key in ("crops", "split", "training", "embeddings")}
        named = {
            f"{key}.{name}": uri
            for key in ("runs", "evaluations", "comparisons")
            for name, uri in getattr(self, key).items()
        }
        return {key: uri for key, uri in {**plain, **named}.items() if uri is not None}

    def run(self) -> dict[str, Any]:
        """Write the page.

        Returns:
            `report` and `summary` (URIs), and what `summary.json` holds.
        """
        with claim(self) as output:
            if not output.done:
                self._write(output)
            summary = json.loads(storage.read_bytes(output.at(SUMMARY)))
        return {"report": output.at(HTML), "summary": output.at(SUMMARY), **summary}

    def _write(self, output: Any) -> None:
        from cosmic_ray.evaluation import sections, sections_generated
        from cosmic_ray.evaluation.page import Page
        from cosmic_ray.stores.crops import CropStore
        from cosmic_ray.stores.split import Split

        store = CropStore.open(self.crops)
        split = Split.open(self.split, store)
        parts = [sections.crops(store, split)]
        if self.training is not None:
            parts.append(sections.training(self.training))
        if self.embeddings is not None:
            parts.append(sections.embedding(self.embeddings, store, split, self.seed))
        parts += [sections.training(uri, name) for name, uri in self.runs.items()]
        parts += [sections_generated.evaluation(name, uri, self.seed) for name, uri in self.evaluations.items()]
        parts += [sections_generated.comparison(name, uri) for name, uri in self.comparisons.items()]
        inputs = self._inputs()
        manifests = {key: read_manifest(uri) for key, uri in inputs.items()}
        simulated = store.simulated or any(manifest.get("simulated", False) for manifest in manifests.values())
        summary = {"simulated": simulated} | {key: value for part in parts for key, value in part.facts.items()}
        shape, channels = "x".join(map(str, store.spec.shape)), ", ".join(store.spec.channels)
        page = Page(
            title=self.title,
            subtitle=f"{len(store):,} crops of {shape} ({channels})",
            simulated=simulated,
            tiles=[tile for part in parts for tile in part.tiles],
            sections=[section for part in parts for section in part.sections] + [sections.origin(inputs, manifests)],
        )
        output.write(HTML, page.html().encode())
        output.write(SUMMARY, encode(summary))
        lineage = {uri: manifests[key].get("content_hash", "") for key, uri in inputs.items()}
        output.publish({"format": "cosmic-ray/report", "version": 1, "simulated": simulated,
                        "job": self.resolved(), "lineage": lineage})  # fmt: skip
