"""SmallCNN has the costs and the initialisation of RDI-Nets' code."""

from __future__ import annotations

from network_costs import convolution_millions

from mexit.models import build_model


def test_costs_are_the_table_of_rdi_nets() -> None:
    """Published: 0.818, 7.00 and 9.25 "MFlops", which are convolution MACs / 2**20 with the exit's own branch only."""
    assert [round(value, 3) for value in convolution_millions("small-cnn")] == [0.818, 7.006, 9.256]


def test_the_last_classifier_starts_at_zero() -> None:
    *_, classifier = build_model("small-cnn", 10).stages[-1].head
    assert not classifier.weight.any()
    assert not classifier.bias.any()
