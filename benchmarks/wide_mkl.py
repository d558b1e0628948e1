"""PyTorch's products at the full width of processors that are not Intel's.

PyTorch's packages contain Intel's library MKL, which on other makers' processors takes code for
half of their width. It asks a function of its own, `mkl_serv_intel_cpu_true`; a library that is
loaded before it may give another answer. So PyTorch can be measured as on an Intel processor.
"""

import subprocess
from pathlib import Path

from dopsd_jax.common.errors import UserError

SOURCE = "int mkl_serv_intel_cpu_true(void) { return 1; }\n"


def environment(folder: Path) -> dict[str, str]:
    """Variables for a process with PyTorch; the library is made in `folder`, by the C compiler."""
    source, library = folder / "wide_mkl.c", folder / "wide_mkl.so"
    source.write_text(SOURCE, encoding="utf-8")
    try:
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--wide needs the C compiler cc: {error}") from None
    return {"LD_PRELOAD": str(library)}
