"""The file of `mexit camera --config` and `mexit serve --cameras`: cameras and their settings, in TOML.

Every error names the file, the line and the key. The whole file is checked before a source is opened.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from mexit.camera.events import UNSURE_S
from mexit.camera.outputs.message_settings import EVENT_KINDS, MqttSettings, WebhookSettings
from mexit.camera.outputs.open_outputs import FileSettings
from mexit.camera.outputs.output_names import camera_slugs
from mexit.camera.parse_source import parse_source
from mexit.camera.setting_values import (
    Parse,
    broker,
    check_budget,
    check_region,
    choice,
    file_path,
    flag,
    macs_per_second,
    name,
    number,
    share,
    text,
    topic,
    url,
    whole,
    words,
)
from mexit.camera.steady import SteadySettings
from mexit.camera.toml_lines import KeyPath, key_lines, line_of
from mexit.camera.triggers import RUNS, TriggerSettings
from mexit.errors import MexitError, NotFound, UsageError, requires_extra

if sys.version_info >= (3, 11):
    import tomllib
else:
    with requires_extra("camera", "A file of cameras"):
        import tomli as tomllib

T = TypeVar("T")
_AT_LINE = re.compile(r"(?P<cause>.*) \(at line (?P<line>\d+), column \d+\)", re.DOTALL)
_LARGEST_FILE = 1_000_000  # bytes
_OUTPUTS = ("jsonl", "events", "out", "save_unsure")
_KEPT = re.compile(r"[^\w.-]+")  # characters of a source that its camera's name leaves out


@dataclass(frozen=True, kw_only=True)
class CameraSettings(FileSettings):
    """The settings of one camera; the files to write are those of `FileSettings`.

    Attributes:
        name: its name in answers, events, metrics and addresses.
        source: source string, as typed after `--source`, possibly with a password.
        budget: budget of each frame; None: that of the file.
        steady: region, trigger, reused answers and votes; each of their settings is a key of the file.
        unsure_s: seconds without a steady label until the event "unsure".
        frozen_s: seconds without any change of the picture until the event "camera-frozen"; 0: never.
        insecure: accept any certificate of a server with TLS.
        deadline_ms: deadline of each frame, milliseconds.
    """

    name: str
    source: str = field(repr=False)
    budget: str | None = None
    steady: SteadySettings = field(default_factory=SteadySettings)
    unsure_s: float = UNSURE_S
    frozen_s: float = 60.0
    insecure: bool = False
    deadline_ms: float | None = None


@dataclass(frozen=True)
class CamerasFile:
    """The cameras of a file and what they share; None where the file does not set a value.

    Attributes:
        cameras: their settings, with distinct names and outputs.
        rate, burst: one rate limit of all cameras together, as in `Runtime.open`.
        backend, threads, cost, profile: as in `Runtime.open`.
        budget: of cameras that have none.
        mqtt, webhook: where answers and events go.
    """

    cameras: tuple[CameraSettings, ...]
    rate: str | None = None
    burst: str | None = None
    backend: str | None = None
    threads: int | None = None
    cost: str | None = None
    profile: Path | None = None
    budget: str | None = None
    mqtt: MqttSettings | None = None
    webhook: WebhookSettings | None = None


_CAMERA: Mapping[str, Parse] = {
    "name": name,
    "source": text,
    "budget": check_budget,
    "region": check_region,
    "run": partial(choice, known=RUNS),
    "interval_s": number,
    "motion": share,
    "reuse": flag,
    "reuse_s": number,
    "votes": whole,
    "hold": whole,
    "unsure_s": number,
    "frozen_s": partial(number, zero=True),
    "insecure": flag,
    "deadline_ms": number,
    "jsonl": file_path,
    "events": file_path,
    "jsonl_mb": number,
    "jsonl_keep": partial(whole, least=0),
    "out": partial(file_path, suffix=".mp4"),
    "segment_s": number,
    "out_mb": number,
    "save_unsure": file_path,
    "save_unsure_mb": number,
}
_MQTT: Mapping[str, Parse] = {
    "url": broker,
    "topic": topic,
    "discovery": partial(topic, empty=True),
    "interval_s": number,
}
_WEBHOOK: Mapping[str, Parse] = {
    "url": partial(url, schemes=("http", "https")),
    "events": partial(words, known=EVENT_KINDS),
    "timeout_s": partial(number, most=3600),  # the network's functions end at 24 days
    "retries": partial(whole, least=0),
}
_FILE: Mapping[str, Parse] = {
    "rate": macs_per_second,
    "burst": macs_per_second,
    "backend": text,
    "threads": whole,
    "cost": partial(choice, known=("time", "macs")),
    "profile": file_path,
    "budget": check_budget,
}


def read_cameras_file(path: Path) -> CamerasFile:
    """Read and check a file of cameras.

    Raises:
        NotFound: the file does not exist, or a source in it.
        UsageError: the file is no TOML, or a key or a value is not valid; the message has file, line and key.
    """
    try:
        with path.open("rb") as file:
            encoded = file.read(_LARGEST_FILE + 1)
        content = encoded.decode("utf-8-sig")  # Windows' editors write a mark
    except FileNotFoundError:
        raise NotFound(f"{path} does not exist; docs/camera.md shows a file of cameras") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from None
    if len(encoded) > _LARGEST_FILE:
        raise UsageError(f"{path} has more than {_LARGEST_FILE} bytes: it is no file of cameras")
    try:
        values = tomllib.loads(content)
    except (ValueError, RecursionError) as error:  # also of numbers with thousands of digits, and of deep lists
        raise _syntax_error(path, content, str(error)) from None
    return _Reader(path, key_lines(content)).file(values)


def cameras_of_sources(sources: Sequence[str], **settings: Any) -> tuple[CameraSettings, ...]:
    """Cameras with default settings, named after their sources.

    Args:
        sources: source strings.
        settings: further attributes of every camera.

    Raises:
        UsageError: a source is empty, or an address that is not supported.
        NotFound: a source does not exist.
    """
    cameras: list[CameraSettings] = []
    for source in sources:
        short = _KEPT.sub("-", parse_source(source).name.rpartition("://")[2]).strip("-.") or "camera"
        taken = sum(camera.name.partition(" ")[0] == short for camera in cameras)
        cameras.append(CameraSettings(name=f"{short} {taken + 1}" if taken else short, source=source, **settings))
    return tuple(cameras)


def _syntax_error(path: Path, content: str, message: str) -> UsageError:
    at = _AT_LINE.fullmatch(message)
    line = at["line"] if at else content.count("\n") + 1
    return UsageError(f"{path}:{line}: no valid TOML: {at['cause'] if at else message}")


@dataclass(frozen=True)
class _Reader:
    """Makes settings from the values of one file; its errors name the line."""

    path: Path
    lines: Mapping[KeyPath, int]

    def file(self, values: dict[str, Any]) -> CamerasFile:
        tables = ("mqtt", "webhook", "camera")
        shared = self._table((), "", {key: value for key, value in values.items() if key not in tables}, _FILE, tables)
        found = values.get("camera")
        if not isinstance(found, list) or not found or not all(isinstance(camera, dict) for camera in found):
            raise self._error(("camera",), "", "no camera; expected at least one table [[camera]] with name and source")
        cameras = self._cameras(found)
        mqtt = self._outside(values, "mqtt", MqttSettings, _MQTT)
        if mqtt is not None:
            self._check_topics(cameras)
        return CamerasFile(
            tuple(cameras),
            **shared,
            mqtt=mqtt,
            webhook=self._outside(values, "webhook", WebhookSettings, _WEBHOOK),
        )

    def _cameras(self, found: Sequence[dict[str, Any]]) -> list[CameraSettings]:
        cameras: list[CameraSettings] = []
        outputs: dict[Path, str] = {}
        for position, values in enumerate(found):
            path: KeyPath = ("camera", position)
            given = values.get("name")
            title = f"camera '{given}'" if isinstance(given, str) and given else f"camera {position + 1}"
            camera = self._settings(_camera_settings, path, title, values, _CAMERA)
            if camera.name in [other.name for other in cameras]:
                raise self._error((*path, "name"), title, "name: another camera has it; expected a name of its own")
            self._check_source(camera, path, title)
            for key in _OUTPUTS:
                self._check_output(getattr(camera, key), (*path, key), title, outputs)
            cameras.append(camera)
        self._check_rotated(cameras)
        return cameras

    def _check_topics(self, cameras: Sequence[CameraSettings]) -> None:
        for position in range(len(cameras)):
            try:
                camera_slugs([camera.name for camera in cameras[: position + 1]])
            except UsageError as error:
                raise self._error(("camera", position, "name"), "", f"name: {error}") from None

    def _check_source(self, camera: CameraSettings, path: KeyPath, title: str) -> None:
        try:
            source = parse_source(camera.source)
        except MexitError as error:
            raise self._error((*path, "source"), title, f"source: {error}", type(error)) from None
        files = {file.resolve() for file in source.files}
        for key in ("jsonl", "events", "out"):
            output = getattr(camera, key)
            if output is not None and output.resolve() in files:
                raise self._error((*path, key), title, f"{key}: {output} is the source; expected another file")
        for key, needed in (("segment_s", "out"), ("out_mb", "segment_s")):
            if getattr(camera, key) is not None and getattr(camera, needed) is None:
                raise self._error((*path, key), title, f"{key}: there is no {needed}; expected both or none")

    def _check_output(self, output: Path | None, path: KeyPath, title: str, outputs: dict[Path, str]) -> None:
        if output is None:
            return
        key = str(path[-1])
        if (other := outputs.get(output.resolve())) is not None:
            raise self._error(path, title, f"{key}: {output} is also an output of {other}; expected another path")
        if output.exists() and output.is_dir() != (key == "save_unsure"):
            expected = "folder" if key == "save_unsure" else "file"
            raise self._error(path, title, f"{key}: {output} is no {expected}; expected a {expected}")
        outputs[output.resolve()] = title

    def _check_rotated(self, cameras: Sequence[CameraSettings]) -> None:
        for owner in cameras:
            lines = [] if owner.jsonl_mb is None else [path for path in (owner.jsonl, owner.events) if path is not None]
            rotated = [re.compile(rf"{re.escape(str(path.resolve()))}\.\d+") for path in lines]
            for position, camera in enumerate(cameras):
                for key in _OUTPUTS:
                    output = getattr(camera, key)
                    if output is not None and any(names.fullmatch(str(output.resolve())) for names in rotated):
                        message = f"{key}: {output} is a name of rotated lines of camera '{owner.name}'"
                        title = f"camera '{camera.name}'"
                        raise self._error(("camera", position, key), title, f"{message}; expected another path")

    def _outside(
        self, values: dict[str, Any], key: str, kind: Callable[..., T], parsers: Mapping[str, Parse]
    ) -> T | None:
        found = values.get(key)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self._error((key,), "", f"{key}: found a value; expected a table [{key}]")
        return self._settings(kind, (key,), key, found, parsers)

    def _settings(
        self, kind: Callable[..., T], path: KeyPath, title: str, values: dict[str, Any], parsers: Mapping[str, Parse]
    ) -> T:
        parsed = self._table(path, title, values, parsers)
        try:
            return kind(**parsed)
        except UsageError as error:
            raise self._error(path, title, str(error)) from None
        except TypeError:  # a field without a default
            missing = [key for key in ("name", "source", "url") if key in parsers and key not in parsed]
            raise self._error(path, title, f"{missing[0]} is missing") from None

    def _table(
        self,
        path: KeyPath,
        title: str,
        values: dict[str, Any],
        parsers: Mapping[str, Parse],
        tables: Sequence[str] = (),
    ) -> dict[str, Any]:
        parsed = {}
        for key, value in values.items():
            if key not in parsers:
                raise self._error((*path, key), title, _unknown(key, (*parsers, *tables)))
            try:
                parsed[key] = parsers[key](value)
            except ValueError as error:
                raise self._error((*path, key), title, f"{key}: {error}") from None
        return parsed

    def _error(self, path: KeyPath, title: str, message: str, kind: type[MexitError] = UsageError) -> MexitError:
        where = f"{self.path}:{line_of(self.lines, path)}"
        return kind(": ".join(part for part in (where, title, message) if part))


def _camera_settings(**values: Any) -> CameraSettings:
    """The settings of the keys of one camera."""
    trigger = TriggerSettings(**_take(values, [field.name for field in fields(TriggerSettings)]))
    steady = SteadySettings(trigger=trigger, **_take(values, ("region", "votes", "hold")))
    return CameraSettings(steady=steady, **values)


def _take(values: dict[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """Remove the keys; return those that were there."""
    return {key: values.pop(key) for key in keys if key in values}


def _unknown(key: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    expected = f"the nearest known one is '{near[0]}'" if near else f"expected one of {', '.join(known)}"
    return f"unknown key '{key}'; {expected}"
