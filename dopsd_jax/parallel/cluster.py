"""How the processes of a run find each other: the flags, and the entry point of such a program."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

from absl import flags

from dopsd_jax.common import errors, program
from dopsd_jax.common.errors import UserError

DISTRIBUTED = flags.DEFINE_enum(
    "distributed",
    "auto",
    ["auto", "on", "off"],
    "several processes as one run: auto finds a TPU pod, Slurm, Open MPI, Kubernetes, or the three "
    "options below; on requires them; off runs alone",
)
COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "host:port of process 0 (or JAX_COORDINATOR_ADDRESS)"
)
NUM_PROCESSES = flags.DEFINE_integer(
    "num_processes", None, "how many there are (or JAX_NUM_PROCESSES)", 1, 10**6
)
PROCESS_ID = flags.DEFINE_integer(
    "process_id", None, "which one this is, from 0 (or JAX_PROCESS_ID)", 0, 10**6
)
CONNECT_TIMEOUT = flags.DEFINE_integer(
    "connect_timeout", 300, "seconds to wait for the other processes", 1, 10**6
)
# A process that was killed is noticed after this time, and the others end.
HEARTBEAT_SECONDS = 60


def connect() -> str:
    """Joins the other processes as the flags say; returns a line about it.

    To be called before anything touches a device. Raises `UserError` for options that do not fit
    together. If the other processes do not connect in time, the program ends with one line and
    status 2.
    """
    import jax  # not above: the options of this file are read first

    if DISTRIBUTED.value == "off":
        return "processes: 1 (--distributed=off)"
    where = COORDINATOR.value or os.environ.get("JAX_COORDINATOR_ADDRESS")
    given = {
        "--coordinator": where,
        "--num_processes": _number(NUM_PROCESSES, "JAX_NUM_PROCESSES"),
        "--process_id": _number(PROCESS_ID, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    count, index = given["--num_processes"], given["--process_id"]
    if where and not (where.rpartition(":")[0] and where.rpartition(":")[2].isdigit()):
        raise UserError(f"--coordinator: {where!r} is not host:port, such as 10.0.0.1:1234")
    if count is not None and index is not None and index >= count:
        raise UserError(f"--process_id: {index} is not below --num_processes, {count}")
    timer = threading.Timer(CONNECT_TIMEOUT.value, _too_late, (where,))
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            where,
            count,
            index,
            # The timer comes first: jax itself aborts with a stack trace.
            initialization_timeout=CONNECT_TIMEOUT.value + 60,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except ValueError as error:
        if DISTRIBUTED.value == "auto" and len(missing) == 3:
            return "processes: 1 (no cluster found)"
        raise UserError(
            f"--distributed={DISTRIBUTED.value}: {str(error).rstrip('.')}; "
            + (f"give {', '.join(missing)}" if missing else "check the options")
        ) from None
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"--coordinator: cannot be joined ({str(error).splitlines()[0]}); check the address, "
            "and that the port is free and open"
        ) from None
    finally:
        timer.cancel()
    if jax.process_count() == 1:  # jax's preemption service has taken it, and nobody would be told
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return (
        f"processes: this is {jax.process_index()} of {jax.process_count()}, "
        f"{jax.local_device_count()} of {jax.device_count()} devices"
    )


def _number(flag: Any, name: str) -> int | None:
    if flag.value is not None:
        return flag.value
    text = os.environ.get(name)
    if text is not None and not text.isdigit():
        raise UserError(f"{name}: {text!r} is not a number; set it to a whole one")
    return None if text is None else int(text)


def _too_late(where: str | None) -> None:
    from dopsd_jax.parallel.multihost import leave

    leave(
        errors.USER_ERROR_EXIT,
        f"error: --coordinator: the other processes did not meet at {where or 'the coordinator'} "
        f"within {CONNECT_TIMEOUT.value} s; check that all were started with the same address and "
        "number, and that its port is open",
    )


def run(main: Callable[[], int | None]) -> None:
    """Entry point of a program that may run as one of many processes; see `program.run`.

    A process that fails alone exits at once, so that the others notice and end too: a normal exit
    would wait for them.
    """
    import jax

    from dopsd_jax.parallel.multihost import SharedError, leave
    from dopsd_jax.parallel.preemption import STOPPED_EXIT

    def joined() -> int:
        status = errors.report(lambda: print(connect(), flush=True))
        if status or jax.process_count() == 1:
            return status or errors.report(main)
        shared = False

        def watched():
            nonlocal shared
            try:
                return main()
            except SharedError:
                shared = True
                raise

        try:
            status = errors.report(watched)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            leave(1)
        if status not in (0, STOPPED_EXIT) and not shared:  # such as a Ctrl-C here alone
            leave(status)
        return status

    program.run(joined)
