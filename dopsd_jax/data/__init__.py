"""Data sets: rows of pictures and captions, buckets, batches, cached and prepared features.

`sources` reads the layouts, `rows` picks one, `dataset` measures the pictures, `loader` draws the
batches. Knows no model. May import `common`, `parallel` and `weights` (for safetensors headers).
"""
