"""The scripts in `examples/` run as their users start them, on small data.

`tests/pipeline/train` runs the example of training, which needs Ray.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

import pipeline
from cvt.checkpoints import load_checkpoint, save_checkpoint
from tests.makers import make_tar

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
SAMPLE = ROOT / "jobs" / "data" / "fashion-mnist" / "test-0000.tar"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder `in` with 12 labeled images and a damaged image."""
    root = tmp_path_factory.mktemp("examples")
    with tarfile.open(SAMPLE) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()[: 2 * 12]]  # type: ignore[union-attr]
    damaged = [("damaged.png", b"no image"), ("damaged.cls", b"1")]
    (root / "in").mkdir()
    (root / "in" / "a.tar").write_bytes(make_tar([*members, *damaged]))
    return root


def run(example: str, *arguments: object) -> list[str]:
    """Runs an example to its end; returns the lines that it printed."""
    command = [sys.executable, ROOT / "examples" / example, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_uses_the_public_api_only(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 60
    assert f"    python examples/{path.name} " in text
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    own = {"cvt", "pipeline", "jobs", "configs"}
    modules = [node.module or "" for node in imports if isinstance(node, ast.ImportFrom)]
    modules += [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    assert {module for module in modules if module.partition(".")[0] in own} <= {"pipeline"}
    names = [a.name for node in imports if getattr(node, "module", "") == "pipeline" for a in node.names]
    assert set(names) <= set(pipeline.__all__)


def test_shard_script_without_arguments_prints_its_usage() -> None:
    command = [sys.executable, str(ROOT / "examples" / "fashion_mnist_shards.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    assert "fashion_mnist_shards.py FOLDER_OF_IDX_FILES" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_label_from_python_counts_labels_and_errors(data: Path, tmp_path: Path) -> None:
    lines = run("label_from_python.py", data / "in", tmp_path)
    assert lines[0] == "images: 13, shards: 1"
    assert "errors: 1" in lines
    assert lines[-1].strip().startswith("damaged: ")


def test_nearest_neighbors_finds_the_query_first(data: Path, tmp_path: Path) -> None:
    fields = [f"input.uri={data}/in", f"output.uri={tmp_path}", "model.path=fashion-mnist"]
    config = pipeline.load_job_config(None, [*fields, "output.embedding=float16", "ray.address=in-process"])
    partition = pipeline.label(config).partition
    key = next(iter(partition.read_labels(["key"])))["key"][3].as_py()
    lines = run("nearest_neighbors.py", partition.uri, key, "--count", 3)
    assert len(lines) == 4
    assert lines[0].startswith("1.0000  ")
    assert key in lines[0].split()
    similarities = [float(line.split()[0]) for line in lines]
    assert similarities == sorted(similarities, reverse=True)


@pytest.mark.slow
def test_compare_models_reports_agreement(data: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint("fashion-mnist")
    model = checkpoint.to_transformers()
    with torch.no_grad():  # the other model predicts the next class for every image
        for parameter in model.classifier.parameters():
            parameter.copy_(parameter.roll(1, 0))
    save_checkpoint(model, checkpoint.preprocessor, tmp_path / "other")
    lines = run("compare_models.py", data / "in", tmp_path / "out", "fashion-mnist", tmp_path / "other")
    assert "images that both models labeled: 12" in lines
    assert "agreement: 0.0% of the images have the same label" in lines
    disagreements = [int(line.split()[0]) for line in lines if " -> " in line]
    assert disagreements == sorted(disagreements, reverse=True)
    assert 0 < sum(disagreements) <= 12
