"""Weights on disk: safetensors, model folders, converted checkpoints, LoRA files in every dialect.

Reads files of other programs, names every fault, and writes files that diffusers and ComfyUI load.
May import `common`, `parallel` and `models`.
"""
