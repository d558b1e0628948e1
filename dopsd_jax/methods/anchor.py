"""The on-policy anchor: a share of each step holds the student to its start. Imports no JAX.

Anchors are ordinary prompts without pictures; those of an editor may edit pictures of the data set.
The student rolls out on them as on the rows of the data set, and at every state it is pulled to the
velocity that the network before training has for the *same* prompt. At the first step the two are
equal; later what differs is what was forgotten.
The loss is `losses.anchor`, the prompts are `conditioning.anchors`.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dopsd_jax.common.config_fields import NEVER, POSITIVE, Field, Naming, as_list
from dopsd_jax.methods.method import Count, Passes
from dopsd_jax.methods.options import DISTANCE

Config = Mapping[str, Any]

GENERAL, CLASS, NEW_WORDS, EDITS = "general", "class", "new_words", "edits"
KINDS = (GENERAL, CLASS, NEW_WORDS, EDITS)  # of prompts; anything else is a file
# Fields of methods that decide the anchors' loss with every method.
USED = ("loss", "loss_steps", *(field.name for field in DISTANCE))
ON = {"anchor.share": POSITIVE}
# fmt: off
FIELDS = (
    Field("anchor.share", 0.0,
          "weight of the anchors, prompts without target pictures on which the student is held to "
          "its start, and their share of a step's images; they come beside batch_size", low=0,
          high=0.9, change=NEVER),
    Field("anchor.prompts", GENERAL,
          "prompts of the anchors: general (500 shipped ones); class (the captions with "
          "anchor.class_word for the concept's word); new_words (with words that mean nothing); "
          "edits (200 shipped instructions for anchor.edit); or a text file, a prompt a line",
          "list", when=ON, change=NEVER),
    Field("anchor.edit", False,
          "give each anchor the references of a row of its step; its prompt must be an instruction "
          "for them", when=ON, change=NEVER),
    Field("anchor.concept_word", "",
          "word of the captions that stands for the concept; empty: data.trigger", when=ON,
          change=NEVER),
    Field("anchor.class_word", "",
          "word, such as dog, that replaces it in prompts of the kind class",
          when={**ON, "anchor.prompts": Naming((CLASS,))}, change=NEVER),
    Field("anchor.teacher", "start",
          "whose velocity the student is pulled to: start, the network before training (full "
          "fine-tuning keeps a copy); teacher, that of config.teacher", when=ON,
          choices=("start", "teacher"), change=NEVER),
)
# fmt: on


class Micro(NamedTuple):
    """Micro-batches of anchors in a step: how many, and the images of each."""

    count: int
    size: int


def micro_batches(config: Config, multiple: int = 1) -> Micro | None:
    """The anchors of a step, which come beside the rows of the data set; None without any.

    At least config.anchor.share of all images of a step are anchors: more where that fits better
    into micro-batches not larger than config.batch_size that are multiples of `multiple`, the
    devices they are spread over. The weight of the anchors is the share in any case.
    """
    size, share = config["batch_size"], config["anchor"]["share"]
    if not share:
        return None
    wanted = size * config["accumulate"] * share / (1 - share)
    count = math.ceil(round(wanted / size, 9))
    own = math.ceil(round(wanted / count / multiple, 9)) * multiple
    return Micro(count, own)


def passes(config: Config, n: Count, devices: int = 1) -> Passes | None:
    """Passes of the anchors beside an image of the data set; None without any.

    devices: that samples are spread over.
    """
    anchors = micro_batches(config, devices)
    if anchors is None:
        return None
    beside = anchors.count * anchors.size / (config["batch_size"] * config["accumulate"])
    return Passes(*(beside * each for each in Passes(n.loss_steps, n.steps, captions=1)))


def faults(given: Config, keeps: str) -> list[str]:
    """What does not go together; `given`: by dotted name. keeps: see `Method`."""
    if not given["anchor.share"]:
        return []
    found, kinds = [], as_list(given["anchor.prompts"])
    if not kinds:
        found.append(f"config.anchor.prompts: is empty; name {', '.join(KINDS)}, or a text file")
    replaced = [kind for kind in kinds if kind in (CLASS, NEW_WORDS)]
    if replaced and not (given["anchor.concept_word"] or given["data.trigger"]).strip():
        found.append(
            f"config.anchor.concept_word: is empty, and so is config.data.trigger; prompts of the "
            f"kind {replaced[0]} need the word that stands for the concept in the captions"
        )
    if CLASS in kinds and not given["anchor.class_word"].strip():
        found.append(
            "config.anchor.class_word: is empty; name what the concept is an example of, as dog"
        )
    if EDITS in kinds and not given["anchor.edit"]:
        found.append(
            f"config.anchor.prompts: {EDITS} are instructions, and without config.anchor.edit an "
            "anchor has no picture to edit; set that to true, or name other prompts"
        )
    none = keeps == "none" or (keeps == "teacher" and given["teacher.weights"] == "live")
    if given["anchor.teacher"] == "teacher" and none:
        found.append(
            "config.anchor.teacher: names the teacher, which has no weights of its own with "
            f"config.method = {given['method']} and config.teacher.weights = "
            f"{given['teacher.weights']}; set it to start"
        )
    return found
