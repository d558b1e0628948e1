"""The cases of a real data set: its own captions, and test prompts from a file.

After upstream's small-set protocol: for at most four rows a picture of the row's caption, which is
compared with the row's own picture, and pictures of test prompts. Upstream lets a vision-language
model reword the caption and write the tests; here both are the user's.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from dopsd_jax.common.errors import UserError, raise_if
from dopsd_jax.common.files import expand, read_bytes
from dopsd_jax.common.json_fields import in_json
from dopsd_jax.common.json_files import parse_json
from dopsd_jax.conditioning.encoding import concept_pattern, put_class
from dopsd_jax.data.dataset import Dataset, spread
from dopsd_jax.data.images import ImageLimits, fit, open_image
from dopsd_jax.data.sources.captions import prompts_in
from dopsd_jax.data.views import cut
from dopsd_jax.evaluation.scorer import Case, Picture
from dopsd_jax.evaluation.seeds import ROW, case_seed

TRAINING, TEST, ORDINARY = "training", "test", "ordinary"
PLACEHOLDER = "[V]"
STYLE = re.compile(re.escape(PLACEHOLDER) + r"\s+style\b", re.IGNORECASE)
KEYS = ("prompt", "row", "class_name")


class Test(dict):
    """One test prompt: `prompt`, `where` it stands, and perhaps `row` and `class_name`."""


def read_prompts(path: str | Path) -> list[Test]:
    """Test prompts: one a line of a text file, or objects of a .jsonl file.

    A .jsonl object has `prompt`, and may have `row` (of the data set, from 0: whose picture the
    teacher is shown) and `class_name` (in place of `[V]` when the text is scored). Raises
    `UserError` with every fault.
    """
    path = expand(path)
    content = read_bytes(path, advice="name a file with --prompts")
    found, faults = [], []
    for number, line in prompts_in(content, f"--prompts {path}"):
        where = f"{path}:{number}"
        test = {"prompt": line} if path.suffix.lower() != ".jsonl" else _parsed(line)
        faults += [f"{where}: {fault}" for fault in _faults(test)]
        if isinstance(test, dict):
            found.append(Test(test, where=where))
    raise_if(faults)
    return found


def _parsed(line: str) -> object:
    try:
        return parse_json(line, "")
    except UserError:
        return None


def _faults(test: object) -> list[str]:
    if not isinstance(test, dict):
        return ["is not a JSON object"]
    faults = [f"{key!r} is unknown; there are {', '.join(KEYS)}" for key in test.keys() - set(KEYS)]
    prompt, row, name = (test.get(key) for key in KEYS)
    if not isinstance(prompt, str) or not prompt.strip():
        faults.append("has no text under 'prompt'")
    if row is not None and (type(row) is not int or row < 0):
        faults.append(f"'row' is {in_json(row)}; it must be a whole number from 0")
    if name is not None and (not isinstance(name, str) or not name.strip()):
        faults.append(f"'class_name' is {in_json(name)}; it must be text")
    return faults


def cases(
    dataset: Dataset,
    tests: Sequence[Mapping],
    *,
    rows: int,
    class_word: str = "",
    limits: ImageLimits | None = None,
    scored_text: bool = True,
    first_seed: int = 30,
    words: Sequence[str] = (),
    teacher_key: str | None = None,
    cuts_references: bool = False,
) -> list[Case]:
    """Each chosen row's first caption, and the test prompts; sizes are the rows' buckets.

    rows: at most so many, spread over the data set; tests without a row take them in turn.
    class_word: replaces `[V]` where neither the test nor the row's record has a class.
    words: besides `[V]`, what may stand for the concept in the data set's captions. Where one of
    them does, a test without any of them is an ordinary prompt.
    teacher_key: of the captions for a teacher that sees no picture; tests have none.
    cuts_references: what is edited is cut to the row's bucket, as in training.
    scored_text: whether a scorer reads texts; only then a class must be known. Raises `UserError`
    with every test of a row that there is not, and every text whose class is not known.
    """
    chosen = spread(len(dataset.rows), rows)
    faults = [
        f"{t['where']}: row {t['row']}, but the data set has {len(dataset.rows)}, from 0"
        for t in tests
        if t.get("row") is not None and t["row"] >= len(dataset.rows)
    ]
    raise_if(faults)
    first = [dataset.caption(row, dataset.prompt_keys) for row in chosen]
    asked = [
        (TRAINING, row, dataset.rows[row].captions[i][1], dataset.rows[row].where, None)
        for row, i in first
    ]
    for i, test in enumerate(tests):
        row = chosen[i % len(chosen)] if test.get("row") is None else test["row"]
        asked.append((TEST, row, test["prompt"], test["where"], test.get("class_name")))
    patterns = [concept_pattern(word).pattern for word in (PLACEHOLDER, *words) if word]
    names_concept = lambda prompt: any(re.search(own, prompt, re.IGNORECASE) for own in patterns)
    known = any(names_concept(prompt) for kind, _, prompt, *_ in asked if kind == TRAINING)
    style = any(STYLE.search(prompt) for _, _, prompt, _, _ in asked)
    classes = class_names([dataset.rows[row].where for _, row, *_ in asked])
    shown: dict[int, dict[str, Picture | list[Picture] | None]] = {}
    counts: dict[int, int] = {}
    found = []
    for kind, row, prompt, where, name in asked:
        name = name or classes.get(dataset.rows[row].where) or class_word
        if PLACEHOLDER in prompt and not name and scored_text:
            faults.append(
                f"{where}: has {PLACEHOLDER}, and no class to score it as; give --class_word"
            )
        number = None
        if kind == TEST:
            number = counts[row] = counts.get(row, -1) + 1
            number %= ROW - 1  # beyond, the noise of the next row would be used
            kind = ORDINARY if known and not names_concept(prompt) else TEST
        if row not in shown:
            own, edited = dataset.rows[row], dataset.rows[row].references
            whole, digest = open_image(own.image, limits), dataset.infos[row].digest
            size = dataset.buckets[row]
            references = [open_image(path, limits) for path in edited]
            if cuts_references:
                references = [fit(picture, *size) for picture in references]
            shown[row] = {"target": cut(whole, size, own.view, digest), "references": references}
            if dataset.others:
                other = open_image(dataset.others[row].image, limits)
                shown[row]["shown"] = fit(other, *size)
        width, height = dataset.buckets[row]
        lesson = ""
        if kind == TRAINING and teacher_key:
            _, i = dataset.caption(row, (teacher_key,))
            lesson = dataset.rows[row].captions[i][1]
        text = with_class(prompt, name, style) if name else prompt
        seed = case_seed(first_seed, row, number)
        found.append(Case(kind, prompt, text, height, width, seed, **shown[row], told=lesson))
    raise_if(faults)
    return found


def with_class(prompt: str, name: str, style: bool) -> str:
    """The prompt as it is scored: `[V]` becomes the class name, or in a set of a style
    `<class> style` (upstream's rule: a set is of a style if a text says `[V] style`)."""
    if style:
        prompt = STYLE.sub(lambda _: PLACEHOLDER, prompt)
        name = f"{name} style"
    return put_class(prompt, PLACEHOLDER, name)


def class_names(wheres: Sequence[str]) -> dict[str, str]:
    """`class_name` of rows that stand in a .jsonl file, by where they stand (`FILE:LINE`)."""
    wanted: dict[str, dict[int, str]] = {}
    for where in wheres:
        file, _, line = where.rpartition(":")
        if file.lower().endswith(".jsonl") and line.isdigit():
            wanted.setdefault(file, {})[int(line)] = where
    found = {}
    for file, by_line in wanted.items():
        with open(file, encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, 1):
                if number in by_line:
                    record = parse_json(line, by_line[number])
                    name = record.get("class_name") if isinstance(record, dict) else None
                    if isinstance(name, str) and name.strip():
                        found[by_line[number]] = name.strip()
    return found
