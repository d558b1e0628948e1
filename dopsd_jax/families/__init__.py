"""Kinds of checkpoints: how the parts of a model belong together."""
