"""Writes the page of a run again: python -m dopsd_jax.report RUN

RUN is the work directory of a training, finished or not. The page is RUN/report.html.
"""

import argparse
import sys

from dopsd_jax.common import errors
from dopsd_jax.common.atomic import path_fault, remove_leftovers
from dopsd_jax.common.program import Parser


def main(run: str) -> None:
    if fault := path_fault(run, stores=True):
        raise errors.UserError(f"{run}: {fault}")
    from dopsd_jax.reporting.run_page import holds_run, write_report  # slow: after the options

    if not holds_run(run):
        raise errors.UserError(f"{run}: holds no run (neither metrics.jsonl nor config.json)")
    remove_leftovers(run)
    print(f"report: {write_report(run)}")


if __name__ == "__main__":
    parser = Parser(
        "python -m dopsd_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="work directory of a training")
    options = parser.parse_args()
    sys.exit(errors.report(lambda: main(options.run)))
