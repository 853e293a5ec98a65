"""The models of CvT on Keras 3: calls, outputs, losses, loading and saving.

`cvt.keras.layers` has the layers. `cvt.checkpoints.tensorflow` reads the format of `tf_model.h5`.
"""

from __future__ import annotations

import copy
import functools
import os
from collections import namedtuple
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import keras
import numpy as np
import torch
from keras import ops
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from cvt.architecture import Architecture
from cvt.checkpoints.tensorflow import TO_TORCH, torch_name
from cvt.checkpoints.weights import check_weights, files_to_load, read_file
from cvt.configuration import CvtConfig
from cvt.errors import checkpoint_errors
from cvt.keras.layers import CvtStage, dense, layer_norm, to_tokens
from cvt.modeling import CvtForImageClassification, CvtModel

H5_NAME = "tf_model.h5"


class _NamedOutput:
    """Adds indexing by name to a named tuple, as in the outputs of transformers."""

    _fields: ClassVar[tuple[str, ...]]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)  # type: ignore[misc]
        if key not in self._fields:
            raise KeyError(key)
        return getattr(self, key)

    def keys(self) -> tuple[str, ...]:
        return self._fields

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self)  # type: ignore[arg-type]


class TFBaseModelOutputWithCLSToken:
    """Output of TFCvtModel, with the attributes of `cvt.modeling.BaseModelOutputWithCLSToken`."""

    last_hidden_state: Any = None
    cls_token_value: Any = None
    hidden_states: tuple[Any, ...] | None = None


class TFImageClassifierOutputWithNoAttention:
    """Output of TFCvtForImageClassification, with the attributes of transformers' class."""

    loss: Any = None
    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None


@functools.cache
def _output_type(kind: type, names: tuple[str, ...]) -> type:
    # Keras (predict, functional models) supports tuples, but not None values in them. So there is one type
    # per set of names. The class attributes of `kind` are the None values of all other names.
    return type(kind.__name__, (_NamedOutput, namedtuple(kind.__name__, names), kind), {})


def _make_output(kind: type, **values: Any) -> Any:
    """Creates an output of type `kind` from the values that are not None."""
    present = {name: value for name, value in values.items() if value is not None}
    return _output_type(kind, tuple(present))(**present)


