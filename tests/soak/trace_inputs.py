"""Hostile trace files: every reader of conf/trace, every packing, and archives that unpack to gigabytes."""

from __future__ import annotations

import bz2
import functools
import gzip
import inspect
import io
import json
import lzma
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
from hydra.utils import get_method
from hypothesis import strategies as st
from omegaconf import OmegaConf

from sim.config import CONF_DIR
from sim.engine.protocol import Request
from sim.traces.trace import Trace
from tests.sim.serving import tiny_engine
from tests.soak.kinds import Case, FaultError
from tests.soak.mutate import CELLS, JSON_VALUES, mutate_bytes, mutate_json, mutate_text, to_json

BOMB_BYTES = 3 * 2**30
REPLAYED_SHARE = 0.1
BOMB_SHARE = 1 / 20_000

CSV = {
    "own": "arrival_s,prompt_tokens,output_tokens\n0,10,5\n0.5,20,6\n1.25,300,70\n",
    "own_ids": "arrival_s,prompt_tokens,output_tokens,hash_ids\n0,600,5,1 2\n0.5,20,6,1\n2,1024,7,1 9\n",
    "azure": "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:17:03.9799600,4808,10\n"
    "2023-11-16 18:17:04.0319600,110,27\n2023-11-16 18:17:05,20,3\n",
    "azure_2024": "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:00.009930+00:00,2162,5\n"
    "2024-05-10 00:00:01+00:00,2399,6\n",
    "azure_images": "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15 00:00:00.0000000,2,900,120\n"
    "2024-10-15 00:00:01.5000000,0,80,12\n",
    "burstgpt": "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,1087,0,1087,API log\n46,GPT-4,7,9,16,API log\n",
    "burstgpt_sessions": "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
    "Log Type\n"
    "5,1,3.2,ChatGPT,472,18,490,Conversation log\n45,1,2.1,ChatGPT,1087,230,1317,Conversation log\n",
    "lengths": "num_prefill_tokens,num_decode_tokens,num_total_tokens\n100,10,110\n200,20,220\n5,6,11\n",
    "vidur": ",arrived_at,num_prefill_tokens,num_decode_tokens,num_total_tokens,pd_ratio\n0,0.0,100,10,110,10.0\n"
    "1,1.5,200,20,220,10.0\n",
    "splitwise": "request_id,request_type,application_id,arrival_timestamp,batch_size,prompt_size,token_size\n"
    "0,2,0,0.0,1,100,10\n1,2,0,0.7,1,200,20\n",
    "tracev2": "request_id,client_id,tenant_id,slo_class,session_id,round_index,prefix_group,streaming,input_tokens,"
    "output_tokens,arrival_time_us,send_time_us,first_chunk_time_us,last_chunk_time_us,num_chunks,status\n"
    "0,c,t,batch,s,0,,true,100,10,0,10,1000,2000,10,ok\n1,c,t,batch,s,1,,true,120,11,900,910,1800,2900,11,ok\n",
}
LINES: dict[str, list[Any]] = {
    "own_lines": [
        {"arrival_s": 0.0, "prompt_tokens": 600, "output_tokens": 5, "hash_ids": [1, 2]},
        {"arrival_s": 1.5, "prompt_tokens": 20, "output_tokens": 6, "hash_ids": [1]},
    ],
    "mooncake": [
        {"timestamp": 0, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]},
        {"timestamp": 27, "input_length": 500, "output_length": 3, "hash_ids": [46]},
        {"timestamp": 3000, "input_length": 1024, "output_length": 9, "hash_ids": [46, 2**63]},
    ],
    "mooncake_hex": [{"timestamp": 1777600000000, "input_length": 600, "output_length": 5, "hash_ids": ["a3f0", "b1"]}],
    "mooncake_plain": [{"timestamp": t, "input_length": 300, "output_length": 40} for t in (0, 200)],
    "sessions": [
        {"timestamp": 0, "session_id": "a", "input_length": 300, "output_length": 40},
        {"session_id": "a", "delay": 500, "input_length": 500, "output_length": 40},
    ],
    "texts": [{"timestamp": 0, "text_input": "two words", "output_length": 5}],
    "llmservingsim": [
        {
            "index": i,
            "group": 0,
            "arrival_time_ns": 10**6 * i,
            "input_toks": 100,
            "output_toks": 10,
            "input_tok_ids": [1],
        }
        for i in range(3)
    ],
    "bailian": [
        {
            "chat_id": i,
            "parent_chat_id": i - 1,
            "timestamp": 61.1 + i,
            "input_length": 33,
            "output_length": 13,
            "type": "text",
            "turn": 1 + i,
            "hash_ids": [7, 8, 9 + i],
        }
        for i in range(3)
    ],
}
WHOLE: dict[str, Any] = {
    "own_array": [{"arrival_s": i, "prompt_tokens": 10, "output_tokens": 5} for i in range(3)],
    "vllm_result": {
        "date": "20260101-000000",
        "backend": "vllm",
        "model_id": "m",
        "num_prompts": 2,
        "duration": 3.1,
        "completed": 2,
        "input_lens": [10, 20],
        "output_lens": [5, 6],
        "ttfts": [0.1, 0.2],
        "itls": [[0.01, 0.02], [0.02]],
        "start_times": [100.0, 101.0],
        "errors": ["", ""],
        "request_rate": 1.0,
    },
    "guidellm": {
        "metadata": {"version": 1},
        "benchmarks": [
            {
                "requests": {
                    "successful": [
                        {"request_start_time": 1777600000.1 + i, "prompt_tokens": 10, "output_tokens": 5}
                        for i in range(3)
                    ],
                    "errored": [],
                    "incomplete": [],
                }
            }
        ],
    },
    "aiperf": {
        "records": [
            {
                "metadata": {"request_start_ns": 1777600000 * 10**9 + i},
                "metrics": {"input_sequence_length": {"value": 7}, "output_sequence_length": {"value": 8}},
            }
            for i in range(3)
        ]
    },
}
SERVEGEN_ROWS = "0,0.05,1.2,Gamma,0.7,3\n600,0.02,1.2,Weibull,0.9,3\n1200,0,0,,0,0\n"
SERVEGEN_LENGTHS = {"0": {"input_tokens": "{13: 0.5, 14: 0.5}", "output_tokens": "{3: 0.25, 4: 0.75}"}}

