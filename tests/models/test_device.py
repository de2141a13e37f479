"""The device that a setting names, and the float32 arithmetic of reported numbers."""

from __future__ import annotations

import pytest
import torch

from mexit.errors import UsageError
from mexit.models import build_model
from mexit.models.device import device_of, exact_float32, resolve_device


def cuda_settings() -> tuple[str, str]:
    """The arithmetic of float32 matrix products and convolutions on CUDA."""
    return torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]


def test_auto_is_cuda_only_where_torch_finds_it() -> None:
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match="choose auto, cpu or cuda"):
        resolve_device("tpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--device cuda: torch finds no CUDA device"):
        resolve_device("cuda")


def test_the_device_of_a_network_is_that_of_its_parameters() -> None:
    network = build_model("digits-cnn", 10)
    assert device_of(network) == torch.device("cpu")
    assert device_of(network.to("meta")) == torch.device("meta")


def test_exact_float32_switches_tf32_off_and_restores_the_settings() -> None:
    before = cuda_settings()
    assert "tf32" in before, "cuDNN's default"
    with exact_float32():
        assert cuda_settings() == ("ieee", "ieee")
        with exact_float32():
            pass
        assert cuda_settings() == ("ieee", "ieee")
    assert cuda_settings() == before


def test_exact_float32_restores_the_settings_after_an_error() -> None:
    @exact_float32()
    def fail() -> None:
        assert cuda_settings() == ("ieee", "ieee")
        raise RuntimeError

    before = cuda_settings()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            fail()
    assert cuda_settings() == before


def test_exact_float32_does_not_mix_the_two_interfaces_of_torch() -> None:
    """Torch refuses to read `allow_tf32` once the two disagree."""
    with exact_float32():
        pass
    assert torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
