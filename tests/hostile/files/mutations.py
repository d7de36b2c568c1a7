"""Mutations of files: of their bytes, and of what the bytes say with the checksums right again."""

from __future__ import annotations

import copy
import io
import json
import random
import struct
import zipfile
from typing import Any

DEEP = "[" * 3000 + "]" * 3000
VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2**31, 2**63, 2**64, 10**30, 10**400, 0.5, -1e308, "", " ", "x", "x" * 10_000,
    "\x1b]0;title\x07\x1b[31m", "\u202egnp.exe", "a\0b", "../../etc/passwd", "/etc/passwd", "I32", "nan", "1e999999",
    "*a", "sha256:", [], [[]], [None], ["x"], [1, 2, 3], [[1], [2]],
    list(range(2000)), {}, {"": None}, {"x": {"y": [1]}},
    {"name": 5}, "{{ 1/0 }}", "(a+)+$", "é" * 300, "😀", -0.0, 1e-320,
]  # fmt: skip
# Texts that stand where a value stood, which JSON's writer would not write.
RAW = [
    "NaN", "Infinity", "-Infinity", "1e999999", "9" * 100_000, DEEP, '{"a":' * 3000 + "1" + "}" * 3000, '"\\ud800"',
    "[" * 50_000, "{", '"', "01", "0x10", "'x'", "nul",
]  # fmt: skip
MARK = "@@here@@"


