"""Checks of what computes: which engines open, which providers only pretend, in which precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mexit.core.policies import PARITY
from mexit.flows.doctor.finding import Finding, ok, problem, warning
from mexit.flows.doctor.packages import installed
from mexit.flows.doctor.probe import IDLE_S, ask
from mexit.runtime.autotune import DEFAULT
from mexit.runtime.backends.registry import ENGINES

# Of a processor, after the work is done: threads that rest use none, those that spin use one for milliseconds.
SPINNING = 0.02


def engines() -> Iterator[Finding]:
    """Open every engine with a tiny float32 network, each in a process of its own.

    Engines that need other segments are the same libraries; `mexit bench --tune` tries them on a bundle's own.
    """
    answers = {name: ask("engine", name) for name, found in ENGINES.items() if found.variant == PARITY}
    for name, answer in answers.items():
        yield engine(name, answer)
    if not any("right" in answer for answer in answers.values()):
        yield problem("engines", "none opens, so no bundle can be run here", "pip install 'mexit[cpu]'")


def engine(name: str, answer: Mapping[str, Any]) -> Finding:
    """What one engine's probe says."""
    label = f"engine {name}"
    if answer.get("error") == "MissingExtra":
        return ok(label, f"not installed. {answer['message']}")
    why = answer.get("message") or answer.get("failed")
    if why:
        worse = problem if name == DEFAULT else warning
        return worse(label, f"installed, but it does not open: {why}", "mend what it names, or leave that engine")
    if not answer["right"]:
        return problem(
            label, "opens, and gives a wrong answer to a sum in the head", "install another version of it"
        )
    if answer["idle_s"] > SPINNING * IDLE_S:
        share = answer["idle_s"] / IDLE_S
        return warning(
            label,
            f"opens, but its threads spin: {share:.0%} of a processor after the work was done",
            "--threads 1, or give it processors of its own",
        )
    return ok(label, "opens, answers and rests when idle")


def providers() -> Iterator[Finding]:
    """onnxruntime lists what it was compiled for; a session has what could be loaded."""
    if installed("onnxruntime") or installed("onnxruntime-gpu"):
        yield provider_list(ask("providers"))


def provider_list(answer: Mapping[str, Any]) -> Finding:
    """What the providers' probe says."""
    name = "onnxruntime providers"
    if "listed" not in answer:
        why = answer.get("message") or answer.get("failed")
        return problem(
            name,
            f"onnxruntime is recorded as installed but does not work: {why}",
            "pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'mexit[cpu]' or 'mexit[gpu]'",
        )
    pretending = [one for one in answer["listed"] if one not in answer["real"]]
    real = ", ".join(one.removesuffix("ExecutionProvider") for one in answer["real"]) or "none"
    if not pretending:
        return ok(name, f"onnxruntime {answer['version']} has {real}, in a session as in its list")
    names = ", ".join(one.removesuffix("ExecutionProvider") for one in pretending)
    return warning(
        name,
        f"onnxruntime {answer['version']} lists {names}, but a session does not get it: it would silently run on "
        f"{real}",
        "install the driver, CUDA and cuDNN that it was built for; "
        "without a GPU: pip uninstall -y onnxruntime-gpu, then pip install 'mexit[cpu]'",
    )


def openvino() -> Iterator[Finding]:
    """OpenVINO computes in bf16 on its own accord where the processor has AMX or AVX512-BF16."""
    if installed("openvino"):
        yield precision(ask("openvino"))


def precision(answer: Mapping[str, Any]) -> Finding:
    """What OpenVINO's probe says."""
    name = "OpenVINO precision"
    if "hint" not in answer:
        why = answer.get("message") or answer.get("failed")
        return warning(name, f"cannot be read: {why}", "pip install --force-reinstall openvino")
    said = f"OpenVINO {answer['version'].partition('-')[0]}: INFERENCE_PRECISION_HINT reads {answer['hint']}"
    if answer["hint"] in ("float", "f32"):
        return ok(name, said)
    return ok(
        name,
        f"{said}; mexit sets the precision that an engine's name says, programs of your own compute in that one",
        'in those: compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})',
    )
