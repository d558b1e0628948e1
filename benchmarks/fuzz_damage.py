"""Damages files: of their meaning where it can be parsed, or of their bytes; the same by seed."""

import copy
import json
import random
import struct
import tarfile
import zlib

from dopsd_jax.data.prepared_parts import SMALL

NASTY = (
    None, True, False, 0, -1, 1, 2, 10**9, 2**31, 2**63, 10**39, 0.0, -0.5, 1e308, 1e-320,
    "", "x", "nan", "../..", "\x00", "\x1b[31m", "é" * 40, "(a+)+$", "layers.0",
    [], {}, [[]], [1], [None], {"a": 1}, [0, 0], [1, 2, 3], [10**12] * 3, ["a"] * 3,
)  # fmt: skip
TOKENS = (b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"[" * 2000, b'"\\ud800"', b"\xff\xfe", b"{")


def damaged(rng: random.Random, content: bytes, kind: str) -> bytes:
    """`content` with one to three faults: of its meaning if it can be parsed, or of its bytes."""
    if kind == "safetensors" and rng.random() < 0.7:
        (length,) = struct.unpack("<Q", content[:8])
        header = damaged(rng, content[8 : 8 + length], "json")
        return struct.pack("<Q", len(header)) + header + content[8 + length :]
    if kind == "lines" and rng.random() < 0.7:
        lines = content.splitlines(keepends=True)
        at = rng.randrange(len(lines))
        lines[at] = damaged(rng, lines[at].rstrip(), "json") + lines[at][-1:]
        return b"".join(lines)
    if kind == "json" and rng.random() < 0.7:
        tree = json.loads(content)
        for _ in range(rng.randint(1, 3)):
            tree = _with_fault(rng, tree)
        content = json.dumps(tree).encode()
        if rng.random() < 0.8:
            return content
    data = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        action = rng.randrange(5)
        if action == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif action == 1:
            del data[at : at + rng.choice((1, 8, 100, 10**9))]
        elif action == 2:
            data[at:at] = rng.choice(TOKENS)
        elif action == 3:
            data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**24, 2**63, 2**64 - 1)))
        else:
            data[at:at] = data[: rng.randrange(1 + min(len(data), 500))]
    return bytes(data)


def _with_fault(rng: random.Random, tree: object) -> object:
    places: list[tuple[dict | list, object]] = []

    def walk(node):
        inner = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in inner:
            places.append((node, key))
            if isinstance(value, dict | list):
                walk(value)

    if isinstance(tree, dict | list):
        walk(tree)
    if not places or rng.random() < 0.03:
        return copy.deepcopy(rng.choice(NASTY))
    node, key = rng.choice(places)
    action = rng.randrange(6)
    if action == 0:
        del node[key]
    elif action == 1 and isinstance(node, dict):
        node[rng.choice(("x", "", "__metadata__", "é", key + "x"))] = node.pop(key)
    elif action == 2:
        other, name = rng.choice(places)
        node[key] = json.loads(json.dumps(other[name])) if _has(other, name) else None
    elif isinstance(node[key], str) and action == 3:
        node[key] = rng.choice(TOKENS).decode("latin-1") + node[key]
    else:
        node[key] = copy.deepcopy(rng.choice(NASTY))  # later faults change it
    return tree


def _has(node: dict | list, key: object) -> bool:
    return key in node if isinstance(node, dict) else key < len(node)


def seal_png(content: bytes) -> bytes:
    """The file with right checksums of all chunks."""
    data, place = bytearray(content), 8
    while place + 12 <= len(data):
        end = place + 8 + int.from_bytes(data[place : place + 4], "big")
        data[end : end + 4] = zlib.crc32(data[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(data[: max(len(content), 1)])


def seal_tar(content: bytes) -> bytes:
    """The archive with right checksums of all headers."""
    data = bytearray(content)
    for place in range(0, len(data) - 511, 512):
        block = data[place : place + 512]
        if block[257:262] == b"ustar":
            total = tarfile.calc_chksums(bytes(block))[0]
            data[place + 148 : place + 156] = b"%06o\0 " % total
    return bytes(data)


def seal_part(content: bytes) -> bytes:
    """The part of a prepared data set with a right checksum, if its header still says where."""
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        spans = {name: header[name]["data_offsets"] for name in (*SMALL, "whole")}
        data, total = bytearray(content), 0
        for name in SMALL:
            total = zlib.crc32(
                data[8 + length + spans[name][0] : 8 + length + spans[name][1]], total
            )
        struct.pack_into("<q", data, 8 + length + spans["whole"][0], total)
        return bytes(data)
    except (ValueError, LookupError, TypeError, RecursionError, struct.error):
        return content
