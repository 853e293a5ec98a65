"""Training on labeled shards with Ray Train: a new model, or fine-tuning.

`train.training` imports Ray, and is imported by its module name. Labeling does not belong here.
"""

from pipeline.train.model import TrainingModel, make_training_model

__all__ = ["TrainingModel", "make_training_model"]
