"""How much of a GPU's memory a program may use. JAX by itself stops at three quarters of it."""

import os

# The rest is the driver's, the libraries' and, where there is one, the screen's.
SHARE = 0.92
NAMES = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")  # JAX reads either


def allow() -> None:
    """Lets JAX use `SHARE` of every GPU; its own setting, where there is one, holds.

    To be called before JAX looks for devices.
    """
    if not any(os.environ.get(name) for name in NAMES):
        os.environ[NAMES[0]] = str(SHARE)
