"""The model card of a LoRA file, by the conventions of the Hugging Face hub.

All facts are those of the file's header; see `run.origin` and `weights.lora_header` for its names.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dopsd_jax.weights.hub import HUB_ID
from dopsd_jax.weights.lora_settings import EDITS, OWN

# Such as Apache-2.0: the hub's list has it in small letters. Others are `other`, with their name.
LISTED = re.compile(r"[A-Za-z0-9.-]+")


class Shown(NamedTuple):
    """A picture of the card: its name in the folder, and the prompt that it was drawn from."""

    name: str
    prompt: str


def base_model(header: Mapping[str, str]) -> str:
    """The hub's name of the model that the file is for; empty where a folder was trained."""
    name = header.get(f"{OWN}base_model", "").partition("@")[0]
    return name if HUB_ID.fullmatch(name) else ""


def licence(header: Mapping[str, str]) -> str:
    """The licence of the base model; empty where the file does not say it."""
    return header.get("modelspec.license", "").removeprefix("of the base model: ")


def card(
    header: Mapping[str, str], file: str, shown: Sequence[Shown], base: str, terms: str, repo: str
) -> str:
    """The text of README.md.

    file: the LoRA file's name. base, terms: see `base_model` and `licence`. repo: where it will
    be; empty: not known.
    """
    title = header.get("modelspec.title") or file
    parts = [_front(header, shown, base, terms), f"# {_line(title)}"]
    parts += ["<Gallery />"] if shown else []
    parts += [_about(header, base), _use(header, file, base, repo), _terms(terms)]
    return "\n\n".join(parts) + "\n"


def _front(header: Mapping[str, str], shown: Sequence[Shown], base: str, terms: str) -> str:
    """What the hub reads. A JSON string is a YAML string, so nothing in it can break out."""
    quoted = lambda text: json.dumps(text, ensure_ascii=False)
    task = "image-to-image" if EDITS in header else "text-to-image"
    lines = ["library_name: diffusers", f"pipeline_tag: {task}"]
    lines += [f"tags: [lora, diffusers, {task}, d-opsd, dopsd_jax]"]
    if base:
        lines += [f"base_model: {quoted(base)}", "base_model_relation: adapter"]
    if LISTED.fullmatch(terms):
        lines += [f"license: {quoted(terms.lower())}"]
    elif terms:
        lines += ["license: other", f"license_name: {quoted(terms)}"]
        lines += [f"license_link: https://huggingface.co/{base}"] if base else []
    if trigger := header.get("modelspec.trigger_phrase"):
        lines += [f"instance_prompt: {quoted(trigger)}"]
    if shown:
        lines += ["widget:"]
        for one in shown:
            lines += [f"- text: {quoted(one.prompt)}", f"  output: {{url: {quoted(one.name)}}}"]
    return "\n".join(["---", *lines, "---"])


def _about(header: Mapping[str, str], base: str) -> str:
    own = lambda name: header.get(f"{OWN}{name}", "")
    trigger, steps = header.get("modelspec.trigger_phrase", ""), own("sampling_steps")
    facts = {
        "base model": base,
        "trigger": trigger,
        "sampling steps": steps and f"{steps}, without guidance",
        "method": own("method"),
        "training steps": header.get("ss_steps", ""),
        "pictures": header.get("ss_num_train_images", ""),
        "resolution": header.get("modelspec.resolution", ""),
        "rank": header.get("ss_network_dim", ""),
        "base model, sha256": own("base_digest"),
        "data, sha256": own("data_digest"),
    }
    rows = [f"| {name} | {_line(text)} |" for name, text in facts.items() if text]
    said = (
        f"A {_kind(header)} for a few-step image model: use it with the model's own few steps, at "
        "strength 1."
    )
    return "\n".join([said, "", "| | |", "|---|---|", *rows])


def _kind(header: Mapping[str, str]) -> str:
    """What the adapter is called; a file's header can hold anything."""
    try:
        told = json.loads(header.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        told = None
    return "LoKr" if isinstance(told, dict) and told.get("algo") == "lokr" else "LoRA"


def _use(header: Mapping[str, str], file: str, base: str, repo: str) -> str:
    trigger = header.get("modelspec.trigger_phrase", "")
    steps = header.get(f"{OWN}sampling_steps", "")
    number = steps if re.fullmatch("[0-9]{1,3}", steps) else "8"
    prompt = f"{trigger} on a skateboard" if trigger else "what to draw"
    loaded = shown = ""
    if EDITS in header:
        prompt = f"what to do with {trigger}" if trigger else "what to do"
        loaded = "\nfrom diffusers.utils import load_image"
        shown = ', image=load_image("picture_to_edit.png")'
    since = " (LoKr: diffusers 0.42 or later)" if _kind(header) == "LoKr" else ""
    older = ""
    if header.get("modelspec.architecture", "").startswith("Z-Image"):
        # Its pipeline took the noise level 0 as the last step's, which changes nothing.
        more = int(number) + 1
        older = f"\n\nIn diffusers before 0.39: `num_inference_steps={more}`, for the same steps."
    prompt = json.dumps(prompt, ensure_ascii=False)
    return f"""## Use{since}

```python
import torch
from diffusers import DiffusionPipeline{loaded}

base = {json.dumps(base or "BASE MODEL")}
pipe = DiffusionPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
pipe.load_lora_weights({json.dumps(repo or ".")}, weight_name={json.dumps(file)})
image = pipe({prompt}{shown}, num_inference_steps={number}, guidance_scale=0.0).images[0]
```{older}

ComfyUI: put the file into `models/loras`, node *LoraLoaderModelOnly*, strength 1."""


def _terms(terms: str) -> str:
    said = f"{_line(terms)}." if terms else "Not stated."
    return f"## Licence\n\n{said}"


def _line(text: str) -> str:
    """Text of a file's header inside a table: it can be anything."""
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;").replace("`", "'")
