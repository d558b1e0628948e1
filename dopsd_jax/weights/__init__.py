"""Weights on disk: safetensors, model folders, converted checkpoints, LoRA files in every dialect.

Reads what others wrote, names every fault, and writes what diffusers and ComfyUI load. May import
`common`, `parallel` and `models`.
"""
