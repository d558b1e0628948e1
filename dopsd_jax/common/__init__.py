"""What every room uses: user errors, reading and writing files, JSON, the flow's mathematics.

Imports no other room, and neither jax nor flax at import: an argument error must be told at once.
"""
