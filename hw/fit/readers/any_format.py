"""Finds the format of a measured run from its content and reads it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from hw.fit.measured import MeasuredRun, Side
from hw.fit.readers.aiperf import is_aiperf, read_aiperf
from hw.fit.readers.columns import Naming, read_columns
from hw.fit.readers.fields import as_run_errors, objects
from hw.fit.readers.guidellm import is_guidellm, read_guidellm
from hw.fit.readers.inference_perf import is_inference_perf, read_inference_perf
from hw.fit.readers.llmservingsim import read_llmservingsim
from hw.fit.readers.run_folder import read_run_folder
from hw.fit.readers.vllm_bench import is_vllm_bench, read_vllm_bench
from sim.errors import ConfigError
from sim.paths import find_data
from sim.traces.readers.files import PARQUET_MAGIC, TraceFile, read_content
from sim.traces.readers.json_table import load_document, parse_line

FORMATS = (
    "a folder of hw.client or of LLMServingSim (requests.jsonl.gz, meta.json); the JSON of vllm bench serve "
    "--save-detailed, guidellm, inference-perf or aiperf; or a table with one row per request"
)


def read_run(path: str | Path, naming: Naming, *, benchmark: int | None = None, side: Side = "client") -> MeasuredRun:
    """Return the run of a folder or file, a path or one under RAP_LAB_DATA.

    Args:
        naming: of columns, for tables. benchmark: which one of a guidellm file. side: of tables.
    Raises:
        ConfigError: if it cannot be read.
    """
    found = find_data(path)
    if found.is_dir():
        return _read_folder(found)
    with as_run_errors():
        file = TraceFile(path=found, on_bad_row="skip")
        content = read_content(file)
        if content.startswith(PARQUET_MAGIC) or not content.lstrip().startswith((b"{", b"[")):
            return read_columns(file, found, naming, side)
        document = _document(file, content)
        if isinstance(document, list) and document and is_vllm_bench(document[0]):
            document = _one_result(document, found, benchmark)  # --append-result wrote them
        if is_vllm_bench(document):
            return read_vllm_bench(document, found)
        if is_guidellm(document):
            return read_guidellm(document, found, benchmark)
        if isinstance(document, list) and is_inference_perf(document):
            return read_inference_perf(objects(document, found, "requests"), found)
        if isinstance(document, list) and is_aiperf(document):
            return read_aiperf(objects(document, found, "requests"), found)
        return read_columns(file, found, naming, side)


def _read_folder(folder: Path) -> MeasuredRun:
    if (folder / "records.parquet").is_file():
        return read_run_folder(folder)
    if (folder / "meta.json").is_file() or (folder / "requests.jsonl.gz").is_file():
        return read_llmservingsim(folder)
    if (folder / "per_request_lifecycle_metrics.json").is_file():
        return read_run(folder / "per_request_lifecycle_metrics.json", Naming(columns={}))
    if (folder / "profile_export.jsonl").is_file():
        return read_run(folder / "profile_export.jsonl", Naming(columns={}))
    raise ConfigError(f"{folder} holds no run that is known here; give {FORMATS}")


def _one_result(results: list[Any], source: Path, benchmark: int | None) -> Any:
    """Return one of several results of a file.

    Raises:
        ConfigError: if none is chosen, or one that is not there.
    """
    if benchmark is None or not 0 <= benchmark < len(results):
        raise ConfigError(
            f"{source} has {len(results)} results, each a run of its own; set benchmark= to one of 0 to "
            f"{len(results) - 1}"
        )
    return results[benchmark]


def _document(file: TraceFile, content: bytes) -> Any:
    """Return a JSON document; of one value a line, the list of those that are JSON."""
    lines = content.strip().count(b"\n") + 1
    first = parse_line(content.lstrip().partition(b"\n")[0])
    if lines > 1 and isinstance(first, dict):
        return [parse_line(line) for line in io.BytesIO(content) if line.strip()]
    return load_document(file, content)
