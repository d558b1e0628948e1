"""Writes a model card for a LoRA file, and uploads both: python -m dopsd_jax.push --lora FILE

Without --repo nothing is uploaded: look at the folder first. Pictures that `sample` has drawn
become the card's gallery, with their prompts. Log in once with `hf auth login`, or set HF_TOKEN.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from dopsd_jax.common import program
from dopsd_jax.common.files import expand

OPTIONS = program.options(__name__)
LORA = OPTIONS.path("lora", None, "LoRA file of a run")
PICTURES = OPTIONS.path("pictures", None, "folder of pictures that sample has drawn with it")
OUT = OPTIONS.path("out", None, "folder for what is uploaded: card, file, pictures; new or empty")
REPO = OPTIONS.string("repo", "", "upload to this repository of the hub, owner/name")
PRIVATE = OPTIONS.bool("private", True, "a repository that is made for it is private")
LICENCE = OPTIONS.string("license", "", "licence of the file; default: that of the base model")
BASE = OPTIONS.string("base_model", "", "hub name of the base model; default: the file's own")

if __name__ == "__main__":
    program.parse(required=("lora", "out"))

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from dopsd_jax.common.atomic import atomic_folder, need_free
from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.reporting import model_card, parameters
from dopsd_jax.reporting.model_card import Shown
from dopsd_jax.reporting.parameters import read_texts
from dopsd_jax.reporting.pictures import LABELS
from dopsd_jax.weights.hub import HUB_ID, NETWORK_ERRORS
from dopsd_jax.weights.lora_dialects import split_name
from dopsd_jax.weights.safetensors_io import read_header

FOLDER = "pictures"


def main() -> None:
    file, out = expand(LORA.value), expand(OUT.value)
    raise_if(
        f"--{name} {value}: is no name of the hub, owner/name"
        for name, value in (("repo", REPO.value), ("base_model", BASE.value))
        if value and not HUB_ID.fullmatch(value)
    )
    need_free(out)
    found = read_header(file)
    if not any(split_name(name)[1] for name in found.tensors):
        raise UserError(f"--lora {file}: holds no LoRA; name a file lora/step_N.safetensors")
    header = found.metadata
    base = BASE.value or model_card.base_model(header)
    terms = LICENCE.value or model_card.licence(header)
    pictures, others = [], []
    if PICTURES.value:
        pictures, others = gallery(expand(PICTURES.value), parameters.digest(file))
    shown = [Shown(f"{FOLDER}/{path.name}", prompt) for path, prompt in pictures]
    with atomic_folder(out, replace=True) as folder:
        shutil.copyfile(file, folder / file.name)
        if pictures:
            (folder / FOLDER).mkdir()
        for path, _ in pictures:
            shutil.copyfile(path, folder / FOLDER / path.name)
        text = model_card.card(header, file.name, shown, base, terms, REPO.value)
        (folder / "README.md").write_text(text, encoding="utf-8")
    for name, missing in (("base_model", not base), ("license", not terms)):
        if missing:
            print(f"note: {file} does not say its {name}; the card has none: give --{name}")
    if others:
        print(
            f"note: {len(others)} pictures were not drawn with {file} by `sample` and are left "
            f"out, such as {others[0].name}"
        )
    print(f"card: {out / 'README.md'}, {len(pictures)} pictures")
    if REPO.value:
        print(f"uploaded: {upload(out)}")


def gallery(folder: Path, digest: str) -> tuple[list[tuple[Path, str]], list[Path]]:
    """The pictures of a folder with their prompts, without sheets of several; then the others.

    The others were drawn without the LoRA of this digest, or by another program: their text may be
    a whole workflow with the paths of a machine. Raises `UserError` where none was drawn with it.
    """
    if not os.path.isdir(folder):
        raise UserError(f"--pictures {folder}: no such folder; name the --out of `sample`")
    found, others, faults = [], [], []
    for path in sorted(folder.glob("*.png")):
        try:
            texts = read_texts(path)
            if LABELS in texts:
                continue
            prompt = _drawn_with(texts, digest, path)
        except UserError as error:
            faults += error.problems
            continue
        if prompt is None:
            others.append(path)
        else:
            found.append((path, prompt))
    raise_if(faults)
    if not found:
        what = "was drawn with this file by `sample`" if others else "is a PNG file"
        raise UserError(f"--pictures {folder}: no picture there {what}; draw some with `sample`")
    return found, others


def _drawn_with(texts: Mapping[str, str], digest: str, path: Path) -> str | None:
    """The prompt of a picture that `sample` drew with the LoRA; None for any other."""
    if not {"lora", parameters.CHUNK} <= texts.keys():
        return None  # by another program
    made = parameters.parse(texts[parameters.CHUNK], str(path))
    used = any(lora.strength and lora.digest == digest for lora in made.loras)
    return made.prompt if used else None


def upload(folder: Path) -> str:
    """Makes the repository if it is not there, and uploads the folder; returns its address."""
    api = HfApi()
    try:
        api.create_repo(REPO.value, private=PRIVATE.value, exist_ok=True)
        return str(api.upload_folder(repo_id=REPO.value, folder_path=folder))
    except (*NETWORK_ERRORS, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise UserError(
            f"--repo {REPO.value}: was not uploaded ({reason[0]}); log in with `hf auth login` as "
            f"one who may write there, or upload {folder} yourself"
        ) from None


if __name__ == "__main__":
    program.run(main)
