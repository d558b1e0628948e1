"""Training state on disk, through orbax: saved in the background, verified, for any mesh.

    checkpoints/1500/               an orbax checkpoint, which appears whole
    checkpoints/1500/digests.0.json the step and the files' sha256, written last, one a process

Orbax notices a damaged index, but returns flipped bits of an array as they are. So every file is
hashed after the save and compared before a restore; each process takes its share of the files. A
checkpoint without all its digests is incomplete and not used. The digests hold the step, so a
renamed folder is noticed. A state with NaN is never restored.

Orbax's own retention removes an old checkpoint once the new one is written; here it is removed only
after the digests of the new one are written.
"""

import concurrent.futures
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
from etils import epath
from orbax.checkpoint import v1 as ocp

from dopsd_jax.common.atomic import is_remote, write_text
from dopsd_jax.common.errors import UserError, one_line
from dopsd_jax.common.file_digests import file_digests, files_below
from dopsd_jax.common.json_fields import Fields
from dopsd_jax.common.json_files import read_json
from dopsd_jax.parallel import multihost
from dopsd_jax.parallel.sharding import to_device
from dopsd_jax.training.state import all_finite

Tree = Any
# How the storage library words a full disk, a quota and a limit on file sizes.
_FULL = ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large")
_DIGESTS = "digests"


class Checkpoints:
    """The checkpoints of a run, one folder a step: the newest `keep`, and every `every`-th step.

    An older one is removed only when a newer one is known to be complete. With many processes all
    of them call every method, and `folder` is on storage they share.
    """

    def __init__(self, folder: epath.PathLike, keep: int, every: int = 0):
        self.folder = epath.Path(folder)
        if not is_remote(folder):
            self.folder = self.folder.resolve()
        self.keep, self.every = keep, every
        self._saving: tuple[int, concurrent.futures.Future] | None = None
        self._good: set[int] = set()  # found to be whole by this object
        self._bad: set[int] = set()  # found to be damaged
        self._threads = concurrent.futures.ThreadPoolExecutor(1)

    @property
    def steps(self) -> list[int]:
        """Steps that are saved whole, oldest first."""
        return [step for step in self._folders() if _digest_files(self.folder / str(step))]

    @property
    def newest(self) -> int:
        """The step that a run probably goes on from; 0 without any."""
        with self._storage():
            return max(self.steps, default=0)

    def _folders(self) -> list[int]:
        if not self.folder.exists():
            return []
        names = (path.name for path in self.folder.iterdir())
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,17}", name))

    def save(self, step: int, state: Tree) -> None:
        """Starts to save; first waits until the save before is done.

        Raises `UserError` when the disk is full; what was saved earlier stays.
        """
        self.wait()
        if step in self._good:
            return
        with multihost.together(), self._storage():
            if multihost.is_first():
                self.folder.mkdir(parents=True, exist_ok=True)
                self._clear(step)  # it was cut off, or found damaged
        with self._storage():
            response = ocp.save_async(self.folder / str(step), flatten(state))
        self._saving = step, self._threads.submit(self._prove, step, response)

    def _prove(self, step: int, response) -> None:
        response.result()
        folder, index = self.folder / str(step), jax.process_index()
        own = _files(folder)[index :: jax.process_count()]
        content = {"step": step, "processes": jax.process_count()}
        content["files"] = file_digests(folder, own)
        write_text(folder / f"{_DIGESTS}.{index}.json", json.dumps(content, indent=1) + "\n")

    def wait(self) -> None:
        """Returns when nothing is being saved any more; then removes what is not to be kept."""
        if self._saving is None:
            return
        (step, future), self._saving = self._saving, None
        self._end_together(future)
        self._good.add(step)
        self._bad.discard(step)
        with multihost.together(), self._storage():
            if multihost.is_first():
                self._prune()

    @property
    def failed(self) -> bool:
        """Whether the save under way is known to have failed.

        Never with several processes: the others may not know it yet.
        """
        if self._saving is None or jax.process_count() > 1:
            return False
        future = self._saving[1]
        return future.done() and future.exception() is not None

    def rescue(self, step: int, state: Tree) -> NoReturn:
        """After a save that `failed`: tries to save this state, and raises what was wrong."""
        (lost, future), self._saving = self._saving, None
        with contextlib.suppress(UserError, OSError, ValueError, RuntimeError):
            self._clear(lost)  # what it wrote takes space
            self._clear_unfinished()
            self.save(step, state)
            self.wait()
        with self._storage():
            future.result()

    def close(self) -> None:
        """Waits for the last save."""
        self.wait()
        self._threads.shutdown()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        # A running save is finished in any case, but without waiting for the other processes: they
        # know of no error and wait elsewhere. Their threads finish the save with this one, unless
        # something is broken.
        if error is None or jax.process_count() == 1 or isinstance(error, multihost.SharedError):
            self.close()
        elif isinstance(error, UserError) and self._saving:
            concurrent.futures.wait([self._saving[1]])

    def restore(self, abstract: Tree, report: Callable = multihost.say) -> tuple[int, Tree] | None:
        """The newest state that is whole, with its step; None if nothing was saved yet.

        `abstract`: arrays, real or abstract, of the state's structure and with its shardings. A
        checkpoint that was cut off, damaged or renamed is named in a line to `report`, and the one
        before is taken. Raises `UserError` if all are damaged or hold another kind of state.
        """
        with multihost.together(), self._storage():
            if multihost.is_first() and self.folder.exists():
                self._clear_unfinished()
        folders = multihost.gather(self._folders())[0]
        proven = multihost.gather(self.steps)[0]
        for step in reversed(folders):
            reason = "its save was cut off"
            if step in proven:
                with multihost.together(), self._storage():
                    faults = self._faults(step)
                faults = [f for found in multihost.gather(faults) for f in found]
                reason = faults[0] if faults else None
            if reason is None:
                names = flatten(abstract)
                try:
                    flat = ocp.load(self.folder / str(step), names)
                except (OSError, ValueError, KeyError, ocp.errors.InvalidLayoutError) as error:
                    reason = str(error).strip().partition("\n")[0][:200]
                else:
                    leaves = [flat[name] for name in names]
                    # One by one: parts of the state may be in host memory because the device has no
                    # room.
                    if all([bool(_finite(leaf)) for leaf in leaves]):
                        self._good.add(step)
                        return step, jax.tree.unflatten(jax.tree.structure(abstract), leaves)
                    reason = "it holds numbers that are not finite"
            self._bad.add(step)
            report(
                f"{self.folder / str(step)}: cannot be restored ({reason}); trying the one before"
            )
        if proven:
            raise multihost.SharedError(
                f"{self.folder}: none of the checkpoints {proven} can be read and fits the "
                "configuration; use another --workdir, or move them away to start anew"
            )
        return None

    def _faults(self, step: int) -> list[str]:
        """What is wrong with this process's share of a checkpoint's files."""
        folder = self.folder / str(step)
        wanted = {}
        for path in _digest_files(folder):
            content = _read_digests(path)
            if content is None:
                return [f"{path.name} is damaged"]
            if content["step"] != step:
                return [f"it holds step {content['step']}: the folder was renamed"]
            wanted |= content["files"]
        present = _files(folder)
        faults = [f"{name} is missing" for name in sorted(wanted.keys() - set(present))]
        faults += [f"{name} has no digest" for name in present if name not in wanted]
        own = present[jax.process_index() :: jax.process_count()]
        if faults:
            return faults
        found = file_digests(folder, own)
        return [f"{name} was damaged" for name in own if found[name] != wanted[name]]

    def _prune(self) -> None:
        newest = [step for step in self.steps if step not in self._bad][-self.keep :]
        for step in self._folders():
            regular = self.every and step % self.every == 0 and step not in self._bad
            if step not in newest and not regular:
                self._clear(step)

    def _clear(self, step: int) -> None:
        folder = self.folder / str(step)
        # In this order: if this is interrupted, the rest is not taken for a checkpoint.
        for path in folder.glob(f"{_DIGESTS}.*.json"):
            path.unlink()
        if folder.exists():
            folder.rmtree()

    def _end_together(self, future: concurrent.futures.Future) -> None:
        """Waits for a save; raises in every process what failed in one.

        The disk of one may be full. The others then wait for its part, and fail in other words.
        """
        if jax.process_count() == 1:
            with self._storage():
                future.result()
            return
        error = future.exception()
        told = error and self._told(error)
        problem = told and one_line(f"{type(told).__name__}: {told}")
        if isinstance(told, UserError):
            problem = str(told)
        if told:  # at once: another process may never come to the next line
            print(f"process {jax.process_index()}: {problem}", file=sys.stderr, flush=True)
        found = multihost.gather([problem, isinstance(told, UserError)])
        if users := [text for text, of_user in found if of_user]:
            raise multihost.SharedError(*dict.fromkeys(users)) from error
        for index, (text, _) in enumerate(found):
            if text:
                raise told or RuntimeError(f"the save failed in process {index}: {text}")

    def _clear_unfinished(self) -> None:
        for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
            path.rmtree()

    @contextlib.contextmanager
    def _storage(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, RuntimeError) as error:
            if (told := self._told(error)) is error:
                raise
            raise told from error

    def _told(self, error: BaseException) -> BaseException:
        """What to raise for a fault of the storage: a `UserError` if the disk is full."""
        if not any(word in str(error) for word in _FULL):
            return error
        saved = self.steps
        return UserError(
            f"{self.folder}: the disk is full; free some space and run the same command, "
            f"it goes on from step {saved[-1] if saved else 0}"
        )


