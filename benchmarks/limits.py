"""Files made to cost much memory or time, and what each costs until it is refused.

    python benchmarks/limits.py

Each is read in a process of its own. A table: name, seconds of work, peak memory in MiB, and the
first line of the answer. Nothing may take 1 GiB or, on an idle core, 10 s.
"""

import io
import json
import resource
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from dopsd_jax.common.errors import UserError
from dopsd_jax.common.json_files import read_json
from dopsd_jax.conversion.inspection import inspect
from dopsd_jax.data.images import inspect_image
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources.array_record import write_array_record
from dopsd_jax.reporting.metrics import read_metrics
from dopsd_jax.weights.safetensors_io import MAX_HEADER
from dopsd_jax.weights.tokenizers import MAX_RULES

MIB = 1 << 20
MOST_MIB, MOST_SECONDS = 1024, 10


def header(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def entries(count: int, entry: str = "{}") -> bytes:
    return ("{" + ",".join(f'"n{i}":{entry}' for i in range(count)) + "}").encode()


def tensors(count: int) -> bytes:
    """A sound file of many tensors that belong to no model."""
    entry = lambda i: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
    return header(json.dumps({f"n.{i}.weight": entry(i) for i in range(count)}).encode()) + bytes(
        count
    )


def tar(kind: bytes, content: Callable[[int], bytes], count: int) -> bytes:
    """An archive of `count` members of a kind."""
    made = io.BytesIO()
    for number in range(count):
        own = content(number)
        member = tarfile.TarInfo(f"m{number}.bin")
        member.type, member.size = kind, len(own)
        made.write(member.tobuf(tarfile.USTAR_FORMAT) + own + bytes(-len(own) % 512))
    return made.getvalue() + bytes(10240)


def pax(number: int) -> bytes:
    text = b" k%d=%s\n" % (number, b"v" * 60_000)
    return b"%d%s" % (len(text) + 5, text)


def picture(kind: str, side: int, cut: float) -> bytes:
    made = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    Image.fromarray(noise).resize((side, side), 0).save(made, kind)
    return made.getvalue()[: int(cut * made.tell())]


LISTS = lambda size: b"[" + b"[]," * (size // 3 - 2) + b"[]]"
ONES = lambda size: b"[" + b"1," * (size // 2 - 2) + b"1]"
# Name of the file: what is in it; and bytes that follow without taking room.
FILES: dict[str, Callable[[], bytes | tuple[bytes, int]]] = {
    "entries.safetensors": lambda: header(entries(MAX_HEADER // 13)),
    "unknown.safetensors": lambda: tensors(90_000),
    "numbers.safetensors": lambda: header(entries(1, "[" + "9" * (MAX_HEADER - 100) + "]")),
    "ones.safetensors": lambda: header(ONES(MAX_HEADER)),
    "lists.config": lambda: LISTS(8 * MIB),
    "keys.config": lambda: entries(8 * MIB // 13),
    "deep.config": lambda: b"[" * 8 * MIB,
    "digits.config": lambda: b"9" * 8 * MIB,
    "lists.tokenizer": lambda: LISTS(MAX_RULES),
    "endless.config": lambda: (b"{", 1 << 40),
    "garbage.jsonl": lambda: b"x\n" * 1_000_000,
    "captions.jsonl": lambda: b'{"caption": "x"}\n' * 1_000_000,
    "row.jsonl": lambda: ONES(16 * MIB),
    "keys.jsonl": lambda: (b'{"' + b"k" * MIB + b'": 1}\n') * 500,
    "endless.jsonl": lambda: (b"{", 1 << 40),
    "columns.csv": lambda: b",".join(b"c%d" % i for i in range(1_500_000)) + b"\n1,2\n",
    "quote.csv": lambda: b'image,caption\n"' + b"a\n" * 4_000_000,
    "global.tar": lambda: tar(tarfile.XGLTYPE, pax, 4000),
    "records.tar": lambda: tar(tarfile.XHDTYPE, lambda n: b"2 " * 32_000, 100),
    "digits.tar": lambda: tar(tarfile.XHDTYPE, lambda n: b"60011 comment=" + b"1" * 60_000, 100),
    "chain.tar": lambda: tar(tarfile.XHDTYPE, pax, 4000),
    "members.tar": lambda: tar(tarfile.REGTYPE, lambda n: b"", 400_000),
    "cut.jpg": lambda: picture("JPEG", 12_000, 0.9),
    "cut.png": lambda: picture("PNG", 12_000, 0.9),
    "endless.webp": lambda: (b"RIFF\xff\xff\xff\x7fWEBPVP8 ", 1 << 40),
    "garbage.metrics": lambda: b"\n" * 30_000_000,
    "endless.metrics": lambda: (b"{", 1 << 36),
    "bomb.array_record": lambda: b"",
}
READ = {
    ".safetensors": lambda path: list(inspect(path)),
    ".config": read_json,
    ".tokenizer": lambda path: read_json(path, limit=MAX_RULES),
    ".metrics": read_metrics,
    **dict.fromkeys((".jpg", ".png", ".webp"), inspect_image),
    **dict.fromkeys((".jsonl", ".csv", ".tar", ".array_record"), load_rows),
}


def write(path: Path) -> None:
    found = FILES[path.name]()
    content, more = found if isinstance(found, tuple) else (found, 0)
    with open(path, "wb") as file:
        file.write(content)
        file.truncate(len(content) + more)
    if path.suffix == ".array_record":
        write_array_record(path, [({"caption": 1}, bytes(64 * MIB))] * 4)


def measure(path: Path) -> str:
    began, answer = time.process_time(), "taken"
    try:
        READ[path.suffix](path)
    except UserError as error:
        answer = error.problems[0].removeprefix(f"{path}: ")
    seconds = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    mark = "  TOO MUCH" if peak >= MOST_MIB or seconds >= MOST_SECONDS else ""
    return f"{path.name:22} {seconds:6.2f} s {peak:5d} MiB{mark}  {answer[:90]}"


def main() -> int:
    if len(sys.argv) == 2 and "/" in sys.argv[1]:
        print(measure(Path(sys.argv[1])))
        return 0
    lines = []
    for name in sys.argv[1:] or FILES:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            # In a process of its own too: a process starts with the peak of the one that forks it.
            code = f"import limits, pathlib; limits.write(pathlib.Path({str(path)!r}))"
            here = Path(__file__).parent
            subprocess.run([sys.executable, "-c", code], check=True, cwd=here)
            command = [sys.executable, __file__, str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            lines.append(done.stdout.strip() or f"{name}: TOO MUCH: {done.stderr[-300:]}")
            print(lines[-1], flush=True)
    return int(any("TOO MUCH" in line for line in lines))


if __name__ == "__main__":
    sys.exit(main())
