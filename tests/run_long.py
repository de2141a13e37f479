"""Run the long tests one by one, go on where a stopped run ended, and write a dated report.

    python tests/run_long.py [--again] [TEST...]

Every test marked `long` runs in a pytest process of its own. Results are kept in `.long/<commit>.json`, so that a
run that was stopped, or that failed in one place, continues with what has not passed yet on the same commit. When
all tests were run, the page `benchmarks/results/long_tests_<hardware>_<date>.md` is written. A change that is not
committed belongs to no commit: its results are not kept.

Tests of packages that this environment cannot hold run in one of their own below `.long`, which is made at first use.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 3 * 3600
# Exit codes of pytest: 0 all passed, 5 nothing was collected.
RESULTS = {0: "passed", 5: "skipped"}
# Files of tests with an environment of their own, and what pip installs into it.
REQUIREMENTS = {
    "tests/long/test_timm_networks.py": "tests/long/timm-requirements.txt",
    "tests/long/test_opencv_examples.py": "tests/long/opencv-requirements.txt",
    "tests/long/test_kserve_clients.py": "tests/long/clients-requirements.txt",
    "tests/long/test_triton_clients.py": "tests/long/clients-requirements.txt",
    "tests/long/test_ray_serve.py": "tests/long/ray-requirements.txt",
}


def collect(chosen: list[str]) -> list[str]:
    """The names of all long tests, parameters left off, in file order."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "--quiet", "-m", "long", *chosen]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode != 0:
        sys.exit(listed.stdout + listed.stderr)
    names = [line.partition("[")[0] for line in listed.stdout.splitlines() if "::" in line]
    return list(dict.fromkeys(names))


def interpreter(name: str) -> str:
    """The Python that runs a test: this one, or that of the environment of the test's file.

    Raises:
        subprocess.CalledProcessError: the environment could not be made.
    """
    file = REQUIREMENTS.get(name.partition("::")[0])
    if file is None:
        return sys.executable
    requirements, all_pins = (ROOT / file).read_text(), (ROOT / "constraints.txt").read_text()
    own = {line.partition("==")[0] for line in requirements.splitlines() if "==" in line}
    pins = "".join(line for line in all_pins.splitlines(keepends=True) if line.partition("==")[0] not in own)
    folder = ROOT / ".long" / Path(file).stem
    python, installed, constraints = folder / "bin" / "python", folder / "installed.txt", folder / "constraints.txt"
    if not installed.exists() or installed.read_text() != requirements + pins:
        print(f"installing {file} into {folder.relative_to(ROOT)} ... ", end="", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True, capture_output=True, text=True)
        constraints.write_text(pins)
        install = [python, "-m", "pip", "install", "--quiet", "-c", constraints, "-r", file]
        subprocess.run(install, cwd=ROOT, check=True, capture_output=True, text=True)
        installed.write_text(requirements + pins)
    return str(python)


def run(name: str) -> dict[str, object]:
    """Run one test; its result, its seconds and, where it failed, the end of its output."""
    begin = time.monotonic()
    try:
        command = [interpreter(name), "-m", "pytest", "-m", "long", "-p", "no:cacheprovider", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
        result, output = RESULTS.get(done.returncode, "failed"), done.stdout
        if result == "passed" and " passed" not in output.splitlines()[-1]:
            result = "skipped"
    except subprocess.TimeoutExpired as error:
        result, output = "failed", f"{error}\n"
    except subprocess.CalledProcessError as error:
        result, output = "failed", f"{error}\n{error.stderr}"
    seconds = round(time.monotonic() - begin, 1)
    lines = output.splitlines()[-40:] if result == "failed" else []
    return {"result": result, "seconds": seconds, "output": lines}


def commit() -> str:
    """The commit of the working tree, or "uncommitted"."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    status = subprocess.run(
        ["git", "status", "--porcelain", "mexit", "tests"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return "uncommitted" if status.stdout.strip() else head.stdout.strip()


def write_report(results: dict[str, dict[str, object]]) -> None:
    """Write the result page."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    from page import table, write_page

    rows = [[f"`{name}`", one["result"], f"{one['seconds']:g} s"] for name, one in results.items()]
    counts = {word: sum(one["result"] == word for one in results.values()) for word in ("passed", "failed", "skipped")}
    summary = ", ".join(f"{count} {word}" for word, count in counts.items())
    cores = len(os.sched_getaffinity(0))
    write_page(
        "long_tests",
        f"{cores}-core-cpu",
        "The long tests",
        [f"{summary}.", table(["test", "result", "time"], rows)],
    )


def main() -> None:
    """Run what has not passed yet, then report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tests", nargs="*", help="files or tests; default: all")
    parser.add_argument("--again", action="store_true", help="also run what has passed on this commit")
    chosen = parser.parse_args()
    names, at = collect(chosen.tests), commit()
    store = ROOT / ".long" / f"{at}.json"
    kept = json.loads(store.read_text()) if store.exists() and at != "uncommitted" and not chosen.again else {}
    results = {name: kept[name] for name in names if kept.get(name, {}).get("result") == "passed"}
    for number, name in enumerate(names, start=1):
        if name in results:
            continue
        print(f"[{number}/{len(names)}] {name} ... ", end="", flush=True)
        results[name] = run(name)
        print(f"{results[name]['result']} in {results[name]['seconds']:g} s", flush=True)
        print("\n".join(map(str, results[name]["output"])), end="", flush=True)
        store.parent.mkdir(exist_ok=True)
        store.write_text(json.dumps({**kept, **results}, indent=1))
    results = {name: results[name] for name in names}
    write_report(results)
    sys.exit(any(one["result"] == "failed" for one in results.values()))


if __name__ == "__main__":
    main()
