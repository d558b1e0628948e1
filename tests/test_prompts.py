"""Prompt strings against the chat templates of the published models."""

import pathlib

import jinja2
import pytest

from dopsd_jax.common.errors import UserError
from dopsd_jax.families.zimage.templates import student_text, teacher_text

DATA = pathlib.Path(__file__).parent / "data"
PROMPTS = [
    "a red fox in the snow",
    "",
    "  spaces, tabs\tand lines\n\nkept \n",
    "雪地里的红狐狸 [V] style 🦊",
    "braces {{ x }} {% if %} and <|im_end|> <b>&amp;</b>",
    "<think>\nhm\n</think>\n\nno",
]


def render(template: str, content, **settings) -> str:
    # As transformers renders them.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((DATA / template).read_text()).render(
        messages=[{"role": "user", "content": content}], add_generation_prompt=True, **settings
    )


@pytest.mark.parametrize("prompt", PROMPTS)
def test_student_text_is_the_published_template_with_thinking_enabled(prompt):
    assert student_text(prompt) == render("qwen3_chat_template.jinja", prompt, enable_thinking=True)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("doubled", [False, True])
def test_teacher_text_is_the_published_template_with_the_image_first(prompt, doubled):
    text = prompt
    if doubled:
        text = render("qwen3_chat_template.jinja", prompt, enable_thinking=True)
    content = [{"type": "image"}, {"type": "text", "text": text}]
    expected = render("qwen3_vl_chat_template.jinja", content)
    expanded = expected.replace("<|image_pad|>", "<|image_pad|>" * 12)
    assert teacher_text(prompt, 12, doubled=doubled) == expanded


def test_half_a_character_is_no_prompt():
    with pytest.raises(UserError, match=r"the prompt 'a \\udcff dog' is no UTF-8 text"):
        student_text("a \udcff dog")


def test_marks_of_an_image_in_a_prompt_are_refused():
    with pytest.raises(UserError) as caught:
        teacher_text("a <|image_pad|> and <|vision_end|>", 4, where="rows.jsonl:3")
    assert len(caught.value.problems) == 2
    assert all(p.startswith("rows.jsonl:3: ") for p in caught.value.problems)
