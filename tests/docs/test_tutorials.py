"""The tutorials and the README work as written: their files, commands, Python and queries, in order."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from cvt.checkpoints import BUNDLED
from jobs.cli import make_cli
from pipeline.storage import Storage
from tests.docs.pages import ROOT, Block, blocks_of, command_lines
from tests.docs.test_code import run_sql
from tests.makers import make_image, make_samples, make_tar
from tests.runs import run_config

#: Commands of a page that a test cannot or need not run.
SKIPPED = ("make ", "pip ", "source ")


def run_page(
    page: str, replacements: dict[str, str], query: Callable[[str], list[list[Any]]] = run_sql
) -> None:
    """Runs the blocks of a page in the current folder; files, models and buckets are replaced."""
    pytest.importorskip("duckdb", reason="duckdb is not installed: cvt-label[consumers]")
    for block in blocks_of("yaml", "bash", "python", "sql", page=page):
        text = block.text
        for name, value in replacements.items():
            text = text.replace(name, value)
        if block.kind == "yaml":
            found = re.match(r"# (\S+\.yaml)\n", text)
            assert found, f"{block.name}: the first line names the file"
            Path(found[1]).write_text(text)
        elif block.kind == "bash":
            run_commands(block, text)
        elif block.kind == "sql":
            assert all(query(text)), block.name
        else:
            exec(compile(text, block.name, "exec"), {})


def run_commands(block: Block, text: str) -> None:
    """Runs the lines of a shell block: commands of this project in this process, others in a shell."""
    for line in command_lines(text):
        if line.startswith(SKIPPED):
            continue
        if not line.startswith("cvt-label "):
            subprocess.run(line, shell=True, check=True)
            continue
        words = shlex.split(line)[1:]
        result = CliRunner().invoke(make_cli(words[0]), words)
        assert result.exit_code == 0, f"{block.name}: {line}\n{result.output}\n{result.exception}"


@pytest.mark.slow
def test_local_folder_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page("docs/tutorials/local-folder.md", {"jobs/data": f"{ROOT}/jobs/data"})
    [state] = tmp_path.glob("labels/model=*/manifest.parquet")
    assert state.stat().st_size


@pytest.mark.slow
def test_fine_tuning_tutorial_runs(ray_local: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (name, content) in enumerate(make_samples(30, labels=False)):
        folder = tmp_path / "photos" / ("bag", "sandal", "sneaker")[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    epochs = {"train --config": "train --set workers.count=0 --config", "epochs: 3": "epochs: 1"}
    run_page("docs/tutorials/fine-tune.md", epochs | {"batch_size: 32": "batch_size: 8"})
    assert (tmp_path / "runs/shoes-and-bags/model/config.json").exists()
    assert list(tmp_path.glob("labels/model=*/predictions/**/*.parquet"))


@pytest.mark.slow
def test_readme_labels_a_bucket(
    bucket: str, storage: Storage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    storage.write(f"{bucket}/shards/0000.tar", make_tar(make_samples(6, labels=False)))
    # DuckDB reads buckets with an extension that it downloads, so that the query runs on a copy.
    copy = tmp_path / "copy"
    text = {"s3://my-bucket/labels/model=*": f"{copy}/model=*", "s3://my-bucket": bucket}
    text |= {"microsoft/cvt-13": "fashion-mnist", "label --config": "label --no-ray --config"}

    def query_copy(query: str) -> list[list[Any]]:
        for info in storage.list(f"{bucket}/labels"):
            path = copy / info.uri.removeprefix(f"{bucket}/labels/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(storage.read(info.uri))
        return run_sql(query)

    run_page("README.md", text, query_copy)


@pytest.mark.slow
def test_python_api_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/0.jpg").write_bytes(make_image())
    (tmp_path / "job.yaml").write_text(run_config(tmp_path).model_dump_json(exclude={"classify", "ray"}))
    shutil.copytree(BUNDLED["fashion-mnist"], tmp_path / "my-cvt")
    names: dict[str, Any] = {
        "image": Image.open("in/0.jpg"),
        "pixel_values": np.zeros((1, 3, 28, 28), np.float32),
    }
    for block in blocks_of("python", page="docs/reference/python-api.md"):
        if "cvt.keras" in block.text:
            pytest.importorskip("keras", reason="keras is not installed: cvt-label[keras]")
        code = block.text.replace("microsoft/cvt-13", "fashion-mnist")
        exec(compile(code, block.name, "exec"), names)
    assert names["logits"].shape == (1, 10)