Reader = Callable[..., Trace]


def readers() -> dict[str, tuple[Reader, dict[str, Any]]]:
    """Return the function and the arguments of every option of conf/trace that reads a file."""
    found: dict[str, tuple[Reader, dict[str, Any]]] = {}
    for path in sorted((CONF_DIR / "trace").glob("*.yaml")):
        option = OmegaConf.create({"seed": 0, "trace": OmegaConf.load(path)}).trace
        if "path" not in option.keys():  # noqa: SIM118 - a key without a value is none of the mapping
            continue
        target = option._target_
        values = {str(key): option._get_node(key) for key in option if key != "_target_" and key != "path"}
        arguments = {
            key: hydra.utils.instantiate(option[key], _convert_="all")
            if OmegaConf.is_dict(node) and "_target_" in node
            else OmegaConf.to_container(option[key])
            if OmegaConf.is_config(node)
            else option[key]
            for key, node in values.items()
        }
        found[path.stem] = (get_method(target), arguments)
    return found


def parquet_bytes(rng: random.Random) -> bytes:
    """Return a Parquet file whose columns have one of several types."""
    columns = {
        "arrival_s": rng.choice(([0.0, 1.0], [0, 1], ["0", "1"], [None, 1.0], [True, False], [[0.0], [1.0]])),
        "prompt_tokens": rng.choice(([10, 20], [10.0, 20.5], ["a", "b"], [None, None], [2**62, 1], [b"x", b"y"])),
        "output_tokens": rng.choice(([1, 2], [1.0, float("nan")], [-1, 0], [{"a": 1}, {"a": 2}])),
        "hash_ids": rng.choice(([[1], [1]], [[1, None], [2]], [["a"], ["b"]], [[1.5], [2.0]], ["1", "2"], [None, [1]])),
    }
    for name in list(columns):
        if rng.random() < 0.1:
            del columns[name]
    if not columns:
        columns["arrival_s"] = [0.0]
    out = io.BytesIO()
    pa_parquet.write_table(pa.table(columns), out, compression=rng.choice(("snappy", "zstd", "gzip", "none")))
    return out.getvalue()


