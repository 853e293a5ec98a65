"""CvT, the Convolutional vision Transformer of arXiv 2103.15808: drop-in classes for transformers.

Tokens have the shape (B, H*W, C). This is the memory layout of an image in channels_last format, so neither
linear layers nor convolutions copy. `cvt.inference.network` has further optimizations for inference.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import ImageClassifierOutputWithNoAttention, ModelOutput

from cvt.configuration import CvtConfig, check_architecture


@dataclass
class BaseModelOutputWithCLSToken(ModelOutput):
    """Output of CvtModel.

    Attributes:
        last_hidden_state: output of the last stage, (B, C, H, W).
        cls_token_value: class token of the last stage, (B, 1, C), or None if the stage has none.
        hidden_states: output of each stage, (B, C, H, W) with the sizes of the stage, or None.
    """

    last_hidden_state: Tensor | None = None
    cls_token_value: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


def _named(**modules: nn.Module) -> nn.Sequential:
    """Returns a sequence with named modules. The names become part of the parameter names."""
    return nn.Sequential(OrderedDict(modules))


def _to_tokens(image: Tensor) -> Tensor:
    """Reshapes (B, C, H, W) to (B, H*W, C)."""
    return image.permute(0, 2, 3, 1).flatten(1, 2)


def _to_image(tokens: Tensor, height: int, width: int) -> Tensor:
    """Reshapes (B, H*W, C) to (B, C, H, W) in channels_last format. Copies only slices of tokens."""
    image = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
    return image.contiguous(memory_format=torch.channels_last)


class CvtConvEmbeddings(nn.Module):
    """Convolutional token embedding (section 3.1): overlapping patches, then layer norm."""

    def __init__(self, config: CvtConfig, stage: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            config.embed_dim[stage - 1] if stage else config.num_channels,
            config.embed_dim[stage],
            config.patch_sizes[stage],
            stride=config.patch_stride[stage],
            padding=config.patch_padding[stage],
        )
        self.normalization = nn.LayerNorm(config.embed_dim[stage])

    def forward(self, image: Tensor) -> Tensor:
        """Embeds an image (B, C_in, H_in, W_in) as (B, C, H, W)."""
        image = self.projection(image.contiguous(memory_format=torch.channels_last))
        return self.normalization(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class CvtSelfAttention(nn.Module):
    """Multi-head attention with convolutional projections of query, key and value (section 3.2)."""

    def __init__(self, config: CvtConfig, stage: int) -> None:
        super().__init__()
        width = config.embed_dim[stage]
        self.num_heads = config.num_heads[stage]
        self.scale = width**-0.5  # the total width of all heads, not the width of one head
        self.drop_rate = config.attention_drop_rate[stage]
        self.with_cls_token = config.cls_token[stage]

        self.convolution_projection_query = self._projection(config, stage, query=True)
        self.convolution_projection_key = self._projection(config, stage)
        self.convolution_projection_value = self._projection(config, stage)
        self.projection_query = nn.Linear(width, width, bias=config.qkv_bias[stage])
        self.projection_key = nn.Linear(width, width, bias=config.qkv_bias[stage])
        self.projection_value = nn.Linear(width, width, bias=config.qkv_bias[stage])

    @staticmethod
    def _projection(config: CvtConfig, stage: int, query: bool = False) -> nn.Module:
        width, kernel = config.embed_dim[stage], config.kernel_qkv[stage]
        stride = (config.stride_q if query else config.stride_kv)[stage]
        padding = (config.padding_q if query else config.padding_kv)[stage]
        method = config.qkv_projection_method[stage]
        if method == "dw_bn":
            convolution = nn.Conv2d(width, width, kernel, stride, padding, groups=width, bias=False)
            normalization = nn.BatchNorm2d(width)
            return _named(convolution_projection=_named(convolution=convolution, normalization=normalization))
        if method == "avg" and not query:
            return nn.AvgPool2d(kernel, stride=stride, padding=padding, ceil_mode=True)
        return nn.Identity()

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """Maps (B, T, C) to (B, T, C). T is H*W, plus 1 if there is a class token, which comes first."""
        cls_token, tokens = hidden_state.split([int(self.with_cls_token), height * width], dim=1)
        image = _to_image(tokens, height, width)

        def project(convolution: nn.Module, linear: nn.Module) -> Tensor:
            tokens = _to_tokens(convolution(image))
            if self.with_cls_token:
                tokens = torch.cat((cls_token, tokens), dim=1)
            return linear(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

        context = F.scaled_dot_product_attention(
            project(self.convolution_projection_query, self.projection_query),
            project(self.convolution_projection_key, self.projection_key),
            project(self.convolution_projection_value, self.projection_value),
            dropout_p=self.drop_rate if self.training else 0.0,
            scale=self.scale,
        )
        return context.transpose(1, 2).flatten(2)


class CvtDropPath(nn.Module):
    """Stochastic depth (arXiv 1603.09382): in training, drops the residual branch of random samples."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """Maps (B, ...) to (B, ...). The expected value does not change."""
        if not self.training or self.rate == 0.0:
            return branch
        kept = branch.new_empty([branch.shape[0]] + [1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (kept / (1 - self.rate))


class QuickGELU(nn.Module):
    """The activation of Microsoft's code, an approximation of GELU: x * sigmoid(1.702 x)."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Maps a tensor to a tensor of the same shape."""
        return hidden_state * torch.sigmoid(1.702 * hidden_state)


