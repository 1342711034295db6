"""The content of a data file: unpacked, of bounded size, and text as UTF-8 with LF line ends.

The first bytes decide how a file is packed; its suffix does not matter.
"""

from __future__ import annotations

import bz2
import codecs
import lzma
import os
import stat
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Literal, cast

import pyarrow as pa

from sim.errors import TraceError
from sim.paths import DATA_VARIABLE, data_dir, find_data
from sim.traces.readers.arguments import check_choice, check_whole

OnBadRow = Literal["error", "skip"]

MAX_ROWS = 2_000_000
MAX_BYTES = 256 * 2**20
CHUNK_BYTES = 2**20
XZ_MEMORY_BYTES = 256 * 2**20
"""What unpacking xz may use; ``xz -9`` needs 65 MiB."""
VALUES_PER_ROW = 4
"""A column of lists, such as hash ids, may hold this many values for each row that ``max_rows`` allows."""
PARQUET_MAGIC = b"PAR1"
NOT_TEXT = b"?"
"""What replaces a byte that is no text in a skipped row. It is no digit, and as short as what it replaces."""
ASCII_ONLY = bytes(range(128)) + NOT_TEXT * 128

BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins like that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
OTHER_MAGIC = {
    b"PK\x03\x04": "a zip archive (or an Excel file)",
    b"PK\x05\x06": "an empty zip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"ARROW1": "an Arrow or Feather file",
    b"ORC": "an ORC file",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"PARE": "an encrypted Parquet file",
}
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceFile:
    """A data file as the user named it, and how it is read.

    path: absolute, or relative to the current folder or the data folder (see ``sim.paths.find_data``).
    on_bad_row: "error" reports the first bad row; "skip" leaves out bad rows and counts each kind.
    max_rows, max_bytes: limits on the rows and on the unpacked size, so that a small packed file cannot fill memory.
    origin: the public repository of the file, for the message when it is missing.
    naming: how to state other names of its columns, for the message when one is missing.
    """

    path: str | Path
    on_bad_row: OnBadRow = "error"
    max_rows: int = MAX_ROWS
    max_bytes: int = MAX_BYTES
    origin: str | None = None
    naming: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str | Path) or not str(self.path).strip():
            raise TraceError(f"trace.path is {self.path!r}; it must be the path of a file")
        check_choice("on_bad_row", self.on_bad_row, OnBadRow)
        check_whole("max_rows", self.max_rows)
        check_whole("max_bytes", self.max_bytes)

    def too_many_rows(self, rows: int) -> TraceError:
        """Return the error for a file with more rows than ``max_rows``."""
        return TraceError(
            f"{self.path} has {rows:,} rows, more than the limit of {self.max_rows:,}; "
            f"cut the file, or raise trace.max_rows"
        )

    def check_values(self, values: int) -> None:
        """Raise a TraceError if the lists of a column hold too many values together."""
        if values > VALUES_PER_ROW * self.max_rows:
            raise TraceError(
                f"{self.path} has lists of over {VALUES_PER_ROW * self.max_rows:,} values together, {VALUES_PER_ROW} "
                f"times trace.max_rows={self.max_rows}; cut the file, or raise trace.max_rows"
            )

    def too_large(self, what: str = "its content", limit: int | None = None, *, factor: int = 1) -> TraceError:
        """Return the error for content beyond ``max_bytes``, or beyond a limit that is ``max_bytes / factor``."""
        limit = self.max_bytes // factor if limit is None else limit
        of = "" if factor == 1 else f", 1/{factor} of trace.max_bytes={self.max_bytes}"
        return TraceError(
            f"{self.path}: {what} is larger than the limit of {limit / 2**20:,.4g} MiB{of}; "
            f"cut the file, or raise trace.max_bytes (bytes)"
        )


def missing_data(path: str | Path, origin: str | None) -> TraceError:
    """Return the error for a missing data file: where it was searched, and where to get it."""
    if Path(path).is_symlink():
        return TraceError(f"{path} is a link to a file that does not exist; mend the link, or name another file")
    if origin is None:
        return TraceError(f"{path} does not exist, neither here nor in {data_dir()}; give the path of a trace file")
    return TraceError(
        f"{path} does not exist, neither here nor in {data_dir()}. Published traces are not part of this project: "
        f"get this one from {origin}, put it at that path below a folder of your own and set {DATA_VARIABLE} to "
        "that folder; or use trace=burst, which needs no file"
    )


def read_content(file: TraceFile) -> bytes:
    """Return the unpacked content of a file: Parquet as it is, text as UTF-8 with LF line ends and no byte order mark.

    A byte that is not text (not UTF-8, or NUL) is an error; if bad rows are skipped, it becomes ``?``, which makes only
    its own cell bad.

    Raises:
        TraceError: if the file is missing, no regular file, not readable, empty, damaged, packed in a way that is not
            supported, or larger than ``max_bytes``.
    """
    try:
        with _open_regular(file) as raw:
            content = b"".join(_text(file, _limited(file, _unpacked(file, raw))))
    except OSError as error:
        raise TraceError(f"{file.path} cannot be read: {_reason(error)}; give the path of a readable file") from error
    if not content.strip():
        raise TraceError(f"{file.path} is empty; it needs a header and at least one request")
    return content if content.startswith(PARQUET_MAGIC) else _checked(file, content)


