from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from cvt.configuration import CvtConfig
from tests.cvt.random_models import PUBLISHED

#: config.json of microsoft/cvt-13, but for the names of its 1000 classes.
PUBLISHED_FILE = """{
  "architectures": ["CvtForImageClassification"],
  "attention_drop_rate": [0.0, 0.0, 0.0],
  "cls_token": [false, false, true],
  "depth": [1, 2, 10],
  "drop_path_rate": [0.0, 0.0, 0.1],
  "drop_rate": [0.0, 0.0, 0.0],
  "embed_dim": [64, 192, 384],
  "id2label": {"0": "tench, Tinca tinca", "1": "goldfish, Carassius auratus", "2": "great white shark"},
  "initializer_range": 0.02,
  "kernel_qkv": [3, 3, 3],
  "label2id": {"goldfish, Carassius auratus": 1, "great white shark": 2, "tench, Tinca tinca": 0},
  "layer_norm_eps": 1e-12,
  "mlp_ratio": [4.0, 4.0, 4.0],
  "model_type": "cvt",
  "num_channels": 3,
  "num_heads": [1, 3, 6],
  "padding_kv": [1, 1, 1],
  "padding_q": [1, 1, 1],
  "patch_padding": [2, 1, 1],
  "patch_sizes": [7, 3, 3],
  "patch_stride": [4, 2, 2],
  "pos_embed": [false, false, false],
  "qkv_bias": [true, true, true],
  "qkv_projection_method": ["dw_bn", "dw_bn", "dw_bn"],
  "stride_kv": [2, 2, 2],
  "stride_q": [1, 1, 1],
  "torch_dtype": "float32",
  "transformers_version": "4.20.0.dev0"
}"""


def lists(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """The content of a configuration as JSON has it, but for where it was written."""
    fields = json.loads(config.to_json_string(use_diff=False))
    return {
        key: value for key, value in fields.items() if key not in ("transformers_version", "_name_or_path")
    }


def test_fields_and_defaults_are_those_of_transformers() -> None:
    assert lists(CvtConfig()) == lists(transformers.CvtConfig())


@pytest.mark.parametrize("name", PUBLISHED)
def test_arguments_have_the_effect_that_they_have_in_transformers(name: str) -> None:
    arguments = PUBLISHED[name] | {"num_labels": 7, "output_hidden_states": True}
    assert lists(CvtConfig(**arguments)) == lists(transformers.CvtConfig(**arguments))


def test_a_published_file_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(PUBLISHED_FILE)
    config = CvtConfig.from_pretrained(tmp_path)
    assert config.num_labels == 3
    assert config.id2label[1] == "goldfish, Carassius auratus"
    assert lists(config) == lists(transformers.CvtConfig.from_pretrained(tmp_path))


def test_whole_numbers_pass_for_ratios_and_rates(tmp_path: Path) -> None:
    fields = json.loads(PUBLISHED_FILE) | {"mlp_ratio": [4, 4, 4], "drop_rate": [0, 0, 0]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert CvtConfig.from_pretrained(tmp_path).mlp_ratio == [4, 4, 4]


def test_a_saved_configuration_loads_here_and_in_transformers(tmp_path: Path) -> None:
    config = CvtConfig(**PUBLISHED["cvt-w24"], id2label={0: "cat", 1: "dog", 2: "eel"})
    config.save_pretrained(tmp_path)
    assert lists(CvtConfig.from_pretrained(tmp_path)) == lists(config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.CvtConfig)
    assert lists(theirs) == lists(config)


def test_configurations_that_differ_in_a_field_are_not_equal() -> None:
    assert CvtConfig(depth=[1, 2, 10]) == CvtConfig(depth=[1, 2, 10])
    assert CvtConfig(depth=[1, 2, 10]) != CvtConfig(depth=[1, 2, 11])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": [1, 2]}, "depth has 2 entries and embed_dim 3; both need one a stage"),
        ({"stride_q": [1, 1, 1, 1]}, "stride_q has 4 entries and embed_dim 3"),
        ({"num_heads": 6}, "num_heads: Input should be an instance of Sequence, not 6"),
        ({"embed_dim": []}, "embed_dim: Value should have at least 1 item after validation, not 0, not []"),
        ({"embed_dim": [64, 190, 384]}, "embed_dim[1] (190) is not divisible by num_heads[1] (3)"),
        (
            {"qkv_projection_method": ["dw_bn", "dw", "avg"]},
            "qkv_projection_method[1]: Input should be 'dw_bn', 'avg' or 'linear', not \"dw\"",
        ),
        ({"depth": [1, 0, 10]}, "depth[1]: Input should be greater than 0, not 0"),
        ({"embed_dim": [-64, 192, 384]}, "embed_dim[0]: Input should be greater than 0, not -64"),
        ({"patch_sizes": [7, 3, 3.0]}, "patch_sizes[2]: Input should be a valid integer, not 3.0"),
        ({"patch_stride": [True, 2, 2]}, "patch_stride[0]: Input should be a valid integer, not true"),
        (
            {"patch_padding": [2, 1, -1]},
            "patch_padding[2]: Input should be greater than or equal to 0, not -1",
        ),
        ({"mlp_ratio": [0, 4, 4]}, "mlp_ratio[0]: Input should be greater than 0, not 0"),
        ({"mlp_ratio": [0.01, 4, 4]}, "mlp_ratio[0] (0.01) leaves no hidden width of embed_dim[0] (64)"),
        ({"mlp_ratio": [float("nan"), 4, 4]}, "mlp_ratio[0]: Input should be"),
        (
            {"drop_path_rate": [0, 0, 1.0]},
            "drop_path_rate[2]: Input should be less than 1, not 1.0",
        ),
        ({"drop_rate": [0, "0", 0]}, 'drop_rate[1]: Input should be a valid number, not "0"'),
        ({"qkv_bias": [True, 1, True]}, "qkv_bias[1]: Input should be a valid boolean, not 1"),
        (
            {"qkv_projection_method": ["avg"] * 3, "padding_kv": [1, 2, 1]},
            "padding_kv[1] (2) must be at most half of kernel_qkv[1] (3) for average pooling",
        ),
        ({"num_channels": 0}, "num_channels: Input should be greater than 0, not 0"),
        ({"initializer_range": -1}, "initializer_range: Input should be greater than or equal to 0, not -1"),
        (
            {"cls_token": [True, False, True]},
            "cls_token[0] is true, but a class token has the last stage's width (384), not that of its"
            " tokens, embed_dim[0] (64)",
        ),
        ({"stride_q": [1, 2, 1]}, "stride_q[1] (2) and padding_q[1] (1) don't keep the number of tokens"),
        ({"padding_q": [1, 1, 0]}, "stride_q[2] (1) and padding_q[2] (0) don't keep the number of tokens"),
        ({"kernel_qkv": [2, 3, 3]}, "with kernel_qkv[0] (2) the stride must be 1"),
    ],
)
def test_what_makes_no_model_is_refused_with_field_and_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^CvtConfig: ") as caught:
        CvtConfig(**fields)
    assert message in str(caught.value)


def test_a_class_token_in_an_earlier_stage_of_the_last_ones_width_is_accepted() -> None:
    CvtConfig(embed_dim=[48, 48, 48], num_heads=[1, 2, 3], cls_token=[True, False, True])


def test_a_query_without_convolution_needs_no_matching_stride() -> None:
    CvtConfig(qkv_projection_method=["avg"] * 3, stride_q=[2, 2, 2])
