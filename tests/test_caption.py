"""The program `caption`: on a model that says the same few words of every picture."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from caption_model import SENTENCE, write_captioner
from conftest import run_program
from PIL import Image
from test_qwen3_vl import torch_inputs

from dopsd_jax import caption
from dopsd_jax.common.errors import UserError
from dopsd_jax.data.rows import load_rows
from dopsd_jax.data.sources import uncaptioned
from dopsd_jax.families.captioner import Captioner, Settings
from dopsd_jax.models.vlm_images import preprocess


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_captioner(tmp_path_factory.mktemp("caption") / "model")


def picture(path, size=(64, 64), colour=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def test_pictures_without_a_caption_get_one_and_the_broken_one_is_named(model, tmp_path):
    folder = tmp_path / "photos"
    picture(folder / "b.png")
    (folder / "c.png").write_bytes(picture(folder / "c.png").read_bytes()[:60])
    picture(folder / "a.png")
    (folder / "a.txt").write_text("my own words")
    first = run_program(
        "caption", f"--images={folder}", f"--model={model}", "--trigger=[V] dog", "--max_tokens=16"
    )
    assert first.returncode == 2
    (line,) = first.stderr.splitlines()
    assert line.startswith(f"error: {folder}/c.png: is damaged")
    assert "2 pictures to caption, 1 have captions" in first.stdout
    assert "1 captions written" in first.stdout
    # The model did not say the trigger, so it stands in front.
    assert (folder / "b.txt").read_text() == f"[V] dog, {SENTENCE}\n"
    assert (folder / "a.txt").read_text() == "my own words"
    assert sorted(p.name for p in folder.iterdir()) == ["a.png", "a.txt", "b.png", "b.txt", "c.png"]

    # Again: what is there is kept, and training takes the folder.
    (folder / "c.png").unlink()
    again = run_program("caption", f"--images={folder}", f"--model={model}")
    assert again.returncode == 0 and not again.stderr
    assert "0 pictures to caption, 2 have captions" in again.stdout
    rows = load_rows(folder, caption_extension=".txt").rows
    assert [row.captions[0][1] for row in rows] == ["my own words", f"[V] dog, {SENTENCE}"]


def settings(**changes) -> Settings:
    return Settings(**{"instruction": "Describe it.", "max_tokens": 16} | changes)


def test_one_answer_for_each_picture_and_none_where_it_does_not_end(model):
    captioner = Captioner(model / "vlm", settings())
    pixels = [np.full((64, 64, 3), value, np.uint8) for value in (0, 200)]
    assert captioner.answers(pixels) == [SENTENCE] * 2
    tokens = captioner.tokenizer(SENTENCE)["input_ids"]
    assert captioner.text(tokens) is None
    assert captioner.text([*tokens, captioner.stops[1], 5]) == SENTENCE


def test_tokens_equal_those_of_transformers_from_the_same_folder(random_model):
    captioner = Captioner(random_model / "vlm", settings(max_tokens=6))
    pixels = np.random.default_rng(0).integers(0, 256, (64, 128, 3)).astype(np.uint8)
    ids, (patches, grid) = captioner.prompt((64, 128)), preprocess(pixels, captioner.images)
    assert grid == (4, 8)
    their = transformers.Qwen3VLForConditionalGeneration.from_pretrained(
        random_model / "vlm", dtype="float32"
    )
    # A head of its own: random embeddings, as head, say the last token again and again.
    head = np.random.default_rng(1).normal(size=captioner.head.shape).astype(np.float32)
    captioner.head = jnp.asarray(head)
    their.lm_head.weight = torch.nn.Parameter(torch.tensor(head))
    inputs = torch_inputs(np.array([ids]), np.array([len(ids)]), patches[None], grid)
    image = torch.tensor([ids]) == captioner.config.image_token_id
    inputs["mm_token_type_ids"] = image.int()
    with torch.no_grad():
        expected = their.generate(
            **inputs, do_sample=False, max_new_tokens=6, eos_token_id=captioner.stops
        )
    found = captioner.tokens([pixels])[0]
    np.testing.assert_array_equal(found, expected[0, len(ids) :].numpy())
    assert len(set(found.tolist())) > 2


def test_what_a_model_lacks_for_captions_is_told(model, tmp_path):
    with pytest.raises(UserError, match="--instruction: the text holds"):
        Captioner(model / "vlm", settings(instruction="say <|image_pad|>"))
    (tmp_path / "drawing").mkdir()
    (tmp_path / "drawing" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match="has no folder vlm"):
        caption.model_folder(str(tmp_path / "drawing"))


def test_batches_hold_pictures_of_one_grid_and_of_one_size_each():
    todo = [caption.Todo(str(i), "", (2, 4) if i % 3 else (4, 2)) for i in range(7)]
    found = caption.batches(todo, 3)
    assert [[one.picture for one in batch.todo] for batch in found] == [
        ["0", "3", "6"], ["1", "2", "4"], ["5"],
    ]  # fmt: skip
    assert [batch.size for batch in found] == [3, 3, 3]
    assert [batch.size for batch in caption.batches(todo[:2], 3)] == [1, 1]


def test_answers_become_one_line_with_the_trigger_once():
    assert caption.plain(' "A dog\n\tin the snow." ') == "A dog in the snow."
    assert caption.with_trigger("A [v] DOG runs.", "[V] dog") == "A [V] dog runs."
    assert caption.with_trigger("A dog runs.", "[V] dog") == "[V] dog, A dog runs."
    assert caption.with_trigger("", "[V] dog") == ""
    assert caption.with_trigger("A hotdog stand.", "dog") == "dog, A hotdog stand."
    assert caption.with_trigger("A hotdog for a Dog.", "dog") == "A hotdog for a dog."
    assert caption.with_trigger("一只小狗。", "狗") == "一只小狗。"
    assert caption.with_trigger("Ein Rüde.", "de") == "de, Ein Rüde."
    assert caption.with_trigger("Éclair, ça.", "clair") == "clair, Éclair, ça."
    assert caption.with_trigger("Đồng hồ", "đồng") == "đồng hồ"
    assert caption.with_trigger("Đồng hồ", "ng") == "ng, Đồng hồ"


def test_what_counts_as_a_caption_is_what_training_takes(tmp_path):
    for name in ("a.png", "b.png", "c.png", "d.jpg", "sub/e.PNG", "sub/f.png", "g.png"):
        picture(tmp_path / name, format="PNG")
    picture(tmp_path / "g_mask.png")
    picture(tmp_path / "masks/g.png")
    picture(tmp_path / ".hidden/h.png")
    (tmp_path / "a.txt").write_text("words")
    (tmp_path / "b.png.txt").write_text("words")
    (tmp_path / "c.json").write_text('{"caption": "words"}')
    (tmp_path / "d.txt").write_text(" \n")  # blank: no caption
    (tmp_path / "sub" / "f.json").write_text('{"exposure": 3}')  # no caption in it
    found = uncaptioned.find(tmp_path, ".txt")
    names = [[p.removeprefix(f"{tmp_path}/") for p in one] for one in found.wanted]
    assert names == [
        ["d.jpg", "d.txt"], ["g.png", "g.txt"],
        ["sub/e.PNG", "sub/e.txt"], ["sub/f.png", "sub/f.txt"],
    ]  # fmt: skip
    assert found.captioned == 3 and not found.faults
    assert "g_mask.png, masks/g.png" in found.notes[0]
    assert len(uncaptioned.find(tmp_path, ".txt", overwrite=True).wanted) == 7


def test_files_that_cannot_be_captioned_are_all_named(tmp_path):
    for name in ("a.png", "a.jpg", "b.png", "c.png"):
        picture(tmp_path / name)
    (tmp_path / "d.psd").touch()
    (tmp_path / "b.json").write_text("{")
    found = uncaptioned.find(tmp_path, ".txt")
    assert [one.picture for one in found.wanted] == [f"{tmp_path}/c.png"]
    assert len(found.faults) == 3
    for word in ("d.psd: psd cannot be read", "would share the caption a.txt", "b.json: is not"):
        assert any(word in fault for fault in found.faults), found.faults
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        uncaptioned.find(tmp_path / "empty", ".txt")
