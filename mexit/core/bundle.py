"""A bundle: the directory that training hands to deployment. `docs/bundle-format.md` is the specification.

    bundle.json        never changes after export; its sha256 is the model id
    segments/<variant>/<k>.onnx
    splits.npz         the stored index lists
    policies.json      thresholds per budget, replaced atomically by calibration
    traces/*.npz       what calibration looked at
    reports/           pictures and tables for people

`Bundle.open` checks the schema, every path and every hash before anything is loaded, and keeps the bytes it
hashed: those are what an engine gets.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from mexit.core.atomic_io import (
    MAX_JSON_BYTES,
    new_directory,
    parse_json,
    read_bytes,
    read_json,
    sha256_bytes,
    to_json,
    write_bytes,
)
from mexit.core.manifest import FileSpec, Manifest
from mexit.core.onnx_safety import refuse_external_data
from mexit.core.policies import Policies, TraceRef
from mexit.core.trace import MAX_TRACE_BYTES, Trace
from mexit.errors import Damaged, NotCalibrated, NotFound, StalePolicy, Untrusted

MANIFEST = "bundle.json"
POLICIES = "policies.json"
SPLITS = "splits.npz"
TRACES = "traces"
MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Bundle:
    """An opened bundle whose every byte was checked.

    Attributes:
        path: the directory.
        manifest: the content of `bundle.json`.
        id: model id, the sha256 of `bundle.json`.
    """

    path: Path
    manifest: Manifest
    id: str
    _content: Mapping[str, bytes] = field(repr=False, compare=False)

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Open and check a bundle.

        Raises:
            NotFound: no such directory, or no `bundle.json` in it.
            Damaged: a missing field or file, or a byte that differs from its hash; names the file.
            Untrusted: a path that leaves the directory, or an ONNX file that points outside itself.
            SchemaTooNew: written by a newer mexit.
        """
        path = Path(path)
        if not path.is_dir():
            raise NotFound(f"bundle {path} does not exist: make one with mexit export, or name its directory")
        content = read_bytes(inside(path, MANIFEST), "bundle manifest", MAX_JSON_BYTES)
        manifest = Manifest.from_json(parse_json(content, path / MANIFEST, "bundle manifest"))
        files = {spec.file: _read_checked(path, spec) for spec in manifest.files}
        for graph in manifest.graphs:
            refuse_external_data(files[graph.file], str(path / graph.file))
        return Bundle(path, manifest, sha256_bytes(content), files)

    @staticmethod
    def from_parts(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """A bundle in memory: every file that the manifest vouches for, by its path. `write` stores it."""
        vouched = {spec.file for spec in manifest.files}
        if vouched != set(files):
            raise ValueError(f"the manifest names {sorted(vouched)}, the files are {sorted(files)}")
        return Bundle(path, manifest, sha256_bytes(to_json(manifest.to_json())), files)

    def write(self, *, replace: bool = False) -> None:
        """Write the whole directory: there at once, or not at all.

        Raises:
            UsageError: it exists and `replace` is false.
            MexitError: the file system refuses a write.
        """
        with new_directory(self.path, replace=replace) as temporary:
            for name, content in self._content.items():
                write_bytes(temporary / name, content)
            write_bytes(temporary / MANIFEST, to_json(self.manifest.to_json()))

    def segment(self, variant: str, k: int) -> bytes:
        """The ONNX bytes of segment `k` (from 1), as they were hashed."""
        return self._content[self.manifest.variants[variant].segments[k - 1].file]

    def content(self, file: str) -> bytes:
        """The bytes of a file that the manifest names, as they were hashed."""
        return self._content[file]

    def splits(self) -> bytes | None:
        """The bytes of the stored index lists, as they were hashed."""
        return self._content[self.manifest.splits.file.file] if self.manifest.splits else None

    def policies(self) -> Policies:
        """The calibrated policies. Raises `NotCalibrated`, `Damaged`, `StalePolicy`, `SchemaTooNew`."""
        path = inside(self.path, POLICIES)
        if not path.exists():
            raise NotCalibrated(f"{self.path} has no {POLICIES}: run mexit calibrate {self.path}")
        policies = Policies.from_json(read_json(path, "policies"), self.id, path)
        for entry in policies.entries:
            if len(entry.temperatures) != len(self.manifest.exits):
                raise Damaged(
                    f"{path}: the entry of {entry.engine} is for {len(entry.temperatures)} exits, "
                    f"this bundle has {len(self.manifest.exits)}: run mexit calibrate"
                )
        return policies

    def policies_or_empty(self) -> Policies:
        """What calibration starts from: the present policies, or none."""
        try:
            return self.policies()
        except (NotCalibrated, Damaged, StalePolicy):
            return Policies(self.id, ())

    def save_policies(self, policies: Policies) -> Path:
        """Replace `policies.json`, then remove the traces that no entry names any more."""
        path = self.path / POLICIES
        write_bytes(path, policies.to_bytes())
        named = {ref.file for entry in policies.entries for ref in (entry.trace, *entry.evidence)}
        for trace in inside(self.path, TRACES).glob("*.npz"):
            if f"{TRACES}/{trace.name}" not in named:
                with suppress(OSError):
                    trace.unlink()
        return path

    def save_trace(self, trace: Trace) -> TraceRef:
        """Store a trace under the hash of its content, so that no reader ever sees one change."""
        content = trace.to_bytes()
        digest = sha256_bytes(content)
        origin = trace.origin
        file = f"{TRACES}/{origin.engine}-{origin.precision}-{origin.split}-{digest[:12]}.npz"
        write_bytes(inside(self.path, file), content)
        return TraceRef(file, digest, origin.split, origin.condition, trace.logits.shape[1])

    def load_trace(self, ref: TraceRef) -> Trace:
        """Read a trace back. Raises `Damaged` if it is not the one that was stored, or of another model."""
        path = inside(self.path, ref.file)
        content = read_bytes(path, "trace", MAX_TRACE_BYTES)
        if sha256_bytes(content) != ref.sha256:
            raise Damaged(f"trace {path} was changed after calibration: run mexit calibrate")
        trace = Trace.from_bytes(content, path)
        if trace.origin.model != self.id:
            raise Damaged(f"trace {path} was made by model {trace.origin.model[:12]}, this is {self.id[:12]}")
        return trace


def inside(root: Path, name: str) -> Path:
    """`root`/`name`, if it cannot lie anywhere else. Raises `Untrusted`."""
    pure = PurePosixPath(name)
    bad = not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name
    if bad or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
        raise Untrusted(f"bundle {root}: the path {name!r} leaves the bundle")
    return root / name


def _read_checked(root: Path, spec: FileSpec) -> bytes:
    path = inside(root, spec.file)
    try:
        content = read_bytes(path, "bundle file", min(spec.bytes, MAX_FILE_BYTES))
    except NotFound as error:
        raise Damaged(f"{error}, though {MANIFEST} names it: copy or export the bundle again") from None
    if len(content) != spec.bytes:
        raise Damaged(f"bundle file {path} has {len(content)} bytes, {spec.bytes} are recorded")
    if sha256_bytes(content) != spec.sha256:
        raise Damaged(f"bundle file {path} was changed: its sha256 is not the recorded one")
    return content
