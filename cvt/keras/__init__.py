"""CvT on Keras 3: TFCvtModel and TFCvtForImageClassification, which transformers 5 removed.

The classes have the arguments and outputs of the classes in transformers 4. Images have the shape
(B, num_channels, H, W). KERAS_BACKEND or keras.json selects the backend: PyTorch or TensorFlow.
"""

try:
    import keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise ImportError("cvt.keras needs Keras: pip install 'cvt-label[keras]'") from error
    raise ImportError(
        f"Keras cannot load its backend ({error}); set KERAS_BACKEND=torch to use PyTorch"
    ) from error

from cvt.keras.models import TFCvtForImageClassification, TFCvtModel, TFCvtOutput
