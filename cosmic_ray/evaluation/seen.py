"""What stands behind generated cells: every fitted thing in their lineage, and whether it has seen the cells judged.

A lineage names its inputs as {"uri", "content_hash" or "digest"}, with the `lineage` of a model inside or not, or, in
crop stores, as URI -> hash. What does not tell its own lineage is looked up at its URI. What cannot be looked up is an
objection: nobody knows what it was fitted on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cosmic_ray import storage
from cosmic_ray.errors import DataError
from cosmic_ray.output import MANIFEST, read_manifest
from cosmic_ray.stores.cells import CellStore
from cosmic_ray.stores.crops import CropStore
from cosmic_ray.stores.embeddings import FORMAT as EMBEDDINGS
from cosmic_ray.stores.manifest import CELLS
from cosmic_ray.stores.manifest import FORMAT as CROPS
from cosmic_ray.stores.split import FORMAT as SPLIT
from cosmic_ray.stores.split import Split

FITTED_ON = ("store", "split")
_HASHES = ("content_hash", "digest")
_DATA = (CELLS, SPLIT)
_MADE_BY = "model"
"""Names the model in the lineage of embeddings, which are not fitted themselves."""


@dataclass(frozen=True)
class Fitted:
    """Something that was fitted, and on what."""

    where: str
    """Its place in the lineage: `images.0.model.fm`."""
    uri: str
    store: str | None
    """Content hash of the store; None where its lineage does not say."""
    split: str | None
    """Content hash of the split; None where there was none."""
    part: str
    """The part of the split that it was fitted on."""
    store_uri: str = ""
    split_uri: str = ""

    def told(self) -> dict[str, str]:
        """As the manifest lists it."""
        return {
            "where": self.where,
            "uri": self.uri,
            "store": self.store or "",
            "split": self.split or "",
            "part": self.part,
        }


@dataclass
class Chain:
    """All fitted things behind something, and what could not be followed."""

    known: frozenset[str] = frozenset()
    """Hashes of data that need no looking up, wherever the lineage says they lie: the cells and the split judged by."""
    fitted: list[Fitted] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    """What could not be followed, and why."""
    foreign: list[str] = field(default_factory=list)
    """Ready embeddings that others made: what these were fitted on cannot be known here, and figures say so."""
    tracking: str | None = None
    """Where registered models are."""

    def follow(self, where: str, lineage: Mapping[str, Any]) -> None:
        """Add what a lineage names."""
        for name, node in _named(lineage):
            self._add(f"{where}.{name}", node)

    def add_model(self, where: str, uri: str, lineage: Mapping[str, Any]) -> None:
        """Add a model by its own lineage, and what stands behind it."""
        store, split = (_mapping(lineage.get(key)) for key in FITTED_ON)
        found = Fitted(
            where,
            uri,
            _hash(store),
            _hash(split),
            str(split.get("part", "train")),
            str(store.get("uri", "")),
            str(split.get("uri", "")),
        )
        if all((found.uri, found.store, found.split) != (known.uri, known.store, known.split) for known in self.fitted):
            self.fitted.append(found)
        self.follow(where, {key: node for key, node in lineage.items() if key not in FITTED_ON})

    def _add(self, where: str, node: Mapping[str, Any]) -> None:
        uri, lineage = str(node["uri"]), node.get("lineage")
        if isinstance(lineage, Mapping):
            if _MADE_BY in lineage:
                self._add_embeddings(where, uri, lineage)
            else:
                self.add_model(where, uri, lineage)
            return
        if _hash(node) in self.known:
            return
        try:
            self._look_up(where, uri, _hash(node))
        except DataError as error:
            self.unknown.append(f"{where}: {error}")

    def _add_embeddings(self, where: str, uri: str, lineage: Mapping[str, Any]) -> None:
        """Nothing was fitted to make them, but for the model that made them."""
        made_by = _mapping(lineage.get(_MADE_BY))
        if "uri" in made_by:
            self._add(f"{where}.{_MADE_BY}", made_by)
        else:
            self.foreign.append(f"{where} ({uri})")
        store = _mapping(lineage.get("store"))
        if "uri" in store:  # of generated crops, which have models behind them
            self._add(f"{where}.store", store)

    def _look_up(self, where: str, uri: str, named: str | None) -> None:
        model = _model(uri, self.tracking)
        if model is not None:
            _require_same(uri, named, model.digest)
            self.add_model(where, uri, model.lineage)
            return
        manifest = read_manifest(uri)
        if manifest.get("format") in _DATA:
            return
        _require_same(uri, named, manifest.get("content_hash"))
        if manifest.get("format") == EMBEDDINGS:
            self._add_embeddings(where, uri, manifest["lineage"])
            return
        if manifest.get("format") == CROPS:
            if generated(manifest):
                self.follow(where, manifest["lineage"])
            return
        self.add_model(where, uri, _mapping(manifest.get("lineage")))


def hashes(store: CellStore) -> frozenset[str]:
    """Content hashes of a cell store and of its crops."""
    images = store.manifest.images
    return frozenset([store.content_hash, *([images.content_hash] if images else [])])


def generated(manifest: Mapping[str, Any]) -> bool:
    """Whether a crop store's manifest is that of generated images."""
    return {"cell_id", "sample"} <= set(manifest.get("extra_columns", ()))


