"""Runs transformers' common model tests on the CvT of this package.

The tests are in the source distribution of transformers, not in its wheel. The first run downloads the source
distribution of the installed version (10 MB) with pip. Later runs use the cache folder of the user. Without
the source distribution, the tests are skipped.
"""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import TestCase, skip

import pytest
import torch
import transformers
from torch import Tensor

from cvt.modeling import CvtConfig, CvtForImageClassification, CvtModel
from tests.cvt.random_models import TINY

#: Import name of transformers' `tests`, which is different because this project has a package `tests` too.
PACKAGE = "transformers_tests"

#: Replacements for modules that the common tests import and the source distribution lacks. Text generation
#: does not apply to CvT, and other tests cover `torch.export`. Fields have non-default values.
REPLACEMENTS: dict[str, dict[str, Any]] = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["BertModel"],
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
        }
    },
}


def download_tests() -> Path:
    """Returns the folder with transformers' `tests` and the package `parameterized`, which the tests need.

    Raises:
        subprocess.SubprocessError: pip cannot download the files.
        OSError: the cache folder cannot be written.
    """
    cache = Path.home() / ".cache" / "cvt-label"
    target = cache / f"transformers-{transformers.__version__}-tests"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            packages = [f"transformers=={transformers.__version__}", "parameterized"]
            options = ["--no-deps", "--no-binary", "transformers", "--no-build-isolation", "--dest", folder]
            quick = ["--quiet", "--disable-pip-version-check", "--retries", "0", "--timeout", "10"]
            subprocess.run(
                [sys.executable, "-m", "pip", "download", *quick, *options, *packages],
                check=True,
                capture_output=True,
                text=True,
                timeout=900,
            )
            (archive,) = Path(folder).glob("transformers-*.tar.gz")
            (wheel,) = Path(folder).glob("parameterized-*.whl")
            with tarfile.open(archive) as tar:
                members = [member for member in tar if Path(member.name).parts[1:2] == ("tests",)]
                tar.extractall(folder, members, filter="data")
            extracted = Path(folder) / archive.name.removesuffix(".tar.gz") / "tests"
            (extracted / "__init__.py").touch()  # a test module reads this file
            shutil.copy(wheel, extracted / "parameterized.whl")
            try:
                extracted.rename(target)
            except OSError:  # another process was faster
                if not target.exists():
                    raise
    return target


def import_tests(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Imports the common tests of models and of configurations."""
    package = ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for name, contents in REPLACEMENTS.items():
        module = sys.modules[f"{PACKAGE}.{name}"] = ModuleType(f"{PACKAGE}.{name}")
        vars(module).update(contents)
    sys.path.append(str(folder / "parameterized.whl"))
    return (
        importlib.import_module(f"{PACKAGE}.test_modeling_common"),
        importlib.import_module(f"{PACKAGE}.test_configuration_common"),
    )


try:
    modeling, configuration = import_tests(download_tests())
except (subprocess.SubprocessError, OSError) as error:
    pytest.skip(
        f"cannot download the source distribution of transformers {transformers.__version__}, which has "
        f"these tests: {(getattr(error, 'stderr', None) or str(error)).strip()}",
        allow_module_level=True,
    )


class CvtModelTester:
    """Provides a configuration and inputs for the common tests."""

    batch_size = 13
    image_size = 64
    num_labels = 2
    is_training = True

    def get_config(self) -> CvtConfig:
        return CvtConfig(**TINY, num_labels=self.num_labels)

    def prepare_config_and_inputs_for_common(self) -> tuple[CvtConfig, dict[str, Tensor]]:
        shape = [self.batch_size, 3, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": modeling.floats_tensor(shape)}


class TestCommon(modeling.ModelTesterMixin, TestCase):
    """Skips only the tests that transformers skips for its own CvT."""

    all_model_classes = (CvtModel, CvtForImageClassification)
    test_resize_embeddings = False
    has_attentions = False
    # By default, this test applies only to models newer than CvT.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self) -> None:
        self.model_tester = CvtModelTester()

    def test_config(self) -> None:
        configuration.ConfigTester(
            self,
            config_class=CvtConfig,
            has_text_modality=False,
            common_properties=["hidden_size", "num_channels"],
            hidden_size=37,
        ).run_common_tests()

    @skip("CvT returns no attentions")
    def test_attention_outputs(self) -> None: ...

    @skip("CvT has no embeddings of tokens")
    def test_inputs_embeds(self) -> None: ...

    @skip("CvT has no embeddings of tokens")
    def test_model_get_set_embeddings(self) -> None: ...

    @torch.no_grad()
    def test_hidden_states_output(self) -> None:
        """Hidden states are one image per stage, not tokens per layer."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).to(modeling.torch_device).eval()
            states = model(**inputs, output_hidden_states=True).hidden_states
            assert [tuple(state.shape) for state in states] == [
                (13, 16, 16, 16),
                (13, 32, 8, 8),
                (13, 48, 4, 4),
            ]
