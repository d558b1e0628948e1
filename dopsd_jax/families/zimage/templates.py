"""Prompts in the chat templates of the text encoder and of the vision-language model."""

from dopsd_jax.common.errors import raise_if
from dopsd_jax.families.texts import user_turn

IMAGE_PAD = "<|image_pad|>"
VISION_START = "<|vision_start|>"
VISION_END = "<|vision_end|>"
VIDEO_PAD = "<|video_pad|>"


def student_text(prompt: str) -> str:
    """The prompt as Z-Image's text encoder is given it: one user turn, thinking enabled.

    (Thinking enabled adds nothing; disabling it is what adds an empty think block.)
    """
    return user_turn(prompt)


def teacher_text(
    prompt: str, image_tokens: int, *, doubled: bool = False, where: str = "prompt"
) -> str:
    """One user turn of Qwen3-VL: an image of `image_tokens` positions, then the prompt.

    `doubled` puts the prompt into the student's template first, as D-OPSD's released training code
    does. Raises `UserError` naming `where` for a prompt that itself holds an image's marks.
    """
    raise_if(
        f"{where}: the text holds {mark}, which stands for a picture; remove it"
        for mark in (IMAGE_PAD, VISION_START, VISION_END, VIDEO_PAD)
        if mark in prompt
    )
    text = student_text(prompt) if doubled else prompt
    return student_text(f"{VISION_START}{IMAGE_PAD * image_tokens}{VISION_END}{text}")
