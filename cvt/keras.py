"""CvT on Keras 3: TFCvtModel and TFCvtForImageClassification.

For programs that used transformers' classes of these names, which transformers 5 no longer has. They
take the same arguments and give the same outputs; images are (B, num_channels, H, W), as there. Inside,
images are (B, H, W, C), in which convolutions run on every backend.

The backend is chosen as ever in Keras, by KERAS_BACKEND or keras.json; PyTorch's and TensorFlow's were
tried. Weights have PyTorch's names and layouts at the border only: in `from_torch` and `to_torch`,
through which files go as well.
"""

from __future__ import annotations

import copy
import functools
import logging
import os
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cvt.configuration import CvtConfig, check_architecture
from cvt.errors import CheckpointError, some
from cvt.modeling import CvtForImageClassification, CvtModel

try:
    import keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise ImportError("cvt.keras needs Keras: pip install 'cvt-label[keras]'") from error
    raise ImportError(
        f"Keras can't load its backend ({error}); KERAS_BACKEND=torch selects PyTorch"
    ) from error

from keras import ops

from cvt.checkpoints.tensorflow import TO_TORCH, check_keys, read_h5, torch_name, write_h5

logger = logging.getLogger(__name__)

#: Of layer norm and batch norm, in PyTorch's CvT and transformers' TensorFlow classes; Keras' is 1e-3.
EPSILON = 1e-5

H5_NAME = "tf_model.h5"


class _ByName:
    """Indexing by name, as transformers' outputs have it, for a named tuple."""

    _fields: ClassVar[tuple[str, ...]]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)  # type: ignore[misc]
        if key not in self._fields:
            raise KeyError(key)
        return getattr(self, key)

    def keys(self) -> tuple[str, ...]:
        """The names of what there is."""
        return self._fields

    def to_tuple(self) -> tuple[Any, ...]:
        """What there is, without names."""
        return tuple(self)  # type: ignore[arg-type]


class TFBaseModelOutputWithCLSToken:
    """What TFCvtModel returns: a named tuple of those attributes that aren't None.

    Attributes:
        last_hidden_state: the last stage's output, (B, C, H, W).
        cls_token_value: its class token, (B, 1, C), or None where that stage has none.
        hidden_states: the output of each stage, (B, C, H, W) of that stage, or None.
    """

    last_hidden_state: Any = None
    cls_token_value: Any = None
    hidden_states: tuple[Any, ...] | None = None


class TFImageClassifierOutputWithNoAttention:
    """What TFCvtForImageClassification returns: a named tuple of those attributes that aren't None.

    Attributes:
        loss: the mean over the batch, a scalar, or None without labels.
        logits: (B, num_labels).
        hidden_states: the output of each stage, (B, C, H, W) of that stage, or None.
    """

    loss: Any = None
    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None


@functools.cache
def _type_with(kind: type, names: tuple[str, ...]) -> type:
    # Of a tuple, Keras' own machinery (predict, functional models) handles the parts. It takes no None
    # for a part, hence a type for each set of them; what such a type lacks, `kind` says is None.
    return type(kind.__name__, (_ByName, namedtuple(kind.__name__, names), kind), {})


def _output(kind: type, **values: Any) -> Any:
    present = {name: value for name, value in values.items() if value is not None}
    return _type_with(kind, tuple(present))(**present)


def _built(layer: keras.layers.Layer, *shape: int | None) -> keras.layers.Layer:
    """The layer, with its variables made at once: all widths are known from the configuration."""
    layer.build((None, *shape))
    return layer


def _initializer(config: PreTrainedConfig) -> keras.initializers.Initializer:
    # A new one for each layer: one without a seed gives the same values time and again.
    return keras.initializers.TruncatedNormal(stddev=config.initializer_range)


def _dense(
    config: PreTrainedConfig, name: str, width_in: int, width: int, **options: Any
) -> keras.layers.Layer:
    layer = keras.layers.Dense(width, kernel_initializer=_initializer(config), name=name, **options)
    return _built(layer, None, width_in)


def _layer_norm(name: str, width: int) -> keras.layers.Layer:
    return _built(keras.layers.LayerNormalization(epsilon=EPSILON, name=name), None, width)


