"""PyTorch's products at the full width of processors that are not Intel's.

PyTorch's packages contain Intel's library MKL, which on other makers' processors takes code for
half of their width. It asks a function of its own, `mkl_serv_intel_cpu_true`; a library that is
loaded before it may give another answer. So PyTorch can be measured as on an Intel processor.
"""

import os
import subprocess
from pathlib import Path

from dopsd_jax.common.errors import UserError

NAME = "wide_mkl"
SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process with PyTorch; the library is made in `folder`, by the C compiler.

    They are read when a process starts. Raises `UserError` without a compiler.
    """
    source, library = folder / f"{NAME}.c", folder / f"{NAME}.so"
    source.write_text(SOURCE, encoding="utf-8")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"MKL at its full width needs the C compiler cc: {error}") from None
    before = os.environ.get("LD_PRELOAD", "")
    return {"LD_PRELOAD": f"{library} {before}".strip()}


def is_on() -> bool:
    """Whether this process was started with `environment`."""
    return NAME in os.environ.get("LD_PRELOAD", "")
