"""Reading checkpoints: the strict header reader against the official one, shards, and reads."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import re
import stat
import threading
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import model_values, shrunk, write_tensors
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ckptools import checkpoint as checkpoint_module
from ckptools.checkpoint import (
    Checkpoint,
    Descriptor,
    Extent,
    Identity,
    SourceFile,
    Tensors,
    read_header,
)
from ckptools.errors import InputError, InvalidFileError, UnsafeError
from ckptools.sources import open_checkpoint
from ckptools.tensors import DTYPES, TensorSpec

ORACLE_VERSION = tuple(map(int, safetensors.__version__.split(".")[:2]))
Json = dict[str, object]


# --- building files by hand ----------------------------------------------------------------------


def framed(header: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of a header's bytes and data; `length` lies about the header's length."""
    claimed = len(header) if length is None else length
    return claimed.to_bytes(8, "little") + header + data


def entry(
    start: int = 0, end: int = 4, dtype: object = "F32", shape: object = (1,), **more: object
) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end], **more}


def built(document: object, data: bytes = b"", tail: bytes = b"") -> bytes:
    return framed(json.dumps(document).encode() + tail, data)


def text(header: str, nbytes: int = 4) -> bytes:
    return framed(header.encode(), bytes(nbytes))


A = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
B = '"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}'


def zip_pickle() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"a": 1}))
    return stream.getvalue()


def one_of(**change: object) -> bytes:
    """One F32 tensor "a" of one value, with some fields changed."""
    return built({"a": entry() | change}, bytes(4))


def two(first: tuple[int, int], second: tuple[int, int], nbytes: int) -> bytes:
    def sized(start: int, end: int) -> Json:
        return entry(start, end, "U8", [max(end - start, 0)])

    return built({"a": sized(*first), "b": sized(*second)}, bytes(nbytes))


LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)

