"""Runs programs one after the other in one process, with the second family among the families.

python -m second_family '[["train", "--config=...", ...], ...]'
"""

import json
import runpy
import sys

from absl import flags

from dopsd_jax import families
from second_family import LISTING

families.FAMILIES["second"] = LISTING


def run(program, *arguments):
    sys.argv = [program, *arguments]
    print("$", *sys.argv, flush=True)
    try:
        runpy.run_module(f"dopsd_jax.{program}", run_name="__main__")
    except SystemExit as end:
        if end.code:
            sys.exit(f"{program}: status {end.code}")
    # The next program has options of the same names.
    for flag in list(flags.FLAGS.flags_by_module_dict().get(program, ())):
        delattr(flags.FLAGS, flag.name)


for command in json.loads(sys.argv[1]):
    run(*command)
