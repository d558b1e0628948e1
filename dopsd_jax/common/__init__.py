"""What every room uses: user errors, reading and writing files, JSON, the flow's mathematics.

Imports no other room, and neither jax nor flax, so that an error in the arguments is reported at
once.
"""
