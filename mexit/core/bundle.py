"""Open, check and write a bundle, the directory that goes from training to deployment.

    bundle.json        the manifest; never changes after export; its sha256 is the model id
    segments/<variant>/<k>.onnx
    splits.npz         the stored splits
    policies.json      thresholds per budget, replaced atomically by calibration
    traces/*.npz       the logits that calibration used
    reports/           plots and tables for people

`docs/bundle-format.md` is the specification. `Bundle.open` checks the schema, every path and every hash before anything
is loaded, and keeps the checked bytes in memory for the engine.
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
from mexit.core.onnx_merge import merge_models
from mexit.core.onnx_safety import refuse_external_data
from mexit.core.policies_file import Policies, TraceRef
from mexit.core.printable import shell_path
from mexit.core.trace import MAX_TRACE_BYTES, Trace
from mexit.core.wrong_path import BUNDLE, found_instead, similar_beside
from mexit.errors import Damaged, NotCalibrated, NotFound, StalePolicy, Untrusted, UsageError

MANIFEST = "bundle.json"
POLICIES = "policies.json"
SPLITS = "splits.npz"
TRACES = "traces"
MAX_FILE_BYTES = 4 << 30


@dataclass(frozen=True)
class Bundle:
    """A bundle whose content was checked.

    Attributes:
        path: the directory.
        manifest: the content of `bundle.json`.
        id: the model id, which is the sha256 of `bundle.json`.
    """

    path: Path
    manifest: Manifest
    id: str
    _content: Mapping[str, bytes] = field(repr=False, compare=False)

    @staticmethod
    def open(path: str | Path) -> Bundle:
        """Open and check a bundle.

        Raises:
            NotFound: the directory or its `bundle.json` does not exist.
            UsageError: the path is a file or a run.
            Damaged: a field or file is missing, or a file does not have its recorded hash; the message names it.
            Untrusted: a path leads out of the directory, or an ONNX file refers to another file.
            SchemaTooNew: a newer mexit wrote the bundle.
        """
        path = Path(path)
        if not path.exists():
            near = similar_beside(path) or ": make one with mexit export, or name its directory"
            raise NotFound(f"bundle {path} does not exist{near}")
        if instead := found_instead(path, BUNDLE):
            raise UsageError(instead)
        content = read_bytes(resolve_inside(path, MANIFEST), "bundle manifest", MAX_JSON_BYTES)
        manifest = Manifest.from_json(parse_json(content, path / MANIFEST, "bundle manifest"))
        files = {spec.file: _read_checked(path, spec) for spec in manifest.files}
        for graph in manifest.graphs:
            refuse_external_data(files[graph.file], str(path / graph.file))
        return Bundle(path, manifest, sha256_bytes(content), files)

    @staticmethod
    def from_parts(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
        """Make a bundle in memory, which `write` stores.

        Args:
            path: the directory.
            manifest: its manifest.
            files: content of every path in the manifest; that of a static network is optional.
        """
        names = {spec.file for spec in manifest.files}
        static = {variant.static.file for variant in manifest.variants.values() if variant.static is not None}
        if not names <= set(files) <= names | static:
            raise ValueError(f"the manifest names {sorted(names)}, the files are {sorted(files)}")
        return Bundle(path, manifest, sha256_bytes(to_json(manifest.to_json())), files)

    def write(self, *, replace: bool = False) -> None:
        """Write the directory atomically.

        Raises:
            UsageError: it exists and `replace` is false.
            MexitError: a write fails.
        """
        with new_directory(self.path, replace=replace) as temporary:
            self.write_files(temporary)

    def write_files(self, folder: Path) -> None:
        """Write the files into an existing directory. Raises `MexitError` if a write fails."""
        for name, content in self._content.items():
            write_bytes(folder / name, content)
        write_bytes(folder / MANIFEST, to_json(self.manifest.to_json()))

    def segment(self, variant: str, k: int) -> bytes:
        """The checked ONNX bytes of segment `k`, from 1."""
        return self._content[self.manifest.variants[variant].segments[k - 1].file]

    def static(self, variant: str) -> bytes:
        """The ONNX bytes of the static network, derived from the checked segments.

        A file with the weights again would double the size of a bundle and the memory of an opened one.

        Raises:
            ValueError: the bundle has none; see `Variant.static`.
            Damaged: the derived bytes do not have the recorded hash.
        """
        variants = self.manifest.variants[variant]
        if variants.static is None:
            raise ValueError(f"{self.path} has no static network")
        segments = [self._content[spec.file] for spec in variants.segments]
        content = merge_models(segments, variants.static.file, only_logits=True)
        if sha256_bytes(content) != variants.static.sha256:
            raise Damaged(
                f"the static network {self.path / variants.static.file} does not follow from the segments: "
                "export the bundle again"
            )
        return content

    def content(self, file: str) -> bytes:
        """The checked bytes of a file in the manifest."""
        return self._content[file]

    def policies(self) -> Policies:
        """Read the policies. Raises `NotCalibrated`, `Damaged`, `StalePolicy`, `SchemaTooNew`."""
        path = resolve_inside(self.path, POLICIES)
        if not path.exists():
            raise NotCalibrated(f"{self.path} has no {POLICIES}: run mexit calibrate {shell_path(self.path)}")
        policies = Policies.from_json(read_json(path, "policies"), self.id, path)
        for entry in policies.entries:
            if len(entry.temperatures) != len(self.manifest.exits):
                raise Damaged(
                    f"{path}: the entry of {entry.engine} is for {len(entry.temperatures)} exits, this bundle has "
                    f"{len(self.manifest.exits)}: run mexit calibrate"
                )
        return policies

    def policies_or_empty(self) -> Policies:
        """Read the policies; no entries if there are none or they cannot be used."""
        try:
            return self.policies()
        except (NotCalibrated, Damaged, StalePolicy):
            return Policies(self.id, ())

    def save_policies(self, policies: Policies) -> Path:
        """Replace `policies.json`, then remove the traces that no entry names. Returns its path."""
        path = self.path / POLICIES
        write_bytes(path, policies.to_bytes())
        named = {ref.file for entry in policies.entries for ref in (entry.trace, *entry.evidence)}
        for trace in resolve_inside(self.path, TRACES).glob("*.npz"):
            if f"{TRACES}/{trace.name}" not in named:
                with suppress(OSError):
                    trace.unlink()
        return path

    def save_trace(self, trace: Trace) -> TraceRef:
        """Write a trace. Its file name contains its hash, so a stored trace never changes."""
        content = trace.to_bytes()
        digest = sha256_bytes(content)
        origin = trace.origin
        file = f"{TRACES}/{origin.engine}-{origin.precision}-{origin.split}-{digest[:12]}.npz"
        write_bytes(resolve_inside(self.path, file), content)
        return TraceRef(file, digest, origin.split, origin.condition, trace.logits.shape[1])

    def load_trace(self, ref: TraceRef) -> Trace:
        """Read a trace. Raises `NotFound`, and `Damaged` if its hash or its model is another one."""
        path = resolve_inside(self.path, ref.file)
        content = read_bytes(path, "trace", MAX_TRACE_BYTES)
        if sha256_bytes(content) != ref.sha256:
            raise Damaged(f"trace {path} was changed after calibration: run mexit calibrate")
        trace = Trace.from_bytes(content, path)
        if trace.origin.model != self.id:
            raise Damaged(
                f"trace {path} is of model {trace.origin.model[:12]}, this is {self.id[:12]}: run mexit calibrate"
            )
        return trace


def resolve_inside(root: Path, name: str) -> Path:
    """The path `root/name`. Raises `Untrusted` if it leads out of `root`, also through a link."""
    pure = PurePosixPath(name)
    bad = not name or pure.is_absolute() or ".." in pure.parts or "\\" in name or "\0" in name or ":" in name
    if bad or not Path(os.path.realpath(root / name)).is_relative_to(os.path.realpath(root)):
        raise Untrusted(f"bundle {root}: the path {name!r} leads out of the bundle")
    return root / name


def _read_checked(root: Path, spec: FileSpec) -> bytes:
    path = resolve_inside(root, spec.file)
    try:
        content = read_bytes(path, "bundle file", min(spec.bytes, MAX_FILE_BYTES))
    except NotFound as error:
        raise Damaged(f"{error}, although {MANIFEST} names it: copy or export the bundle again") from None
    if len(content) != spec.bytes:
        raise Damaged(
            f"bundle file {path} has {len(content)} bytes, expected {spec.bytes}: copy or export the bundle again"
        )
    if sha256_bytes(content) != spec.sha256:
        raise Damaged(
            f"bundle file {path} was changed: its sha256 is not the recorded one; copy or export the bundle again"
        )
    return content
