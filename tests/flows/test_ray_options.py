"""Options of `mexit serve` that do not apply to Ray Serve are refused before Ray is needed."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_line import refused

from mexit.errors import UsageError
from mexit.flows.ray_options import read_replicas
from mexit.flows.serve_models import ServeOptions

REFUSED = {
    "--grpc-port 0": "--grpc-port does not apply with --ray",
    "--host unix:/tmp/socket": "--host unix:PATH does not apply with --ray",
    "--tls-cert server.pem": "--tls-cert does not apply with --ray: let the load balancer",
    "--rate 40M": "a rate (--rate, --burst, --client-rate, --client-burst) does not apply with --ray",
    "--client-burst 40M": "a rate (--rate, --burst, --client-rate, --client-burst) does not apply with --ray",
    "--watch-drift 0.01": "--watch-drift does not apply with --ray",
    "--watch": "--watch does not apply with --ray",
    "--cameras cameras.toml": "--cameras does not apply with --ray",
    "--workers 2": "--workers does not apply with --ray: give --min-replicas and --max-replicas",
    "--max-connections 9": "--max-connections does not apply with --ray",
    "--min-replicas 3 --max-replicas 2": "expected 1 <= --min-replicas <= --max-replicas, found 3 and 2",
    "--min-replicas 0": "expected 1 <= --min-replicas <= --max-replicas, found 0 and 4",
}


@pytest.mark.parametrize(("options", "words"), REFUSED.items(), ids=REFUSED.keys())
def test_an_option_that_does_not_apply(digits_bundle: Path, options: str, words: str) -> None:
    assert words in refused("serve", digits_bundle, "--ray", *options.split(), code=2)


@pytest.mark.parametrize("option", ["--min-replicas", "--max-replicas"])
def test_a_number_of_replicas_without_ray(digits_bundle: Path, option: str) -> None:
    assert "add --ray" in refused("serve", digits_bundle, option, 2, code=2)


def test_a_folder_of_models(digits_bundle: Path) -> None:
    assert "give one of its bundles" in refused("serve", digits_bundle.parent, "--ray", code=2)


def test_the_bounds_of_the_number_of_replicas() -> None:
    assert read_replicas(False, None, None) is None
    assert read_replicas(True, None, None) == (1, 4)
    assert read_replicas(True, 6, None) == (6, 6)
    assert read_replicas(True, None, 2) == (1, 2)
    assert ServeOptions().replicas is None
    with pytest.raises(UsageError, match="found 1 and 0"):
        read_replicas(True, None, 0)
