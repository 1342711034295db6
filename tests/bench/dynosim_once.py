"""Run NVIDIA's DynoSim once on the requests of a file and print its CPU seconds as JSON; for bench_speed.py.

usage: dynosim_once.py ROWS.jsonl | --version

A line of ROWS.jsonl is [arrival_s, prompt_tokens, output_tokens]. One vLLM-type worker with the memory and limits of
bench_speed.py, chunked prefill, no prefix caching, DynoSim's built-in prices. Needs ai-dynamo-runtime 1.6.1.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import tempfile
import time
from pathlib import Path

TRACE_BLOCK_TOKENS = 512  # as in the Mooncake format


def main(path: str) -> None:
    """Convert, run, print."""
    import dynamo._core as dynamo

    with Path(path).open() as file:
        requests = [json.loads(line) for line in file]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl", delete=False) as out:
        for i, (arrival_s, prompt_tokens, output_tokens) in enumerate(requests):
            blocks = range(-(-prompt_tokens // TRACE_BLOCK_TOKENS))
            row = {
                "timestamp": int(arrival_s * 1000),
                "input_length": prompt_tokens,
                "output_length": output_tokens,
                "hash_ids": [i * 64 + k for k in blocks],
            }
            out.write(json.dumps(row) + "\n")
    settings = {
        "backend": "vllm",
        "num_gpu_blocks": 7300,
        "block_size": 16,
        "max_num_seqs": 128,
        "max_num_batched_tokens": 2048,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": False,
        "speedup_ratio": 1.0,
    }
    engine = dynamo._normalize_mocker_config({"engine": settings})
    start_s = time.process_time()
    dynamo.run_mocker_trace_replay(
        [out.name],
        extra_engine_args=engine,
        num_workers=1,
        trace_block_size=TRACE_BLOCK_TOKENS,
        replay_mode="offline",
        capture_per_request=False,
        capture_planner_details=False,
    )
    cpu_s = time.process_time() - start_s
    Path(out.name).unlink()
    print(json.dumps({"cpu_s": cpu_s}))


if __name__ == "__main__":
    if sys.argv[1:] == ["--version"]:
        print(importlib.metadata.version("ai-dynamo-runtime"))
    else:
        main(sys.argv[1])
