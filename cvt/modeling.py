"""CvT, the Convolutional vision Transformer of arXiv 2103.15808: drop-in classes for transformers.

The base classes of transformers handle files, the hub and labels. `cvt.architecture` has the fields of the
configuration, and `cvt.network` the layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention, ModelOutput
from transformers.models.cvt.modeling_cvt import BaseModelOutputWithCLSToken

from cvt import network
from cvt.architecture import PRESETS, Architecture


class CvtConfig(PreTrainedConfig, Architecture):
    """Configuration of a CvT, a drop-in replacement for `transformers.CvtConfig`.

    The constructor takes the fields of `cvt.architecture.Architecture` and of PreTrainedConfig (`num_labels`,
    `id2label`, ...) as keyword arguments.
    """

    model_type = "cvt"

    def __init__(self, **kwargs: Any) -> None:
        for field in dataclasses.fields(Architecture):
            setattr(self, field.name, kwargs.pop(field.name, field.default))
        super().__init__(**kwargs)
        Architecture.from_dict(vars(self))  # validates the fields


def preset_config(name: str, **fields: Any) -> CvtConfig:
    """Returns the configuration of a published variant, a key of `PRESETS`.

    Raises:
        ValueError: the name is unknown, or `fields` do not describe a valid model.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(PRESETS)}")
    return CvtConfig(**{**PRESETS[name], **fields})


class CvtLayer(GradientCheckpointingLayer, network.CvtLayer):
    """A transformer layer with gradient checkpointing."""


class CvtPreTrainedModel(PreTrainedModel):
    """Base class: settings for creating, loading and saving with transformers."""

    config: CvtConfig
    config_class = CvtConfig
    base_model_prefix = "cvt"
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _no_split_modules = ["CvtLayer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # initializes everything except the class token
        if isinstance(module, network.CvtStage) and module.cls_token is not None:
            init.trunc_normal_(module.cls_token, mean=0.0, std=self.config.initializer_range)

    def _format_output(self, outputs: ModelOutput, return_dict: bool | None) -> Any:
        named = self.config.return_dict if return_dict is None else return_dict
        return outputs if named else outputs.to_tuple()

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        # With checkpointing, the backward pass computes the layer a second time, so batch norm sees each
        # batch twice. Two steps with the smaller momentum equal one step with PyTorch's 0.1.
        for layer in (module for module in self.modules() if isinstance(module, CvtLayer)):
            for module in layer.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = 1 - 0.9**0.5 if layer.gradient_checkpointing else 0.1


class CvtModel(CvtPreTrainedModel):
    """CvT without a classification head. `add_pooling_layer` has no effect, as in transformers."""

    def __init__(self, config: CvtConfig, add_pooling_layer: bool = True) -> None:
        Architecture.from_dict(vars(config))  # the configuration may have changed after its validation
        super().__init__(config)
        self.encoder = network.CvtEncoder(config, CvtLayer)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | BaseModelOutputWithCLSToken:
        """Computes the features of images.

        Args:
            pixel_values: normalized images, (B, num_channels, H, W). Any size is valid that gives the last
                stage at least one token.
            output_hidden_states: whether to return the output of each stage. Default: as configured.
            return_dict: whether to return a ModelOutput instead of a tuple. Default: as configured.
            kwargs: ignored, as in transformers.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        image, cls_token, states = self.encoder(pixel_values, keep_states=output_hidden_states)
        outputs = BaseModelOutputWithCLSToken(
            last_hidden_state=image,
            cls_token_value=cls_token,
            hidden_states=states if output_hidden_states else None,
        )
        return self._format_output(outputs, return_dict)


class CvtForImageClassification(CvtPreTrainedModel):
    """CvT with a linear classifier on the class token, or on the mean of the tokens if there is none."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cvt = CvtModel(config, add_pooling_layer=False)
        self.layernorm, self.classifier = network.make_head(config, config.num_labels)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...] | ImageClassifierOutputWithNoAttention:
        """Computes the logits of images, (B, num_labels), and the loss if labels are given.

        Args:
            pixel_values: see `CvtModel.forward`.
            labels: class ids, (B,). For regression and multi-label classification
                (`config.problem_type`), values (B, num_labels).
            output_hidden_states: see `CvtModel.forward`.
            return_dict: see `CvtModel.forward`.
            kwargs: passed to the loss function, for transformers' Trainer.
        """
        outputs = self.cvt(pixel_values, output_hidden_states, return_dict=True)
        embeddings = network.pool(self.layernorm, outputs.last_hidden_state, outputs.cls_token_value)
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        result = ImageClassifierOutputWithNoAttention(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states
        )
        return self._format_output(result, return_dict)


def register() -> None:
    """Registers these classes, so that transformers' Auto classes of this process use them for CvT."""
    AutoConfig.register(CvtConfig.model_type, CvtConfig, exist_ok=True)
    AutoModel.register(CvtConfig, CvtModel, exist_ok=True)
    AutoModelForImageClassification.register(CvtConfig, CvtForImageClassification, exist_ok=True)
