"""ICC profiles made by hand, with answers known from their definition."""

import struct


def _s15(*values: float) -> bytes:
    return struct.pack(f">{len(values)}i", *(round(v * 65536) for v in values))


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {
        b"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78 + 8),
        b"wtpt": b"XYZ \0\0\0\0" + _s15(0.9642, 1.0, 0.8249),
        **tags,
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4s4s4s4s4s12s4s", start + len(body), bytes(4), b"\x02\x40\0\0", kind,
                         space, pcs, bytes(12), b"acsp")  # fmt: skip
    header += bytes(28) + _s15(0.9642, 1.0, 0.8249)
    return header + bytes(128 - len(header)) + table + body


def rgb_profile(gamma: float, swapped: bool = False) -> bytes:
    """sRGB's primaries with a pure power curve; `swapped` exchanges red and blue."""
    red, green, blue = (0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)
    if swapped:
        red, blue = blue, red
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    tags = {n: b"XYZ \0\0\0\0" + _s15(*v) for n, v in
            ((b"rXYZ", red), (b"gXYZ", green), (b"bXYZ", blue))}  # fmt: skip
    return _profile(
        b"mntr", b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), curve)
    )


def grey_profile(gamma: float) -> bytes:
    """Grey with a pure power curve."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A press on which ink only darkens: L = 100 (1 - k) (1 - (c + m + y) / 3), without colour."""
    clut = bytearray()
    for c in (0, 1):
        for m in (0, 1):
            for y in (0, 1):
                for k in (0, 1):
                    clut += bytes((round(255 * (1 - k) * (1 - (c + m + y) / 3)), 128, 128))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + _s15(1, 0, 0, 0, 1, 0, 0, 0, 1)
    lut += ramp * 4 + bytes(clut) + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut, b"A2B1": lut})
