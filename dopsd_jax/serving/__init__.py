"""A page on this machine: a model with LoRA files side by side, and how far a run is.

May import: what stands before the programs. `page` alone knows gradio.
"""
