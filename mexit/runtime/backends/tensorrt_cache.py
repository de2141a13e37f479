"""Built engines, kept for this device: `$MEXIT_CACHE/<model id>/<device>/engines/<package>/<variant>/<k>/`.

    engine.plan   what TensorRT opens. Opening a plan runs code in it, so none is opened that was not checked
    engine.json   what it is (`Record`), under an HMAC-SHA256 with a key that this device alone has

The key lies in `$MEXIT_CACHE/device.key`, for its owner's eyes only. Who can read it can forge engines; who can
only write to the cache cannot. Both files appear at once or not at all.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mexit.core.atomic_io import (
    new_directory,
    read_bytes,
    read_json,
    sha256_bytes,
    to_json,
    write_bytes,
)
from mexit.core.bundle import MAX_FILE_BYTES, Bundle, inside
from mexit.core.manifest import check_format, read_value
from mexit.errors import Damaged, MexitError, NotFound, SchemaTooNew, Untrusted
from mexit.runtime.backends.tensorrt_builder import Built, EngineConfig
from mexit.runtime.device_cache import cache_folder, cache_root, make_private

FORMAT, VERSION = "mexit-engine", 1
KEY, KEY_BYTES = "device.key", 32
ENGINES, PLAN, RECORD = "engines", "engine.plan", "engine.json"


@dataclass(frozen=True)
class Record:
    """What an engine is.

    Attributes:
        format, version: of this record.
        model, variant, segment: which segment of which bundle, from 1.
        onnx_sha256: of the bytes that it was built from.
        recipe: what it was built with.
        targets: those of the recipe that it runs on.
        plan_sha256, plan_bytes: of the plan.
        seconds: that the build took.
        signature: HMAC-SHA256 of all of these, hexadecimal.
    """

    format: str
    version: int
    model: str
    variant: str
    segment: int
    onnx_sha256: str
    recipe: EngineConfig
    targets: tuple[str, ...]
    plan_sha256: str
    plan_bytes: int
    seconds: float
    signature: str

    def sign(self, key: bytes) -> str:
        """The signature that it should have."""
        return hmac.new(key, to_json(asdict(replace(self, signature=""))), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Slot:
    """The place of one engine.

    Attributes:
        folder: holds its two files.
        bundle: whose segment it runs.
        variant, segment: which one, from 1.
    """

    folder: Path
    bundle: Bundle
    variant: str
    segment: int

    @property
    def onnx_sha256(self) -> str:
        """Of the segment's bytes."""
        return self.bundle.manifest.variants[self.variant].segments[self.segment - 1].sha256

    @property
    def remedy(self) -> str:
        """What to type where its files are not what was written."""
        return f"mexit export {self.bundle.path} --trt --replace builds all engines anew"


@dataclass(frozen=True)
class Engine:
    """A checked plan; `origin` is "cached", "built" just now, or "adopted" from the bundle."""

    record: Record
    plan: bytes
    origin: str


def slot(bundle: Bundle, package: str, variant: str, segment: int) -> Slot:
    """Where this device keeps an engine."""
    return Slot(cache_folder(bundle.id) / ENGINES / package / variant / str(segment), bundle, variant, segment)


def shipped(bundle: Bundle, package: str, variant: str, segment: int) -> Slot:
    """Where a bundle may bring an engine along, laid out as in a cache. Raises `Untrusted` for links out of it."""
    folder = f"{ENGINES}/{package}/{variant}/{segment}"
    for file in (PLAN, RECORD):
        inside(bundle.path, f"{folder}/{file}")
    return Slot(bundle.path / folder, bundle, variant, segment)


def provide(
    place: Slot,
    recipe: EngineConfig,
    build: Callable[[], Built],
    *,
    replace_it: bool = False,
    trusted: Slot | None = None,
) -> Engine:
    """The engine of a place: the one that is there, else one that is built and kept.

    Args:
        place: from `slot`.
        recipe: an engine of another recipe is stale and replaced.
        build: builds it.
        replace_it: build in any case, without a look at what is there.
        trusted: where the bundle brings an engine that the user trusts; taken before one is built.

    Raises:
        Untrusted, Damaged: what is there was not signed by this device, or changed since; see `load`.
        BackendError: it cannot be built.
        MexitError: it cannot be kept.
    """
    found = None if replace_it else load_or_none(place, device_key())
    if found is not None and not changes(found.record, recipe, place):
        return found
    found = load_or_none(trusted, None) if trusted else None
    if found is not None and not changes(found.record, recipe, place):
        _store(place, found.record, found.plan)
        return replace(found, origin="adopted")
    built = build()
    record = Record(
        FORMAT, VERSION, place.bundle.id, place.variant, place.segment, place.onnx_sha256, recipe, built.targets,
        sha256_bytes(built.plan), len(built.plan), built.seconds, "",
    )  # fmt: skip
    return Engine(_store(place, record, built.plan), built.plan, "built")


