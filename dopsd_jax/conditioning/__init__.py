"""The encoders' outputs for a data set: computed in batches, cached by content, or prepared.

May import training and everything before it. `encoding` runs the encoders, `features` keeps.
"""
