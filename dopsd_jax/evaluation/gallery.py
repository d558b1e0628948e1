"""What an evaluation keeps in its folder, so that a second call does only what is missing.

pictures/<key>.png   the key says all that a picture depends on: weights, prompt, noise, size
values.jsonl         {"key", "value"}: what a scorer said of a picture
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dopsd_jax.common.atomic import atomic_file, disk_error
from dopsd_jax.common.errors import UserError
from dopsd_jax.common.files import open_regular
from dopsd_jax.common.json_fields import Fields, is_number
from dopsd_jax.common.json_files import parse_json
from dopsd_jax.conditioning.cached import ROLE_NAMES
from dopsd_jax.data.images import DECODE_ERRORS
from dopsd_jax.evaluation.drawing import Shot
from dopsd_jax.evaluation.scorer import Judge, Picture, digest
from dopsd_jax.reporting.pictures import save_picture

AGAIN = "remove the line"
FORMAT = 1  # part of every key: raise it when old pictures or values must not be used


def key(*parts: Any) -> str:
    """sha256 of what something was made from, as JSON has it."""
    return hashlib.sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()


class Gallery:
    """The folder of an evaluation. Raises `UserError` if it cannot be made."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            (folder / "pictures").mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"--out {folder}: is a file; name a folder") from None
        except OSError as error:
            raise disk_error(error, folder) from error
        self.values = Values(folder / "values.jsonl")

    def path(self, name: str) -> Path:
        return self.folder / "pictures" / f"{name}.png"

    def has(self, name: str, shot: Shot) -> bool:
        """Whether a picture is there; one that is damaged is removed, and a line says so."""
        path = self.path(name)
        try:
            with Image.open(path) as image:
                size = image.size
                image.verify()
            if size == (shot.case.width, shot.case.height):
                return True
            fault = f"is {size[0]}x{size[1]}"
        except FileNotFoundError:
            return False
        except DECODE_ERRORS as error:
            fault = str(error)
        print(f"{path}: damaged ({fault}); it is drawn again", flush=True)
        path.unlink()
        return False

    def put(self, name: str, image: Picture, shot: Shot, model: str, role: int) -> None:
        about = {"prompt": shot.case.prompt, "seed": str(shot.seed), "model": model}
        save_picture(self.path(name), image, about | {"context": ROLE_NAMES[role]})

    def picture(self, name: str) -> Picture:
        with Image.open(self.path(name)) as image:
            return np.asarray(image.convert("RGB"))


class Values:
    """Numbers by key, in a file of lines, of which the last may be incomplete."""

    def __init__(self, path: Path):
        self.path = path
        self._known: dict[str, float] = {}
        content = b""
        if path.exists():
            with open_regular(path) as file:
                content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            fields = Fields(parse_json(line, f"{path}:{number}", AGAIN), f"{path}:{number}")
            name = fields.text("key")
            value = fields.value("value", f"a number; {AGAIN}", is_number)
            fields.finish()
            self._known[name] = float(value)
        if whole != content:
            with atomic_file(path) as file:
                file.write(whole)

    def get(self, name: str) -> float | None:
        return self._known.get(name)

    def put(self, values: dict[str, float]) -> None:
        lines = [json.dumps({"key": k, "value": v}) + "\n" for k, v in values.items()]
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(lines)
        except OSError as error:
            raise disk_error(error, self.path) from error
        self._known |= values


def value_key(scorer: Judge, picture: str, shot: Shot) -> str:
    """What a scorer's value depends on."""
    case = shot.case
    target = "" if case.target is None else digest(case.target)
    return key(scorer.identity, scorer.name, picture, case.text, target, case.truth_digest)
