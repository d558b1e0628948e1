"""Weights on disk: names, safetensors, converted checkpoints, LoRA dialects."""
