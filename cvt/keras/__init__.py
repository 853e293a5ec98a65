"""CvT on Keras 3: TFCvtModel and TFCvtForImageClassification, which transformers 5 no longer has.

They have the arguments and outputs of transformers' classes of these names. Images are (B, num_channels,
H, W). KERAS_BACKEND or keras.json selects the backend; it works with PyTorch's and TensorFlow's.
"""

try:
    import keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise ImportError("cvt.keras needs Keras: pip install 'cvt-label[keras]'") from error
    raise ImportError(
        f"Keras can't load its backend ({error}); KERAS_BACKEND=torch selects PyTorch"
    ) from error

from cvt.keras.models import (
    TFBaseModelOutputWithCLSToken,
    TFCvtForImageClassification,
    TFCvtModel,
    TFImageClassifierOutputWithNoAttention,
)

__all__ = [
    "TFBaseModelOutputWithCLSToken",
    "TFCvtForImageClassification",
    "TFCvtModel",
    "TFImageClassifierOutputWithNoAttention",
]
