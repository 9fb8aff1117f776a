"""Malformed files: a corpus, and fuzzing against the official library, through every door.

Whatever the reference refuses we refuse, with a reason; what we refuse beyond that is listed.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from models import write_tensors
from safetensors import SafetensorError, safe_open

from ckptools.checkpoint import read_header
from ckptools.cli import run
from ckptools.errors import InvalidFileError
from ckptools.soundness import verify_source
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
    ("XML error", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML document"),
    ("zip pickle", zip_pickle(), "zip archive.*pickle"),
    ("raw pickle", pickle.dumps({"state_dict": list(range(50))}, 2), "Python pickle"),
    ("raw pickle, protocol 4", pickle.dumps({"a": list(range(50))}, 4), "Python pickle"),
    ("GGUF", b"GGUF\x03\x00\x00\x00" + bytes(64), "GGUF"),
    ("gzip", gzip.compress(built({"a": entry()}, bytes(4)), mtime=0), "gzip"),
    ("zeros", bytes(4096), "zeros only"),
    ("JSON index", json.dumps({"weight_map": {"a": "b"}}, indent=2).encode(), "a JSON file"),
    ("JSON array", b'[1, 2, 3, "four", "five"]', "a JSON file"),
    ("short JSON", b"{}", "too small|a JSON file"),
    ("other text", b"hello, this is a readme of a model", "a text file.*'hello, this is a readme"),
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


# --- `verify`, which is stricter still -----------------------------------------------------------

# Legal oddities that no tool should write: the code of the problem that `verify` reports.
STRICT_PROBLEMS = {"empty name": "empty-name", "control characters in a name": "control-character"}
# Those that a reader is told of.
STRICT_WARNINGS = {
    "no tensors": "no-tensors", "only metadata": "no-tensors", "null metadata": "header",
    "unknown field": "header", "unknown number": "header", "header not aligned": "misaligned",
}  # fmt: skip
OTHER_FORMATS = {"zip pickle", "raw pickle", "raw pickle, protocol 4"}


@pytest.mark.parametrize(("name", "content", "words"), MALFORMED, ids=[row[0] for row in MALFORMED])
def test_verify_reports_a_malformed_file_instead_of_failing(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)

    found = verify_source(path, deep=True)

    assert not found.valid
    (problem,) = found.problems
    if name not in OTHER_FORMATS:
        assert problem.code == "invalid-file"
        assert re.search(words, problem.message)


@pytest.mark.parametrize(
    ("name", "content"), [row[:2] for row in ODDITIES], ids=[row[0] for row in ODDITIES]
)
def test_verify_judges_legal_oddities(tmp_path: Path, name: str, content: bytes) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)

    found = verify_source(path)

    assert [problem.code for problem in found.problems] == [
        code for odd, code in STRICT_PROBLEMS.items() if odd == name
    ]
    warned = {warning.code for warning in found.warnings} - {"misaligned"}
    told = STRICT_WARNINGS.get(name)
    assert warned == ({told} - {"misaligned"} if told else set())
    if told == "misaligned":
        assert "misaligned" in {warning.code for warning in found.warnings}


def test_every_strict_rule_has_its_oddity() -> None:
    assert {row[0] for row in ODDITIES} >= STRICT_PROBLEMS.keys() | STRICT_WARNINGS.keys()


def test_the_command_line_says_invalid_for_the_whole_corpus_in_little_memory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = []
    for number, (_, content, _) in enumerate(MALFORMED):
        paths.append(tmp_path / f"{number}.safetensors")
        paths[-1].write_bytes(content)
    run(["verify", "--help"])  # imports are not what is measured
    capsys.readouterr()
    tracemalloc.start()
    try:
        code = run(["verify", "--json", "--deep", *map(str, paths)])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    document = json.loads(capsys.readouterr().out)
    assert code in (1, 3)  # 3 where a pickle is refused as unsafe
    assert [source["valid"] for source in document["sources"]] == [False] * len(MALFORMED)
    assert len({problem["path"] for problem in document["problems"]}) == len(MALFORMED)
    assert peak < 60_000_000


@pytest.mark.parametrize("length", [2**20, 99_999_999])
def test_a_header_of_junk_is_refused_without_growing(tmp_path: Path, length: int) -> None:
    path = tmp_path / "m.safetensors"
    with path.open("wb") as stream:  # sparse: zeros to the end
        stream.write(length.to_bytes(8, "little") + b"{")
        stream.truncate(8 + length)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFileError, match="not JSON"):
            read_header(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 4 * length + 4_000_000


@FUZZ
@given(content=st.binary(max_size=200), start=st.sampled_from([b"", *[s[:30] for s in SEEDS]]))
def test_arbitrary_bytes_are_judged_as_the_reference_does(
    tmp_path: Path, content: bytes, start: bytes
) -> None:
    judged(tmp_path / "m.safetensors", start + content)
