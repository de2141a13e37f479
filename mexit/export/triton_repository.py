"""Write a bundle as a model repository of Triton: segments, static network, and a model that applies the policy.

    NAME/               Python model: config.pbtxt, labels.txt, 1/model.py, 1/policy.json
    NAME-exit<number>/  the segment up to that exit: config.pbtxt, 1/model.onnx
    NAME-static/        the static network: config.pbtxt, 1/model.onnx

Clients call NAME. The thresholds are those of ONNX Runtime in float32. Needs neither torch nor onnx.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import new_directory, to_json, write_bytes
from mexit.core.budget import NAMED_FRACTIONS, Budget
from mexit.core.bundle import Bundle
from mexit.core.exit_policy import Policy
from mexit.core.manifest import Manifest, SegmentSpec
from mexit.core.policies_file import PARITY, PolicyEntry
from mexit.core.printable import json_text
from mexit.errors import BudgetInfeasible, UsageError

MARK = "# Written by mexit export --triton"
MODEL_SOURCE = Path(__file__).with_name("triton_model.py")
DEFAULT_BUDGET = "low"
MAX_BATCH_SIZE = 64  # larger batches gain nothing on a CPU and delay early answers
# Each instance is a process that waits while a segment runs; the second one keeps the segments busy.
PYTHON_INSTANCES = 2
OUTPUTS = {"probabilities": "FP32", "label": "INT64", "confidence": "FP32", "exit": "INT32", "macs": "INT64"}
TYPES = {"float32": "FP32", "float64": "FP64", "float16": "FP16", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}


def check_target(folder: Path, *, replace: bool) -> None:
    """Check that the repository can be written to `folder`.

    Args:
        folder: the directory; it does not exist, or is empty, or holds a repository that mexit wrote.
        replace: whether such a repository may be replaced.

    Raises:
        UsageError: it exists and is not to be replaced.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file: name another directory after --triton")
    entries = list(folder.iterdir())
    if any(not _is_written(entry) for entry in entries):
        raise UsageError(
            f"{folder} holds other files than those of mexit export --triton, so it is not replaced: name another "
            "directory after --triton, and copy the models into the repository"
        )
    if entries and not replace:
        raise UsageError(f"{folder} exists already: name another directory after --triton, or add --replace")


def write_repository(bundle: Bundle, folder: Path, *, replace: bool = False) -> tuple[str, ...]:
    """Write the repository atomically; returns the names of its models, the one for clients first.

    Args:
        bundle: with thresholds for ONNX Runtime in float32.
        folder: the directory; it does not exist, or is empty, or holds a repository that mexit wrote.
        replace: replace a repository that mexit wrote.

    Raises:
        UsageError: the directory exists and is not to be replaced.
        NotCalibrated: the bundle has no thresholds for ONNX Runtime in float32.
        StalePolicy: the thresholds are of another bundle.
        Damaged: a file of the bundle was changed.
        MexitError: a write fails; nothing is left behind.
    """
    check_target(folder, replace=replace)
    entry = bundle.policies().entry("ort", PARITY, PARITY)
    files = _files(bundle, entry)
    with new_directory(folder, replace=folder.exists()) as temporary:
        for name, content in files.items():
            write_bytes(temporary / name, content)
    return tuple(dict.fromkeys(name.partition("/")[0] for name in files))


def _is_written(model: Path) -> bool:
    """Whether a directory is a model that mexit wrote."""
    config = model / "config.pbtxt"
    return config.is_file() and config.read_bytes().startswith(MARK.encode())


def _files(bundle: Bundle, entry: PolicyEntry) -> dict[str, bytes]:
    """The content of every file by its path in the repository."""
    manifest, variant = bundle.manifest, bundle.manifest.variants[PARITY]
    name, origin = manifest.name, f"{MARK} from the bundle {manifest.name}, model {bundle.id[:12]}.\n"
    policy = policy_file(bundle, entry)
    files = {
        f"{name}/config.pbtxt": (origin + _python_config(manifest, policy["default_budget"])).encode(),
        f"{name}/labels.txt": "".join(f"{one}\n" for one in manifest.classes).encode(),
        f"{name}/1/model.py": MODEL_SOURCE.read_bytes(),
        f"{name}/1/policy.json": to_json(policy),
    }
    graphs = [(spec, bundle.segment(PARITY, k)) for k, spec in enumerate(variant.segments, start=1)]
    if variant.static is not None:
        graphs.append((variant.static, bundle.static(PARITY)))
    for step, (spec, content) in zip([*policy["segments"], policy["static"]], graphs, strict=False):
        files[f"{step['model']}/config.pbtxt"] = (origin + _onnx_config(step["model"], spec)).encode()
        files[f"{step['model']}/1/model.onnx"] = content
    return files


