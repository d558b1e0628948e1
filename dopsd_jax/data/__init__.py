"""Data sets: rows of pictures and captions, buckets, batches, cached and prepared features.

`sources` reads the layouts, `rows` picks one, `dataset` measures the pictures, `loader` draws the
batches. `prompts/general.txt` holds 500 varied prompts of our own writing, one a line; their
subjects are mixed evenly, so that the first n cover them too. `prompts/edits.txt` holds 200
instructions, which fit any picture. Knows no model. May import `common`, `parallel` and `weights`
(for safetensors headers).
"""
