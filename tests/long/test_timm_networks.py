"""Networks of timm of ten families: one step of training, export, calibration, and the answers of torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mexit import Bundle, Runtime, UsageError
from mexit.flows.export import ExportOptions, export_bundle
from mexit.flows.train import TrainOptions, train_model
from mexit.models import MultiExit, model_spec
from mexit.models.exit_costs import exit_costs
from mexit.models.multi_exit import keep_exits, single_exit
from mexit.runtime.reference import answer_slowly, run_all_exits
from mexit.train import checkpoint

pytestmark = pytest.mark.long

SIDE = 64
STEP_1 = "weights-epoch0-step1.safetensors"
SETTINGS = {
    "method": "clean", "attack": "none", "epochs": 1, "batch": 8, "lr": 0.001, "weight_decay": 0.0,
    "precision": "fp32", "size": (SIDE, SIDE),
}  # fmt: skip
NETWORKS = {
    "ResNet": "resnet10t",
    "RegNet": "regnety_002",
    "MobileNetV3": "mobilenetv3_small_050",
    "EfficientNet": "efficientnet_lite0",
    "ConvNeXt": "convnext_atto",
    "RepVGG": "repvgg_a0",
    "ViT": "vit_tiny_patch16_224",
    "DeiT": "deit_tiny_distilled_patch16_224",
    "FastViT": "fastvit_t8",
    "MobileViT": "mobilevit_xxs",
}


def random_network(name: str, weights: Path) -> nn.Module:
    """A network whose norms and layer scales are random too, because identities and zeros would hide a difference."""
    timm = pytest.importorskip("timm", exc_type=ImportError, reason="needs the extra timm")
    torch.manual_seed(0)
    module: nn.Module = timm.create_model(name)
    with torch.no_grad():
        for key, values in module.state_dict().items():
            if key.endswith("running_var") or (is_vector(values) and not key.endswith(("bias", "running_mean"))):
                values.uniform_(0.5, 1.5)
            elif is_vector(values):
                values.normal_(0, 0.1)
    torch.save(module.state_dict(), weights)
    if hasattr(module, "set_input_size"):
        module.set_input_size(img_size=(SIDE, SIDE))
    return module.eval()


def is_vector(values: Tensor) -> bool:
    return values.is_floating_point() and values.numel() == max(values.shape, default=0)


@pytest.mark.parametrize("name", NETWORKS.values(), ids=NETWORKS)
def test_a_network_trains_a_step_and_its_bundle_answers_as_torch_does(name: str) -> None:
    run, weights = Path("runs/x"), Path("weights.pth").absolute()
    module = random_network(name, weights)
    spec = model_spec(f"timm:{name}", str(weights)).with_input((3, SIDE, SIDE))
    assert spec.initial is not None
    check_last_exit(module, spec.initial(1000).eval())
    settings = SETTINGS | {"model": f"timm:{name}", "weights": str(weights)}
    options = TrainOptions(device="cpu", threads=1, should_stop=lambda: True)
    assert not train_model("digits", settings=settings, out=run, options=options).finished
    kept = (2, spec.exits - 1, spec.exits)
    result = export_bundle(run, out=Path("bundles/x"), options=ExportOptions(exits=",".join(map(str, kept))))
    assert result.calibration is not None
    network, bundle = checkpoint.load_model(run, STEP_1)[0], Bundle.open(result.bundle)
    assert bundle.manifest.numbers == kept
    check_step(network, weights)
    check_costs(bundle, network)
    check_answers(bundle, network)


def check_last_exit(module: nn.Module, network: MultiExit) -> None:
    """With the classes of the module, the last exit is the module."""
    images = torch.rand(2, *network.input_shape)
    with torch.no_grad():
        expected, logits = module(network.normalise(images)), network(images)[-1]
    assert torch.allclose(logits, expected, atol=1e-5 * float(expected.abs().max()))


def check_step(network: MultiExit, weights: Path) -> None:
    """The step has changed the network's own layers and every new head: a BatchNorm's bias begins at 0."""
    before = torch.load(weights, weights_only=True)
    trained = {name.partition(".trunk.")[2]: values for name, values in network.state_dict().items()}
    changed = [name for name in before.keys() & trained.keys() if not torch.equal(before[name], trained[name])]
    assert len(changed) > len(before) / 2
    for stage in list(network.stages)[:-1]:
        assert stage.head.layers[0].bias.abs().max() > 0


def check_costs(bundle: Bundle, network: MultiExit) -> None:
    """The counts of the exported graphs are those of the torch network."""
    costs = exit_costs(keep_exits(network, bundle.manifest.numbers).eval())
    assert [spec.cumulative_macs for spec in bundle.manifest.exits] == [cost.macs for cost in costs]
    assert bundle.manifest.static is not None
    assert bundle.manifest.static.macs == exit_costs(single_exit(network).eval())[-1].macs
    assert costs[0].macs < 0.9 * costs[-1].macs


def check_answers(bundle: Bundle, network: MultiExit) -> None:
    """Every exit, the static network and every budget answer as torch and the reference engine do."""
    images = np.random.default_rng(0).random((6, *network.input_shape), np.float32)
    with torch.no_grad():
        logits = network(torch.from_numpy(images)).numpy()[[number - 1 for number in bundle.manifest.numbers]]
    assert (logits.std(axis=1) > 1e-3).all(), "logits that do not depend on the image would hide a difference"
    runtime = Runtime.open(bundle.path, "full", backend="ort", threads=1)
    tolerance = 1e-4 * np.abs(logits).max(axis=(1, 2), keepdims=True)
    assert (np.abs(run_all_exits(runtime.backend, images) - logits) < tolerance).all()
    assert runtime.backend.static is not None
    _, static = runtime.backend.static.run(runtime.backend.carry(images))
    assert (np.abs(static - logits[-1]) < tolerance[-1]).all()
    for budget in ("low", "medium", "high", "full"):
        found = runtime.answer_tensor(images, budget=budget)
        exits, probabilities, _ = answer_slowly(runtime.backend, images, runtime.policy(budget), logits.shape[2])
        assert [one.exit for one in found] == [bundle.manifest.numbers[k - 1] for k in exits]
        assert np.allclose([one.probabilities for one in found], probabilities, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9999", "timm has no network 'resnet9999': similar names are "),
        ("resnet18.no_such_weights", r"timm cannot build 'resnet18.no_such_weights': Invalid pretrained tag"),
    ],
)
def test_a_name_that_timm_does_not_know_is_refused(name: str, message: str) -> None:
    pytest.importorskip("timm", exc_type=ImportError, reason="needs the extra timm")
    with pytest.raises(UsageError, match=message):
        model_spec(f"timm:{name}")