def read_head(file: TraceFile) -> bytes:
    """Return the beginning of the content, one megabyte or so, as ``read_content`` would; bad bytes are replaced."""
    try:
        with _open_regular(file) as raw:
            piece = next(_text(replace(file, on_bad_row="skip"), _unpacked(file, raw)), b"")
    except OSError as error:
        raise TraceError(f"{file.path} cannot be read: {_reason(error)}; give the path of a readable file") from error
    return piece if piece.startswith(PARQUET_MAGIC) else piece.decode(errors="replace").encode()


def _open_regular(file: TraceFile) -> BinaryIO:
    """Open a file for reading; anything that is no regular file is an error and is not waited for."""
    try:
        found = find_data(file.path)
        # Without O_NONBLOCK, opening a FIFO waits for a writer.
        descriptor = os.open(found, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise missing_data(file.path, file.origin) from error
    except (OSError, ValueError, RuntimeError) as error:  # ValueError: a NUL in the path; RuntimeError: ~nosuchuser
        raise TraceError(
            f"{str(file.path)!r} cannot be read: {_reason(error)}; give the path of a readable file"
        ) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise TraceError(f"{file.path} cannot be read: it is {_kind_of_file(mode)}; give the path of a regular file")
    return cast(BinaryIO, os.fdopen(descriptor, "rb"))


def _kind_of_file(mode: int) -> str:
    kinds: tuple[tuple[Callable[[int], bool], str], ...] = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((name for matches, name in kinds if matches(mode)), "a device")


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200]


# --- Packing ---------------------------------------------------------------------------------------------------------


def _gzip_chunks(raw: BinaryIO) -> Iterator[bytes]:
    packed = raw.read(CHUNK_BYTES)
    while packed:  # a file may have several members
        one = zlib.decompressobj(wbits=31)
        while not one.eof:
            chunk = one.decompress(packed, CHUNK_BYTES)
            if not chunk and not packed:
                raise EOFError("the file ends before its end marker")
            yield chunk
            packed = one.unconsumed_tail or (b"" if one.eof else raw.read(CHUNK_BYTES))
        packed = one.unused_data.lstrip(b"\0") or raw.read(CHUNK_BYTES).lstrip(b"\0")


def _bz2_chunks(raw: BinaryIO) -> Iterator[bytes]:
    with bz2.BZ2File(raw) as stream:
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


def _xz_chunks(raw: BinaryIO) -> Iterator[bytes]:
    packed = raw.read(CHUNK_BYTES)
    while packed:
        one = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)
        while not one.eof:
            if one.needs_input and not packed:
                raise EOFError("the file ends before its end marker")
            yield one.decompress(packed, CHUNK_BYTES)
            packed = raw.read(CHUNK_BYTES) if one.needs_input else b""
        packed = (one.unused_data + packed).lstrip(b"\0") or raw.read(CHUNK_BYTES).lstrip(b"\0")


def _zstd_chunks(raw: BinaryIO) -> Iterator[bytes]:
    if not pa.Codec.is_available("zstd"):
        raise TraceError("this pyarrow cannot unpack zstd; unpack the file first (zstd -d)")
    with pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd") as stream:
        yield from iter(lambda: stream.read(CHUNK_BYTES), b"")


@dataclass(frozen=True, slots=True)
class _Packing:
    name: str
    magic: tuple[bytes, ...]
    chunks: Callable[[BinaryIO], Iterator[bytes]]


PACKINGS = (
    _Packing("gzip", (b"\x1f\x8b",), _gzip_chunks),
    _Packing("bz2", (b"BZh",), _bz2_chunks),
    _Packing("xz", (b"\xfd7zXZ\x00",), _xz_chunks),
    # A zstd file may start with a frame that decoders skip.
    _Packing("zstd", (b"\x28\xb5\x2f\xfd", *(bytes([n]) + b"\x2a\x4d\x18" for n in range(0x50, 0x60))), _zstd_chunks),
)


def _packing(head: bytes) -> _Packing | None:
    return next((packing for packing in PACKINGS if head.startswith(packing.magic)), None)


def _unpacked(file: TraceFile, raw: BinaryIO) -> Iterator[bytes]:
    """Yield the unpacked content in pieces; the first is at least as long as any magic."""
    head = raw.read(512)
    raw.seek(0)
    _refuse_other(file, head)
    packing = _packing(head)
    if packing is None:
        yield from iter(lambda: raw.read(CHUNK_BYTES), b"")
        return
    chunks, first = packing.chunks(raw), b""
    try:
        for chunk in chunks:
            if len(first) < 512:
                first += chunk
                if len(first) >= 512:
                    _refuse_nested(file, packing, first)
                    yield first
            else:
                yield chunk
    except (OSError, EOFError, ValueError, MemoryError, lzma.LZMAError, zlib.error) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(
            f"{file.path} is a broken {packing.name} file ({_reason(error)}); it is truncated or damaged: "
            "write or download it again"
        ) from error
    if len(first) < 512:
        _refuse_nested(file, packing, first)
        yield first


