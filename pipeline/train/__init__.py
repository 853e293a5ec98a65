"""Training on labeled shards with Ray Train: a new model, or fine-tuning.

`train.model` needs PyTorch and `train.training` Ray: both are imported by module name.
"""
