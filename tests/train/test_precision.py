"""The device, arithmetic and threads that a run gets."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from mexit.core.resource_limits import read_limits
from mexit.errors import UsageError
from mexit.models import build_model
from mexit.models.msdnet import Growth
from mexit.train.precision import Precision, select_precision, set_threads


@pytest.fixture
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_bf16_on_the_processor_goes_with_channels_last_and_fp32_is_plain() -> None:
    assert select_precision("bf16", "cpu") == Precision("cpu", bf16=True, channels_last=True)
    assert select_precision("fp32", "cpu") == Precision("cpu", bf16=False, channels_last=False)
    assert select_precision("auto", "cpu") in (
        select_precision("bf16", "cpu"),
        select_precision("fp32", "cpu"),
    )


def test_a_missing_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu': choose auto, cpu or cuda"):
        select_precision("auto", "tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_precision("auto", "auto").device == "cpu"
    with pytest.raises(UsageError, match="choose cpu, or install a CUDA build"):
        select_precision("auto", "cuda")


@pytest.mark.usefixtures("_threads_restored")
def test_processes_on_one_machine_share_its_cores() -> None:
    cores = read_limits().threads
    for count, processes, expected in (
        (None, 1, cores),
        (None, 2, max(1, cores // 2)),
        (None, 1000, 1),
        (3, 2, 3),
    ):
        set_threads(count, processes)
        assert torch.get_num_threads() == expected


def test_only_bfloat16_training_on_the_cpu_makes_gradients_contiguous() -> None:
    for bf16 in (False, True):
        network = Precision("cpu", bf16, channels_last=bf16).prepare(build_model("msdnet-cifar10", 10))
        assert {layer.contiguous_gradients for layer in network.modules() if isinstance(layer, Growth)} == {bf16}