def _to_tokens(image: Any) -> Any:
    """(B, H, W, C) to (B, H*W, C)."""
    _, height, width, channels = ops.shape(image)
    return ops.reshape(image, (-1, height * width, channels))


def _to_channels_first(image: Any) -> Any:
    """(B, H, W, C) to (B, C, H, W)."""
    return ops.transpose(image, (0, 3, 1, 2))


class CvtDropPath(keras.layers.Layer):
    """Stochastic depth (arXiv 1603.09382): in training, drops a sample's residual branch."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.seeds = keras.random.SeedGenerator()
        self.built = True

    def call(self, branch: Any, training: bool = False) -> Any:
        """(B, T, C) to (B, T, C), of the same expectation."""
        if not training or self.rate == 0.0:
            return branch
        drawn = keras.random.uniform((ops.shape(branch)[0], 1, 1), seed=self.seeds)
        return branch * ops.cast(drawn >= self.rate, branch.dtype) / (1 - self.rate)


class CvtDepthwiseProjection(keras.layers.Layer):
    """Depthwise convolution with batch norm.

    Batch norm's moving variance is of the batch as it is; PyTorch's is of the population that the batch
    is a sample of, which is larger by n/(n-1) for the n tokens of a batch.
    """

    def __init__(self, config: PreTrainedConfig, stage: int, stride: int, padding: int, name: str) -> None:
        super().__init__(name=name)
        width = config.embed_dim[stage]
        self.padding = keras.layers.ZeroPadding2D(padding, data_format="channels_last")
        self.convolution = _built(
            keras.layers.DepthwiseConv2D(
                config.kernel_qkv[stage],
                strides=stride,
                use_bias=False,
                data_format="channels_last",
                depthwise_initializer=_initializer(config),
                name=f"{name}-convolution",
            ),
            *(None, None, width),
        )
        # What Keras calls momentum is 1 - PyTorch's.
        self.normalization = _built(
            keras.layers.BatchNormalization(epsilon=EPSILON, momentum=0.9, name=f"{name}-normalization"),
            *(None, None, width),
        )
        self.built = True

    def call(self, image: Any) -> Any:
        """(B, H_in, W_in, C) to (B, H, W, C)."""
        return self.normalization(self.convolution(self.padding(image)))


class CvtAveragePooling(keras.layers.Layer):
    """PyTorch's AvgPool2d with ceil_mode, which Keras lacks: one more window where some would be left.

    The zeros of the padding count in the mean; what lies beyond them, of that window, does not.
    """

    def __init__(self, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.kernel, self.stride, self.padding = kernel, stride, padding
        self.built = True

    def call(self, image: Any) -> Any:
        """(B, H_in, W_in, C) to (B, H, W, C).

        Raises:
            ValueError: the image's size isn't known, as in a graph for images of any size.
        """
        sizes = tuple(image.shape[1:3])
        if None in sizes:
            raise ValueError(
                'qkv_projection_method "avg" needs images of a size known beforehand, in TensorFlow\'s'
                f" graphs and functional models: this input has {tuple(image.shape)}"
            )
        before, after = self.padding, self.padding + self.stride - 1
        pads = ((0, 0), (before, after), (before, after), (0, 0))
        means = self._pool(ops.pad(image, pads))
        # Of ones where a window counts a value, padding included, the mean is the part that counts.
        counted = np.zeros((1, *(size + before + after for size in sizes), 1), dtype="float32")
        counted[:, : sizes[0] + 2 * before, : sizes[1] + 2 * before] = 1
        means = means / ops.cast(self._pool(ops.convert_to_tensor(counted)), means.dtype)
        # A window that starts in the padding after the image is none.
        height, width = (-(-(size + self.padding) // self.stride) for size in sizes)
        return means[:, :height, :width]

    def _pool(self, image: Any) -> Any:
        return ops.average_pool(image, self.kernel, strides=self.stride, data_format="channels_last")


class CvtSelfAttention(keras.layers.Layer):
    """Attention whose queries, keys and values are convolutional projections (section 3.2)."""

    def __init__(self, config: PreTrainedConfig, stage: int, name: str) -> None:
        super().__init__(name=name)
        self.width = config.embed_dim[stage]
        self.num_heads = config.num_heads[stage]
        self.scale = self.width**-0.5  # of the whole width, not of a head's
        self.with_cls_token = config.cls_token[stage]
        self.convolutions = [
            self._projection(config, stage, part, name) for part in ("query", "key", "value")
        ]
        self.projections = [
            _dense(
                config, f"{name}-projection_{part}", self.width, self.width, use_bias=config.qkv_bias[stage]
            )
            for part in ("query", "key", "value")
        ]
        self.dropout = keras.layers.Dropout(config.attention_drop_rate[stage])
        self.built = True

    @staticmethod
    def _projection(config: PreTrainedConfig, stage: int, part: str, name: str) -> keras.layers.Layer:
        query = part == "query"
        stride = (config.stride_q if query else config.stride_kv)[stage]
        padding = (config.padding_q if query else config.padding_kv)[stage]
        method = config.qkv_projection_method[stage]
        if method == "dw_bn":
            name = f"{name}-convolution_projection_{part}-convolution_projection"
            return CvtDepthwiseProjection(config, stage, stride, padding, name)
        if method == "avg" and not query:
            return CvtAveragePooling(config.kernel_qkv[stage], stride, padding)
        return keras.layers.Identity()

    def call(self, hidden_state: Any, height: int, width: int) -> Any:
        """(B, T, C) to (B, T, C); T is H*W, and 1 more for a class token, which comes first."""
        first = int(self.with_cls_token)
        image = ops.reshape(hidden_state[:, first:], (-1, height, width, self.width))
        projected = []
        for convolution, linear in zip(self.convolutions, self.projections, strict=True):
            tokens = _to_tokens(convolution(image))
            if self.with_cls_token:
                tokens = ops.concatenate([hidden_state[:, :1], tokens], axis=1)
            heads = (-1, ops.shape(tokens)[1], self.num_heads, self.width // self.num_heads)
            projected.append(ops.transpose(ops.reshape(linear(tokens), heads), (0, 2, 1, 3)))
        query, key, value = projected
        scores = ops.matmul(query * self.scale, ops.swapaxes(key, -1, -2))
        weights = self.dropout(ops.softmax(scores, axis=-1))
        context = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return ops.reshape(context, (-1, ops.shape(hidden_state)[1], self.width))


class CvtLayer(keras.layers.Layer):
    """Transformer block, with layer norm ahead of attention and MLP."""

    def __init__(self, config: PreTrainedConfig, stage: int, drop_path_rate: float, name: str) -> None:
        super().__init__(name=name)
        width, drop_rate = config.embed_dim[stage], config.drop_rate[stage]
        hidden = int(width * config.mlp_ratio[stage])
        self.layernorm_before = _layer_norm(f"{name}-layernorm_before", width)
        self.attention = CvtSelfAttention(config, stage, f"{name}-attention-attention")
        self.attention_output = _dense(config, f"{name}-attention-output-dense", width, width)
        self.attention_dropout = keras.layers.Dropout(drop_rate)
        self.layernorm_after = _layer_norm(f"{name}-layernorm_after", width)
        self.intermediate = _dense(config, f"{name}-intermediate-dense", width, hidden)
        self.mlp_output = _dense(config, f"{name}-output-dense", hidden, width)
        self.mlp_dropout = keras.layers.Dropout(drop_rate)
        self.drop_path = CvtDropPath(drop_path_rate)
        self.built = True

    def call(self, hidden_state: Any, height: int, width: int) -> Any:
        """(B, T, C) to (B, T, C)."""
        context = self.attention(self.layernorm_before(hidden_state), height=height, width=width)
        branch = self.attention_dropout(self.attention_output(context))
        hidden_state = hidden_state + self.drop_path(branch)
        transformed = ops.gelu(self.intermediate(self.layernorm_after(hidden_state)), approximate=False)
        branch = self.mlp_dropout(self.mlp_output(transformed))
        # As in the paper's code, only the branch is dropped; transformers drops the whole sum.
        return hidden_state + self.drop_path(branch)


class CvtStage(keras.layers.Layer):
    """Token embedding and the layers over it, with a class token if the stage has one."""

    def __init__(self, config: PreTrainedConfig, stage: int, name: str) -> None:
        super().__init__(name=name)
        width, depth, rate = config.embed_dim[stage], config.depth[stage], config.drop_path_rate[stage]
        embeddings = f"{name}-embedding-convolution_embeddings"
        self.padding = keras.layers.ZeroPadding2D(config.patch_padding[stage], data_format="channels_last")
        self.projection = _built(
            keras.layers.Conv2D(
                width,
                config.patch_sizes[stage],
                strides=config.patch_stride[stage],
                data_format="channels_last",
                kernel_initializer=_initializer(config),
                name=f"{embeddings}-projection",
            ),
            *(None, None, config.embed_dim[stage - 1] if stage else config.num_channels),
        )
        self.normalization = _layer_norm(f"{embeddings}-normalization", width)
        self.dropout = keras.layers.Dropout(config.drop_rate[stage])
        # Rates rise over a stage's layers, as in the paper's code.
        self.blocks = [
            CvtLayer(config, stage, rate * i / max(depth - 1, 1), f"{name}-layers-{i}") for i in range(depth)
        ]
        self.cls_token = (
            self.add_weight(shape=(1, 1, width), initializer=_initializer(config), name="cls_token")
            if config.cls_token[stage]
            else None
        )
        self.built = True

    def call(self, image: Any) -> tuple[Any, Any]:
        """(B, H_in, W_in, C_in) to (B, H, W, C) and the class token, (B, 1, C) or None."""
        image = self.projection(self.padding(image))
        batch, height, width, channels = ops.shape(image)
        hidden_state = self.dropout(self.normalization(_to_tokens(image)))
        if self.cls_token is not None:
            cls_token = ops.broadcast_to(ops.cast(self.cls_token, hidden_state.dtype), (batch, 1, channels))
            hidden_state = ops.concatenate([cls_token, hidden_state], axis=1)
        for block in self.blocks:
            hidden_state = block(hidden_state, height=height, width=width)
        first = 0 if self.cls_token is None else 1
        image = ops.reshape(hidden_state[:, first:], (-1, height, width, channels))
        return image, hidden_state[:, :1] if first else None


class TFCvtPreTrainedModel(keras.Model):
    """Loading, saving, and the conventions of a call that the models share."""

    #: The class of the same model in PyTorch, and what its parameters' names have ahead of them here.
    torch_class: ClassVar[type[PreTrainedModel]]
    torch_prefix: ClassVar[str]

    def __init__(self, config: PreTrainedConfig, name: str | None = None) -> None:
        check_architecture(config)  # again: a configuration can be changed after it was made
        super().__init__(name=name)
        self.config = config

    def __call__(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As `call`, whose arguments may also come in a mapping, in place of the first."""
        if isinstance(pixel_values, Mapping):
            kwargs = {**pixel_values, **kwargs}
            pixel_values = kwargs.pop("pixel_values", None)
        return super().__call__(pixel_values, *args, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """What Keras' own format, `model.save("….keras")`, keeps of the model beside its weights."""
        return {"config": self.config.to_dict(), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """The reverse of `get_config`; weights are initial."""
        return cls(CvtConfig.from_dict(config["config"]), name=config["name"])

    @classmethod
    def from_torch(cls, model: PreTrainedModel) -> Self:
        """This model, of a PyTorch model's configuration and weights.

        Args:
            model: a CvtModel for a TFCvtModel, a CvtForImageClassification for a
                TFCvtForImageClassification; this package's or transformers'.

        Raises:
            CheckpointError: the model is another; names the weights that differ.
        """
        made = cls(copy.deepcopy(model.config))
        made._assign({f"{cls.torch_prefix}{key}": value for key, value in model.state_dict().items()})
        return made

    def to_torch(self) -> PreTrainedModel:
        """The PyTorch model of the same configuration and weights, in float32 and evaluation mode."""
        with torch.device("meta"):  # initial weights would only take time
            model = self.torch_class(copy.deepcopy(self.config))
        model = model.to_empty(device="cpu")
        state = {key.removeprefix(self.torch_prefix): value for key, value in self._torch_state().items()}
        counts = {key for key in model.state_dict() if key.endswith(".num_batches_tracked")}
        model.load_state_dict(state | {key: torch.tensor(0) for key in counts}, strict=True)
        return model.eval()

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Loads what PyTorch's models save, or transformers' TensorFlow models.

        Args:
            path: a folder in Hugging Face's layout, a hub id, or a `tf_model.h5` next to its
                config.json. Of a folder, a `tf_model.h5` is read only where there is nothing else.
            kwargs: changes of the configuration, such as `num_labels`; for PyTorch's files, whatever
                their `from_pretrained` takes.

        Raises:
            CheckpointError: the weights of a `tf_model.h5` don't fit config.json; names them. A
                classifier that is missing, as in a TFCvtModel's file, is initialised instead, with a
                warning.
            OSError: there are no such files.
        """
        h5 = Path(path) / H5_NAME
        if Path(path).suffix == ".h5":
            h5 = Path(path)
        elif not h5.is_file() or any(
            any(Path(path).glob(name)) for name in ("model*.safetensors*", "pytorch_model*.bin*")
        ):
            return cls.from_torch(cls.torch_class.from_pretrained(path, dtype=torch.float32, **kwargs))
        made = cls(CvtConfig.from_pretrained(h5.parent, **kwargs))
        state, head = read_h5(h5), ("layernorm.", "classifier.")
        if not cls.torch_prefix:
            initial = {k: v for k, v in made._torch_state().items() if k.startswith(head) and k not in state}
            if initial:
                logger.warning("%s has no classifier: initialised %s", h5, ", ".join(sorted(initial)))
            state = initial | state
        else:
            state = {key: value for key, value in state.items() if not key.startswith(head)}
        try:
            made._assign(state)
        except CheckpointError as error:
            raise CheckpointError(f"{h5}: {error}") from None
        return made

    def save_pretrained(self, folder: str | os.PathLike[str], safe_serialization: bool = True) -> None:
        """Saves config.json and weights, in Hugging Face's layout.

        Args:
            folder: where to; made if it doesn't exist.
            safe_serialization: whether to save `model.safetensors` of PyTorch's model, which this
                package and transformers load; else `tf_model.h5`, which transformers 4 loads into its
                TensorFlow classes if config.json has an `image_size`.
        """
        if safe_serialization:
            self.to_torch().save_pretrained(folder)
            return
        Path(folder).mkdir(parents=True, exist_ok=True)
        write_h5(self._torch_state(), Path(folder) / H5_NAME)
        self.config.architectures = [self.torch_class.__name__]
        self.config.save_pretrained(folder)

    def _by_torch_name(self) -> dict[str, Any]:
        # A path ends in the names of layer and variable. A layer has for a name that of PyTorch's module,
        # but for its dots, which Keras can't have there.
        names = (w.path.split("/")[-2:] for w in self.weights)
        return {
            torch_name(".".join(n).replace("-", ".")): w for n, w in zip(names, self.weights, strict=True)
        }

    def _torch_state(self) -> dict[str, Tensor]:
        """Weights with the names and layouts that they have in CvtForImageClassification."""
        state = {}
        for key, variable in self._by_torch_name().items():
            value = torch.from_numpy(np.array(ops.convert_to_numpy(variable), dtype=np.float32))
            state[key] = value.permute(_axes(key, value.ndim)).contiguous()
        return state

    def _assign(self, state: Mapping[str, Tensor]) -> None:
        """The reverse of `_torch_state`."""
        variables = self._by_torch_name()
        state = {key: value for key, value in state.items() if not key.endswith(".num_batches_tracked")}
        check_keys(state, variables, "weights don't fit the configuration")
        misshapen = []
        for key, variable in variables.items():
            value, axes = state[key].detach().cpu().float(), _axes(key, len(variable.shape))
            if [variable.shape[axis] for axis in axes] == list(value.shape):
                variable.assign(value.permute(np.argsort(axes).tolist()).numpy())
            else:
                misshapen.append(key)
        if misshapen:
            raise CheckpointError(
                f"weights don't fit the configuration, which says another shape: {some(misshapen)}"
            )


def _axes(key: str, ndim: int) -> tuple[int, ...]:
    """The axes of a variable, in the order that they have in PyTorch."""
    if key.endswith(".convolution.weight"):  # depthwise, (height, width, channels, 1)
        return (2, 3, 0, 1)
    return TO_TORCH.get(ndim, tuple(range(ndim)))


@keras.saving.register_keras_serializable(package="cvt")
class TFCvtModel(TFCvtPreTrainedModel):
    """CvT without a head; the counterpart of `cvt.CvtModel`."""

    torch_class = CvtModel
    torch_prefix = "cvt."

    def __init__(self, config: PreTrainedConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.stages = [CvtStage(config, i, f"cvt-encoder-stages-{i}") for i in range(len(config.depth))]
        self.built = True

    def call(
        self,
        pixel_values: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Any:
        """Computes the features of normalised images, (B, num_channels, H, W).

        Args:
            pixel_values: the images, of any size that leaves the last stage a token.
            output_hidden_states: whether to return each stage's output; else as configured.
            return_dict: whether to return a TFBaseModelOutputWithCLSToken, not a plain tuple; else as
                configured.
            training: whether to drop, and to normalise by the batch and learn its statistics; Keras
                tells the layers.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if return_dict is None:
            return_dict = self.config.return_dict
        image, cls_token = ops.transpose(ops.convert_to_tensor(pixel_values), (0, 2, 3, 1)), None
        states: tuple[Any, ...] = ()
        for stage in self.stages:
            image, cls_token = stage(image)
            states += (_to_channels_first(image),)
        outputs = _output(
            TFBaseModelOutputWithCLSToken,
            last_hidden_state=states[-1],
            cls_token_value=cls_token,
            hidden_states=states if output_hidden_states else None,
        )
        return outputs if return_dict else outputs.to_tuple()


@keras.saving.register_keras_serializable(package="cvt")
class TFCvtForImageClassification(TFCvtPreTrainedModel):
    """CvT with a linear classifier; the counterpart of `cvt.CvtForImageClassification`.

    `fit` needs no loss in `compile`: without one, the model's own is used, with labels as Keras' `y` or
    as "labels" among the inputs. A loss or a metric in `compile` is given the logits.
    """

    torch_class = CvtForImageClassification
    torch_prefix = ""

    def __init__(self, config: PreTrainedConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width = config.embed_dim[-1]
        self.num_labels = config.num_labels
        self.cvt = TFCvtModel(config, name="cvt")
        self.layernorm = _layer_norm("layernorm", width)
        self.classifier = (
            _dense(config, "classifier", width, config.num_labels)
            if config.num_labels > 0
            else keras.layers.Identity()
        )
        self.loss_function = (
            keras.losses.MeanSquaredError()
            if config.num_labels == 1
            else keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        )
        self.built = True

    def call(
        self,
        pixel_values: Any = None,
        labels: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Any:
        """Classifies normalised images, (B, num_channels, H, W), into logits (B, num_labels).

        Args:
            pixel_values: the images.
            labels: for a loss: class ids (B,), of which the loss is the cross-entropy; for a model with
                one label values, (B,) or (B, 1), of which it is the squared error. It is the mean over
                the batch, where transformers' TensorFlow classes gave one for each image.
            output_hidden_states: whether to return each stage's output; else as configured.
            return_dict: whether to return a TFImageClassifierOutputWithNoAttention, not a plain tuple;
                else as configured.
            training: whether to drop, and to normalise by the batch and learn its statistics; Keras
                tells the layers.
        """
        if return_dict is None:
            return_dict = self.config.return_dict
        outputs = self.cvt(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        tokens = outputs.cls_token_value
        if tokens is None:
            tokens = _to_tokens(ops.transpose(outputs.last_hidden_state, (0, 2, 3, 1)))
        logits = self.classifier(ops.mean(self.layernorm(tokens), axis=1))
        result = _output(
            TFImageClassifierOutputWithNoAttention,
            loss=None if labels is None else self.loss_function(labels, logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
        return result if return_dict else result.to_tuple()

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """What Keras' `fit` and `evaluate` minimise and report."""
        if y is None:
            return y_pred.loss
        if self.loss is None:
            return self.loss_function(y, y_pred.logits, sample_weight)
        return super().compute_loss(x, y, y_pred.logits, sample_weight, training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """What Keras' `fit` and `evaluate` report beside the loss."""
        return super().compute_metrics(x, y, y_pred.logits, sample_weight)