def _refuse_nested(file: TraceFile, packing: _Packing, content: bytes) -> None:
    inner = _packing(content)
    if inner is not None:
        raise TraceError(
            f"{file.path} is a {packing.name} file that holds a {inner.name} file; unpack it once and name the result"
        )
    _refuse_other(file, content)


def _refuse_other(file: TraceFile, head: bytes) -> None:
    kind = next((name for magic, name in OTHER_MAGIC.items() if head.startswith(magic)), None)
    if head[TAR_MAGIC_AT:].startswith(TAR_MAGIC):
        kind = "a tar archive"
    if kind is not None:
        raise TraceError(
            f"{file.path} holds {kind}, which is not read; unpack or convert it, and name one CSV, JSON, JSONL or "
            "Parquet file (plain, gzip, bz2, xz or zstd)"
        )


def _limited(file: TraceFile, chunks: Iterator[bytes]) -> Iterator[bytes]:
    total = 0
    for chunk in chunks:
        total += len(chunk)
        if total > file.max_bytes:
            raise file.too_large()
        yield chunk


# --- Text ------------------------------------------------------------------------------------------------------------


def _text(file: TraceFile, chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield text in UTF-8 with LF line ends, or Parquet as it is."""
    first = next(chunks, b"")
    if first.startswith(PARQUET_MAGIC):
        yield first
        yield from chunks
        return
    mark = next((mark for mark in BYTE_ORDER_MARKS if first.startswith(mark)), b"")
    encoding = BYTE_ORDER_MARKS.get(mark, "utf-8")

    def without_mark() -> Iterator[bytes]:
        yield first[len(mark) :]
        yield from chunks

    utf8 = without_mark() if encoding == "utf-8" else _transcoded(file, without_mark(), encoding)
    yield from _with_lf(utf8)


def _transcoded(file: TraceFile, chunks: Iterator[bytes], encoding: str) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("replace" if file.on_bad_row == "skip" else "strict")
    lines = 1
    try:
        for chunk in chunks:
            piece = decoder.decode(chunk).encode()
            yield piece
            lines += piece.count(b"\n")
        yield decoder.decode(b"", final=True).encode()
    except UnicodeDecodeError as error:
        raise TraceError(
            f"{file.path}, line {lines} or later: not {encoding.upper()}, although its byte order mark says so "
            f"({error.reason}); save the file as UTF-8"
        ) from error


def _with_lf(chunks: Iterator[bytes]) -> Iterator[bytes]:
    held = b""  # a CR at the end of a piece, because its LF may be in the next one
    for chunk in chunks:
        chunk = held + chunk
        held = b"\r" if chunk.endswith(b"\r") else b""
        chunk = chunk[: len(chunk) - len(held)]
        if b"\r" in chunk:
            chunk = chunk.replace(b"\r\n", b"\n")
            if b"\r" in chunk:
                chunk = chunk.replace(b"\r", b"\n")
        yield chunk
    yield held.replace(b"\r", b"\n")


def _checked(file: TraceFile, content: bytes) -> bytes:
    """Return ``content`` as UTF-8 without NUL; a byte that is neither is an error, or replaced in skipped rows."""
    if b"\0" in content:
        if file.on_bad_row == "error":
            line = content.count(b"\n", 0, content.index(b"\0")) + 1
            raise TraceError(
                f"{file.path}, line {line}: a NUL byte, which text does not hold; it is a binary file, or UTF-16 "
                "without a byte order mark: save it as UTF-8, or set trace.on_bad_row=skip to leave out such rows"
            )
        content = content.replace(b"\0", NOT_TEXT)
    if content.isascii():
        return content
    start, pieces = 0, []
    while start < len(content):  # in pieces, because a str of the entire file can be four times as large
        end = start + CHUNK_BYTES
        while end < len(content) and content[end] & 0xC0 == 0x80 and end > start + CHUNK_BYTES - 4:
            end -= 1  # not within a character
        piece = content[start:end]
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            if file.on_bad_row == "error":
                raise _not_utf8(file, content, start + error.start) from error
            piece = b"\n".join(_as_text(line) for line in piece.split(b"\n"))
        pieces.append(piece)
        start = end
    return b"".join(pieces)


def _as_text(line: bytes) -> bytes:
    """Return a line, with ``?`` for every byte beyond ASCII if it is not UTF-8."""
    try:
        line.decode()
    except UnicodeDecodeError:
        return line.translate(ASCII_ONLY)
    return line


def _not_utf8(file: TraceFile, content: bytes, at: int) -> TraceError:
    line_start = content.rfind(b"\n", 0, at) + 1
    line = content.count(b"\n", 0, at) + 1
    value_number = content.count(b",", line_start, at) + 1
    return TraceError(
        f"{file.path}, line {line}, value {value_number}: byte 0x{content[at]:02x} is not UTF-8; "
        "save the file as UTF-8, or set trace.on_bad_row=skip to leave out such rows"
    )
