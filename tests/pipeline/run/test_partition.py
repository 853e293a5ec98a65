"""Settings that change the partition, and settings that do not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from pipeline.config import Config, ConfigError, load_config
from pipeline.run import label, make_job

DEVICE = "classify.device=cuda"  # a fixed device, so that no cluster is needed


def config(*overrides: str) -> Config:
    base = ["input.uri=in", "model.path=fashion-mnist", "output.uri=out", DEVICE]
    return load_config(Config, None, [*base, *overrides])


def fingerprint(*overrides: str) -> str:
    return make_job(config(*overrides)).fingerprint


@pytest.mark.parametrize(
    "override",
    [
        "decode.quality=fast",
        "decode.device=gpu",
        "decode.device=auto",
        "model.precision=bf16",
        "output.topk=3",
        "input.labels=false",
    ],
)
def test_options_that_affect_labels_change_the_partition(override: str) -> None:
    assert fingerprint(override) != fingerprint()


@pytest.mark.parametrize(
    "override",
    [
        "decode.device=cpu",
        "decode.quality=exact",
        "input.uri=elsewhere",
        "read.concurrent_fetches=1",
        "read.chunk_images=3",
        "classify.concurrent_chunks=1",
        "classify.batch_size=3",
        "ray.task_retries=9",
    ],
)
def test_options_of_execution_keep_the_partition(override: str) -> None:
    assert fingerprint(override) == fingerprint()


def test_automatic_gpu_decoding_keeps_the_partition_of_gpu_decoding() -> None:
    assert fingerprint("decode.device=auto") == fingerprint("decode.device=gpu")


def test_each_share_of_the_cpu_has_its_own_partition() -> None:
    shares = [f"decode.cpu_share={share}" for share in (0, 0.2, 0.3)]
    none, *others = [fingerprint("decode.device=gpu", share) for share in shares]
    assert none == fingerprint("decode.device=gpu")
    assert len({none, *others}) == 3


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is installed")
def test_gpu_decoding_without_torchvision_names_the_package(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"pip install 'cvt-label\[gpu\]'\), or set decode.device: cpu"):
        label(config("decode.device=auto", f"output.uri={tmp_path}"))
