"""Pack CIFAR into few small files without loss, and unpack them into the layout that mexit reads.

A part holds pictures as lossless WebP mosaics of 32 x 32 tiles, about 1.7 KB a picture, and all labels of the data
set. Pictures that no part holds are blank after unpacking. The splits depend on the labels alone, so they are those
of the complete data set; `present_splits` keeps of each the pictures that exist.
"""

from __future__ import annotations

import io
import json
import pickle
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from mexit.core.atomic_io import read_bytes, read_npz, sha256_bytes, to_json, to_npz, write_bytes
from mexit.data import cifar, registry
from mexit.data.cifar import LAYOUTS, SIDE
from mexit.data.dataset import ArrayImages, DataSet, evenly_spaced
from mexit.data.splits import NAMES, Splits, split
from mexit.errors import Damaged, NotFound, UsageError

Index = NDArray[np.int64]
Pictures = NDArray[np.uint8]

SUFFIX = ".part.npz"
PRESENT = "present.npz"
MNIST_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
COLUMNS, TILES = 64, 4096  # of a mosaic
MAX_BYTES = 1 << 30
# Pictures of each split that are packed; None = all. 46,500 of 60,000 take 79 MB.
COUNTS: dict[str, int | None] = {
    "train": None, "selection": 1500, "calibration": 2000, "certification": 1000, "test": 2000,
}  # fmt: skip


@dataclass(frozen=True)
class Present:
    """Which pictures of an unpacked data set exist.

    Attributes:
        full_sha256: sha256 of the complete data set.
        mask: (N,) bool.
        parts: numbers of the unpacked parts, from 1.
        of: number of parts that exist.
    """

    full_sha256: str
    mask: NDArray[np.bool_]
    parts: tuple[int, ...]
    of: int

    @property
    def complete(self) -> bool:
        """Whether every part was unpacked."""
        return len(self.parts) == self.of


def pack(
    name: str, data_dir: Path, out: Path, parts: int, counts: Mapping[str, int | None] = COUNTS, effort: int = 6
) -> list[Path]:
    """Write a data set for the journey.

    Args:
        name: "cifar10", "cifar100" or "mnist", whose original files are copied.
        data_dir: folder of the data sets.
        out: folder of the parts.
        parts: number of files to write for CIFAR.
        counts: pictures of each split, evenly spaced within each class; None = all.
        effort: of the compression, 0 to 6.

    Returns:
        The written files.

    Raises:
        UsageError: another data set.
        NotFound, Damaged: as the readers raise them.
    """
    if name == "mnist":
        return _copy_mnist(data_dir, out / "mnist")
    if name not in LAYOUTS:
        raise UsageError(f"cannot pack '{name}': choose from mnist, {', '.join(LAYOUTS)}")
    data = registry.load(name, data_dir)
    assert isinstance(data.images, ArrayImages)
    index = packed_positions(data, counts)
    written = []
    for number in range(1, parts + 1):
        # Every part holds an equal share of each split, so one part alone can be trained on.
        content = _part_bytes(data, data.images.array, index[number - 1 :: parts], number, parts, effort)
        written.append(out / f"{name}-{number}of{parts}{SUFFIX}")
        write_bytes(written[-1], content)
    return written


def packed_positions(data: DataSet, counts: Mapping[str, int | None]) -> Index:
    """Sorted positions of the packed pictures. Test pictures are evenly spaced, others so within each class."""
    chosen = []
    for name, part in split(data).parts.items():
        ordered = part if name == "test" else part[np.argsort(data.labels[part], kind="stable")]
        chosen.append(evenly_spaced(ordered, counts[name]))
    return np.sort(np.concatenate(chosen))


def unpack(part: Path, data_dir: Path) -> Present:
    """Add the pictures of a part to the data set below `data_dir`.

    Raises:
        NotFound: the part does not exist.
        Damaged: the part is not readable, or belongs to another data set than what is there.
    """
    arrays, meta = _read_part(part)
    layout = LAYOUTS[meta["data"]]
    folder, labels, index = data_dir / layout.folder, arrays["labels"].astype(np.int64), arrays["index"]
    before = read_present(folder)
    if before is None:
        images = np.zeros((len(labels), SIDE, SIDE, 3), np.uint8)
        before = Present(meta["full_sha256"], np.zeros(len(labels), bool), (), meta["of"])
    else:
        stored = cifar.load(meta["data"], data_dir).images
        assert isinstance(stored, ArrayImages)
        images = stored.array.copy()
    if before.full_sha256 != meta["full_sha256"]:
        raise Damaged(f"{part} belongs to another data set than {folder}: unpack into an empty folder")
    images[index] = _decode(arrays, len(index))
    if sha256_bytes(np.ascontiguousarray(images[index]).tobytes()) != meta["sha256"]:
        raise Damaged(f"{part}: its pictures are not those that were packed")
    _write_batches(folder, layout, images, labels, meta)
    mask = before.mask.copy()
    mask[index] = True
    present = Present(before.full_sha256, mask, tuple(sorted({*before.parts, meta["number"]})), meta["of"])
    about = {"full_sha256": present.full_sha256, "parts": json.dumps(present.parts), "of": str(present.of)}
    write_bytes(folder / PRESENT, to_npz(about=about, mask=mask))
    return present


