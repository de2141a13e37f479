"""Send requests to a running `mexit serve`: an image, a batch of tensors at two budgets, and the metrics.

    sh server.sh                         in one terminal
    python client.py [IMAGE]             in another; the default image is a handwritten seven

The protocol is plain HTTP (docs/http-api.md), so the standard library and numpy suffice.
"""

from __future__ import annotations

import argparse
import json
import os
import struct
import sys
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# From UCI's handwritten digits, 17 grey levels.
SEVEN = np.array(
    [
        [0, 0, 7, 8, 13, 16, 15, 1],
        [0, 0, 7, 7, 4, 11, 12, 0],
        [0, 0, 0, 0, 8, 13, 1, 0],
        [0, 4, 8, 8, 15, 15, 6, 0],
        [0, 2, 11, 15, 15, 4, 0, 0],
        [0, 0, 0, 16, 5, 0, 0, 0],
        [0, 0, 9, 15, 1, 0, 0, 0],
        [0, 0, 13, 5, 0, 0, 0, 0],
    ]
)
SEVEN = np.rint(SEVEN * 255 / 16).astype(np.uint8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("image", nargs="?", type=Path, help="PNG, JPEG, ...")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    arguments = parser.parse_args()
    try:
        classify(arguments.url, arguments.image.read_bytes() if arguments.image else png(SEVEN))
        infer(arguments.url)
        print_costs(arguments.url)
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {json.loads(error.read())['error']}")
    except urllib.error.URLError as error:
        sys.exit(f"no server at {arguments.url} ({error.reason}): start server.sh first")


def classify(url: str, image: bytes) -> None:
    """Classify one encoded image."""
    for budget in ("low", "full"):
        answer = json.loads(send(f"{url}/v1/classify?budget={budget}", image))
        print(
            f"budget {budget:4}: {answer['label']} ({answer['confidence']:.0%}) at exit {answer['exit']}, "
            f"{answer['macs']:,} MACs, {answer['saved_macs']:,} saved, {answer['latency_ms']:.2f} ms"
        )


def infer(url: str) -> None:
    """Send a batch as a binary tensor by the Open Inference Protocol."""
    index = json.loads(send(f"{url}/v2/repository/index", b""))
    model = f"{url}/v2/models/{index[0]['name']}"
    input_spec = json.loads(send(model))["inputs"][0]
    images = noisy_sevens(8, input_spec["shape"][1:])
    tensor = {"name": input_spec["name"], "shape": images.shape, "datatype": input_spec["datatype"]}
    tensor["parameters"] = {"binary_data_size": images.nbytes}
    for budget in ("low", "high"):
        head = json.dumps({"inputs": [tensor], "parameters": {"mexit_budget": budget}}).encode()
        headers = {"Inference-Header-Content-Length": str(len(head))}
        response = json.loads(send(f"{model}/infer", head + images.tobytes(), headers))
        outputs = {output["name"]: output["data"] for output in response["outputs"]}
        cost = response["parameters"]["mexit_mean_macs"]
        print(f"budget {budget:4}: exits {outputs['exit']}, {cost:,.0f} MACs on average")


def noisy_sevens(rows: int, shape: list[int]) -> NDArray[np.float32]:
    """Sevens with increasing noise; for another input shape than that of digits, noise alone."""
    noise = np.random.default_rng(0).random((rows, *shape), np.float32)
    share = np.linspace(0, 0.6, rows, dtype=np.float32)[:, None, None, None]
    return (1 - share) * (SEVEN / np.float32(255)) + share * noise if shape == [1, 8, 8] else noise


def print_costs(url: str) -> None:
    """Print the server's counters of predictions and MACs."""
    for line in send(f"{url}/metrics").decode().splitlines():
        if line.startswith(("mexit_predictions_total", "mexit_macs_total", "mexit_static_macs_total")):
            print(line)


def send(url: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> bytes:
    """Send GET, or POST if there is a body; the variable MEXIT_TOKEN holds the token, if any."""
    token = os.environ.get("MEXIT_TOKEN")
    bearer = {"Authorization": f"Bearer {token}"} if token else {}
    with urllib.request.urlopen(urllib.request.Request(url, body, {**bearer, **(headers or {})})) as response:
        content: Any = response.read()
    return bytes(content)


def png(pixels: NDArray[np.uint8]) -> bytes:
    """Encode a grey image as PNG."""
    height, width = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in [(b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")]
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


if __name__ == "__main__":
    main()
