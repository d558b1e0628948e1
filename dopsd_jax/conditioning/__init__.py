"""The encoders' outputs for a data set: computed in batches, cached by content, or prepared.

May import training and everything before it. `encoding` runs the encoders, `cached` keeps what
they made, `features` gives it to a method, `anchors` does the same for prompts without pictures.
"""
