"""Training: the state, the optimizer step around a method, what is trained, checkpoints.

May import: common, parallel, models, weights, data, adapters, dopsd, families, methods, config.
"""