def load_or_none(place: Slot, key: bytes | None) -> Engine | None:
    """As `load`; None where no engine is kept."""
    try:
        return load(place, key)
    except NotFound:
        return None


def load(place: Slot, key: bytes | None) -> Engine:
    """Read and check an engine. The plan that is returned is the very bytes that were checked.

    Args:
        place: where.
        key: of this device; None leaves the signature unchecked, for engines that the user says to trust.

    Raises:
        NotFound: none is kept there.
        Untrusted: the signature is not of this key, or the engine is another segment's.
        Damaged: a file is not what was written.
        SchemaTooNew: a newer mexit wrote it.
    """
    record = read_record(place)
    path = place.folder / RECORD
    if key is not None and not hmac.compare_digest(record.signature, record.sign(key)):
        raise Untrusted(
            f"{path} was changed, or was not written by this device, so its engine is not opened, which would "
            f"run code in it: {place.remedy}"
        )
    found = (record.model, record.variant, record.segment)
    expected = (place.bundle.id, place.variant, place.segment)
    if found != expected:
        raise Untrusted(f"{path} is {_say(*found)}, expected is {_say(*expected)}: {place.remedy}")
    plan = read_bytes(place.folder / PLAN, "engine", MAX_FILE_BYTES)
    if len(plan) != record.plan_bytes or sha256_bytes(plan) != record.plan_sha256:
        raise Damaged(
            f"{place.folder / PLAN} was changed: its sha256 is not the recorded one, so it is not opened: "
            f"{place.remedy}"
        )
    return Engine(record, plan, "cached")


def read_record(place: Slot) -> Record:
    """What a place says that it holds, unchecked. Raises `NotFound`, `Damaged`, `SchemaTooNew`."""
    path = place.folder / RECORD
    try:
        value = read_json(path, "engine record")
        check_format(value, FORMAT, VERSION, str(path))
        record = read_value(value, Record, str(path))
    except (Damaged, SchemaTooNew) as error:
        raise type(error)(f"{error}: {place.remedy}") from None
    assert isinstance(record, Record)
    return record


def changes(record: Record, recipe: EngineConfig, place: Slot) -> str:
    """Why an engine is stale, in words; empty where it is what would be built now."""
    if record.onnx_sha256 != place.onnx_sha256:
        return "built from another segment"
    then, now = asdict(record.recipe), asdict(recipe)
    return ", ".join(f"{name} was {then[name]}, is {now[name]}" for name in then if then[name] != now[name])


def device_key() -> bytes:
    """This device's key, made at the first call.

    Raises:
        Untrusted: others can read or replace it, or it is no key.
        MexitError: it cannot be made.
    """
    path = cache_root() / KEY
    try:
        if not path.exists():
            _make_key(path)
        found = path.lstat()
        key = path.read_bytes() if stat.S_ISREG(found.st_mode) else b""
    except OSError as error:
        raise MexitError(
            f"{path} cannot be made or read ({error.strerror}): set MEXIT_CACHE to a folder that can be written"
        ) from None
    safe = found.st_uid == os.getuid() and not found.st_mode & 0o077
    if not safe or len(key) != KEY_BYTES:
        raise Untrusted(
            f"{path} must be a file of {KEY_BYTES} bytes that its owner alone can read, found {len(key)} bytes, "
            f"{stat.filemode(found.st_mode)}: remove it, and build engines anew with mexit export --trt --replace"
        )
    return key


def _make_key(path: Path) -> None:
    """A complete key appears under its name, whoever else makes one at the same time."""
    make_private(path.parent)
    temporary = path.with_name(f".{KEY}.{secrets.token_hex(8)}")
    try:
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _store(place: Slot, record: Record, plan: bytes) -> Record:
    """Sign and keep an engine."""
    record = replace(record, signature=record.sign(device_key()))
    with suppress(OSError):  # what cannot be made is reported by the write
        make_private(cache_folder(place.bundle.id))
    with new_directory(place.folder, replace=True) as temporary:
        write_bytes(temporary / PLAN, plan)
        write_bytes(temporary / RECORD, to_json(asdict(record)))
    return record


def _say(model: Any, variant: Any, segment: Any) -> str:
    return f"the engine of segment {segment}, {variant}, model {str(model)[:12]}"
