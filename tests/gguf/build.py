"""GGUF files byte by byte, so that each field can be wrong."""

import struct

KINDS = {"u32": (4, "<I"), "f32": (6, "<f"), "bool": (7, "<?"), "u64": (10, "<Q"), "i32": (5, "<i")}


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def pair(key, kind, value):
    """One key with its value: a number by its kind, a string, or an array of strings or numbers."""
    if kind == "str":
        return text(key) + struct.pack("<I", 8) + text(value)
    if kind == "strings":
        return text(key) + struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
    if kind.endswith("s") and kind[:-1] in KINDS:
        number, form = KINDS[kind[:-1]]
        return (
            text(key)
            + struct.pack("<IIQ", 9, number, len(value))
            + b"".join(struct.pack(form, v) for v in value)
        )
    number, form = KINDS[kind]
    return text(key) + struct.pack("<I", number) + struct.pack(form, value)


def info(name, shape, kind=0, offset=0):
    """One tensor; shape as GGUF has it, columns first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def header(pairs, infos, version=3, counts=None, magic=b"GGUF"):
    tensors, keys = counts or (len(infos), len(pairs))
    return magic + struct.pack("<IQQ", version, tensors, keys) + b"".join(pairs) + b"".join(infos)


def whole(pairs, infos, data, alignment=32, **settings):
    """A file: the header, padding, the bytes of the tensors."""
    head = header(pairs, infos, **settings)
    return head + b"\0" * (-len(head) % alignment) + data
