"""A second family, as small as one can be: what a family must say, and that programs need no more.

It differs from Z-Image in all that families differ in: it answers noise - picture and is told
sigma; its shift grows with the picture; its teacher is given the picture's latent as reference.
"""

from dopsd_jax.families import Listing

LISTING = Listing("SecondPipeline", "second_family")