@jax.jit
def _finite(leaf: jax.Array) -> jax.Array:
    return all_finite(to_device(leaf))


def flatten(tree: Tree) -> Mapping[str, Any]:
    """Leaves by their path in the tree, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _digest_files(folder: epath.Path) -> list[epath.Path]:
    """The files of digests of a checkpoint; none if it has not all of them."""
    paths = sorted(folder.glob(f"{_DIGESTS}.*.json"))
    for path in paths:
        if (content := _read_digests(path)) is not None:
            return paths if len(paths) == content["processes"] else []
    return paths  # damaged, which is found when they are compared


def _read_digests(path: epath.Path) -> dict[str, Any] | None:
    """What a file of digests says; None if it is damaged."""
    try:
        fields = Fields(read_json(path)[0], str(path))
        for name, kind in {"step": int, "processes": int, "files": dict}.items():
            fields.value(name, kind.__name__, lambda found, kind=kind: type(found) is kind)
        fields.finish()
    except UserError:
        return None
    return dict(fields.json)


def _files(folder: epath.Path) -> list[str]:
    """Names of a checkpoint's files, below its folder, in order.

    Without digests and their temporary files, which another process may be writing.
    """
    own = (f"{_DIGESTS}.", f".{_DIGESTS}.")
    return [name for name in files_below(folder) if not name.startswith(own)]
