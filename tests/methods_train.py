"""Runs of `train`, one after the other in one process, as a user makes them; see test_methods.py.

python methods_train.py JOBS.json WHOLE

JOBS.json: a list of [work directory beside it, fields of the configuration]. The work directory
`resumed` begins as a copy of that of WHOLE, as it was after its second step.
"""

import json
import runpy
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from absl import flags

from dopsd_jax import train

CONFIG = Path(__file__).parents[1] / "configs/zimage.py"


def main(jobs, whole):
    get_config = runpy.run_path(str(CONFIG))["get_config"]
    flags.FLAGS(["train", f"--config={CONFIG}:random"])
    for name, fields in json.loads(Path(jobs).read_text()):
        workdir = Path(jobs).with_name(name)
        if name == "resumed":
            shutil.copytree(workdir.with_name(whole), workdir)
            shutil.rmtree(workdir / "checkpoints" / "4")
            (workdir / "lora" / "step_4.safetensors").unlink()
        config = get_config("random")
        config.update_from_flattened_dict(fields)
        train.CONFIG = SimpleNamespace(value=config, asked={})
        train.WORKDIR = SimpleNamespace(value=str(workdir))
        start = time.process_time()
        train.main()
        print(f"{name}: {time.process_time() - start:.1f} CPU s", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