def objections(chain: Chain, store: CellStore, split: Split, part: str, cell_ids: Sequence[str]) -> list[str]:
    """Why these cells must not be judged as held out; empty where nothing in the chain has seen them.

    Args:
        chain: all that stands behind what is judged.
        store: the cell store that the cells are of.
        split: the split that says which are held out.
        part: the part that is judged.
        cell_ids: the cells that are judged.
    """
    found = [f"{told}: so nobody knows what it was fitted on" for told in chain.unknown]
    if not (chain.fitted or chain.unknown or chain.foreign):
        found.append("the lineage names no model: nobody knows what made this")
    own = hashes(store)
    for each in chain.fitted:
        name = f"{each.where} ({each.uri})"
        if each.store is None:
            found.append(f"{name}: its lineage does not say what it was fitted on")
        elif each.store in own:
            if each.split is None:
                found.append(f"{name} was fitted on the whole store")
            elif each.split != split.content_hash:
                found.append(f"{name} was fitted by another split of these cells ({each.split_uri})")
            elif each.part == part:
                found.append(f"{name} was fitted on {part}, which is judged here")
        elif each.store in store.manifest.lineage.values() and (seen := _seen_before(each, cell_ids)):
            found.append(f"{name} {seen}")
    return found


def _seen_before(each: Fitted, cell_ids: Sequence[str]) -> str:
    """What is wrong with a model fitted on the crop store that the cells come from; "" where it saw none of them."""
    try:
        crops = CropStore.open(each.store_uri)
        if crops.content_hash != each.store:
            return f"was fitted on the crops that these cells are made of, which are no longer at {each.store_uri}"
        if each.split is None:
            return "was fitted on all of the crops that these cells are made of"
        rows = Split.open(each.split_uri, crops).rows(each.part)
    except DataError as error:
        return f"was fitted on the crops that these cells are made of, and which of them cannot be seen: {error}"
    fitted = set(crops.metadata(["crop_id"], rows)["crop_id"].to_pylist())
    seen = sum(cell_id in fitted for cell_id in cell_ids)
    return f"was fitted on {seen:,} of the {len(cell_ids):,} cells that are judged here" if seen else ""


def _named(tree: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every input that a lineage names, but for stores and splits that tell only what else was fitted on."""
    if isinstance(tree, Mapping) and isinstance(tree.get("uri"), str):
        yield name or "input", tree
    elif isinstance(tree, Mapping):
        for key, node in tree.items():
            if isinstance(node, str) and "/" in key:
                yield storage.name(key), {"uri": key, "content_hash": node}
            elif not isinstance(node, str):
                yield from _named(node, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, Sequence) and not isinstance(tree, str | bytes):
        for place, node in enumerate(tree):
            yield from _named(node, f"{name}.{place}")


def _model(uri: str, tracking: str | None) -> Any:
    """The configuration of the model at `uri`, or None where something else is there."""
    from cosmic_ray.registry.load import fetch_model
    from cosmic_ray.registry.package import CONFIG, read_config

    if uri.startswith("models:"):
        return fetch_model(uri, tracking=tracking).config
    return read_config(uri) if storage.exists(storage.join(uri, CONFIG)) else None


def _require_same(uri: str, named: str | None, now: str | None) -> None:
    if named is not None and now is not None and named != now:
        raise DataError(uri, "what is there now is not what the lineage names", f"the {MANIFEST} has another hash")


def _hash(node: Mapping[str, Any]) -> str | None:
    return next((str(node[key]) for key in _HASHES if node.get(key)), None)


def _mapping(node: Any) -> Mapping[str, Any]:
    return node if isinstance(node, Mapping) else {}
