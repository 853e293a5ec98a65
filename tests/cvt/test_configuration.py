"""Tests of CvtConfig against transformers' CvtConfig, and of its validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from cvt.modeling import CvtConfig
from tests.cvt.random_models import PUBLISHED

#: config.json of microsoft/cvt-13, with 3 instead of 1000 class names.
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


def to_json(config: transformers.PreTrainedConfig) -> dict[str, Any]:
    """Returns a configuration as JSON, without its origin and the default of the field that is ours alone."""
    fields = json.loads(config.to_json_string(use_diff=False))
    assert fields.pop("hidden_act", "gelu") == "gelu"
    return {
        key: value for key, value in fields.items() if key not in ("transformers_version", "_name_or_path")
    }


def test_fields_and_defaults_equal_transformers() -> None:
    assert to_json(CvtConfig()) == to_json(transformers.CvtConfig())


@pytest.mark.parametrize("name", PUBLISHED)
def test_arguments_act_as_in_transformers(name: str) -> None:
    arguments = PUBLISHED[name] | {"num_labels": 7, "output_hidden_states": True}
    assert to_json(CvtConfig(**arguments)) == to_json(transformers.CvtConfig(**arguments))


def test_published_file_loads(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(PUBLISHED_FILE)
    config = CvtConfig.from_pretrained(tmp_path)
    assert config.num_labels == 3
    assert config.id2label[1] == "goldfish, Carassius auratus"
    assert to_json(config) == to_json(transformers.CvtConfig.from_pretrained(tmp_path))


def test_ratios_and_rates_may_be_integers(tmp_path: Path) -> None:
    fields = json.loads(PUBLISHED_FILE) | {"mlp_ratio": [4, 4, 4], "drop_rate": [0, 0, 0]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert CvtConfig.from_pretrained(tmp_path).mlp_ratio == [4, 4, 4]


def test_saved_configuration_loads_here_and_in_transformers(tmp_path: Path) -> None:
    config = CvtConfig(**PUBLISHED["cvt-w24"], id2label={0: "cat", 1: "dog", 2: "eel"})
    config.save_pretrained(tmp_path)
    assert to_json(CvtConfig.from_pretrained(tmp_path)) == to_json(config)
    theirs = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(theirs, transformers.CvtConfig)
    assert to_json(theirs) == to_json(config)


def test_configurations_with_different_fields_are_not_equal() -> None:
    assert CvtConfig(depth=[1, 2, 10]) == CvtConfig(depth=[1, 2, 10])
    assert CvtConfig(depth=[1, 2, 10]) != CvtConfig(depth=[1, 2, 11])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depth": [1, 2]}, "depth has 2 entries and embed_dim has 3; both need one entry per stage"),
        ({"stride_q": [1, 1, 1, 1]}, "stride_q has 4 entries and embed_dim has 3"),
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
        (
            {"mlp_ratio": [0.01, 4, 4]},
            "mlp_ratio[0] (0.01) times embed_dim[0] (64) gives a hidden width of 0",
        ),
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
            "cls_token[0] needs embed_dim[0] (64) to equal the width of the last stage (384), which is the"
            " width of a class token",
        ),
        ({"hidden_act": "relu"}, "hidden_act: Input should be 'gelu' or 'quick_gelu', not \"relu\""),
        ({"depth": [1, 2, 257]}, "depth[2]: Input should be less than or equal to 256, not 257"),
        ({"depth": [100, 100, 100]}, "depth has 300 layers in all, more than 256"),
        ({"embed_dim": [64, 192, 16_385]}, "embed_dim[2]: Input should be less than or equal to 16384"),
        ({"kernel_qkv": [3, 3, 10**30]}, "kernel_qkv[2]: Input should be less than or equal to 256"),
        ({"patch_padding": [2, 1, 257]}, "patch_padding[2]: Input should be less than or equal to 256"),
        ({"mlp_ratio": [4, 4, 65]}, "mlp_ratio[2]: Input should be less than or equal to 64"),
        ({"stride_q": [1, 2, 1]}, "stride_q[1] (2) and padding_q[1] (1) change the number of tokens"),
        ({"padding_q": [1, 1, 0]}, "stride_q[2] (1) and padding_q[2] (0) change the number of tokens"),
        ({"kernel_qkv": [2, 3, 3]}, "with kernel_qkv[0] (2) the stride must be 1"),
    ],
)
def test_invalid_fields_fail_with_field_and_reason(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"^CvtConfig: ") as caught:
        CvtConfig(**fields)
    assert message in str(caught.value)


def test_earlier_stage_with_the_last_width_may_have_a_class_token() -> None:
    CvtConfig(embed_dim=[48, 48, 48], num_heads=[1, 2, 3], cls_token=[True, False, True])


def test_query_without_convolution_may_have_any_stride() -> None:
    CvtConfig(qkv_projection_method=["avg"] * 3, stride_q=[2, 2, 2])