def read_present(folder: Path) -> Present | None:
    """Which pictures of the unpacked data set in `folder` exist; None if it was not unpacked from parts."""
    try:
        arrays = read_npz(read_bytes(folder / PRESENT, "picture mask", MAX_BYTES), MAX_BYTES)
    except NotFound:
        return None
    about = json.loads(arrays["about"].tobytes())
    return Present(about["full_sha256"], arrays["mask"], tuple(json.loads(about["parts"])), int(about["of"]))


def load(name: str, data_dir: Path) -> tuple[DataSet, Present | None]:
    """A data set, and which of its pictures exist; None = all."""
    folder = LAYOUTS[name].folder if name in LAYOUTS else name
    return registry.load(name, data_dir), read_present(data_dir / folder)


def present_splits(splits: Splits, present: Present | None) -> Splits:
    """Of each split, the pictures that exist."""
    if present is None:
        return splits
    parts = {name: part[present.mask[part]] for name, part in splits.parts.items()}
    return Splits(splits.data_set, splits.data_sha256, parts)


def complete_splits(splits: Splits, data: DataSet, present: Present | None) -> Splits:
    """The splits of the complete data set of which `splits` are the pictures that exist.

    The training split is kept: all its pictures exist, or it was thinned.
    """
    if present is None:
        return splits
    full = split(data).parts
    parts = {name: splits.parts[name] if name == "train" else full[name] for name in NAMES}
    return Splits(splits.data_set, present.full_sha256, parts)


def _copy_mnist(data_dir: Path, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for name in MNIST_FILES:
        matches = sorted((data_dir / "mnist").glob(f"{name}*"))
        if not matches:
            raise NotFound(f"no {name}* in {data_dir / 'mnist'}")
        written.append(Path(shutil.copyfile(matches[0], out / matches[0].name)))
    return written


def _part_bytes(data: DataSet, images: Pictures, index: Index, number: int, of: int, effort: int) -> bytes:
    pictures = images[index]
    about = {
        "data": data.name, "full_sha256": data.sha256, "sha256": sha256_bytes(pictures.tobytes()),
        "classes": list(data.classes), "test": len(split(data).part("test")), "number": number, "of": of,
    }  # fmt: skip
    groups = [pictures[start : start + TILES] for start in range(0, len(pictures), TILES)]
    with ThreadPoolExecutor() as pool:
        mosaics = list(pool.map(partial(_encode, effort=effort), groups))
    labels = data.labels.astype(np.uint8)
    arrays = {f"mosaic{k}": np.frombuffer(content, np.uint8) for k, content in enumerate(mosaics)}
    about_bytes = np.frombuffer(to_json(about), np.uint8)
    return to_npz(about=about_bytes, index=index, labels=labels, **arrays)


def _encode(pictures: Pictures, effort: int) -> bytes:
    """Pictures (n, 32, 32, 3) as one lossless WebP; missing tiles of the last row are black."""
    rows = -(-len(pictures) // COLUMNS)
    tiles = np.zeros((rows * COLUMNS, SIDE, SIDE, 3), np.uint8)
    tiles[: len(pictures)] = pictures
    mosaic = tiles.reshape(rows, COLUMNS, SIDE, SIDE, 3).transpose(0, 2, 1, 3, 4)
    buffer = io.BytesIO()
    image = Image.fromarray(mosaic.reshape(rows * SIDE, COLUMNS * SIDE, 3))
    image.save(buffer, "WEBP", lossless=True, quality=100, method=effort)
    return buffer.getvalue()


def _decode(arrays: dict[str, NDArray[Any]], count: int) -> Pictures:
    tiles = []
    for k in range(-(-count // TILES)):
        mosaic = np.asarray(Image.open(io.BytesIO(arrays[f"mosaic{k}"].tobytes())).convert("RGB"))
        rows = mosaic.shape[0] // SIDE
        tiles.append(mosaic.reshape(rows, SIDE, COLUMNS, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3))
    return np.concatenate(tiles)[:count]


def _read_part(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    try:
        arrays = read_npz(read_bytes(path, "part", MAX_BYTES), MAX_BYTES)
        return arrays, json.loads(arrays["about"].tobytes())
    except (ValueError, KeyError) as error:
        raise Damaged(f"part {path} is not readable: {error}") from None


def _write_batches(
    folder: Path, layout: cifar.Layout, images: Pictures, labels: Index, meta: Mapping[str, Any]
) -> None:
    """Write the python batches: the test pictures are the last, the training batches share the rest evenly."""
    pixels = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    names = [*layout.train, layout.test]
    bounds = [*np.linspace(0, len(images) - meta["test"], len(layout.train) + 1).astype(int).tolist(), len(images)]
    for name, start, stop in zip(names, bounds[:-1], bounds[1:], strict=True):
        # Protocol 4 stores arrays as the reader expects them; 5 does not.
        batch = {"data": np.ascontiguousarray(pixels[start:stop]), layout.labels: labels[start:stop].tolist()}
        write_bytes(folder / name, pickle.dumps(batch, protocol=4))
    write_bytes(folder / layout.meta, pickle.dumps({layout.names: meta["classes"]}, protocol=4))