def policy_file(bundle: Bundle, entry: PolicyEntry) -> dict[str, Any]:
    """The content of `policy.json`, which `triton_model` reads.

    Args:
        bundle: the opened bundle.
        entry: its policies for one engine, in MACs.

    Returns:
        JSON values: the segments, costs and scores; `policies`, those of the frontier and last that of `full`;
        `limits`, the MACs of the frontier; `budgets`, the names of budgets and the index of their policy.
    """
    manifest = bundle.manifest
    variant, costs = manifest.variants[PARITY], manifest.costs
    policies = [entry.policy(point) for point in entry.frontier]
    policies.append(policies[-1].without_early_exit())
    budgets = _budget_names(entry, manifest) | {"full": len(policies) - 1}
    names = [f"{manifest.name}-exit{number}" for number in manifest.numbers]
    return {
        "model": bundle.id,
        "classes": list(manifest.classes),
        "input": manifest.input.name,
        "segments": [_step(name, spec) for name, spec in zip(names, variant.segments, strict=True)],
        "static": None if variant.static is None else _step(f"{manifest.name}-static", variant.static),
        "exits": list(manifest.numbers),
        "exit_macs": list(manifest.cumulative_macs),
        "static_macs": int(costs.static),
        "smallest_macs": costs.first,
        "measure": entry.measure,
        "temperatures": list(entry.temperatures),
        "policies": [_policy_json(policy, has_static=variant.static is not None) for policy in policies],
        "limits": [point.budget_macs for point in entry.frontier],
        "budgets": budgets,
        "default_budget": DEFAULT_BUDGET if DEFAULT_BUDGET in budgets else "full",
    }


def _budget_names(entry: PolicyEntry, manifest: Manifest) -> dict[str, int]:
    """The names of the budgets that have a policy, and its index in the frontier; `full` is none of them."""
    found = {}
    for name in sorted({*NAMED_FRACTIONS, *entry.named} - {"full"}):
        with suppress(BudgetInfeasible):
            found[name] = entry.frontier_index(Budget.parse(name, entry.names), manifest.costs)
    return found


def _policy_json(policy: Policy, *, has_static: bool) -> dict[str, Any]:
    """A policy as the Python model applies it: whether the static network runs, thresholds, and the reject option."""
    if has_static:
        policy = policy.alone
    return {
        "static": has_static and policy.static is not None,
        "ensemble": policy.ensemble,
        "thresholds": list(policy.thresholds),
        "reject": None if policy.reject is None else policy.reject_thresholds.tolist(),
        "selective": list(policy.selective),
    }


def _step(model: str, spec: SegmentSpec) -> dict[str, Any]:
    return {
        "model": model,
        "inputs": [tensor.name for tensor in spec.inputs],
        "outputs": [tensor.name for tensor in spec.outputs],
    }


def _onnx_config(model: str, spec: SegmentSpec) -> str:
    """`config.pbtxt` of a segment. One thread: the thread pools of several sessions take each other's processors."""
    tensors = [("input", one) for one in spec.inputs] + [("output", one) for one in spec.outputs]
    lines = [_tensor(kind, tensor.name, TYPES[tensor.dtype], tensor.shape[1:]) for kind, tensor in tensors]
    return _config(model, "onnxruntime", [*lines, _parameter("intra_op_thread_count", "1")])


def _python_config(manifest: Manifest, budget: str) -> str:
    """`config.pbtxt` of the model for clients."""
    lines = [_tensor("input", manifest.input.name, TYPES[manifest.input.dtype], manifest.input.shape)]
    for name, kind in OUTPUTS.items():
        per_class = name == "probabilities"
        labels = f"label_filename: {_quoted('labels.txt')} " if per_class else ""
        lines.append(_tensor("output", name, kind, [len(manifest.classes) if per_class else 1], labels))
    lines.append(f"instance_group {{ kind: KIND_CPU count: {PYTHON_INSTANCES} }}")
    return _config(manifest.name, "python", [*lines, _parameter("budget", budget)])


def _config(name: str, backend: str, lines: Sequence[str]) -> str:
    head = [f"name: {_quoted(name)}", f"backend: {_quoted(backend)}", f"max_batch_size: {MAX_BATCH_SIZE}"]
    return "\n".join([*head, "dynamic_batching { }", *lines, ""])


def _tensor(field: str, name: str, kind: str, sizes: Sequence[int], more: str = "") -> str:
    """An input or output; `sizes` leave out the batch, -1 is any size."""
    return f"{field} {{ name: {_quoted(name)} data_type: TYPE_{kind} dims: {list(sizes)} {more}}}"


def _parameter(key: str, value: str) -> str:
    return f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _quoted(text: str) -> str:
    return json_text(text, ascii_only=False)
