"""Training on labeled shards with Ray Train: a new model, or fine-tuning.

`train.training` needs Ray and is imported by its module name.
"""
