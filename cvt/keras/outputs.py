"""What the Keras models return: named tuples of the values that there are, indexed by name or by place."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any, ClassVar


class _ByName:
    """Adds indexing by name, which transformers' outputs have, to a named tuple."""

    _fields: ClassVar[tuple[str, ...]]

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, str):
            return super().__getitem__(key)  # type: ignore[misc]
        if key not in self._fields:
            raise KeyError(key)
        return getattr(self, key)

    def keys(self) -> tuple[str, ...]:
        """The names of the values."""
        return self._fields

    def to_tuple(self) -> tuple[Any, ...]:
        """The values without names."""
        return tuple(self)  # type: ignore[arg-type]


class TFBaseModelOutputWithCLSToken:
    """What TFCvtModel returns, with the attributes of `cvt.modeling.BaseModelOutputWithCLSToken`."""

    last_hidden_state: Any = None
    cls_token_value: Any = None
    hidden_states: tuple[Any, ...] | None = None


class TFImageClassifierOutputWithNoAttention:
    """What TFCvtForImageClassification returns, with the attributes of transformers' class."""

    loss: Any = None
    logits: Any = None
    hidden_states: tuple[Any, ...] | None = None


@functools.cache
def _type_with(kind: type, names: tuple[str, ...]) -> type:
    # Keras' own machinery (predict, functional models) handles the values in a tuple, but no None among them:
    # hence one type per set of names. The class attributes of `kind` make the other values None.
    return type(kind.__name__, (_ByName, namedtuple(kind.__name__, names), kind), {})


def make_output(kind: type, **values: Any) -> Any:
    """An output of the given class, of the values that are not None."""
    present = {name: value for name, value in values.items() if value is not None}
    return _type_with(kind, tuple(present))(**present)
