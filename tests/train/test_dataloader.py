"""Batches loaded ahead by threads: pixels, order, bounds and shutdown."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.data import digits, folder
from mexit.data.dataset import DataSet
from mexit.errors import BadInput, UsageError
from mexit.flows.train import TrainOptions, train_model
from mexit.train.dataloader import THREAD_NAME, load_batches, worker_count

SPEC = InputSpec("input", "float32", "NCHW", 3, (24, 24), (0.0, 1.0), PrepareSpec(fit="cover", crop=0.9))
SIZE = 5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 200 digits as JPEG files of several sizes, in three classes."""
    made = tmp_path_factory.mktemp("pictures")
    data = digits.load()
    for position in range(200):
        image = np.asarray(data.images.at(np.array([position]))[0])
        path = made / "abc"[data.labels[position] // 4] / f"{position:03}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(image).resize((30 + position % 7, 30 + position % 5)).save(path, quality=95)
    return made


@pytest.fixture
def pictures(root: Path, tmp_path: Path) -> DataSet:
    """A copy of the images that a test may change."""
    return folder.load(Path(shutil.copytree(root, tmp_path / "pictures")))


def parts_of(data: DataSet) -> list[NDArray[np.int64]]:
    """Batches in a random order; the last batch is smaller."""
    order = np.random.default_rng(0).permutation(len(data) - 2).astype(np.int64)
    return [order[start : start + SIZE] for start in range(0, len(order), SIZE)]


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("workers", [0, 1, 3, 100])
def test_pixels_and_order_are_those_of_the_data_set(root: Path, workers: int) -> None:
    data = folder.load(root)
    parts = parts_of(data)
    batches = list(load_batches(data, parts, SPEC, workers))
    assert len(batches) == len(parts)
    for part, images in zip(parts, batches, strict=True):
        assert images.tobytes() == data.batch(part, SPEC).tobytes()
    assert not threads()


def test_no_batches_are_loaded_from_an_empty_list(root: Path) -> None:
    assert list(load_batches(folder.load(root), [], SPEC, 2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_one_batch_per_worker_is_loaded_ahead(root: Path, workers: int) -> None:
    data = folder.load(root)
    parts = parts_of(data)
    loaded: list[bytes] = []
    ahead = threading.Semaphore(0)

    class RecordingData(DataSet):
        def batch(self, index: NDArray[np.int64], spec: InputSpec) -> NDArray[np.float32]:
            images = data.batch(index, spec)
            loaded.append(index.tobytes())
            ahead.release()
            return images

    recording = RecordingData(**{field.name: getattr(data, field.name) for field in dataclasses.fields(data)})
    with closing(load_batches(recording, parts, SPEC, workers)) as stream:
        next(stream)
        for _ in range(1 + workers):
            assert ahead.acquire(timeout=60)
    assert sorted(loaded) == sorted(part.tobytes() for part in parts[: 1 + workers])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_reported_with_its_batch_and_the_threads_end(pictures: DataSet, workers: int) -> None:
    parts = parts_of(pictures)
    bad = Path(pictures.images.name(int(parts[3][2])).removeprefix("image "))
    bad.write_bytes(bad.read_bytes()[:200])
    stream = load_batches(pictures, parts, SPEC, workers)
    for part in parts[:3]:
        assert next(stream).tobytes() == pictures.batch(part, SPEC).tobytes()
    with pytest.raises(BadInput, match=f"image {bad}: the image is damaged"):
        next(stream)
    assert not threads()


def test_closing_ends_the_threads(root: Path) -> None:
    data = folder.load(root)
    stream = load_batches(data, parts_of(data), SPEC, 2)
    assert not threads(), "no thread starts before the first batch is requested"
    next(stream)
    assert len(threads()) == 2
    stream.close()
    assert not threads()


def test_the_default_is_one_thread_per_core_for_files_and_none_for_arrays(root: Path) -> None:
    files, arrays = folder.load(root), digits.load()
    assert worker_count(files, None) >= 1
    assert worker_count(arrays, None) == 0
    assert (worker_count(files, 0), worker_count(arrays, 3)) == (0, 3)
    with pytest.raises(UsageError, match=r"--workers must be at least 0 .*, found -1"):
        worker_count(files, -1)


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of two epochs on the images, by number of workers."""
    home = tmp_path_factory.mktemp("runs")
    data = folder.load(root)
    given = {
        "model": "digits-cnn", "method": "adversarial", "attack": "average", "steps": 1, "epochs": 2, "batch": 16,
        "augment": "crop-flip", "precision": "fp32",
    }  # fmt: skip
    weights = {}
    for workers in (0, 2):
        torch.set_num_threads(1)
        result = train_model(
            data=data.name,
            settings=given,
            out=home / str(workers),
            options=TrainOptions(threads=1, workers=workers),
        )
        weights[workers] = load_file(result.run / "weights.safetensors")
    return weights


@pytest.mark.slow
def test_workers_do_not_change_the_weights(trained: dict[int, dict[str, torch.Tensor]]) -> None:
    for name, value in trained[0].items():
        assert torch.equal(value, trained[2][name]), name
    assert not threads()


def test_a_damaged_image_ends_the_run_with_its_name_and_without_threads(pictures: DataSet, tmp_path: Path) -> None:
    for position in range(len(pictures)):
        path = Path(pictures.images.name(position).removeprefix("image "))
        path.write_bytes(path.read_bytes()[:300])
    given = {"model": "digits-cnn", "method": "clean", "epochs": 1, "batch": 16}
    with pytest.raises(BadInput, match=rf"image {tmp_path}/pictures/./\d\d\d\.jpg: the image is damaged"):
        train_model(
            data=pictures.name, settings=given, out=tmp_path / "run", options=TrainOptions(threads=1, workers=2)
        )
    assert not threads()


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from mexit.core.manifest import InputSpec, PrepareSpec
from mexit.data import folder
from mexit.train.dataloader import load_batches
from mexit.train.precision import keep_freed_memory

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

spec = InputSpec("input", "float32", "NCHW", 3, (224, 224), (0.0, 1.0), PrepareSpec(fit="cover"))
data = folder.load(Path(sys.argv[1]))
keep_freed_memory()
parts = np.array_split(np.arange(len(data), dtype=np.int64), len(data) // 10)
peaks = [peak() for _ in load_batches(data, parts, spec, 2)]
kept = list(load_batches(data, parts, spec, 2))
print(len(data), peaks[len(peaks) // 5], peaks[-1], peak())
"""


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 JPEG files; their tensors have 287 MB."""
    made = tmp_path_factory.mktemp("many")
    for name in ("a", "b"):
        (made / name).mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((256, 240)).save(made / "a" / "000.jpg")
    for position in range(1, 500):
        shutil.copy(made / "a" / "000.jpg", made / "ab"[position % 2] / f"{position:03}.jpg")
    return made


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak of resident memory from /proc")
def test_memory_does_not_grow_with_the_number_of_images(many: Path) -> None:
    """Measured in a separate process, which finally keeps all batches, to show that the measurement would see it."""
    done = subprocess.run([sys.executable, "-c", MEMORY, str(many)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, early, late, all_kept = (float(word) for word in done.stdout.split())
    assert count == 500
    assert late - early < 50, f"{early} MB after a fifth of the images, {late} MB after all"
    assert all_kept - late > 150
