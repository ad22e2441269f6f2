"""What is installed from a wheel is whole, keeps to its own names, and runs where there is no checkout."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
from wheel_check import PACKAGES, ROOT, build, names_in, pip, run


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("wheel"))


def test_a_wheel_puts_only_names_that_begin_with_fedssl_on_the_path(wheel: Path):
    top = {name.split("/")[0] for name in names_in(wheel)}
    assert top - {Path(package).name for package in PACKAGES} == {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}
    assert all(name.startswith("fedssl") for name in top)


def test_a_wheel_holds_every_file_of_the_packages(wheel: Path):
    """Presets, templates and the Flower app too: a data file that package-data does not name would be missing only where there is no checkout."""
    wanted = {
        str(path.relative_to((ROOT / package).parent))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"fedssl_server/flower_app/pyproject.toml", "fedssl_simulations/presets/demo.toml", "fedssl_simulations/templates/report.html"} <= wanted
    assert {name for name in names_in(wheel) if ".dist-info/" not in name} == wanted


def test_installed_elsewhere_a_wheel_simulates(wheel: Path, tmp_path: Path):
    """An environment of its own that borrows the other libraries of this one; `make wheel-check` installs them too."""
    run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], cwd=tmp_path)
    programs = tmp_path / "venv" / "bin"
    python = programs / "python"
    packages = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], cwd=tmp_path).strip())
    (packages / "borrowed.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    pip("install", "--no-deps", "--no-index", "--force-reinstall", str(wheel), python=python)

    code = (
        "import fedssl, fedssl_client, fedssl_server, fedssl_simulations as roof; print(*(m.__path__[0] for m in (fedssl, fedssl_client, fedssl_server, roof)))"
    )
    assert {Path(path).parent for path in run([str(python), "-c", code], cwd=tmp_path).split()} == {packages}
    assert "demo" in run([str(programs / "fedssl"), "presets"], cwd=tmp_path)
    run([str(programs / "fedssl"), "data", "synthesize", "histories.txt", "--users", "60", "--items", "200"], cwd=tmp_path)
    small = ["encoder.width=8", "encoder.hidden=8", "encoder.window=10", "server.rounds=2", "server.cohort=10", "data.path=histories.txt"]
    settings = [word for setting in small for word in ("--set", setting)]
    run([str(programs / "fedssl"), "simulate", "demo", *settings, "--out", "run"], cwd=tmp_path, seconds=120)
    assert "<html" in (tmp_path / "run" / "report.html").read_text()[:200]
    # What `flwr run` would send: two names, no code.
    code = "from fedssl_simulations.federation import FLOWER_APP; print(FLOWER_APP)"
    app = Path(run([str(python), "-c", code], cwd=tmp_path).strip())
    assert app.parent.parent == packages
    assert {path.name for path in app.iterdir()} == {"pyproject.toml", "README.md"}
