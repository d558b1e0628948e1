"""Training state on disk, through orbax: saved in the background, restored to any mesh."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from dopsd_jax.errors import UserError

Tree = Any
# How the storage library words a full disk, a quota and a limit on file sizes.
_FULL = ("No space left", "RESOURCE_EXHAUSTED", "Disk quota", "File too large")


class Checkpoints:
    """The checkpoints of a run: the newest `keep` ones, one folder a step."""

    def __init__(self, folder: Path, keep: int):
        self.folder = folder
        policy = ocp.training.preservation_policies.LatestN(keep)
        self._manager = ocp.training.Checkpointer(
            folder.absolute(), preservation_policy=policy, cleanup_tmp_directories=True
        )

    @property
    def steps(self) -> list[int]:
        """Steps that are saved whole, oldest first."""
        return sorted(c.step for c in self._manager.checkpoints)

    def save(self, step: int, state: Tree) -> None:
        """Starts to save; first waits until the save before is done.

        Raises `UserError` when the disk is full; what was saved earlier stays.
        """
        self.wait()
        if step in self.steps:
            return
        self._guard(lambda: self._manager.save_async(step, flatten(state), force=True))

    def wait(self) -> None:
        """Returns when nothing is being saved any more."""
        self._guard(self._manager.wait)

    def close(self) -> None:
        """Waits for the last save."""
        self._guard(self._manager.close)

    def restore(self, like: Tree, report=print) -> tuple[int, Tree] | None:
        """The newest state that can be read, with its step; None if there is none at all.

        `like`: arrays, real or abstract, of the state's structure and with its shardings. A damaged
        checkpoint is named in a line to `report`, and the one before is taken. Raises `UserError`
        if all are damaged or hold another kind of state.
        """
        steps = self.steps
        for step in reversed(steps):
            try:
                flat = self._manager.load(step, flatten(like))
            except (OSError, ValueError, KeyError, ocp.errors.InvalidLayoutError) as error:
                reason = str(error).strip().partition("\n")[0][:200]
                report(
                    f"{self.folder / str(step)}: cannot be restored ({reason}); "
                    "trying the one before"
                )
                continue
            treedef = jax.tree.structure(like)
            return step, jax.tree.unflatten(treedef, [flat[name] for name in flatten(like)])
        if steps:
            raise UserError(
                f"{self.folder}: none of the checkpoints {steps} can be read and fits the "
                "configuration; use another --workdir, or move them away to start anew"
            )
        return None

    def _guard(self, action):
        try:
            return action()
        except (OSError, ValueError, RuntimeError) as error:
            if any(word in str(error) for word in _FULL):
                raise UserError(
                    f"{self.folder}: the disk is full; free some space and run the same command, "
                    f"it goes on from step {self.steps[-1] if self.steps else 0}"
                ) from error
            raise


def flatten(tree: Tree) -> Mapping[str, Any]:
    """Leaves by their path in the tree, in the tree's order."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