class CvtLayer(GradientCheckpointingLayer):
    """Transformer block with pre-norm: layer norm before attention and before the MLP."""

    def __init__(self, config: CvtConfig, stage: int, drop_path_rate: float) -> None:
        super().__init__()
        width, drop_rate = config.embed_dim[stage], config.drop_rate[stage]
        hidden = int(width * config.mlp_ratio[stage])
        self.attention = nn.ModuleDict(
            {
                "attention": CvtSelfAttention(config, stage),
                "output": _named(dense=nn.Linear(width, width), dropout=nn.Dropout(drop_rate)),
            }
        )
        activation = QuickGELU() if getattr(config, "hidden_act", "gelu") == "quick_gelu" else nn.GELU()
        self.intermediate = _named(dense=nn.Linear(width, hidden), activation=activation)
        self.output = _named(dense=nn.Linear(hidden, width), dropout=nn.Dropout(drop_rate))
        self.drop_path = CvtDropPath(drop_path_rate)
        self.layernorm_before = nn.LayerNorm(width)
        self.layernorm_after = nn.LayerNorm(width)

    def forward(self, hidden_state: Tensor, height: int, width: int) -> Tensor:
        """Maps (B, T, C) to (B, T, C)."""
        context = self.attention["attention"](self.layernorm_before(hidden_state), height, width)
        hidden_state = hidden_state + self.drop_path(self.attention["output"](context))
        transformed = self.output(self.intermediate(self.layernorm_after(hidden_state)))
        # Drops only the branch, as in the paper's code. transformers drops the whole sum.
        return hidden_state + self.drop_path(transformed)


class CvtStage(nn.Module):
    """One stage: token embedding, class token if configured, and transformer layers."""

    def __init__(self, config: CvtConfig, stage: int) -> None:
        super().__init__()
        depth, rate = config.depth[stage], config.drop_path_rate[stage]
        self.embedding = _named(
            convolution_embeddings=CvtConvEmbeddings(config, stage),
            dropout=nn.Dropout(config.drop_rate[stage]),
        )
        # The rate rises over the layers of a stage, as in the paper's code. transformers uses the rate of
        # layer i for all layers of stage i.
        rates = (rate * i / max(depth - 1, 1) for i in range(depth))
        self.layers = nn.ModuleList(CvtLayer(config, stage, rate) for rate in rates)
        token = nn.Parameter(torch.zeros(1, 1, config.embed_dim[-1])) if config.cls_token[stage] else None
        self.cls_token = token

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (B, C_in, H_in, W_in) to (B, C, H, W) and the class token, (B, 1, C) or None."""
        image = self.embedding(image)
        height, width = image.shape[-2:]
        hidden_state = _to_tokens(image)
        if self.cls_token is not None:
            cls_token = self.cls_token.expand(image.shape[0], -1, -1)
            hidden_state = torch.cat((cls_token, hidden_state), dim=1)
        for layer in self.layers:
            hidden_state = layer(hidden_state, height, width)
        if self.cls_token is None:
            return _to_image(hidden_state, height, width), None
        return _to_image(hidden_state[:, 1:], height, width), hidden_state[:, :1]


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
        if isinstance(module, CvtStage) and module.cls_token is not None:
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
        check_architecture(config)  # the configuration may have changed after its own validation
        super().__init__(config)
        stages = (CvtStage(config, i) for i in range(len(config.depth)))
        self.encoder = nn.ModuleDict({"stages": nn.ModuleList(stages)})
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
        image, cls_token = pixel_values, None
        states: tuple[Tensor, ...] | None = () if output_hidden_states else None
        for stage in self.encoder["stages"].children():
            image, cls_token = stage(image)
            if states is not None:
                states += (image,)
        outputs = BaseModelOutputWithCLSToken(
            last_hidden_state=image, cls_token_value=cls_token, hidden_states=states
        )
        return self._format_output(outputs, return_dict)


class CvtForImageClassification(CvtPreTrainedModel):
    """CvT with a linear classifier on the class token, or on the mean of the tokens if there is none."""

    def __init__(self, config: CvtConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.cvt = CvtModel(config, add_pooling_layer=False)
        width = config.embed_dim[-1]
        self.layernorm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def pool(self, last_hidden_state: Tensor, cls_token: Tensor | None) -> Tensor:
        """Returns the input of the classifier, (B, C), from the outputs of CvtModel."""
        tokens = _to_tokens(last_hidden_state) if cls_token is None else cls_token
        # The head may have a higher precision than the features.
        return self.layernorm(tokens.to(self.layernorm.weight.dtype)).mean(dim=1)

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
        logits = self.classifier(self.pool(outputs.last_hidden_state, outputs.cls_token_value))
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
