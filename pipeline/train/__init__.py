"""Fine-tuning on labeled shards with Ray Train.

Modules are imported by name: `train.training` imports Ray.
"""
