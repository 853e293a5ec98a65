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
from cvt.checkpoints.files import files_to_load
from cvt.checkpoints.tensorflow import TO_TORCH
from cvt.checkpoints.weights import check_weights, read_file
from cvt.errors import checkpoint_errors
from cvt.keras.layers import CvtStage, build, dense, layer_norm, to_tokens
from cvt.modeling import CvtConfig, CvtForImageClassification, CvtModel

H5_NAME = "tf_model.h5"


class TFCvtOutput:
    """Output of a model: a named tuple of the values that are not None, also indexed by name.

    The names are those of transformers. An attribute without a value is None.
    """

    _fields: ClassVar[tuple[str, ...]]
    _asdict: ClassVar[Any]

    def __getitem__(self, key: Any) -> Any:
        values = self._asdict() if isinstance(key, str) else self.to_tuple()
        return values[key]

    def __getattr__(self, name: str) -> None:
        if name not in ("last_hidden_state", "cls_token_value", "loss", "logits", "hidden_states"):
            raise AttributeError(name)

    def keys(self) -> tuple[str, ...]:
        """Returns the names of the values."""
        return self._fields

    def to_tuple(self) -> tuple[Any, ...]:
        """Returns the values."""
        return tuple(self)  # type: ignore[arg-type]


@functools.cache
def _output_type(names: tuple[str, ...]) -> type:
    # Keras (predict, functional models) supports tuples, but not None values in them. So there is one type
    # per set of names.
    return type("TFCvtOutput", (TFCvtOutput, namedtuple("TFCvtOutput", names)), {})


class TFCvtPreTrainedModel(keras.Model):
    """Base class: loading, saving and calling."""

    #: The PyTorch class of the model, and the prefix of its names in the names of a classifier.
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

    def _format_output(self, return_dict: bool | None, **values: Any) -> Any:
        present = {name: value for name, value in values.items() if value is not None}
        named = self.config.return_dict if return_dict is None else return_dict
        return _output_type(tuple(present))(**present) if named else tuple(present.values())

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
        check_weights(state, cls._empty_torch_model(model.config).state_dict())
        for key, variable in result._variables_by_torch_name().items():
            axes = np.argsort(TO_TORCH[state[key].ndim]).tolist()
            value = state[key].detach().cpu().float().permute(axes)
            # The kernel of a depthwise convolution has its axis of size 1 in another place.
            variable.assign(value.reshape(tuple(variable.shape)).numpy())
        return result

    def to_torch(self) -> PreTrainedModel:
        """Returns a PyTorch model with the same configuration and weights, in float32 and evaluation mode."""
        model = self._empty_torch_model(self.config).to_empty(device="cpu")
        state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
        for key, variable in self._variables_by_torch_name().items():
            value = torch.from_numpy(np.array(ops.convert_to_numpy(variable), dtype=np.float32))
            state[key] = value.permute(TO_TORCH[value.ndim]).reshape(state[key].shape)
        model.load_state_dict(state)
        return model.eval()

    @classmethod
    def _empty_torch_model(cls, config: PreTrainedConfig) -> PreTrainedModel:
        with torch.device("meta"):  # skips random initialization
            return cls.torch_class(copy.deepcopy(config))

    def _variables_by_torch_name(self) -> dict[str, Any]:
        # The layers create their variables in the order of PyTorch's state dict.
        keys = self._empty_torch_model(self.config).state_dict().keys()
        names = (key for key in keys if not key.endswith(".num_batches_tracked"))
        return dict(zip(names, self.weights, strict=True))

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
        empty = cls._empty_torch_model(config).state_dict()
        expected = {f"{cls.torch_prefix}{key}": value for key, value in empty.items()}
        head = ("layernorm.", "classifier.")
        check_weights(
            {key: value for key, value in state.items() if key in expected or not key.startswith(head)},
            {key: value for key, value in expected.items() if key in state or not key.startswith(head)},
        )

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Saves config.json and model.safetensors, which this package and transformers can load."""
        self.to_torch().save_pretrained(folder)


@keras.saving.register_keras_serializable(package="cvt")
class TFCvtModel(TFCvtPreTrainedModel):
    """CvT without a classification head, like `cvt.CvtModel`."""

    torch_class = CvtModel
    torch_prefix = "cvt."

    def __init__(self, config: PreTrainedConfig, name: str | None = None) -> None:
        super().__init__(config, name)
        self.stages = [CvtStage(config, i) for i in range(len(config.depth))]
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
        return self._format_output(
            return_dict,
            last_hidden_state=states[-1],
            cls_token_value=cls_token,
            hidden_states=states if output_hidden_states else None,
        )


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
        self.cvt = TFCvtModel(config)
        self.layernorm = build(layer_norm(), None, width)
        self.classifier = build(dense(config, labels), width) if labels else keras.layers.Identity()
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
        return self._format_output(
            return_dict,
            loss=None if labels is None else self.loss_function(labels, logits),
            logits=logits,
            hidden_states=outputs.hidden_states,
        )

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