# What is wrong, the file, the words of the message that name it
MALFORMED: list[tuple[str, bytes, str]] = [
    ("empty", b"", "the file is empty"),
    ("1 byte", b"\x02", "only 1 bytes, too small"),
    ("7 bytes", b"\x02" + bytes(6), "too small for a header"),
    ("length 0", bytes(8), "zeros only"),
    ("length 0 with data", bytes(8) + b"{}rest", "header is empty"),
    ("header longer than the file", framed(b"{}", length=3), "truncated inside the header"),
    ("cut in the header", built({"a": entry()}, bytes(4))[:40], "truncated inside the header"),
    ("length 100 MB + 1", framed(b"{}", length=100_000_001), "100,000,001 bytes"),
    ("length 2^63", framed(b"{}", length=2**63), "limit 100 MB"),
    ("length 2^64 - 1", framed(b"{}", length=2**64 - 1), "limit 100 MB"),
    ("LFS pointer", LFS, "Git LFS pointer.*4d7a214614ab.*12,345 bytes"),
    ("LFS pointer, cut", LFS[:60], "Git LFS pointer"),
    ("HTML", b"<!DOCTYPE html><html><body>404</body></html>", "HTML page"),
    ("HTML after a blank line", b"\n  <html lang=en>" + bytes(100), "HTML page"),
    ("XML error", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "HTML page"),
    ("zip pickle", zip_pickle(), "zip archive.*pickle"),
    ("raw pickle", pickle.dumps({"state_dict": list(range(50))}, 2), "Python pickle"),
    ("raw pickle, protocol 4", pickle.dumps({"a": list(range(50))}, 4), "Python pickle"),
    ("GGUF", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    ("gzip", gzip.compress(built({"a": entry()}, bytes(4)), mtime=0), "gzip"),
    ("zeros", bytes(4096), "zeros only"),
    ("JSON index", json.dumps({"weight_map": {"a": "b"}}, indent=2).encode(), "a JSON file"),
    ("JSON array", b'[1, 2, 3, "four", "five"]', "a JSON file"),
    ("short JSON", b"{}", "too small|a JSON file"),
    ("other text", b"hello, this is a readme of a model", "not a safetensors file"),
    ("header is not UTF-8", text("{" + A + "}").replace(b'"a"', b'"\xff"'), "UTF-8 .byte 10"),
    ("header in UTF-16", framed(("{" + A + "}").encode("utf-16-le"), bytes(4)), "header"),
    ("UTF-8 with a mark", framed(b"\xef\xbb\xbf{" + A.encode() + b"}", bytes(4)), "begin with '{'"),
    ("not JSON", text("{a: 1}"), "not JSON.*byte 9"),
    ("JSON cut", text("{" + A), "not JSON"),
    ("two documents", text("{" + A + "}{}"), "not JSON: Extra data"),
    ("trailing NUL", text("{" + A + "}\0\0\0"), "not JSON: Extra data"),
    ("trailing comma", text("{" + A + ",}"), "not JSON"),
    ("single quotes", text("{" + A.replace('"', "'") + "}"), "not JSON"),
    ("comment", text("{" + A + "/* x */}"), "not JSON"),
    ("raw control character", text('{"a\x01":' + A[4:] + "}"), "not JSON"),
    ("array", text("[]", 0), "must begin with '{'|JSON list"),
    ("a string", text('"abc"', 0), "begin with"),
    ("null", text("null", 0), "begin with"),
    ("NaN literal", text('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN"),
    ("Infinity", text('{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,Infinity]}}'), "Infinity"),
    ("-Infinity", text('{"a":{"dtype":"F32","shape":[-Infinity],"data_offsets":[0,4]}}'), "Inf"),
    ("number too large for a float", text("{" + A[:-1] + ',"x":1e999}}'), "unknown field 'x'"),
    ("lone surrogate in a name", text('{"\\ud800":' + A[4:] + "}"), "lone surrogate"),
    ("lone surrogate in metadata", text('{"__metadata__":{"k":"\\udfff"},' + A + "}"), "surrogate"),
    ("lone surrogate in a key", text('{"__metadata__":{"\\udfff":"v"},' + A + "}"), "surrogate"),
    ("nested 200 deep", text('{"a":' + "[" * 200 + "]" * 200 + "}", 0), "'a' is a list"),
    ("shape nested deep", one_of(shape=json.loads("[" * 200 + "]" * 200)), "the shape"),
    ("nested 100,000 deep", text('{"a":' + "[" * 100_000 + "]" * 100_000 + "}", 0), "too deeply"),
    ("objects 100,000 deep", text('{"a":' * 100_000 + "1" + "}" * 100_000, 0), "too deeply"),
    ("duplicate tensor", text("{" + A + "," + A + "}"), "duplicate key 'a'"),
    ("duplicate, other place", text("{" + A + "," + B.replace('"b"', '"a"') + "}", 8), "duplicate"),
    ("duplicate, escaped", text("{" + A + "," + A.replace('"a"', '"\\u0061"') + "}"), "duplicate"),
    ("duplicate metadata", text('{"__metadata__":{},"__metadata__":{},' + A + "}"), "duplicate"),
    ("duplicate metadata key", text('{"__metadata__":{"k":"1","k":"2"},' + A + "}"), "key 'k'"),
    ("duplicate field", text("{" + A[:-1] + ',"dtype":"F32"}}'), "duplicate key 'dtype'"),
    ("metadata is text", built({"__metadata__": "x", "a": entry()}, bytes(4)), "__metadata__.*str"),
    ("metadata is a list", built({"__metadata__": [], "a": entry()}, bytes(4)), "metadata.*list"),
    ("metadata number", built({"__metadata__": {"k": 1}}), "metadata 'k' is a int"),
    ("metadata null", built({"__metadata__": {"k": None}}), "metadata 'k' is a NoneType"),
    ("metadata nested", built({"__metadata__": {"k": {"x": "y"}}}), "metadata 'k' is a dict"),
    ("metadata list", built({"__metadata__": {"k": ["y"]}}), "metadata 'k' is a list"),
    ("entry is a number", built({"a": 1}), "'a' is a int"),
    ("entry is null", built({"a": None}), "'a' is a NoneType"),
    ("no dtype", text('{"a":{"shape":[1],"data_offsets":[0,4]}}'), "no 'dtype'"),
    ("no shape", text('{"a":{"dtype":"F32","data_offsets":[0,4]}}'), "no 'shape'"),
    ("no offsets", text('{"a":{"dtype":"F32","shape":[1]}}'), "no 'data_offsets'"),
    ("empty entry", text('{"a":{}}', 0), "'a' has no"),
    ("unknown dtype", one_of(dtype="F128"), "unknown dtype 'F128'"),
    ("lower-case dtype", one_of(dtype="f32"), "unknown dtype 'f32'"),
    ("empty dtype", one_of(dtype=""), "unknown dtype ''"),
    ("dtype null", one_of(dtype=None), "unknown dtype None"),
    ("dtype number", one_of(dtype=32), "unknown dtype 32"),
    ("dtype object", one_of(dtype={"F32": None}), "unknown dtype"),
    ("shape null", one_of(shape=None), "shape None"),
    ("shape a number", one_of(shape=1), "shape 1"),
    ("shape text", one_of(shape="1"), "shape '1'"),
    ("negative size", one_of(shape=[-1]), "negative number -1"),
    ("two negative sizes", one_of(shape=[-1, -1]), "negative"),
    ("float size", one_of(shape=[1.0]), r"shape \[1.0\]"),
    ("bool size", one_of(shape=[True]), r"shape \[True\]"),
    ("exponent size", text("{" + A.replace("[1]", "[1e0]") + "}"), "shape"),
    ("text size", one_of(shape=["1"]), r"shape \['1'\]"),
    ("null size", one_of(shape=[None]), r"shape \[None\]"),
    ("leading zero", text("{" + A.replace("[1]", "[01]") + "}"), "not JSON"),
    ("minus zero", text("{" + A.replace("[0,", "[-0,") + "}"), "negative"),
    ("size of 2^64", one_of(shape=[2**64]), "does not fit 64 bits"),
    ("size of 5,000 digits", text("{" + A.replace("[1]", f"[1{'0' * 5000}]") + "}"), "64 bits"),
    ("product overflows", one_of(shape=[2**33, 2**33]), "impossible shape"),
    ("overflows before a zero", one_of(shape=[2**40, 2**40, 0]), "impossible shape"),
    ("bits overflow", one_of(dtype="F64", shape=[2**60]), "impossible shape"),
    ("huge but no overflow", one_of(shape=[2**40]), "offsets span 4"),
    ("size too small", one_of(shape=[2]), r"F32 \[2\], 8 bytes.*span 4"),
    ("size too large", one_of(shape=[0]), "0 bytes.*span 4"),
    ("scalar of the wrong size", one_of(shape=[], dtype="F64"), "8 bytes.*span 4"),
    ("F4, odd count", built({"a": entry(0, 1, "F4", [3])}, bytes(1)), "1.5 bytes"),
    ("F6, odd count", built({"a": entry(0, 3, "F6_E2M3", [5])}, bytes(3)), "3.75 bytes"),
    ("offsets null", one_of(data_offsets=None), "offsets None"),
    ("one offset", one_of(data_offsets=[0]), r"offsets \[0\]"),
    ("three offsets", one_of(data_offsets=[0, 4, 8]), r"offsets \[0, 4, 8\]"),
    ("float offset", one_of(data_offsets=[0, 4.0]), r"offsets \[0, 4.0\]"),
    ("bool offset", one_of(data_offsets=[False, 4]), "offsets"),
    ("negative offset", one_of(data_offsets=[-4, 0]), "negative number -4"),
    ("offset of 2^64", one_of(data_offsets=[0, 2**64]), "64 bits"),
    ("reversed offsets", one_of(data_offsets=[4, 0]), "span -4"),
    ("starts late", built({"a": entry(4, 8)}, bytes(8)), "leaves a hole after the start"),
    ("hole", two((0, 4), (8, 12), 12), "'b' at bytes 8 to 12 leaves a hole after 'a'"),
    ("overlap", two((0, 8), (4, 12), 12), "'b' at bytes 4 to 12 overlaps 'a'"),
    ("same bytes twice", two((0, 4), (0, 4), 4), "overlaps"),
    ("inside another", two((0, 12), (4, 8), 12), "'b' at bytes 4 to 8 overlaps 'a'"),
    ("empty tensor inside another", two((0, 8), (4, 4), 8), "'b'.*overlaps 'a'"),
    ("empty tensor past the end", two((0, 4), (9, 9), 4), "leaves a hole"),
    ("data cut", two((0, 4), (4, 12), 9), "truncated: 9 of 12 data bytes.*75.0 %"),
    ("no data", built({"a": entry()}), "truncated: 0 of 4"),
    ("trailing bytes", built({"a": entry()}, bytes(7)), "3 bytes follow the last tensor"),
    ("data without tensors", built({}, bytes(3)), "3 bytes follow"),
    ("an unknown field with a list", one_of(more=[1]), "unknown field 'more'"),
]  # fmt: skip

# What the format's README forbids ("Duplicate keys are disallowed", "MUST begin with a `{`"), and
# what only looks like the format: the reference takes these, we do not.
STRICTER = {
    "duplicate tensor", "duplicate, escaped", "duplicate metadata key", "dtype object",
    "an unknown field with a list", "leading space",
}  # fmt: skip
MALFORMED.append(("leading space", text(" {" + A + "}"), "begin with '{'"))

# Legal, if odd: what it is, the file, the words of the warning if there is one.
ODDITIES: list[tuple[str, bytes, str]] = [
    ("no tensors", built({}), ""),
    ("only metadata", built({"__metadata__": {"k": "v"}}), ""),
    ("null metadata", built({"__metadata__": None, "a": entry()}, bytes(4)), "null"),
    ("scalar", one_of(shape=[]), ""),
    ("eight dimensions", one_of(shape=[1] * 8), ""),
    ("empty tensor", built({"a": entry(0, 0, shape=[0])}), ""),
    ("empty tensor of a great shape", built({"a": entry(0, 0, shape=[0, 2**40])}), ""),
    ("empty tensors between", two((0, 4), (4, 4), 4), ""),
    ("empty tensor first", two((0, 0), (0, 4), 4), ""),
    ("empty name", built({"": entry()}, bytes(4)), ""),
    ("control characters in a name", built({"a\x1b[31m\n": entry()}, bytes(4)), ""),
    ("emoji name", framed(json.dumps({"\U0001f600": entry()}, ensure_ascii=False).encode(),
                          bytes(4)), ""),
    ("escaped emoji", built({"\U0001f600": entry()}, bytes(4)), ""),
    ("padded with spaces", built({"a": entry()}, bytes(4), tail=b" " * 13), ""),
    ("newlines around", framed(b'{\n "a": ' + json.dumps(entry()).encode() + b"}\n", bytes(4)), ""),
    ("header not aligned", built({"abc": entry()}, bytes(4)), ""),
    ("unknown field", one_of(extra="x"), "unknown field 'extra'"),
    ("unknown number", one_of(extra=1.5), "unknown field 'extra'"),
    ("BOOL of 2", built({"a": entry(0, 1, "BOOL", [1])}, b"\x02"), ""),
    ("NaN values", built({"a": entry()}, b"\xff\xff\xff\xff"), ""),
    ("tensors not sorted", two((4, 8), (0, 4), 8), ""),
    ("named like metadata", built({"__metadata": entry()}, bytes(4)), ""),
]  # fmt: skip


# --- the reference -------------------------------------------------------------------------------


Specs = dict[str, tuple[str, tuple[int, ...]]]


def reference(path: Path) -> tuple[Specs, dict[str, str]] | None:
    """What the official library reads from a file's header; None where it refuses it."""
    try:
        with safe_open(str(path), framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            specs = {n: (s.get_dtype(), tuple(s.get_shape())) for n, s in slices.items()}
            return specs, dict(opened.metadata() or {})
    except SafetensorError:
        return None


def ours(path: Path) -> tuple[Specs, dict[str, str]]:
    header = read_header(path)
    specs = {spec.name: (spec.dtype, spec.shape) for spec in header.specs.values()}
    return specs, dict(header.metadata)


@pytest.mark.parametrize(("name", "content", "words"), MALFORMED, ids=[row[0] for row in MALFORMED])
def test_a_malformed_file_is_refused_with_its_fault(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)

    with pytest.raises(InvalidFileError, match=words) as caught:
        read_header(path)

    assert caught.value.where == str(path)
    assert caught.value.fix
    assert "\n" not in caught.value.what
    assert (reference(path) is None) == (name not in STRICTER)


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len({content for _, content, _ in MALFORMED}) == len(MALFORMED) >= 100
    assert {name for name, _, _ in MALFORMED} >= STRICTER


@pytest.mark.parametrize(
    ("content", "warning"), [row[1:] for row in ODDITIES], ids=[row[0] for row in ODDITIES]
)
def test_a_legal_oddity_is_read_as_the_reference_reads_it(
    tmp_path: Path, content: bytes, warning: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)

    header = read_header(path)

    assert ours(path) == reference(path)
    assert len(header.warnings) == bool(warning)
    assert warning in "".join(header.warnings)


def test_warnings_of_one_entry_come_in_a_fixed_order(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(one_of(**{f"k{number}": 1 for number in reversed(range(20))}))

    warnings = read_header(path).warnings

    assert list(warnings) == sorted(f"'a' has an unknown field 'k{number}'" for number in range(20))


def test_a_message_about_a_giant_name_stays_short(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    faults = [
        {"n" * 1_000_000: entry(shape=[5])},
        {"a": entry(shape=[1] * 100_000 + [2])},
        {"a": entry(dtype="D" * 1_000_000)},
        {"__metadata__": {"k" * 1_000_000: 1}},
    ]
    for fault in faults:
        path.write_bytes(built(fault, bytes(4)))

        with pytest.raises(InvalidFileError) as caught:
            read_header(path)

        assert len(str(caught.value)) < 1500 + len(str(path))


# --- every dtype ---------------------------------------------------------------------------------


@pytest.mark.skipif(ORACLE_VERSION < (0, 8), reason="this safetensors knows fewer dtypes")
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_has_the_size_that_the_reference_gives_it(tmp_path: Path, dtype: str) -> None:
    path = tmp_path / "m.safetensors"
    sizes = []
    for nbytes in range(33):  # 4 elements of the right size, and of every other
        path.write_bytes(built({"a": entry(0, nbytes, dtype, [4])}, bytes(nbytes)))
        accepted = reference(path) is not None
        if accepted:
            sizes.append(nbytes)
            assert ours(path) == ({"a": (dtype, (4,))}, {})
        else:
            with pytest.raises(InvalidFileError, match="bytes, but its offsets span"):
                read_header(path)

    assert sizes == [TensorSpec("a", dtype, (4,)).nbytes]


def test_no_dtype_of_torch_is_unknown(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        name: torch.zeros(3, 5, dtype=torch.uint8).to(getattr(torch, row.torch_name))
        for name, row in DTYPES.items()
        if row.torch_name and name != "F8_E8M0"
    }
    tensors["F8_E8M0"] = torch.ones(3, 5).to(torch.float8_e8m0fnu)

    write_tensors(path, tensors)

    assert len(tensors) >= 19
    assert ours(path)[0] == {name: (name, (3, 5)) for name in tensors}


# --- mutations -----------------------------------------------------------------------------------

SEEDS = [content for _, content, _ in ODDITIES] + [
    built(
        {"__metadata__": {"format": "pt", "k": "ü"},
         "a": entry(0, 8, "I64", [1]), "b": entry(8, 14, "F16", [3]),
         "c.weight": entry(14, 18, "U8", [2, 2])},
        bytes(range(18)),
    )
]  # fmt: skip
# What JSON edits put in place of a piece of the header
TOKENS = [
    b"null", b"true", b"-1", b"0", b"1", b"2", b"4", b"1.0", b"1e2", b"18446744073709551616",
    b'"F16"', b'"F4"', b'"x"', b"[]", b"{}", b"[0,4]", b'"dtype"', b'"shape"', b'"__metadata__"',
    b",", b":", b"[", b"]", b"{", b"}", b" ", b"\n", b"\t", b'"', b"\\", b"\\ud800", b"\\u0061",
    b"\x00", b"\x1f", b"\xc3\xa9", b"\xff", b"NaN", b"Infinity", b'"a":', b'"e":"\\udc00",',
]  # fmt: skip


def judged(path: Path, content: bytes) -> None:
    """Our reader never accepts what the reference refuses, reads the same, fails only as it may."""
    path.write_bytes(content)
    expected = reference(path)
    try:
        found = ours(path)
    except InvalidFileError:
        return
    assert expected is not None, "accepted what the reference refuses"
    assert found == expected


FUZZ = settings(max_examples=600, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data(), content=st.sampled_from(SEEDS))
def test_flipped_bytes_are_judged_as_the_reference_does(
    tmp_path: Path, data: st.DataObject, content: bytes
) -> None:
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(changed) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 2))
    judged(tmp_path / "m.safetensors", bytes(changed[: len(changed) - cut]))


@FUZZ
@given(data=st.data(), content=st.sampled_from(SEEDS))
def test_edited_headers_are_judged_as_the_reference_does(
    tmp_path: Path, data: st.DataObject, content: bytes
) -> None:
    """Tokens of the header are replaced, removed and inserted; its length is put right."""
    length = int.from_bytes(content[:8], "little")
    header, rest = content[8 : 8 + length], content[8 + length :]
    tokens = re.findall(rb'"[^"]*"|\d+|.', header, re.DOTALL)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, len(tokens) - 1))
        action = data.draw(st.sampled_from(["replace", "insert", "remove", "copy"]))
        token = data.draw(st.sampled_from(TOKENS))
        if action == "remove":
            new = []
        elif action == "copy":
            new = [tokens[place], tokens[data.draw(st.integers(0, len(tokens) - 1))]]
        else:
            new = [token] if action == "replace" else [tokens[place], token]
        tokens[place : place + 1] = new
        if not tokens:
            break
    judged(tmp_path / "m.safetensors", framed(b"".join(tokens), rest))


@FUZZ
@given(
    names=st.lists(st.text(max_size=6), max_size=6),
    sizes=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    dtypes=st.lists(st.sampled_from(sorted(DTYPES)), min_size=6, max_size=6),
    shift=st.sampled_from([0, 0, 0, 0, 1, -1]),
    order=st.randoms(use_true_random=False),
)
@example(names=["a", "a"], sizes=[1] * 6, dtypes=["F32"] * 6, shift=0, order=None)
def test_built_headers_are_judged_as_the_reference_does(
    tmp_path: Path, names: list[str], sizes: list[int], dtypes: list[str], shift: int, order: object
) -> None:
    """Any names, shapes and dtypes, laid out soundly but for a shift, listed in any order."""
    at, rows = 0, []
    for name, size, dtype in zip(names, sizes, dtypes, strict=False):
        nbytes = size * 4 * DTYPES[dtype].bits // 8
        start = max(at + (shift if rows else 0), 0)
        rows.append((name, entry(start, start + nbytes, dtype, [size, 4])))
        at = start + nbytes
    if order is not None:
        order.shuffle(rows)  # type: ignore[attr-defined]
    header = ",".join(f"{json.dumps(name)}:{json.dumps(value)}" for name, value in rows)
    judged(tmp_path / "m.safetensors", framed(f"{{{header}}}".encode(), bytes(at)))


# --- what a path may be --------------------------------------------------------------------------


def test_a_missing_file_names_those_that_are_there(tmp_path: Path) -> None:
    for name in ("one.safetensors", "two.safetensors", "notes.txt"):
        (tmp_path / name).touch()

    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(tmp_path / "tow.safetensors")

    assert "one.safetensors, two.safetensors" in caught.value.fix
    assert "notes" not in caught.value.fix


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(tmp_path / "modles" / "a.safetensors")

    assert f"{str(tmp_path / 'modles')!r} does not exist either" in caught.value.fix


def test_a_file_where_a_folder_should_be_is_an_input_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    with pytest.raises(InputError, match="cannot be opened: Not a directory"):
        open_checkpoint(tmp_path / "file" / "a.safetensors")


def test_a_path_that_the_system_cannot_have_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be opened: embedded null byte"):
        open_checkpoint(tmp_path / "a\0b.safetensors")
    with pytest.raises(InputError, match="cannot be opened: File name too long"):
        open_checkpoint(tmp_path / ("a" * 300 + ".safetensors"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_an_input_error(tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir()
    path = write_tensors(folder / "a.safetensors", {"a": torch.zeros(1)})
    path.chmod(0)

    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        open_checkpoint(path)
    folder.chmod(0)
    with pytest.raises(InputError, match="cannot be opened: Permission denied"):
        open_checkpoint(path)
    folder.chmod(stat.S_IRWXU)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
def test_a_named_pipe_is_refused_without_waiting_for_it(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)

    with pytest.raises(InputError, match="not a regular file"):
        open_checkpoint(tmp_path / name)


def test_a_folder_with_one_file_stands_for_it(tmp_path: Path) -> None:
    path = write_tensors(tmp_path / "a.safetensors", {"a": torch.zeros(2)})

    with open_checkpoint(tmp_path) as opened:
        assert opened.path == path
        assert list(opened) == ["a"]


def test_a_folder_with_several_files_asks_for_one(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {"a": torch.zeros(2)})

    with pytest.raises(InputError, match="2 candidate files") as caught:
        open_checkpoint(tmp_path)

    assert caught.value.fix == "give one of them: a.safetensors, b.safetensors"


def test_folders_without_a_single_file_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a folder without weights"):
        open_checkpoint(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match="a diffusers folder"):
        open_checkpoint(tmp_path)
    with pytest.raises(InputError, match="not a regular file"):
        read_header(tmp_path)


# --- shards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    folder: Path
    index: Path

    def write_index(self, weight_map: object, **more: object) -> None:
        self.index.write_text(json.dumps({"weight_map": weight_map, **more}))


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    """Two sound shards, 1.safetensors (a, b) and 2.safetensors (c), with their index."""
    write_tensors(tmp_path / "1.safetensors", {"a": torch.ones(3), "b": torch.ones(2).half()})
    write_tensors(tmp_path / "2.safetensors", {"c": torch.full((2, 2), 7.0)}, {"from": "two"})
    found = Shards(tmp_path, tmp_path / "m.safetensors.index.json")
    found.write_index(SOUND, metadata={"total_size": 32})
    return found


SOUND = {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}


@pytest.mark.parametrize("by_folder", [True, False])
def test_shards_are_read_as_one_checkpoint(shards: Shards, *, by_folder: bool) -> None:
    with open_checkpoint(shards.folder if by_folder else shards.index) as opened:
        assert dict(opened) == {
            "a": TensorSpec("a", "F32", (3,)),
            "b": TensorSpec("b", "F16", (2,)),
            "c": TensorSpec("c", "F32", (2, 2)),
        }
        assert opened.read("a") == torch.ones(3).numpy().tobytes()
        assert opened.read("c") == torch.full((2, 2), 7.0).numpy().tobytes()
        assert opened.file_bytes == sum(
            (shards.folder / f"{number}.safetensors").stat().st_size for number in (1, 2)
        )
        assert opened.warnings == ()
        assert re.fullmatch("[0-9a-f]{64}", opened.header_sha256)
        assert opened.header_sha256 not in {file.header.sha256 for file in opened.files}


def test_the_text_entries_of_an_index_are_metadata(shards: Shards) -> None:
    shards.write_index(SOUND, metadata={"total_size": 32, "format": "pt"})

    with open_checkpoint(shards.index) as opened:
        assert dict(opened.metadata) == {"format": "pt"}


def test_a_wrong_total_size_is_a_warning(shards: Shards) -> None:
    shards.write_index(SOUND, metadata={"total_size": 31})

    with open_checkpoint(shards.index) as opened:
        assert opened.warnings == ("the index says 31 bytes, its shards hold 32",)


def test_a_missing_shard_is_named(shards: Shards) -> None:
    (shards.folder / "2.safetensors").unlink()

    with pytest.raises(InputError, match="no such file") as caught:
        open_checkpoint(shards.index)

    assert caught.value.where == str(shards.folder / "2.safetensors")
    assert "1.safetensors" in caught.value.fix


def test_a_broken_shard_is_named(shards: Shards) -> None:
    path = shards.folder / "2.safetensors"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(InvalidFileError, match="truncated: 15 of 16") as caught:
        open_checkpoint(shards.index)

    assert caught.value.where == str(path)


def test_a_tensor_in_two_shards_is_refused(shards: Shards) -> None:
    write_tensors(shards.folder / "2.safetensors", {"a": torch.ones(3), "c": torch.ones(1)})

    with pytest.raises(InvalidFileError, match=r"'a' is in two shards, '1\S+ and '2\."):
        open_checkpoint(shards.index)


def test_a_tensor_that_the_index_does_not_list_is_refused(shards: Shards) -> None:
    shards.write_index({"a": "1.safetensors", "c": "2.safetensors"})

    with pytest.raises(InvalidFileError, match="'b' is in a shard but not in the index"):
        open_checkpoint(shards.index)


def test_a_tensor_in_another_shard_than_listed_is_refused(shards: Shards) -> None:
    shards.write_index(SOUND | {"b": "2.safetensors"})

    with pytest.raises(InvalidFileError, match=r"'b' should be in '2\S+ it is in '1\."):
        open_checkpoint(shards.index)


def test_a_listed_tensor_that_no_shard_has_is_refused(shards: Shards) -> None:
    shards.write_index(SOUND | {"d": "2.safetensors"})

    with pytest.raises(InvalidFileError, match=r"'d' should be in '2\S+ it is in none"):
        open_checkpoint(shards.index)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the index is not JSON"),
        (b"\xff{}", r"the index is not UTF-8 \(byte 0\)"),
        (b"[]", "the index is a JSON list"),
        (b'{"weight_map": {"a": "x", "a": "y"}}', "the index breaks the format: duplicate key"),
        (b"{}", "no `weight_map`"),
        (b'{"weight_map": {}}', "no `weight_map`"),
        (b'{"weight_map": ["a"]}', "no `weight_map`"),
        (b'{"weight_map": {"a": 1}}', "the shard of 'a' is 1, not a file name"),
        (b'{"weight_map": {"a": null}}', "the shard of 'a' is None"),
        (b'{"weight_map": {"a": ["x.safetensors"]}}', "the shard of 'a' is"),
        (b'{"weight_map": {"a": "\\ud800.safetensors"}}', "lone surrogate"),
        (b'{"metadata": {"k": "\\ud800"}, "weight_map": {"a": "1.safetensors"}}', "lone surrogate"),
        (b'{"weight_map": ' + b"[" * 100_000, "the index is nested too deeply"),
    ],
)
def test_a_broken_index_is_refused(shards: Shards, content: bytes, words: str) -> None:
    shards.index.write_bytes(content)

    with pytest.raises(InvalidFileError, match=words):
        open_checkpoint(shards.index)


def test_an_index_of_more_than_100_mb_is_not_read(shards: Shards) -> None:
    with shards.index.open("wb") as stream:
        stream.truncate(100_000_001)  # sparse: takes no room on the disk

    with pytest.raises(InvalidFileError, match="larger than 100 MB"):
        open_checkpoint(shards.index)


TRAVERSALS = [
    "../1.safetensors", "a/../../1.safetensors", "..", "/etc/passwd", "/tmp/x.safetensors",
    "//host/x.safetensors", "..\\1.safetensors", "C:\\x.safetensors", "C:x.safetensors",
    "C:/x.safetensors", "\\\\host\\share\\x.safetensors", "x.safetensors\0.txt", "", ".",
    "x.safetensors/..", "sub/../../../x.safetensors", "x.bin", "x.safetensors.py", "x.SAFETENSORS",
    "file:///x.safetensors", "https://host/x.safetensors", "x.safetensors\0",
    "x.safetensors:stream.safetensors", "./../x.safetensors", "sub/../1.safetensors",
    "~/../../x.safetensors", "x.pkl",
]  # fmt: skip


@pytest.mark.parametrize("shard", TRAVERSALS)
def test_an_index_that_leaves_its_folder_is_unsafe(shards: Shards, shard: str) -> None:
    inner = Shards(shards.folder / "model", shards.folder / "model" / "m.safetensors.index.json")
    inner.folder.mkdir()
    inner.write_index({"a": shard})

    with pytest.raises(UnsafeError, match="points outside its folder") as caught:
        open_checkpoint(inner.index)

    assert caught.value.exit_code == 3
    assert repr(shard) in caught.value.what


def test_a_shard_in_a_folder_below_is_read(shards: Shards) -> None:
    (shards.folder / "sub").mkdir()
    (shards.folder / "2.safetensors").rename(shards.folder / "sub" / "2.safetensors")
    shards.write_index(SOUND | {"c": "sub/2.safetensors"})

    with open_checkpoint(shards.index) as opened:
        assert len(opened) == 3


def linked(source: Path, target: Path) -> None:
    source.parent.mkdir(parents=True, exist_ok=True)
    try:
        source.symlink_to(target)
    except OSError as exc:
        pytest.skip(f"symbolic links are not permitted: {exc}")


def test_a_link_out_of_the_folder_is_unsafe(shards: Shards, tmp_path: Path) -> None:
    inner = tmp_path / "model"
    linked(inner / "1.safetensors", shards.folder / "1.safetensors")
    index = Shards(inner, inner / "m.safetensors.index.json")
    index.write_index({"a": "1.safetensors", "b": "1.safetensors"})

    with pytest.raises(UnsafeError, match="points outside its folder"):
        open_checkpoint(index.index)


def test_a_link_within_the_folder_is_followed(shards: Shards) -> None:
    (shards.folder / "2.safetensors").rename(shards.folder / "other.safetensors")
    linked(shards.folder / "2.safetensors", shards.folder / "other.safetensors")

    with open_checkpoint(shards.index) as opened:
        assert len(opened) == 3


def test_a_link_to_itself_is_refused(shards: Shards) -> None:
    (shards.folder / "2.safetensors").unlink()
    linked(shards.folder / "2.safetensors", shards.folder / "2.safetensors")

    with pytest.raises(InputError, match=r"symbolic link|cannot be opened"):
        open_checkpoint(shards.index)


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_the_hub_cache_may_link_to_its_blobs(shards: Shards, tmp_path: Path, inner: str) -> None:
    """Source: huggingface_hub, "Understand caching": snapshots/<revision>/x -> blobs/<hash>."""
    repository = tmp_path / "models--org--name"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / ("c0ffee" * 6) / inner
    blobs.mkdir(parents=True)
    for number, file in enumerate(("1.safetensors", "2.safetensors", shards.index.name)):
        (shards.folder / file).rename(blobs / f"hash{number}")
        linked(snapshot / file, Path(os.path.relpath(blobs / f"hash{number}", snapshot)))

    with open_checkpoint(snapshot / shards.index.name) as opened:
        assert len(opened) == 3
        assert opened.read("a") == torch.ones(3).numpy().tobytes()


def test_the_hub_cache_may_not_link_elsewhere(shards: Shards, tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = repository / "snapshots" / "c0ffee"
    (repository / "blobs" / "deeper").mkdir(parents=True)
    targets = (shards.folder / "1.safetensors", repository / "blobs" / "deeper" / "x")
    for number, target in enumerate(targets):
        linked(snapshot / f"{number}.safetensors", target)
        index = Shards(snapshot, snapshot / f"{number}.safetensors.index.json")
        index.write_index({"a": f"{number}.safetensors", "b": f"{number}.safetensors"})

        with pytest.raises(UnsafeError):
            open_checkpoint(index.index)


# --- reading bytes -------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A file of mixed dtypes and shapes, and its tensors' bytes by the official library."""
    values = dict(list(model_values(shrunk("sd1"), seed=3).items())[:40])
    values |= {
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "bytes": torch.arange(256, dtype=torch.uint8),
        "brain": torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16(),
    }
    path = write_tensors(tmp_path / "m.safetensors", values)
    official = safetensors.deserialize(path.read_bytes())
    return path, {name: bytes(row["data"]) for name, row in official}


def assert_reads(path: Path, expected: dict[str, bytes]) -> None:
    with open_checkpoint(path) as opened:
        assert opened.keys() == expected.keys()
        for name, data in expected.items():
            assert opened.read(name) == data
            for start, end in (
                (0, 1),
                (len(data) // 2, len(data)),
                (len(data) // 3, len(data) // 2),
            ):
                view = bytearray(len(data[start:end]))
                opened.read_into(name, memoryview(view), start)
                assert view == data[start:end]


def test_reads_at_offsets_equal_the_official_bytes(model: tuple[Path, dict[str, bytes]]) -> None:
    assert_reads(*model)


def test_a_read_past_the_end_of_a_tensor_is_a_mistake_of_ours(
    model: tuple[Path, dict[str, bytes]],
) -> None:
    with open_checkpoint(model[0]) as opened, pytest.raises(ValueError, match="past the end"):
        opened.read_into("bytes", memoryview(bytearray(2)), 255)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no os.preadv")
def test_short_reads_are_continued(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.preadv
    lengths = []

    def short(number: int, views: list[memoryview], offset: int) -> int:
        lengths.append(len(views[0]))
        return whole(number, [views[0][: max(1, len(views[0]) // 3)]], offset)

    monkeypatch.setattr(os, "preadv", short)

    assert_reads(*model)
    assert len(lengths) > 400


def test_systems_without_positional_reads_read_the_same(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)

    assert_reads(*model)


def slow(function: Callable[..., int]) -> Callable[..., int]:
    """The same function, with a pause after it in which other threads run."""

    def wrapped(*arguments: int) -> int:
        result = function(*arguments)
        threading.Event().wait(0.0001)
        return result

    return wrapped


@pytest.mark.parametrize("positional", [True, False])
def test_threads_may_share_a_checkpoint(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch, *, positional: bool
) -> None:
    if not positional:
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.setattr(os, "lseek", slow(os.lseek))
    path, expected = model
    wrong: list[str] = []
    with open_checkpoint(path) as opened:

        def read_all() -> None:
            for _ in range(2):
                wrong.extend(name for name, data in expected.items() if opened.read(name) != data)

        threads = [threading.Thread(target=read_all) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    assert wrong == []


def test_a_file_that_shrinks_while_it_is_read_is_an_input_error(
    model: tuple[Path, dict[str, bytes]],
) -> None:
    path, expected = model
    with open_checkpoint(path) as opened:
        last = max(expected, key=lambda name: opened.files[0].header.starts[name])
        os.truncate(path, path.stat().st_size - 1)

        with pytest.raises(InputError, match="became shorter") as caught:
            opened.read(last)

    assert caught.value.where == str(path)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="no os.preadv")
def test_an_error_of_the_disk_names_the_file(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    path, expected = model
    with open_checkpoint(path) as opened:
        monkeypatch.setattr(os, "preadv", broken)
        for attempt in (lambda: opened.read(next(iter(expected))), lambda: read_header(path)):
            with pytest.raises(InputError, match="cannot be read: Input/output error") as caught:
                attempt()
            assert caught.value.where == str(path)


def touched(path: Path) -> None:
    info = path.stat()
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1_000_000_000))


def replaced(path: Path) -> None:
    info = path.stat()
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes())
    os.utime(copy, ns=(info.st_atime_ns, info.st_mtime_ns))
    copy.replace(path)


def lengthened(path: Path) -> None:
    info = path.stat()
    os.truncate(path, info.st_size + 1)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))


@pytest.mark.parametrize("change", [touched, replaced, lengthened, Path.unlink])
def test_a_file_that_changed_meanwhile_is_noticed(
    model: tuple[Path, dict[str, bytes]], change: Callable[[Path], None]
) -> None:
    path, _ = model
    with open_checkpoint(path) as opened:
        opened.check_unchanged()
        change(path)

        with pytest.raises(InputError, match="changed while it was being read") as caught:
            opened.check_unchanged()

    assert caught.value.where == str(path)


def test_closing_closes_every_descriptor_and_keeps_the_specs(
    model: tuple[Path, dict[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened_numbers: list[int] = []

    class Recorded(Descriptor):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            opened_numbers.append(self.fileno())

    monkeypatch.setattr(checkpoint_module, "Descriptor", Recorded)
    path, expected = model
    with open_checkpoint(path) as opened:
        opened.read("bytes")

    assert len(opened_numbers) == 2  # for the header, and for the values
    assert opened.keys() == expected.keys()
    for number in set(opened_numbers):
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


def test_a_header_beyond_100_mb_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    for length in (100_000_001, 2**40):
        with path.open("wb") as stream:
            stream.write(length.to_bytes(8, "little") + b"{}")
            stream.truncate(length + 8)  # sparse

        tracemalloc.start()
        with pytest.raises(InvalidFileError, match="limit 100 MB"):
            read_header(path)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < 1_000_000


# --- tensors whose elements do not follow one another --------------------------------------------


def laid_out(
    tmp_path: Path, values: torch.Tensor, *extents: Extent, shape: list[int]
) -> Checkpoint:
    """A checkpoint whose tensor "x" lies as the extents say in a file of these values."""
    path = tmp_path / "raw.safetensors"
    save_file({"raw": values}, path)
    header = read_header(path)
    start = header.starts["raw"]
    moved = tuple(replace(extent, start=start + extent.start) for extent in extents)
    spec = TensorSpec("x", header.specs["raw"].dtype, tuple(shape))
    file = SourceFile(path, header, Identity.of(path))
    return Checkpoint(path, [file], tensors=Tensors({"x": spec}, {"x": moved}))


@pytest.mark.parametrize(
    "view",
    [
        lambda values: values.t(),
        lambda values: values[3:, ::2],
        lambda values: values.expand(5, 7, 9).permute(2, 0, 1),
        lambda values: values[0, 0].expand(6),
    ],
    ids=["transposed", "every second column", "expanded and permuted", "one number"],
)
def test_strided_tensors_read_as_torch_sees_them_from_any_element_on(
    tmp_path: Path, view: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    values = torch.arange(63, dtype=torch.float32).view(7, 9)
    seen = view(values)
    strides = tuple(zip(seen.shape, seen.stride(), strict=True))
    extent = Extent(0, 4 * seen.storage_offset(), 4 * seen.numel(), strides)
    expected = seen.contiguous().numpy().tobytes()

    with laid_out(tmp_path, values, extent, shape=list(seen.shape)) as checkpoint:
        assert checkpoint.read("x") == expected
        for begin, end in [(0, 1), (1, 3), (5, seen.numel()), (seen.numel() // 2, seen.numel())]:
            part = bytearray(4 * (end - begin))
            checkpoint.read_into("x", memoryview(part), 4 * begin)
            assert bytes(part) == expected[4 * begin : 4 * end]


def test_a_tensor_may_lie_in_several_runs(tmp_path: Path) -> None:
    values = torch.arange(12, dtype=torch.int16)
    runs = [Extent(0, 16, 8), Extent(0, 0, 4), Extent(0, 8, 6, ((3, 1),))]
    expected = torch.cat([values[8:12], values[:2], values[4:7]]).numpy().tobytes()

    with laid_out(tmp_path, values, *runs, shape=[9]) as checkpoint:
        assert checkpoint.read("x") == expected
        for begin in range(9):
            for end in range(begin, 10):
                part = bytearray(2 * (end - begin))
                checkpoint.read_into("x", memoryview(part), 2 * begin)
                assert bytes(part) == expected[2 * begin : 2 * end]
