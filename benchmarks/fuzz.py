"""Feeds damaged files to every reader: whatever comes, the answer is a `UserError` or a result.

    python benchmarks/fuzz.py --cases 100000 --seed 0

Prints the cases of each reader, and every exception that is not a `UserError` with the seed that
gives it again. The suite runs a few hundred of the same cases (tests/test_fuzz.py).
"""

import argparse
import collections
import random
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from fuzz_damage import damaged
from fuzz_readers import Reader, readers

from dopsd_jax.common.errors import UserError


def run_case(reader: Reader, good: bytes, seed: str) -> Exception | None:
    """Damages the file, reads it, and puts the good one back. What was raised besides UserError."""
    rng = random.Random(seed)
    content = damaged(rng, good, reader.kind)
    if reader.seal and rng.random() < 0.5:
        content = reader.seal(content)
    reader.path.write_bytes(content)
    try:
        reader.read()
    except UserError as error:
        if not all(problem.isprintable() for problem in error.problems):
            return ValueError(f"unprintable: {error.problems!r}")
    except Exception as error:
        return error
    finally:
        reader.path.write_bytes(good)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one reader, by name")
    args = parser.parse_args()
    counts: collections.Counter = collections.Counter()
    seconds: collections.Counter = collections.Counter()
    warnings.simplefilter("ignore")  # of Pillow, about what is damaged
    kinds, shown, begun = set(), time.monotonic(), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        table = readers(Path(folder))
        if args.only:
            table = {args.only: table[args.only]}
        good = {name: reader.path.read_bytes() for name, reader in table.items()}
        for case in range(args.cases):
            name = list(table)[case % len(table)]
            seed, began, busy = f"{args.seed}/{name}/{case}", time.monotonic(), time.process_time()
            error = run_case(table[name], good[name], seed)
            now = time.monotonic()
            counts[name] += 1
            seconds[name] += time.process_time() - busy
            seconds["slowest"] = max(seconds["slowest"], now - began)
            if error is not None:
                counts["exceptions"] += 1
                place = traceback.extract_tb(error.__traceback__)[-1:]
                kind = (type(error).__name__, str(place))
                if kind not in kinds:
                    kinds.add(kind)
                    print(f"{seed}: {type(error).__name__}: {str(error)[:200]} {place}", flush=True)
            if now - shown > 60:
                shown = now
                print(
                    f"{case + 1} cases in {now - begun:.0f} s, {counts['exceptions']} exceptions",
                    flush=True,
                )
    for name in table:
        work = 1e3 * seconds[name] / max(1, counts[name])
        print(f"{name}: {counts[name]}, {work:.1f} ms of work each")
    print(
        f"{args.cases} cases, {counts['exceptions']} exceptions, slowest {seconds['slowest']:.2f} s"
    )
    return min(counts["exceptions"], 1)


if __name__ == "__main__":
    sys.exit(main())
