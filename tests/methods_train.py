"""Runs of `train`, one after the other in one process, as a user makes them; see test_methods.py.

python methods_train.py JOBS.json: a list of [work directory, fields of the configuration].
"""

import json
import runpy
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from absl import flags
from etils import epath

from dopsd_jax import train

CONFIG = Path(__file__).parents[1] / "configs/zimage.py"


def main(jobs):
    get_config = runpy.run_path(str(CONFIG))["get_config"]
    flags.FLAGS(["train", f"--config={CONFIG}:tiny"])
    for workdir, fields in json.loads(epath.Path(jobs).read_text()):
        config = get_config("tiny")
        config.update_from_flattened_dict(fields)
        train.CONFIG = SimpleNamespace(value=config)
        train.WORKDIR = SimpleNamespace(value=workdir)
        start = time.process_time()
        status = train.main()
        print(f"{workdir}: {status}, {time.process_time() - start:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