class TFCvtPreTrainedModel(keras.Model):
    """Base class: loading, saving and calling."""

    #: The PyTorch class of the model, and the prefix of its parameter names in the names of variables.
    torch_class: ClassVar[type[PreTrainedModel]]
    torch_prefix: ClassVar[str]

    def __init__(self, config: PreTrainedConfig, name: str | None = None) -> None:
        Architecture.from_dict(vars(config))  # the configuration may have changed after its validation
        super().__init__(name=name)
        self.config = config

    def __call__(self, pixel_values: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Calls the model. The first argument may be a mapping with the arguments of `call`."""
        if isinstance(pixel_values, Mapping):
            kwargs = {**pixel_values, **kwargs}
            pixel_values = kwargs.pop("pixel_values", None)
        return super().__call__(pixel_values, *args, **kwargs)

    def _format_output(self, outputs: Any, return_dict: bool | None) -> Any:
        named = self.config.return_dict if return_dict is None else return_dict
        return outputs if named else outputs.to_tuple()

    def get_config(self) -> dict[str, Any]:
        """Returns the configuration for Keras' own file format, `model.save("….keras")`."""
        return {"config": self.config.to_dict(), "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Self:
        """Creates a model with initial weights from the result of `get_config`."""
        return cls(CvtConfig.from_dict(config["config"]), name=config["name"])

    @classmethod
    def from_torch(cls, model: PreTrainedModel) -> Self:
        """Creates a Keras model with the configuration and weights of a PyTorch model.

        The model is a CvtModel or CvtForImageClassification of this package or of transformers.

        Raises:
            CheckpointError: the weights do not fit the model. The message names the weights.
        """
        result = cls(copy.deepcopy(model.config))
        state = model.state_dict()
        check_weights(state, result._empty_torch_model().state_dict())
        for key, variable in result._variables_by_torch_name().items():
            axes = np.argsort(_axes(key, len(variable.shape))).tolist()
            variable.assign(state[key].detach().cpu().float().permute(axes).numpy())
        return result

    def to_torch(self) -> PreTrainedModel:
        """Returns a PyTorch model with the same configuration and weights, in float32 and evaluation mode."""
        model = self._empty_torch_model().to_empty(device="cpu")
        state = {key: torch.tensor(0) for key in model.state_dict() if key.endswith(".num_batches_tracked")}
        for key, variable in self._variables_by_torch_name().items():
            value = torch.from_numpy(np.array(ops.convert_to_numpy(variable), dtype=np.float32))
            state[key] = value.permute(_axes(key, value.ndim))
        model.load_state_dict(state, strict=True)
        return model.eval()

    def _empty_torch_model(self) -> PreTrainedModel:
        with torch.device("meta"):  # skips random initialization
            return self.torch_class(copy.deepcopy(self.config))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> Self:
        """Loads a saved PyTorch model, or a TensorFlow model of transformers.

        Missing weights, such as those of a new classifier, are initialized with a warning, as in
        transformers.

        Args:
            path: a folder in the Hugging Face layout, a hub id, or a `tf_model.h5` with config.json next to
                it. The `tf_model.h5` of a folder is read only if the folder has no other weights.
            kwargs: overrides of the configuration, such as `num_labels`. For PyTorch files, any argument of
                transformers' `from_pretrained`.

        Raises:
            OSError: a file is missing.
            CheckpointError, RuntimeError: weights do not fit the configuration.
        """
        h5 = Path(path)
        if h5.is_dir() and H5_NAME in files_to_load(file.name for file in h5.iterdir()):
            h5 = h5 / H5_NAME
        kwargs["dtype"] = torch.float32
        if h5.suffix == ".h5":
            config, state = CvtConfig.from_pretrained(h5.parent, **kwargs), read_file(h5)
            with checkpoint_errors(h5):
                cls._check_except_head(state, config)
            model = cls.torch_class.from_pretrained(None, config=config, state_dict=state)
        else:
            model = cls.torch_class.from_pretrained(path, **kwargs)
        return cls.from_torch(model)

    @classmethod
    def _check_except_head(cls, state: Mapping[str, Tensor], config: CvtConfig) -> None:
        """Raises `CheckpointError` if weights do not fit. The classifier may be missing or superfluous."""
        with torch.device("meta"):
            empty = cls.torch_class(copy.deepcopy(config)).state_dict()
        expected = {f"{cls.torch_prefix}{key}": value for key, value in empty.items()}
        head = ("layernorm.", "classifier.")
        check_weights(
            {key: value for key, value in state.items() if key in expected or not key.startswith(head)},
            {key: value for key, value in expected.items() if key in state or not key.startswith(head)},
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Saves config.json and model.safetensors, which this package and transformers can load."""
        self.to_torch().save_pretrained(folder)

    def _variables_by_torch_name(self) -> dict[str, Any]:
        # A path ends in the names of layer and variable. A layer has the name of the PyTorch module, with
        # hyphens in place of dots, because Keras does not allow dots.
        names = (".".join(variable.path.split("/")[-2:]) for variable in self.weights)
        keys = (torch_name(name.replace("-", ".")).removeprefix(self.torch_prefix) for name in names)
        return dict(zip(keys, self.weights, strict=True))


def _axes(key: str, ndim: int) -> tuple[int, ...]:
    """Returns the permutation of the axes of a variable to PyTorch's order."""
    if key.endswith(".convolution.weight"):  # depthwise, (height, width, channels, 1)
        return (2, 3, 0, 1)
    return TO_TORCH.get(ndim, tuple(range(ndim)))


@keras.saving.register_keras_serializable(package="cvt")
class TFCvtModel(TFCvtPreTrainedModel):
    """CvT without a classification head, like `cvt.CvtModel`."""

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
        """Computes the features of normalized images, (B, num_channels, H, W).

        `training` is the mode of dropout and batch norm. `cvt.CvtModel.forward` has the other arguments.
        """
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values")
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        image, cls_token = ops.transpose(ops.convert_to_tensor(pixel_values), (0, 2, 3, 1)), None
        states: tuple[Any, ...] = ()
        for stage in self.stages:
            image, cls_token = stage(image)
            states += (ops.transpose(image, (0, 3, 1, 2)),)
        outputs = _make_output(
            TFBaseModelOutputWithCLSToken,
            last_hidden_state=states[-1],
            cls_token_value=cls_token,
            hidden_states=states if output_hidden_states else None,
        )
        return self._format_output(outputs, return_dict)


@keras.saving.register_keras_serializable(package="cvt")
class TFCvtForImageClassification(TFCvtPreTrainedModel):
    """CvT with a linear classifier, like `cvt.CvtForImageClassification`.

    Without a loss in `compile`, `fit` uses the loss of the model. Labels are `y` or the input "labels".
    Losses and metrics in `compile` receive the logits.
    """

    torch_class = CvtForImageClassification
    torch_prefix = ""

    def __init__(self, config: PreTrainedConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        width, labels = config.embed_dim[-1], config.num_labels
        self.num_labels = labels
        self.cvt = TFCvtModel(config, name="cvt")
        self.layernorm = layer_norm("layernorm", width)
        self.classifier = dense(config, "classifier", width, labels) if labels else keras.layers.Identity()
        self.loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        if labels == 1:
            self.loss_function = keras.losses.MeanSquaredError()
        self.built = True

    def call(
        self,
        pixel_values: Any = None,
        labels: Any = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        training: bool = False,
    ) -> Any:
        """Computes the logits of images, (B, num_labels), and the loss if labels are given.

        See `TFCvtModel.call` for the other arguments. The loss is the mean over the batch: cross-entropy of
        class ids, (B,). For a model with one label, the squared error of values, (B,) or (B, 1).
        """
        outputs = self.cvt(pixel_values, output_hidden_states=output_hidden_states, return_dict=True)
        tokens = outputs.cls_token_value
        if tokens is None:
            tokens = to_tokens(ops.transpose(outputs.last_hidden_state, (0, 2, 3, 1)))
        logits = self.classifier(ops.mean(self.layernorm(tokens), axis=1))
        result = _make_output(
            TFImageClassifierOutputWithNoAttention,
            loss=None if labels is None else self.loss_function(labels, logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )
        return self._format_output(result, return_dict)

    def compute_loss(
        self,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
        training: bool = True,
    ) -> Any:
        """Returns the loss, for `fit` and `evaluate` of Keras."""
        if y is None:
            return y_pred.loss
        if self.loss is None:
            return self.loss_function(y, y_pred.logits, sample_weight)
        return super().compute_loss(x, y, y_pred.logits, sample_weight, training)

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> dict[str, Any]:
        """Returns the metrics, for `fit` and `evaluate` of Keras."""
        return super().compute_metrics(x, y, y_pred.logits, sample_weight)