def zstd(content: bytes) -> bytes:
    """Return the content as a Zstandard frame."""
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(content)
    return bytes(sink.getvalue())


PACKINGS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": functools.partial(gzip.compress, compresslevel=1, mtime=0),
    "bz2": functools.partial(bz2.compress, compresslevel=1),
    "xz": functools.partial(lzma.compress, preset=0),
    "zstd": zstd,
    "utf-16": lambda content: content.decode("utf-8", "replace").encode("utf-16"),
    "utf-16-be": lambda content: b"\xfe\xff" + content.decode("utf-8", "replace").encode("utf-16-be"),
    "bom": lambda content: b"\xef\xbb\xbf" + content,
    "cr": lambda content: content.replace(b"\n", b"\r"),
    "crlf": lambda content: content.replace(b"\n", b"\r\n"),
}
COMPRESSED = ("gzip", "bz2", "xz", "zstd")


def bomb(packing: str, text: bool) -> bytes:
    """Return a small archive that unpacks to BOMB_BYTES of rows or of nothing."""
    piece = (b"0,10,5\n" * 150_000 if text else bytes(2**20))[: 2**20]
    header = PACKINGS[packing](b"arrival_s,prompt_tokens,output_tokens\n")
    return header + PACKINGS[packing](piece) * (BOMB_BYTES // len(piece))


class Traces:
    """Files for the readers of traces."""

    name = "trace files"

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._readers = readers()
        self._seeds = {
            **{name: text.encode() for name, text in CSV.items()},
            **{name: "".join(json.dumps(row) + "\n" for row in rows).encode() for name, rows in LINES.items()},
            **{name: json.dumps(value).encode() for name, value in WHOLE.items()},
        }
        self._rng = np.random.default_rng(0)
        rows = {"arrival_s": [0.0, 1.0], "prompt_tokens": [10, 3000], "output_tokens": [5, 6]}
        serve_trace(Trace(**{name: np.array(values) for name, values in rows.items()}))  # compile the engine

    def make(self, rng: random.Random) -> Case:
        """Return a file for a random reader."""
        target = rng.choice(list(self._readers))
        reader, _ = self._readers[target]
        if reader.__name__ == "read_servegen":
            return self._servegen(target, rng)
        if rng.random() < BOMB_SHARE:
            packing = rng.choice(COMPRESSED)
            return Case(target, bomb(packing, rng.random() < 0.5), options={"packing": packing})
        return Case(target, self._packed(self._content(target, rng), rng), options=self._options(reader, rng))

    def strategy(self) -> st.SearchStrategy[Case]:
        """Return hypothesis' strategy of files with one JSON object a line, or with cells of any text."""
        fields = sorted({name for rows in LINES.values() for row in rows for name in row})
        row = st.dictionaries(st.sampled_from(fields), JSON_VALUES, max_size=6).map(json.dumps)
        cell = st.text(max_size=6) | st.sampled_from(CELLS) | st.integers().map(str) | st.floats().map(str)
        header = st.sampled_from(sorted(text.split("\n")[0] for text in CSV.values()))
        cells = st.lists(cell, min_size=1, max_size=7).map(",".join)
        text = st.lists(row, min_size=1, max_size=4).map("\n".join) | st.builds(
            lambda first, rows: "\n".join([first, *rows]), header, st.lists(cells, min_size=1, max_size=4)
        )
        plain = [name for name, (reader, _) in self._readers.items() if reader.__name__ != "read_servegen"]
        return st.builds(
            lambda target, content: Case(target, content.encode("utf-8", "surrogatepass")), st.sampled_from(plain), text
        )

    def _content(self, target: str, rng: random.Random) -> bytes:
        """Return the bytes of a file before it is packed: half of the time in the reader's own format."""
        family = target.split("_")[0]
        own = [name for name in self._seeds if name.split("_")[0] in (family, {"file": "own"}.get(family, family))]
        name = rng.choice(own) if own and rng.random() < 0.6 else rng.choice(list(self._seeds))
        other = self._seeds[rng.choice(list(self._seeds))]
        how = rng.random()
        if how < 0.03:
            return rng.randbytes(rng.randrange(200))
        if how < 0.08:
            return mutate_bytes(parquet_bytes(rng), rng, other) if rng.random() < 0.5 else parquet_bytes(rng)
        if how < 0.45 and name in LINES:
            rows = json.loads(json.dumps(LINES[name]))
            at = rng.randrange(len(rows))
            rows[at] = mutate_json(rows[at], rng)
            return b"\n".join(to_json(row, rng) for row in rows)
        if how < 0.7 and name in WHOLE:
            return to_json(mutate_json(json.loads(self._seeds[name]), rng), rng)
        return mutate_text(self._seeds[name], rng, other) if how < 0.97 else self._seeds[name]

    def _packed(self, content: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.6:
            return content
        packed = PACKINGS[rng.choice(list(PACKINGS))](content)
        if rng.random() < 0.05:
            packed = PACKINGS[rng.choice(COMPRESSED)](packed)
        return mutate_bytes(packed, rng, content) if rng.random() < 0.3 else packed

    def _options(self, reader: Reader, rng: random.Random) -> dict[str, Any]:
        allowed = inspect.signature(reader).parameters
        options = {
            "on_bad_row": rng.choice(("error", "skip")),
            "sort": rng.random() < 0.5,
            "rebase": rng.random() < 0.5,
            "failed": rng.choice(("drop", "error")),
        }
        return {name: value for name, value in options.items() if name in allowed and rng.random() < 0.5}

    def _servegen(self, target: str, rng: random.Random) -> Case:
        rows, lengths = SERVEGEN_ROWS.encode(), json.loads(json.dumps(SERVEGEN_LENGTHS))
        if rng.random() < 0.5:
            rows = mutate_text(rows, rng)
        else:
            lengths = mutate_json(lengths, rng)
        content = to_json(lengths, rng)
        if rng.random() < 0.3:
            content = mutate_text(content, rng)
        return Case(target, content, more={"trace.csv": rows})

    def feed(self, case: Case) -> str:
        """Read the file; replay a share of the traces that were accepted."""
        reader, arguments = self._readers[case.target]
        if case.more:
            folder = self._folder / "servegen"
            folder.mkdir(exist_ok=True)
            (folder / "chunk-0-dataset.json").write_bytes(case.content)
            (folder / "chunk-0-trace.csv").write_bytes(case.more["trace.csv"])
            trace = reader(folder, **{**arguments, "clients": None, "start_s": 0.0, "duration_s": 1200.0})
        else:
            path = self._folder / "hostile"
            path.write_bytes(case.content)
            options = {name: value for name, value in case.options.items() if name != "packing"}
            trace = reader(path, **{**arguments, **options})
        check_trace(trace)
        if len(trace) < 100 and self._rng.random() < REPLAYED_SHARE:
            serve_trace(trace)
        return "accepted"

    def close(self) -> None:
        """Nothing runs."""


def check_trace(trace: Trace) -> None:
    """Check what a reader promises of a trace that it accepted."""
    arrivals = trace.arrival_s
    if not (np.isfinite(arrivals).all() and (arrivals >= 0).all() and (np.diff(arrivals) >= 0).all()):
        raise FaultError("accepted arrivals that are not finite and ascending")
    if (trace.prompt_tokens < 1).any() or (trace.output_tokens < 1).any():
        raise FaultError("accepted a length below 1")


def serve_trace(trace: Trace) -> None:
    """Serve a trace with a small engine."""
    engine = tiny_engine(max_context_tokens=2000)
    engine.submit(
        [
            Request(request_id=i, arrival_s=float(s), prompt_tokens=int(p), output_tokens=int(o))
            for i, (s, p, o) in enumerate(zip(trace.arrival_s, trace.prompt_tokens, trace.output_tokens, strict=True))
        ]
    )
    engine.run_until(float("inf"))
    if not engine.drained:
        raise FaultError("a replay of an accepted trace did not end")
