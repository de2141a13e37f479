"""Collect the results of a session in few small files, and bring them into the repository.

    results.json              state, reports, settings, logs and splits; binary files in base64
    weights-K.safetensors     weights of finished runs and checkpoints of unfinished ones, as PATH|TENSOR

Weights are float32, or float16 (matrices only) where the files would be too large otherwise. Splits of finished runs
are written as those of the complete data set, so the runs are evaluated and exported where it exists.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import data_parts
import torch
from context import ROOT
from items import QUEUE
from safetensors import safe_open
from safetensors.torch import save
from state import FILE, State
from torch import Tensor

from mexit.core.atomic_io import read_json, sha256_file, to_json, write_bytes
from mexit.data.splits import Splits
from mexit.errors import Damaged

FORMAT, VERSION = "mexit-gpu-results", 1
MAX_FILES, FILE_BYTES, TOTAL_BYTES = 8, 15_500_000, 60_000_000
HEADER_BYTES = 200_000  # of a safetensors file
LOG_BYTES = 20_000
JSON_FILE, WEIGHTS = "results.json", "weights-{}.safetensors"
STORED = ROOT / "benchmarks" / "results" / "gpu"
CLAIMS = ROOT / "benchmarks" / "results" / "method_claims_gpu"  # a folder of `stored_answers.py`
ZOO, UNFINISHED = ROOT / "zoo" / "gpu", ROOT / "runs" / "gpu"
CHECKPOINT = "checkpoint.safetensors"
SMALL_FILES = ("settings.json", "splits.npz", "log.jsonl")


def collect(folder: Path, data_dir: Path, out: Path) -> list[Path]:
    """Write the results of the state folder into `out`.

    Args:
        folder: the state folder.
        data_dir: the data sets of the runs.
        out: folder of the result files; those of an earlier call are replaced.

    Returns:
        The written files, at most `MAX_FILES` of at most `FILE_BYTES`.
    """
    state = State.read(folder / FILE)
    files: dict[str, dict[str, str]] = {}
    for path in sorted((folder / "items").rglob("*")):
        if path.is_file() and path.name not in ("lock", "splits.npz") and not path.name.startswith("."):
            files[str(path.relative_to(folder))] = _encode(path)
    tensors: dict[str, Path] = {}
    for item in QUEUE:
        run = folder / "runs" / item.name
        if item.kind != "train" or not (run / "settings.json").exists():
            continue
        done = state.is_done(item.name)
        for path in (run / name for name in SMALL_FILES):
            if path.exists():
                files[str(path.relative_to(folder))] = _encode(path)
        if done:
            files[f"runs/{item.name}/splits.npz"] = _complete_splits(run, item.data, data_dir)
        source = run / ("weights.safetensors" if done else CHECKPOINT)
        if source.exists() and (item.keep or not done):
            tensors[str(source.relative_to(folder))] = source
    content = {"format": FORMAT, "version": VERSION, "state": state.to_json(), "files": files}
    out.mkdir(parents=True, exist_ok=True)
    groups = _pack_tensors(tensors, half=False)
    size = sum(len(group) for group in groups)
    if len(groups) > MAX_FILES - 1 or size > TOTAL_BYTES:
        groups = _pack_tensors(tensors, half=True)
    left_out = []
    while len(groups) > MAX_FILES - 1:  # a checkpoint of resnet18 alone takes most of the space
        largest = max(tensors, key=lambda name: tensors[name].stat().st_size)
        left_out.append(largest)
        del tensors[largest]
        groups = _pack_tensors(tensors, half=True)
    if left_out:
        content["left_out"] = f"{', '.join(left_out)}: more than {MAX_FILES} files in all"
    written = []
    for number, group in enumerate(groups, start=1):
        written.append(out / WEIGHTS.format(number))
        write_bytes(written[-1], group)
    content["weights"] = {path.name: sha256_file(path) for path in written}
    written.append(out / JSON_FILE)
    write_bytes(written[-1], to_json(content))  # last: an interrupted collection does not match the files it names
    for stale in set(out.glob(WEIGHTS.format("*"))) - set(written):
        stale.unlink()
    return written


def bring_in(source: Path, root: Path = ROOT) -> list[Path]:
    """Bring the result files in `source` into the repository below `root`.

    Reports and the state go to benchmarks/results/gpu, finished runs to zoo/gpu, unfinished ones to runs/gpu.

    Returns:
        The folders that were written.

    Raises:
        NotFound, Damaged: a result file does not exist or is not readable.
    """
    content = read_json(source / JSON_FILE, "results")
    if content.get("format") != FORMAT or content.get("version") != VERSION:
        raise Damaged(f"{source / JSON_FILE}: expected {FORMAT} {VERSION}, found {content.get('format')}")
    stale = [name for name, digest in content["weights"].items() if _digest(source / name) != digest]
    if stale:
        raise Damaged(f"{source}: {', '.join(stale)} and {JSON_FILE} are not of one collection: bring all files again")
    staged = root / "runs" / ".gpu-import"
    shutil.rmtree(staged, ignore_errors=True)
    write_bytes(staged / FILE, to_json(content["state"]))
    later = State.read(staged / FILE)
    for name, file in content["files"].items():
        write_bytes(_inside(staged, name), _decode(file))
    _unpack_tensors([source / name for name in sorted(content["weights"])], staged)
    stored = root / STORED.relative_to(ROOT)
    written = _place(staged, later, root)
    state = State.read(stored / FILE)
    state.merge(later)
    shutil.rmtree(staged)
    return [stored, *written]


def _digest(path: Path) -> str:
    return sha256_file(path) if path.exists() else ""


def _place(staged: Path, state: State, root: Path) -> list[Path]:
    """Move runs and reports to their places; returns the folders of the runs."""
    stored, written = root / STORED.relative_to(ROOT), []
    for folder in sorted((staged / "items").glob("*")):
        shutil.rmtree(stored / folder.name, ignore_errors=True)
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                claims = path.suffix == ".npz"
                target = root / CLAIMS.relative_to(ROOT) if claims else stored / folder.name
                write_bytes(target / path.relative_to(folder).name, path.read_bytes())
    for run in sorted((staged / "runs").glob("*")):
        done = state.is_done(run.name)
        if done:
            write_bytes(stored / run.name / "settings.json", (run / "settings.json").read_bytes())
        if done and not (run / "weights.safetensors").exists():
            continue  # only its reports are kept
        base, other = (ZOO, UNFINISHED) if done else (UNFINISHED, ZOO)
        target = root / base.relative_to(ROOT) / run.name
        if not done and (target / CHECKPOINT).exists() and not (run / CHECKPOINT).exists():
            continue  # it was left out: the one of an earlier collection is kept
        shutil.rmtree(target, ignore_errors=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(run, target)
        if done:
            shutil.rmtree(root / other.relative_to(ROOT) / run.name, ignore_errors=True)
        written.append(target)
    return written


def _complete_splits(run: Path, name: str, data_dir: Path) -> dict[str, str]:
    data, present = data_parts.load(name, data_dir)
    splits = data_parts.complete_splits(Splits.load(run / "splits.npz"), data, present)
    return {"base64": base64.b64encode(splits.to_bytes()).decode()}


def _encode(path: Path) -> dict[str, str]:
    content = path.read_bytes()
    if path.name == "log.txt":
        content = content[-LOG_BYTES:]
    if path.suffix in (".json", ".jsonl", ".txt"):
        return {"text": content.decode(errors="replace")}
    return {"base64": base64.b64encode(content).decode()}


def _decode(file: Mapping[str, str]) -> bytes:
    return file["text"].encode() if "text" in file else base64.b64decode(file["base64"])


def _inside(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise Damaged(f"the results name a file outside their folder: {name}")
    return path


def _pack_tensors(sources: Mapping[str, Path], half: bool) -> list[bytes]:
    """All tensors, first fit into files of at most `FILE_BYTES`; with `half`, matrices of finished runs in float16."""
    groups: list[dict[str, Tensor]] = []
    sizes: list[int] = []
    metadata: dict[str, str] = {}
    for name, path in sources.items():
        with safe_open(path, framework="pt") as file:
            metadata[name] = json.dumps(file.metadata() or {})
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                value = file.get_tensor(key)
                if half and path.name == "weights.safetensors" and value.ndim > 1 and value.dtype == torch.float32:
                    value = value.half()
                size = value.numel() * value.element_size() + len(name) + len(key) + 100
                fitting = [k for k, used in enumerate(sizes) if used + size <= FILE_BYTES - HEADER_BYTES]
                if not fitting:
                    groups.append({})
                    sizes.append(0)
                k = fitting[0] if fitting else len(groups) - 1
                groups[k][f"{name}|{key}"] = value.contiguous()
                sizes[k] += size
    return [save(group, {"sources": json.dumps(metadata)}) for group in groups]


def _unpack_tensors(files: list[Path], folder: Path) -> None:
    gathered: dict[str, dict[str, Tensor]] = {}
    metadata: dict[str, str] = {}
    for path in files:
        with safe_open(path, framework="pt") as file:
            metadata |= json.loads((file.metadata() or {}).get("sources", "{}"))
            for key in file.keys():  # noqa: SIM118
                name, _, tensor = key.partition("|")
                gathered.setdefault(name, {})[tensor] = file.get_tensor(key)
    for name, tensors in gathered.items():
        write_bytes(_inside(folder, name), save(tensors, json.loads(metadata[name])))
