"""The dashboard in a real browser: what it shows, its keyboard, its token, faults of the server, and accessibility.

It needs the extra `browser` and Chromium: Debian's package `chromium`, or `playwright install chromium`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from servers import Client, free_port, infer_body, serve_runtime, start

from mexit import Runtime
from mexit.serving import uvicorn_server

playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra browser")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs the extra browser")
pytestmark = pytest.mark.long

Images = NDArray[np.float32]
WIDE, PHONE = (1280, 900), (390, 844)
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    with playwright.sync_playwright() as driver:
        if program is None and not Path(driver.chromium.executable_path).exists():
            pytest.skip("needs Chromium: install Debian's chromium, or run playwright install chromium")
        chromium = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])  # containers run as root
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser: Any) -> Iterator[Callable[..., Any]]:
    """Opens the dashboard of a server; an error or a message in the browser's console fails the test."""
    messages: list[str] = []

    def open_page(client: Client, size: tuple[int, int] = WIDE, scheme: str = "light", ready: str = ".model") -> Any:
        context = browser.new_context(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
        page = context.new_page()
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.on(
            "request", lambda request: request.url.startswith((client.url, "blob:")) or messages.append(request.url)
        )
        page.goto(f"{client.url}/")
        page.wait_for_selector(ready)
        return page

    open_page.messages = messages  # type: ignore[attr-defined]
    yield open_page
    for context in browser.contexts:
        context.close()
    assert not [text for text in messages if "Failed to load resource" not in text]


def drop(page: Any, picture: bytes) -> None:
    """Choose a picture, and wait for its answer."""
    page.set_input_files("#file", {"name": "digit.png", "mimeType": "image/png", "buffer": picture})
    page.wait_for_selector("#answer[aria-busy=false] .ladder")


def violations(page: Any) -> list[str]:
    """What axe finds against the rules of WCAG and its best practices."""
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in axe.Axe().run(page).response["violations"]]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, PHONE], ids=["wide", "phone"])
def test_it_is_accessible_and_fits(
    mixed_bundle: Path, sample_png: bytes, show: Callable[..., Any], size: tuple[int, int], scheme: str
) -> None:
    with serve_runtime(Runtime.open(mixed_bundle, rate="1G")) as client:
        page = show(client, size, scheme)
        drop(page, sample_png)
        assert not violations(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert not show.messages  # type: ignore[attr-defined]


def test_it_shows_the_server_s_counts(mixed_bundle: Path, images: Images, show: Callable[..., Any]) -> None:
    with serve_runtime(Runtime.open(mixed_bundle, "medium")) as client:
        page = show(client)
        for _ in range(3):
            client.ask("POST", "/v2/models/digits/infer", infer_body(images))
        client.ask("POST", "/v1/classify", b"no picture")
        page.get_by_text("180 since the start").wait_for()
        [model] = client.json("GET", "/v1/stats")[1]["models"]
        for row, exit in zip(page.locator(".exits tbody tr").all(), model["exits"], strict=True):
            assert row.locator("td").nth(1).inner_text() == f"{exit['answers']}"
            assert row.locator("td").nth(0).inner_text() == f"{100 * exit['answers'] / 180:.1f}\u00a0%"
        saved = 1 - model["totals"]["macs"] / model["totals"]["static_macs"]
        assert (
            page.locator(".figure", has_text="MACs saved").locator(".value").inner_text() == f"{100 * saved:.1f}\u00a0%"
        )
        assert page.locator("#errors tbody").inner_text().split() == ["400", "invalid", "request", "or", "image", "1"]
        page.get_by_label("Since the start").check()
        assert page.locator(".exits tbody td").nth(1).inner_text() == f"{model['exits'][0]['answers']}"


def test_a_picture_and_the_budget_with_the_keyboard(
    mixed_bundle: Path, runtime: Runtime, sample_png: bytes, show: Callable[..., Any]
) -> None:
    """The answers are those of the runtime, and the slider moves with the arrow keys."""
    with serve_runtime(Runtime.open(mixed_bundle, "medium")) as client:
        page = show(client)
        drop(page, sample_png)
        [expected] = runtime([sample_png], budget="medium")
        assert page.locator("#answer .label strong").inner_text() == expected.label
        left = page.locator(".ladder li", has_text="left here")
        assert left.locator("h4").inner_text() == f"Exit {expected.exit}"
        page.locator("#budget").focus()
        page.keyboard.press("End")
        page.get_by_text("This budget runs the static network").wait_for()
        assert page.locator("#budget-text").inner_text() == "100 %"
        assert page.locator(".ladder li", has_text="left here").locator("h4").inner_text() == "Exit 3"
        assert page.locator(".ladder li.skipped").count() == 2
        page.keyboard.press("ArrowLeft")
        page.wait_for_function("document.getElementById('budget-text').textContent.startsWith('99')")
        page.locator("#budget").focus()
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "low"
        page.keyboard.press("Enter")
        page.wait_for_function("document.getElementById('budget-text').textContent.startsWith('low')")


def test_every_control_is_reached_by_tab(mixed_bundle: Path, show: Callable[..., Any]) -> None:
    with serve_runtime(Runtime.open(mixed_bundle)) as client:
        page = show(client)
        reached = []
        for _ in range(10):
            page.keyboard.press("Tab")
            script = "(e => e.id || e.textContent.trim() || e.value)(document.activeElement)"
            reached.append(page.evaluate(script))
        expected = ["Skip to the models", "HTTP API", "minute", "Load newest version", "file", "budget"]
        assert [name for name in reached if name in expected] == expected
        assert [name for name in reached if name in ("low", "medium", "high", "full")] == [
            "low",
            "medium",
            "high",
            "full",
        ]


def test_a_faulty_picture(mixed_bundle: Path, show: Callable[..., Any]) -> None:
    with serve_runtime(Runtime.open(mixed_bundle)) as client:
        page = show(client)
        page.set_input_files("#file", {"name": "a.png", "mimeType": "image/png", "buffer": b"\x00\x01\x02 no picture"})
        page.locator("#answer .wrong").wait_for()
        assert page.locator("#answer").inner_text().startswith("No answer: ")


def test_the_token_is_asked_for_and_stays_in_the_tab(mixed_bundle: Path, show: Callable[..., Any]) -> None:
    with serve_runtime(Runtime.open(mixed_bundle), tokens=("right",)) as client:
        page = show(client, ready="dialog[open]")
        assert not violations(page)
        for word in ("wrong", "right"):
            page.locator("#token").fill(word)
            page.keyboard.press("Enter")
            if word == "wrong":
                page.get_by_text("The server does not know this token.").wait_for()
        page.wait_for_selector(".model")
        assert page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        page.reload()
        page.wait_for_selector(".model")
        page.get_by_text("Forget token").click()
        page.wait_for_selector("dialog[open]")
        assert page.evaluate("sessionStorage.length") == 0


def test_loads(bundle_copy: Path, tmp_path: Path, show: Callable[..., Any]) -> None:
    """A version of the same files loads; a damaged one is refused with the reason, and the one in service stays."""
    with start(bundle_copy, tmp_path, budget="full") as server:
        page = show(server)
        card = page.locator(".model")
        card.get_by_role("button").click()
        page.get_by_text("the newest version was loaded").wait_for()
        segment = next(bundle_copy.glob("segments/fp32/1.onnx"))
        segment.write_bytes(segment.read_bytes() + b"x")
        card.get_by_role("button").click()
        page.get_by_text("Not loaded: ").wait_for()
        assert "segments/fp32/1.onnx" in card.locator(".wrong").first.inner_text()
        assert card.locator(".chip").inner_text() == "in service"
        server.ask("POST", "/v2/repository/models/digits/unload")
        page.locator(".model .chip", has_text="unloaded").wait_for()
        assert not violations(page)


def test_cameras(mixed_bundle: Path, images: Images, tmp_path: Path, show: Callable[..., Any]) -> None:
    """A folder of three pictures, which ends, and a camera that is not there."""
    folder = tmp_path / "gate"
    folder.mkdir()
    for k in range(3):
        Image.fromarray((images[k, 0] * 255).astype(np.uint8)).save(folder / f"{k}.png")
    settings = tmp_path / "cameras.toml"
    settings.write_text(
        f'[[camera]]\nname = "gate"\nsource = "{folder}"\nrun = "interval"\ninterval_s = 1000\n'
        f'[[camera]]\nname = "yard"\nsource = "rtsp://127.0.0.1:{free_port()}/none"\n'
    )
    with start(mixed_bundle, tmp_path, cameras=str(settings), workers=0) as server:
        page = show(server, ready=".tile img:not([hidden])")
        gate, yard = (page.get_by_role("article", name=f"Camera {name}") for name in ("gate", "yard"))
        gate.locator(".chip", has_text="ended").wait_for()
        states = {camera["name"]: camera for camera in server.json("GET", "/v1/cameras")[1]}
        assert gate.locator(".label").inner_text() == states["gate"]["answer"]["steady"]
        assert states["gate"]["counters"]["dropped"] == 2
        assert "1 answered" in gate.inner_text()
        assert "2 dropped" in gate.inner_text()
        assert gate.locator("img").evaluate("image => image.naturalWidth") == 8
        yard.locator(".chip", has_text="lost").wait_for()
        assert yard.locator(".label").inner_text() == "no answer yet"
        for tile in (yard, gate):
            tile.get_by_role("button").click()
            assert tile.locator("img").get_attribute("src").endswith("/stream.mjpg")
        assert yard.get_by_role("button").get_attribute("aria-pressed") == "false"
        assert not violations(page)


def test_a_server_that_ends_and_returns(mixed_bundle: Path, show: Callable[..., Any]) -> None:
    runtime = Runtime.open(mixed_bundle)
    port = free_port()
    with serve_runtime(runtime, bound=uvicorn_server.bind("127.0.0.1", port, has_token=False)) as client:
        page = show(client)
    page.get_by_text("No answer from the server").wait_for()
    assert page.locator(".model").is_visible()
    assert not violations(page)
    with serve_runtime(runtime, bound=uvicorn_server.bind("127.0.0.1", port, has_token=False)):
        page.get_by_text("The server answers again").wait_for()
        assert page.locator("#banner").is_hidden()
        page.context.close()
