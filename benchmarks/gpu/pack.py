"""Pack what is copied to a GPU machine, and bring its results into the repository.

    python benchmarks/gpu/pack.py data cifar10 OUT [--data-dir DIR] [--parts 2]
    python benchmarks/gpu/pack.py autoattack OUT
    python benchmarks/gpu/pack.py commit OUT
    python benchmarks/gpu/pack.py results STATE OUT
    python benchmarks/gpu/pack.py import DIR

`data` writes a data set in few files, `autoattack` the sources of the installed package `pyautoattack` without its
example network. `commit` notes the present commit for parts that were packed before. `results` writes the result
files of a state folder, which `run.py --results` does too. `import` brings them into benchmarks/results/gpu, zoo/gpu
and runs/gpu.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import zipfile
from pathlib import Path

import data_parts
import results
from run import note_commit

from mexit.errors import MexitError, NotFound


def pack_autoattack(out: Path) -> Path:
    """Write the package's Python files and its licence as a zip archive, which Python imports from."""
    spec = importlib.util.find_spec("pyautoattack")
    if spec is None or spec.origin is None:
        raise NotFound("pyautoattack is not installed: pip install 'mexit[eval]'")
    package = Path(spec.origin).parent
    licences = [path for info in package.parent.glob("pyautoattack-*.dist-info") for path in info.rglob("LICENSE*")]
    out.mkdir(parents=True, exist_ok=True)
    path = out / "pyautoattack.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(package.rglob("*.py")):
            if "examples" not in file.parts:
                archive.write(file, file.relative_to(package.parent))
        for file in licences:
            archive.write(file, f"pyautoattack/{file.name}")
    return path


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    data = commands.add_parser("data", help="write a data set as few small files")
    data.add_argument("name", choices=["cifar10", "cifar100", "mnist"])
    data.add_argument("out", type=Path)
    data.add_argument("--data-dir", type=Path, default=os.environ.get("MEXIT_DATA"))
    data.add_argument("--parts", type=int, default=2)
    autoattack = commands.add_parser("autoattack", help="write the sources of pyautoattack")
    autoattack.add_argument("out", type=Path)
    noted = commands.add_parser("commit", help="note the commit beside data that was packed before")
    noted.add_argument("out", type=Path)
    collect = commands.add_parser("results", help="write the result files of a state folder")
    collect.add_argument("state", type=Path)
    collect.add_argument("out", type=Path)
    bring_in = commands.add_parser("import", help="bring result files into the repository")
    bring_in.add_argument("source", type=Path)
    arguments = parser.parse_args()
    try:
        if arguments.command == "data":
            if arguments.data_dir is None:
                parser.error("data needs --data-dir, or MEXIT_DATA")
            written = data_parts.pack(arguments.name, Path(arguments.data_dir), arguments.out, arguments.parts)
            written.append(note_commit(arguments.out))
        elif arguments.command == "autoattack":
            written = [pack_autoattack(arguments.out)]
        elif arguments.command == "commit":
            written = [note_commit(arguments.out)]
        elif arguments.command == "results":
            written = results.collect(arguments.state, arguments.state / "data", arguments.out)
        else:
            written = results.bring_in(arguments.source)
    except MexitError as error:
        sys.exit(f"error: {error}")
    for path in written:
        print(path, f"{path.stat().st_size / 1e6:.1f} MB" if path.is_file() else "")


if __name__ == "__main__":
    main()
