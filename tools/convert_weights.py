"""Converts weights from a clone of the repository; installed, it is `dopsd-jax convert`."""

from dopsd_jax.convert import main

if __name__ == "__main__":
    main("convert_weights.py")
