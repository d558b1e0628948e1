"""Programs started in copies of one process that has imported the libraries: seconds less each.

A program sees there what it sees in a process of its own, but for modules that are imported
already. Its environment is that of the first one: a test that sets another starts a process.
"""

import functools
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

PATIENCE = 600  # seconds
IMPORTS = (
    *("jax", "flax.nnx", "optax", "orbax.checkpoint", "ml_collections", "transformers"),
    *("jax.experimental.pallas.ops.tpu.splash_attention", "dopsd_jax.run.build"),
)


def run_module(name: str, arguments: list[str], folder: Path) -> subprocess.CompletedProcess:
    """What `python -m name arguments` in a folder comes to, with its output as text."""
    server = _server()
    with tempfile.TemporaryDirectory() as outputs:
        job = {"name": name, "arguments": arguments, "folder": str(folder), "outputs": outputs}
        print(json.dumps(job), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        out, err = (Path(outputs, stream).read_text() for stream in ("1", "2"))
    return subprocess.CompletedProcess([name, *arguments], status, out, err)


@functools.cache
def _server() -> subprocess.Popen:
    """Ends when its input does, with the process of the tests."""
    command, root = [sys.executable, __file__], Path(__file__).parents[1]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def _serve() -> dict:
    """Answers each job with the status of the child that does it; returns in that child."""
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what is there is shared with the children, not copied
    for line in sys.stdin:
        child = os.fork()
        if not child:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(job: dict) -> None:
    """The program, from here to the end of the process."""
    signal.alarm(PATIENCE)
    for stream in (1, 2):
        os.dup2(os.open(f"{job['outputs']}/{stream}", os.O_CREAT | os.O_WRONLY), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(job["folder"])
    sys.path[0] = job["folder"]
    sys.argv = [job["name"], *job["arguments"]]
    runpy.run_module(job["name"], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _become(_serve())
