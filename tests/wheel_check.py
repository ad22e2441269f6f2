"""The wheel: built, and with ``python tests/wheel_check.py`` installed with all it needs in an empty environment, where it runs the demo and a federation.

``make wheel-check PYTHON=python3.12`` is the second. It downloads some hundred MB to a few GB (torch), and takes minutes.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("fedssl", "server/fedssl_server", "client/fedssl_client", "simulations/fedssl_simulations")
"""Folders of the packages that a wheel is made of."""

FEDERATION = """
from pathlib import Path
from everything_on import TEST_KEYS, give_keys, lay_out, learn_here, learned
from fedssl_simulations.federation import federation

here = Path.cwd()
config, dataset, simulated = learn_here(here / "simulated")
stores, run = lay_out(config, dataset, here)
give_keys(run, TEST_KEYS)
with federation(stores, run, environment={"OMP_NUM_THREADS": "1"}) as deployed:
    outcome = deployed.run(seconds=500)
    assert outcome.is_completed, outcome.log + deployed.logs(lines=30)
assert learned(run, [store / "heads" for store in stores]) == simulated
print(f"a federation reached the bytes of the simulation in {outcome.seconds:.0f} s")
"""


def build(folder: Path) -> Path:
    """The wheel of the working tree, in ``folder``. Made from a copy: what an earlier build left in the tree would get into it."""
    source = folder / "source"
    source.mkdir(parents=True)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(source))
    (wheel,) = folder.glob("*.whl")
    return wheel


def names_in(wheel: Path) -> list[str]:
    """The files in a wheel."""
    with zipfile.ZipFile(wheel) as file:
        return [name for name in file.namelist() if not name.endswith("/")]


def pip(*words: str, python: Path | None = None) -> None:
    """Run this environment's pip, quietly, on itself or on another environment."""
    where = [] if python is None else ["--python", str(python)]
    run([sys.executable, "-m", "pip", *where, "--quiet", "--disable-pip-version-check", *words], cwd=ROOT)


def run(command: list[str], *, cwd: Path, seconds: float | None = None) -> str:
    """What a command says, run where nothing of this checkout is on the path. Raises RuntimeError with its words where it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "VIRTUAL_ENV"}}
    done = subprocess.run(command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done.stdout


def main() -> None:
    """Build, install with the extra `sim`, run the demo with its baselines, and a federation."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--python", default=sys.executable, help="the Python to install for (default: this one)")
    parser.add_argument("--pip-args", default="", help="arguments for pip, such as another index")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fedssl-wheel-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        wheel = build(folder / "wheel")
        run([chosen.python, "-m", "venv", str(folder / "venv")], cwd=folder)
        programs = folder / "venv" / "bin"
        # The environment's own pip: this one may know no wheels of that Python.
        install = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", str(ROOT / "constraints.txt"), *shlex.split(chosen.pip_args)]
        run([str(programs / "python"), *install, f"{wheel}[sim]"], cwd=folder)
        print(run([str(programs / "python"), "-V"], cwd=folder).strip(), f"has {wheel.name} and what it needs", flush=True)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        run([str(programs / "fedssl"), "data", "synthesize", "histories.txt"], cwd=elsewhere)
        print(run([str(programs / "fedssl"), "simulate", "demo", "--baselines", "--set=data.path=histories.txt", "--out=demo"], cwd=elsewhere), flush=True)
        shutil.copy(ROOT / "tests" / "everything_on.py", elsewhere)
        print(run([str(programs / "python"), "-c", FEDERATION], cwd=elsewhere, seconds=600), end="")


if __name__ == "__main__":
    main()
