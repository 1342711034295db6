"""Behavior of sim/traces/readers/files.py: packings, encodings, line ends, limits, and what is no regular file."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sim.errors import TraceError
from sim.traces.readers.files import TraceFile, read_content
from sim.traces.readers.native import read_trace

ROWS = "arrival_s,prompt_tokens,output_tokens\n0,10,5\n1.5,20,6\n"
ARRIVALS = [0.0, 1.5]


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


PACKERS = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zstd": zstd}


def file_of(tmp_path, content, name="trace.csv"):
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("name", ["trace.csv", "trace.gz", "trace.csv.zst", "trace"])
@pytest.mark.parametrize("packing", PACKERS)
def test_the_first_bytes_not_the_suffix_say_how_a_file_is_packed(tmp_path, packing, name):
    path = file_of(tmp_path, PACKERS[packing](ROWS.encode()), name)
    assert read_trace(path).arrival_s.tolist() == ARRIVALS


@pytest.mark.parametrize("packing", PACKERS)
def test_a_packed_file_may_have_several_parts(tmp_path, packing):
    pack = PACKERS[packing]
    first, second = ROWS[:30].encode(), ROWS[30:].encode()
    assert read_trace(file_of(tmp_path, pack(first) + pack(second))).arrival_s.tolist() == ARRIVALS


@given(
    text=st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"]), max_size=300),
    times=st.sampled_from([1, 9, 9000]),
    packing=st.sampled_from(sorted(PACKERS)),
    parts=st.integers(1, 3),
)
def test_packed_text_comes_back_as_it_was(tmp_path_factory, text, times, packing, parts):
    content = ("line," + text).encode() * times
    path = file_of(tmp_path_factory.getbasetemp(), PACKERS[packing](content) * parts, "any.bin")
    assert read_content(TraceFile(path=path)) == content * parts


@given(content=st.binary(max_size=300), packing=st.sampled_from(["", *sorted(PACKERS)]), cut=st.integers(0, 400))
def test_any_bytes_are_read_or_give_one_line_of_error(tmp_path_factory, content, packing, cut):
    packed = PACKERS[packing](content)[:cut] if packing else content
    path = file_of(tmp_path_factory.getbasetemp(), packed, "any.bin")
    for on_bad_row in ("error", "skip"):
        try:
            read_content(TraceFile(path=path, on_bad_row=on_bad_row))
        except TraceError as error:
            assert len(str(error).splitlines()) == 1  # noqa: PT017


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("cut", [12, -3])
def test_a_truncated_packed_file_is_named_as_broken(tmp_path, packing, cut):
    packed = PACKERS[packing]((ROWS * 50).encode())
    with pytest.raises(TraceError, match=f"broken {packing} file"):
        read_trace(file_of(tmp_path, packed[:cut]))


@pytest.mark.parametrize("packing", PACKERS)
def test_a_small_file_that_unpacks_to_gigabytes_is_refused_early_and_names_the_key(tmp_path, packing):
    path = file_of(tmp_path, PACKERS[packing](b"0" * 2**23))
    with pytest.raises(TraceError, match=r"larger than the limit of 1 MiB.*raise trace\.max_bytes"):
        read_trace(path, max_bytes=2**20)


def test_more_rows_than_the_limit_are_refused_and_the_key_is_named(tmp_path):
    for name, content in (
        ("a.csv", ROWS),
        ("a.jsonl", '{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}\n' * 2),
        ("a.json", '[{"arrival_s": 0, "prompt_tokens": 1, "output_tokens": 1}]'),
    ):
        with pytest.raises(TraceError, match=r"more than the limit of 1; .*raise trace\.max_rows"):
            read_trace(file_of(tmp_path, content.encode(), name), max_rows=1)


@pytest.mark.parametrize(
    ("limit", "value"), [("max_rows", 0), ("max_rows", 1.5), ("max_bytes", -1), ("max_bytes", True)]
)
def test_a_limit_is_a_whole_number_from_1(tmp_path, limit, value):
    with pytest.raises(TraceError, match=rf"trace\.{limit} is .*whole number from 1"):
        read_trace(file_of(tmp_path, ROWS.encode()), **{limit: value})


def test_archives_are_named(tmp_path):
    zipped, tarred = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("trace.csv", ROWS)
    with tarfile.open(fileobj=tarred, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("trace.csv"))
    for content, what in (
        (zipped.getvalue(), "a zip archive"),
        (tarred.getvalue(), "a tar archive"),
        (gzip.compress(tarred.getvalue()), "a tar archive"),
        (gzip.compress(zstd(ROWS.encode())), "a gzip file that holds a zstd file"),
    ):
        with pytest.raises(TraceError, match=what):
            read_trace(file_of(tmp_path, content))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_byte_order_mark_gives_the_encoding(tmp_path, encoding):
    mark = "\ufeff" if encoding.endswith("e") else ""
    content = (mark + ROWS).encode(encoding)
    assert read_trace(file_of(tmp_path, content)).arrival_s.tolist() == ARRIVALS
    assert read_trace(file_of(tmp_path, gzip.compress(content))).arrival_s.tolist() == ARRIVALS


def test_utf16_that_is_cut_within_a_character_is_named(tmp_path):
    with pytest.raises(TraceError, match="not UTF-16-LE"):
        read_trace(file_of(tmp_path, ROWS.encode("utf-16")[:-1]))


@pytest.mark.parametrize("ends", [("\r",), ("\r\n",), ("\r", "\n"), ("\r\n", "\r", "\n")])
def test_cr_lf_crlf_and_mixed_line_ends_are_line_ends(tmp_path, ends):
    lines = ROWS.splitlines()
    text = "".join(line + ends[i % len(ends)] for i, line in enumerate(lines))
    assert read_trace(file_of(tmp_path, text.encode())).arrival_s.tolist() == ARRIVALS
    bad = text.replace("1.5", "x")
    with pytest.raises(TraceError, match="line 3, column 'arrival_s'"):
        read_trace(file_of(tmp_path, bad.encode()))


def test_a_crlf_between_two_pieces_is_one_line_end(tmp_path):
    header, row = b"arrival_s,prompt_tokens,output_tokens\r\n", b"0,10,5\r\n"
    content = header + row * ((2**20 - len(header)) // len(row) - 1)
    content += b"0,10,5" + b" " * (2**20 - len(content) - 7) + b"\r\n" + row
    assert content[2**20 - 1 : 2**20 + 1] == b"\r\n"  # files are read in pieces of 2**20 bytes
    assert len(read_trace(file_of(tmp_path, content))) == content.count(b"\n") - 1


def test_a_nul_byte_is_named_with_its_line_or_costs_only_its_row(tmp_path):
    path = file_of(tmp_path, ROWS.encode() + b"2.0,\x00,1\n3.0,1,1\n")
    with pytest.raises(TraceError, match="line 4: a NUL byte"):
        read_trace(path)
    assert read_trace(path, on_bad_row="skip").arrival_s.tolist() == [0.0, 1.5, 3.0]


def test_what_is_no_regular_file_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for path, what in (
        (tmp_path, "a directory"),
        (tmp_path / "pipe", "a pipe"),
        ("/dev/zero", "a device"),
        (tmp_path / "dangling", "a link to a file that does not exist"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        ("~no_such_user/x", "cannot be read"),
        ("", r"trace\.path is ''"),
        (7, r"trace\.path is 7"),
    ):
        with pytest.raises(TraceError, match=what):
            read_trace(path)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path):
    path = file_of(tmp_path, ROWS.encode())
    path.chmod(0)
    with pytest.raises(TraceError, match="Permission denied"):
        read_trace(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"\xef\xbb\xbf\n", gzip.compress(b"", mtime=0), b"\r\r\n"])
def test_a_file_without_content_is_empty(tmp_path, content):
    with pytest.raises(TraceError, match="is empty"):
        read_trace(file_of(tmp_path, content))


def test_skipped_bytes_do_not_make_a_file_larger(tmp_path):
    path = file_of(tmp_path, ROWS.encode() + b"\xff\x00" * 1000 + b"\n2.0,1,1\n")
    content = read_content(TraceFile(path=path, on_bad_row="skip"))
    assert len(content) == len(path.read_bytes())
    assert read_trace(path, on_bad_row="skip").arrival_s.tolist() == [0.0, 1.5, 2.0]


def test_lists_of_too_many_values_are_refused_in_json_and_parquet(tmp_path):
    row = {"arrival_s": 0.0, "prompt_tokens": 1, "output_tokens": 1, "hash_ids": list(range(50))}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "t.parquet")
    for path in (tmp_path / "t.parquet", file_of(tmp_path, json.dumps(row).encode(), "t.jsonl")):
        with pytest.raises(TraceError, match=r"lists of over 40 values together.*raise trace\.max_rows"):
            read_trace(path, max_rows=10)
        assert len(read_trace(path, max_rows=13)) == 1


def test_a_parquet_file_is_refused_by_its_footer_and_by_what_its_texts_expand_to(tmp_path):
    ones = pa.array(np.ones(1000, dtype=np.int64))
    long = pa.DictionaryArray.from_arrays(pa.array(np.zeros(1000, dtype=np.int32)), pa.array(["7" * 10_000]))
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"arrival_s": long, "prompt_tokens": ones, "output_tokens": ones}), path)
    assert path.stat().st_size < 2**17
    with pytest.raises(TraceError, match=r"1,000 rows, more than the limit of 999"):
        read_trace(path, max_rows=999)
    with pytest.raises(TraceError, match=r"'arrival_s' is larger than the limit of 1 MiB"):
        read_trace(path, max_bytes=2**20)
    with pytest.raises(TraceError, match="row 1, column 'arrival_s': "):
        read_trace(path)
