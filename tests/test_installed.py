"""Tests of the installed wheel, in a folder with other packages of the same names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pyarrow.dataset as ds
import pytest

from tests.makers import make_samples, make_tar
from tests.ray_head import Head

ROOT = Path(__file__).parents[1]
PACKAGES = ("cvt", "pipeline", "jobs", "configs")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    run([*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source], folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scripts of a new environment with the wheel and the dependencies of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python"]
    run([*pip, "install", "--no-deps", "--no-index", wheel], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    # Python does not read .pth files in this folder, so the editable installation is not visible.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A folder with other packages of the same names, and images in `in`."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise RuntimeError('the other {package}')\n")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.tar").write_bytes(make_tar(make_samples(5)))
    return tmp_path


def run(command: list[object], folder: Path, status: int = 0) -> str:
    """Runs a command in a folder and returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)),
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_wheel_has_data_and_type_markers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        files = {path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*") if path.is_file()}
        assert {name for name in files if "__pycache__" not in name} <= names
    licenses = {name.partition(".dist-info/licenses/")[2] for name in names}
    assert {"LICENSE", "NOTICE", "jobs/data/fashion-mnist/LICENSE"} <= licenses
    assert {"pipeline/py.typed", "cvt/py.typed", "cvt/bundled/fashion-mnist/model.safetensors"} <= names


def label(scripts: Path, folder: Path, address: str) -> None:
    """Labels the images of a folder with the installed command and checks the labels."""
    (folder / "job.yaml").write_text("input: {uri: in}\noutput: {uri: out}\nmodel: {path: fashion-mnist}\n")
    options = ["--config", "job.yaml", "--set", f"ray.address={address}"]
    assert "5 in 1 shard" in run([scripts / "cvt-label", "label", *options], folder)
    (partition,) = (folder / "out").iterdir()
    assert ds.dataset(partition / "predictions", format="parquet").count_rows() == 5
    assert (partition / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("address", ["in-process", "local"])
def test_command_ignores_other_packages_of_the_same_names(scripts: Path, foreign: Path, address: str) -> None:
    label(scripts, foreign, address)


def test_command_on_cluster_ignores_other_packages(scripts: Path, foreign: Path, head: Head) -> None:
    label(scripts, foreign, head.gcs_address)


def test_module_form_refuses_other_packages(scripts: Path, foreign: Path) -> None:
    shutil.rmtree(foreign / "jobs")
    output = run([scripts / "python", "-m", "jobs.label", "--help"], foreign, status=2)
    place = f"{foreign}/cvt/__init__.py"
    assert (
        output
        == f"cvt is another package: {place}: run cvt-label, or run this command in another directory\n"
    )
