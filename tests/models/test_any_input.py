"""Networks for images of any shape: logits, normalisation, and the message of those with one shape only."""

from __future__ import annotations

import pytest
import torch

from mexit.errors import UsageError
from mexit.models import ANY_INPUT, MODELS, MultiExit, build_model, model_spec
from mexit.models.exit_costs import exit_costs
from mexit.models.multi_exit import Normalise

SHAPES = [(3, 32, 32), (1, 28, 28), (3, 48, 33), (1, 64, 96), (3, 130, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ANY_INPUT)
def test_every_exit_answers_for_images_of_any_shape(name: str, shape: tuple[int, int, int]) -> None:
    spec = model_spec(name).with_input(shape)
    assert (spec.input.channels, spec.input.size) == (shape[0], shape[1:])
    with torch.device("meta"):
        network = spec.build(7)
        assert network(torch.zeros(2, *shape)).shape == (spec.exits, 2, 7)
    assert network.input_shape == shape


@pytest.mark.parametrize("name", ANY_INPUT)
def test_its_own_shape_gives_the_same_network(name: str) -> None:
    spec = model_spec(name)
    torch.manual_seed(3)
    own = build_model(name, 5).state_dict()
    torch.manual_seed(3)
    again = spec.with_input(spec.input_shape).build(5).state_dict()
    assert own.keys() == again.keys()
    assert all(torch.equal(own[key], again[key]) for key in own)


def test_the_normalisation_is_that_of_the_data_or_a_half() -> None:
    def normalise(network: MultiExit) -> list[list[float]]:
        assert isinstance(network.normalise, Normalise)
        return [[round(value, 4) for value in part.flatten().tolist()] for part in network.normalise.buffers()]

    spec = model_spec("wide-cnn-10m")
    measured = spec.with_input((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert normalise(measured.build(2)) == [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]]
    assert normalise(spec.with_input((1, 32, 32)).build(2)) == [[0.5], [0.5]]
    assert normalise(spec.with_input((3, 48, 48)).build(2)) == normalise(spec.build(2))
    grey = model_spec("small-cnn").with_input((1, 40, 40), (0.25,), (0.125,))
    assert normalise(grey.build(2)) == [[0.25], [0.125]]


def test_the_static_network_takes_the_same_images() -> None:
    spec = model_spec("wide-cnn-20m-single").with_input((1, 48, 48))
    with torch.device("meta"):
        assert spec.build(4)(torch.zeros(3, 1, 48, 48)).shape == (1, 3, 4)


def test_large_images_are_halved_until_they_cost_about_as_much_as_small_ones() -> None:
    spec = model_spec("wide-cnn-20m")
    with torch.device("meta"):
        costs = {side: exit_costs(spec.with_input((3, side, side)).build(10))[-1].macs for side in (32, 64, 128, 256)}
    assert costs[64] < 1.1 * costs[32]
    assert max(costs.values()) < 2.5 * costs[32]


@pytest.mark.parametrize("name", [name for name, spec in MODELS.items() if not spec.any_input])
def test_a_network_of_one_shape_says_so(name: str) -> None:
    with pytest.raises(UsageError, match=r"not of 3 x 50 x 50: leave out --size .* wide-cnn"):
        model_spec(name).with_input((3, 50, 50))


@pytest.mark.parametrize(("name", "side", "least"), [("wide-cnn", 7, 8), ("small-cnn", 13, 14), ("mnist-cnn", 3, 4)])
def test_images_too_small_for_the_network_are_refused(name: str, side: int, least: int) -> None:
    with pytest.raises(UsageError, match=f"at least {least} x {least} pixels, found {side} x 40"):
        model_spec(name).with_input((1, side, 40)).build(3)