def of_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flipped bits, cuts, copies, zeros and noise, mostly near the beginning, where headers are."""
    changed = bytearray(content)
    if not changed:
        return b"\0"
    kind = chance.choice(["flip", "flip", "flip", "set", "cut", "drop", "repeat", "insert", "zero", "number", "append"])
    size = len(changed)
    place = min(size - 1, chance.choice([chance.randrange(size), chance.randrange(min(size, 200)), int(size * 0.98)]))
    length = chance.choice([1, 2, 8, 64, 1000])
    if kind == "flip":
        for _ in range(chance.choice([1, 1, 2, 8])):
            at = chance.randrange(size) if chance.random() < 0.5 else chance.randrange(min(size, 400))
            changed[at] ^= 1 << chance.randrange(8)
    elif kind == "set":
        changed[place] = chance.choice([0, 1, 127, 128, 255, 0x5B, 0x7B, 0x22])
    elif kind == "cut":
        del changed[place:]
    elif kind == "drop":
        del changed[place : place + length]
    elif kind == "repeat":
        changed[place:place] = changed[place : place + length] * chance.choice([1, 2, 50])
    elif kind == "insert":
        changed[place:place] = chance.randbytes(length)
    elif kind == "zero":
        changed[place : place + length] = bytes(min(length, size - place))
    elif kind == "number":
        changed[place : place + 8] = struct.pack("<Q", chance.choice([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]))
    else:
        changed += chance.randbytes(length)
    return bytes(changed)


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in _places(child, (*path, key)))]


def of_value(value: Any, chance: random.Random) -> str:
    """A JSON text with one or two places changed: another value, none, a copy under another key, or broken text."""
    value = copy.deepcopy(value)
    raw = None
    for _ in range(chance.choice([1, 1, 1, 2])):
        place = chance.choice(_places(value))
        if not place:
            if chance.random() < 0.1:
                value = chance.choice(VALUES)
            continue
        parent = value
        for key in place[:-1]:
            parent = parent[key]
        kind = chance.choice(["value", "value", "value", "remove", "add", "rename", "raw"])
        if kind == "value":
            parent[place[-1]] = copy.deepcopy(chance.choice(VALUES))
        elif kind == "remove":
            del parent[place[-1]]
        elif kind == "add" and isinstance(parent, dict):
            parent[chance.choice(["", "x", "\x1b[31m", "k" * 5000, "é"])] = chance.choice(VALUES)
        elif kind == "rename" and isinstance(parent, dict):
            parent[chance.choice(["X", str(place[-1]) + " ", "../x", "a\0b"])] = parent.pop(place[-1])
        elif kind == "raw":
            parent[place[-1]], raw = MARK, chance.choice(RAW)
    try:
        text = json.dumps(value)
    except (ValueError, RecursionError):
        text = "[" * 5000
    return text.replace(json.dumps(MARK), raw) if raw is not None else text


def of_json(content: bytes, chance: random.Random) -> bytes:
    """A document of JSON, mostly with other values, sometimes in another encoding or with other bytes."""
    kind = chance.random()
    if kind < 0.2:
        return of_bytes(content, chance)
    text = of_value(json.loads(content), chance)
    if kind < 0.23:
        return text.encode("utf-16")
    return (b"\xef\xbb\xbf" if kind < 0.26 else b"") + text.encode("utf-8", "surrogatepass")


def of_lines(content: bytes, chance: random.Random) -> bytes:
    """A document of JSON lines."""
    lines = content.split(b"\n")
    at = chance.randrange(len(lines))
    lines[at] = of_json(lines[at] or b"{}", chance) if chance.random() < 0.8 else of_bytes(lines[at], chance)
    return b"\n".join(lines)


def of_table(content: bytes, chance: random.Random) -> bytes:
    """A table with a header (CSV): its bytes, or cells, rows and quotation marks of it."""
    if chance.random() < 0.3:
        return of_bytes(content, chance)
    sign = "\t" if b"\t" in content else ","
    rows = [line.split(sign) for line in content.decode().split("\n")]
    at = chance.choice([0, chance.randrange(len(rows))])
    cell = chance.randrange(len(rows[at]))
    kind = chance.choice(["value", "value", "raw", "quote", "fewer", "more", "twice", "end"])
    if kind in ("value", "raw"):
        value = chance.choice(RAW) if kind == "raw" else str(chance.choice(VALUES))
        rows[at][cell] = chance.choice([value, '"' + value.replace('"', '""') + '"'])
    elif kind == "quote":
        rows[at][cell] = chance.choice(['"', '"x', 'x"y', '"a"b"', '"\n\n', '""', "\r", "\0"])
    elif kind == "fewer":
        del rows[at][cell]
    elif kind == "more":
        rows[at] += ["x"] * chance.choice([1, 1000, 100_000])
    elif kind == "twice":
        rows[at][cell] = chance.choice(rows[at])
    else:
        rows[at][-1] += chance.choice(["\r", "\r\n", "\n" * 5000, "\x0b", "\u2028", "\x1a"])
    return "\n".join(sign.join(row) for row in rows).encode("utf-8", "surrogatepass")


SIGNS = [
    *"+-*@[](){}:,.'\"\\0123456789 \t\n", *("1e999", "nan", "0*", "1e-320", "--", "(" * 3000, "warm+" * 3000),
    *("ablate(", "clamp(", "rotate(", "@response", "@first:", "@last:9", "@prompt", "@first:" + "9" * 5000),
    *("[0-999999999]", "[9-1]", "'", "\u202e", "\x1b[31m", "é", "😀", "x" * 10_000, "\ud800", "\0"),
]  # fmt: skip


def of_expression(content: bytes, chance: random.Random) -> bytes:
    """An expression: signs put in, taken out and exchanged, and parts of it repeated."""
    if chance.random() < 0.1:
        return of_bytes(content, chance)
    text = content.decode()
    for _ in range(chance.choice([1, 1, 2, 5])):
        at, length = chance.randrange(len(text) + 1), chance.choice([0, 0, 1, 3, 10])
        sign = chance.choice([*SIGNS, text[at : at + 20], ""])
        text = text[:at] + sign + text[at + length :]
    return text.encode("utf-8", "surrogatepass")


def of_yaml(content: bytes, chance: random.Random) -> bytes:
    """A document of YAML: other values, or constructs of YAML that JSON does not have."""
    import yaml

    kind = chance.random()
    if kind < 0.25:
        return of_bytes(content, chance)
    if kind < 0.4:
        line = chance.choice([
            "x: &a [*a]", "x: !!python/object/apply:os.system [ls]", "<<: {models: 5}", "? [a]\n: b",
            "x: !!binary aGVs",
            "x: " + "[" * 200, "a: &a [1,1]\nb: &b [*a,*a]\n" + "".join(f"c{i}: &c{i} [*{'b' if i == 0 else f'c{i-1}'}"
            f",*{'b' if i == 0 else f'c{i-1}'}]\n" for i in range(40)), "\tx: 1", "x: 2024-13-45", "- 1", "x: 1e999999",
            "%YAML 9.9", "---\n---", "x: |\n" + " y\n" * 2000, "base: 1:30:00", "method: ~",
        ])  # fmt: skip
        lines = content.decode().split("\n")
        lines.insert(chance.randrange(len(lines)), line)
        return "\n".join(lines).encode()
    text = of_value(yaml.safe_load(content), chance)
    if chance.random() < 0.5:
        return text.encode("utf-8", "surrogatepass")
    try:
        return yaml.safe_dump(json.loads(text)).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError, yaml.YAMLError):
        return text.encode("utf-8", "surrogatepass")


def of_safetensors(content: bytes, chance: random.Random) -> bytes:
    """A safetensors file: its bytes, its header, or our metadata in it, mostly with the checksum right again."""
    if chance.random() < 0.35:
        return of_bytes(content, chance)
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    strings = header.get("__metadata__") or {}
    if "steer" in strings and chance.random() < 0.7:
        text = of_value(json.loads(strings["steer"]), chance)
        strings["steer"] = _with_checksum(text, header, data)
        if chance.random() < 0.05:
            header["__metadata__"] = chance.choice(
                [[], 5, "x", {"steer": 5}, {"steer": None}, {"x" * 10**5: "y" * 10**6}]
            )
        text = json.dumps(header)
    elif chance.random() < 0.5:
        names = [name for name in header if name != "__metadata__"]
        if names:
            entry = header[chance.choice(names)]
            field = chance.choice(["dtype", "shape", "data_offsets"])
            entry[field] = copy.deepcopy(
                chance.choice(["I32", "F64", "U64", "BOOL", "F16", "BF16", "X"] if field == "dtype" else
                              [[0, 4], [4, 0], [-4, 4], [0, 2**63], [0, 10**30],
                               [1.5, 2], ["0", "4"], [], [3] * 100, [2**62, 4], None])
            )  # fmt: skip
        text = json.dumps(header)
    else:
        text = of_value(header, chance)
    encoded = text.encode("utf-8", "surrogatepass")
    stated = chance.choice([len(encoded)] * 12 + [0, len(encoded) + 1, 2**62])
    return struct.pack("<Q", stated) + encoded + data


def _with_checksum(text: str, header: Any, data: bytes) -> str:
    """The metadata with the checksum that its writer would give it, where it can be computed."""
    from vectors.storage.files import canonical_json, digest_bytes

    try:
        metadata = json.loads(text)
        if not isinstance(metadata, dict):
            return text
        rest = canonical_json({key: value for key, value in metadata.items() if key != "checksum"})
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        parts = {name: data[slice(*entry["data_offsets"])] for name, entry in entries.items()}
        if metadata.get("kind") == "task-vector":
            lines = [
                f"{name} {entries[name]['dtype']} {entries[name]['shape']} {digest_bytes(parts[name])}"
                for name in sorted(entries)
            ]
            metadata["checksum"] = digest_bytes("\n".join([rest, *lines]).encode())
        else:
            torch_names = {"F32": "torch.float32", "BF16": "torch.bfloat16", "F16": "torch.float16"}
            pieces = [rest.encode()]
            for name in sorted(entries):
                dtype = torch_names.get(entries[name]["dtype"], "torch.float32")
                pieces += [f"{name} {dtype} {entries[name]['shape']}".encode(), parts[name]]
            metadata["checksum"] = digest_bytes(*pieces)
        return json.dumps(metadata)
    except (ValueError, TypeError, RecursionError, KeyError):
        return text


def of_zip(content: bytes, chance: random.Random) -> bytes:
    """A zip of torch.save: its bytes, or the archive written again with one entry changed and right checksums."""
    if chance.random() < 0.3 or not content.startswith(b"PK"):
        return of_bytes(content, chance)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = [(entry.filename, archive.read(entry)) for entry in archive.infolist()]
    at = chance.choice([0, 0, 0, chance.randrange(len(entries))])
    name, data = entries[at]
    kind = chance.choice(["bytes"] * 5 + ["remove", "rename", "empty", "twice", "compress", "pickle"])
    if kind == "bytes":
        entries[at] = (name, of_bytes(data, chance))
    elif kind == "remove":
        del entries[at]
    elif kind == "rename":
        entries[at] = (chance.choice(["../x", "/x", "x/data.pkl/y", "data.pkl", "é" * 100, name + "\n"]), data)
    elif kind == "empty":
        entries[at] = (name, b"")
    elif kind == "pickle":
        entries[at] = (name, chance.choice(PICKLES))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED if kind == "compress" else zipfile.ZIP_STORED) as archive:
        for name, data in entries:
            archive.writestr(zipfile.ZipInfo(name), data)
        if kind == "twice":
            archive.writestr(zipfile.ZipInfo(entries[0][0]), of_bytes(entries[0][1], chance))
    written = bytearray(packed.getvalue())
    if chance.random() < 0.1:  # a directory that lies
        end = written.rfind(b"PK\x01\x02")
        written[end + 16 + chance.randrange(28)] ^= 1 << chance.randrange(8)
    return bytes(written)


PICKLES = [
    b"\x80\x02cbuiltins\nbytearray\n\x8a\x06\0\0\0\0\0\x10\x85R.",  # a terabyte of zeros
    b"\x80\x02cos\nsystem\nX\x04\0\0\0true\x85R.",
    b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
    b"\x80\x02}q\x00" + b"".join(b"(" + b"K\x01" * 20 + b"t" for _ in range(5000)) + b".",
    b"\x80\x02" + b"(" * 100_000 + b".",
    b"\x80\x02]q\x00" + b"]h\x00a" * 30_000 + b".",
    b"\x80\x02}(" + b"".join(
        b"\x8a\x0a" + (k * (2**61 - 1)).to_bytes(10, "little") + b"N" for k in range(1, 20_000)
    ) + b"u.",  # keys with one hash
    b"\x80\x02N\x85q\x00" + b"h\x00h\x00\x86q\x00" * 20_000 + b"}h\x00Ns.",  # a tuple of 2^20000 parts as a key
    b"\x80\x04\x95" + b"\xff" * 8 + b".",
    b"\x80\x02X\xff\xff\xff\x7fabc.",
    b"\x80\x02\x8b\xff\xff\xff\x7fabc.",
    b"L" + b"9" * 1_000_000 + b"L\n.",
    b"I" + b"9" * 1_000_000 + b"\n.",
]  # fmt: skip


def of_gguf(content: bytes, chance: random.Random) -> bytes:
    """A GGUF file: its bytes, or a count, length or type in its header."""
    if chance.random() < 0.6:
        return of_bytes(content, chance)
    changed = bytearray(content)
    place = chance.choice([4, 8, 16, chance.randrange(24, min(len(changed) - 8, 600))])
    form = chance.choice(["<I", "<Q"])
    number = chance.choice([0, 1, 2, 7, 8, 9, 13, 255, 2**16, 2**31, 2**32 - 1])
    changed[place : place + struct.calcsize(form)] = struct.pack(form, number)
    return bytes(changed)


BY_FORM = {
    "json": of_json, "lines": of_lines, "table": of_table, "expression": of_expression,
    "yaml": of_yaml, "safetensors": of_safetensors, "zip": of_zip, "gguf": of_gguf, "bytes": of_bytes,
}  # fmt: skip
