"""A small tokenizer like that of Qwen: its rules and special tokens, a vocabulary of 512."""

import collections
import itertools
import json
from collections.abc import Sequence
from pathlib import Path

# In Qwen's order. The first fourteen are special; the others are plain added tokens.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
OTHER_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)

MERGES = 192


def added_ids(merges: int) -> dict[str, int]:
    """Ids of the added tokens: they stand behind 256 bytes and `merges` merged pairs."""
    return {token: 256 + merges + i for i, token in enumerate(SPECIAL_TOKENS + OTHER_TOKENS)}


IDS = added_ids(MERGES)
# As in Qwen, the embedding has more rows than there are tokens.
VOCABULARY = 512

# The pairs to merge are learned from these words, so that prompts do not fall apart into bytes.
CORPUS = """
user assistant system a photo of the painting of an image with the red green blue yellow purple
orange black white gold silver pink brown circle square triangle star heart cross ring diamond
shape on the background in the centre of the top left bottom right corner large small tiny bright
dark light soft warm cold rocket house tree cat dog horse flower river mountain snow forest sky
sea sun moon night day one two three drawing sketch style colour and is that this two striped
dotted plain gradient
"""

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# What Qwen3's template does with system, user and assistant text; tools are left out.
QWEN3_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""

# What Qwen3-VL's template does with text and images; video and tools are left out.
QWEN3_VL_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for content in message.content %}
            {%- if content.type == 'image' or 'image' in content or 'image_url' in content %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- elif 'text' in content %}
                {{- content.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def write_tokenizer(
    folder: Path,
    template: str,
    max_length: int,
    *,
    words: Sequence[str] = tuple(CORPUS.split()),
    count: int = MERGES,
) -> None:
    """Writes tokenizer.json and tokenizer_config.json.

    `template` is the chat template; `count` pairs to merge are learned from `words`.
    """
    symbols, ids = byte_symbols(), added_ids(count)
    merges = learn_merges(words, symbols, count)
    vocabulary = [symbols[b] for b in sorted(symbols, key=lambda b: symbols[b])]
    vocabulary += [left + right for left, right in merges]
    added = {token: _added_token(token) for token in ids}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": ids[token], **added[token]} for token in ids],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": SPLIT},
                    "behavior": "Isolated",
                    "invert": False,
                },
                _BYTE_LEVEL,
            ],
        },
        "post_processor": _BYTE_LEVEL,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(vocabulary)},
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(ids[token]): added[token] for token in ids},
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": max_length,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("tokenizer.json", tokenizer), ("tokenizer_config.json", config)):
        text = json.dumps(value, indent=2, ensure_ascii=False)
        (folder / name).write_text(text + "\n", encoding="utf-8")


_BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": False,
    "use_regex": False,
}


def _added_token(token: str) -> dict:
    return {
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": token in SPECIAL_TOKENS,
    }


def byte_symbols() -> dict[int, str]:
    """The printable character that stands for each byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    symbols = {b: chr(b) for b in printable}
    return symbols | {b: chr(256 + i) for i, b in enumerate(others)}


def learn_merges(
    words: Sequence[str], symbols: dict[int, str], count: int
) -> list[tuple[str, str]]:
    """The `count` byte pairs that byte-pair encoding merges, most frequent first, ties by text."""
    spelled = collections.Counter(
        tuple(symbols[b] for b in (space + word).encode()) for word in words for space in ("", " ")
    )
    merges = []
    while len(merges) < count:
        pairs = collections.Counter()
        for word, times in spelled.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged = collections.Counter()
        for word, times in spelled.items():
            merged[_merge(word, best)] += times
        spelled = merged
    return merges


def _merge(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts, i = [], 0
    while i < len(word):
        if word[i : i + 2] == pair:
            parts.append(word[i] + word[i + 1])
            i += 2
        else:
            parts.append(word[i])
            i += 1
    return tuple(parts)
