"""Other ways to shuffled batches of the same crops, each from its own format and at its best; used by `ingest.py`.

Every one gets raw crops, uncompressed, and hands out whole batches of uint8 in one staging buffer, epoch after epoch.
"""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path

import numpy as np

from cosmic_ray.stores.columns import images
from cosmic_ray.stores.crops import CropStore

Way = Callable[[int], Iterator[int]]
WORKERS = (0, 1, 2)


def peers(store: CropStore, folder: Path, batch: int) -> dict[str, dict[str, Way]]:
    """Every peer that is installed: name -> with so many workers -> way."""
    found: dict[str, dict[str, Way]] = {}
    for name, (module, make) in _PEERS.items():
        if find_spec(module) is None:
            print(f"{name} is not installed: left out")
            continue
        found[name] = {f"{workers} workers": make(store, folder, batch, workers) for workers in WORKERS}
    return found


def memory_map(store: CropStore, folder: Path, batch: int, workers: int) -> Way:
    """A torch DataLoader over a memory map: a shuffle of all rows, whole batches at a time."""
    from torch.utils.data import BatchSampler, RandomSampler

    path = folder / "raw.bin"
    if not path.exists():
        with open(path, "wb") as file:
            for crops in _crops(store):
                crops.tofile(file)
    raw = np.memmap(path, np.uint8, "r", shape=(len(store), *store.spec.shape))
    return _loaded(_Rows(raw), BatchSampler(RandomSampler(raw), batch, drop_last=True), None, workers, batch, store)


def mosaic(store: CropStore, folder: Path, batch: int, workers: int) -> Way:
    """MosaicML streaming from MDS shards on this disk, its own shuffle."""
    from streaming import MDSWriter, StreamingDataset

    home = folder / "mds"
    shape = ",".join(map(str, store.spec.shape))
    if not home.exists():
        with MDSWriter(out=str(home), columns={"image": f"ndarray:uint8:{shape}"}) as writer:
            for crops in _crops(store):
                for crop in crops:
                    writer.write({"image": crop})

    def data() -> StreamingDataset:
        return StreamingDataset(local=str(home), batch_size=batch, shuffle=True, num_canonical_nodes=1)

    return _loaded(data, None, lambda rows: np.stack([row["image"] for row in rows]), workers, batch, store)


def web(store: CropStore, folder: Path, batch: int, workers: int) -> Way:
    """webdataset from tar files on this disk: shards shuffled, then a buffer of 5,000 crops."""
    import webdataset

    home = folder / "tar"
    if not home.exists():
        home.mkdir()
        for number, crops in enumerate(_crops(store)):
            with tarfile.open(home / f"{number:05}.tar", "w") as tar:
                for row, crop in enumerate(crops):
                    about = tarfile.TarInfo(f"{number:05}{row:05}.bin")
                    about.size = crop.nbytes
                    tar.addfile(about, BytesIO(crop.tobytes()))
    files = sorted(map(str, home.iterdir()))

    def stacked(rows: list[dict]) -> np.ndarray:
        return np.frombuffer(b"".join(row["bin"] for row in rows), np.uint8).reshape(-1, *store.spec.shape)

    def data() -> webdataset.WebDataset:
        return webdataset.WebDataset(files, shardshuffle=len(files), empty_check=False).shuffle(5000)

    return _loaded(data, None, stacked, workers, batch, store)


def hugging_face(store: CropStore, folder: Path, batch: int, workers: int) -> Way:
    """Hugging Face datasets: its Arrow file in memory, a shuffle of all rows, whole batches at a time."""
    import datasets
    import pyarrow as pa
    from torch.utils.data import BatchSampler, RandomSampler

    home = folder / "arrow"
    if not home.exists():
        tables = [table.select(["image"]) for table in store.batches(4096, ["image"])]
        datasets.Dataset(pa.concat_tables(tables)).save_to_disk(str(home))
    data = datasets.load_from_disk(str(home)).with_format("arrow")
    sampler = BatchSampler(RandomSampler(data), batch, drop_last=True)
    return _loaded(_Arrow(data, store), sampler, None, workers, batch, store)


class _Rows:
    def __init__(self, raw: np.ndarray):
        self._raw = raw

    def __len__(self) -> int:
        return len(self._raw)

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        return self._raw[rows]


class _Arrow:
    def __init__(self, data: object, store: CropStore):
        self._data, self._spec = data, store.spec

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, rows: list[int]) -> np.ndarray:
        return images(self._data[rows].combine_chunks(), self._spec)


def _loaded(data, sampler, collate, workers: int, batch: int, store: CropStore) -> Way:
    """`data`: a dataset that takes lists of rows, or what makes an iterable one; in a DataLoader, into one buffer."""
    import torch
    from torch.utils.data import DataLoader

    def way(steps: int) -> Iterator[int]:
        staging = torch.empty((batch, *store.spec.shape), dtype=torch.uint8)
        done = 0
        while done < steps:
            source = data if sampler else data()
            size = {"sampler": sampler, "batch_size": None} if sampler else {"batch_size": batch, "drop_last": True}
            for crops in DataLoader(source, **size, collate_fn=collate or np.asarray, num_workers=workers):
                staging.copy_(torch.from_numpy(crops))
                yield len(crops)
                done += 1
                if done == steps:
                    return

    return way


def _crops(store: CropStore) -> Iterator[np.ndarray]:
    for table in store.batches(4096, ["image"]):
        yield images(table, store.spec)


_PEERS: dict[str, tuple[str, Callable[[CropStore, Path, int, int], Way]]] = {
    "torch DataLoader over a memory map, all in RAM": ("torch", memory_map),
    "MosaicML streaming": ("streaming", mosaic),
    "webdataset": ("webdataset", web),
    "Hugging Face datasets": ("datasets", hugging_face),
}
