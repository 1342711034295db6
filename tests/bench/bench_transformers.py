"""The real engine beside what a user would pick instead: Transformers' ``generate`` and its continuous batching.

python tests/bench/bench_transformers.py [--device cuda] [--checkpoint FOLDER] [--batches 1,8,32] [--out FOLDER]

The same model, prompts and machine, in one run. Prints a section of a page. With ``--out`` it also puts the section
into the folder's index.md, and the figures into transformers.json beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from hw.elastic.checkpoint import DTYPES, SMOLLM2, load_checkpoint
from hw.elastic.processor import processor_name
from hw.validate.transformers_engines import ENGINES, OURS, Row, compare
from sim.results.run_folder import commit

TITLES = {
    "hw.engine": "`hw.engine`",
    "generate": "`generate`",
    "generate_batch": "continuous batching (`generate_batch`)",
}


def main() -> None:
    """Compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", default=SMOLLM2, help="a folder, a hub id, or smollm2_135m")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=sorted(DTYPES))
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    code = commit()  # of the code that runs, whatever changes meanwhile
    model, _ = load_checkpoint(args.checkpoint, dtype=args.dtype, device=args.device)
    rows = compare(
        model,
        model.device,
        batches=[int(batch) for batch in args.batches.split(",")],
        prompt_tokens=args.prompt_tokens,
        output_tokens=args.output_tokens,
        rounds=args.rounds,
    )
    text = section(rows, args, processor_name(model.device))
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        index = args.out / "index.md"
        before = index.read_text(encoding="utf-8") if index.is_file() else ""
        index.write_text(with_section(before, text), encoding="utf-8")
        content = {
            "checkpoint": args.checkpoint,
            "device": processor_name(model.device),
            "dtype": args.dtype,
            "prompt_tokens": args.prompt_tokens,
            "output_tokens": args.output_tokens,
            "rounds": args.rounds,
            "commit": code,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "rows": [asdict(row) for row in rows],
        }
        (args.out / "transformers.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def with_section(page: str, text: str) -> str:
    """Return a page with this section in the place of the one of the same title, else at its end."""
    title = text.partition("\n")[0]
    before, found, after = page.partition(f"{title}\n")
    rest = after.partition("\n## ")[2] if found else ""
    joined = f"{before.rstrip()}\n\n{text}" if before.strip() else text
    return f"{joined}\n## {rest}" if rest else joined


def section(rows: list[Row], args: argparse.Namespace, device: str) -> str:
    """Return the section of the results."""
    seconds = "CPU seconds of the process" if args.device == "cpu" else "wall-clock seconds"
    lines = [
        "## Against Transformers",
        "",
        f"{args.checkpoint} in {args.dtype} on {device}, PyTorch with one thread on a CPU; torch {torch.__version__},",
        f"transformers {transformers.__version__}. Each request has {args.prompt_tokens} prompt tokens and "
        f"{args.output_tokens} greedy output tokens; all are submitted",
        f"at once. Times are {seconds}, the best of {args.rounds} rounds in which the engines take turns. All",
        "prompts are equally long, the best case of `generate`, which pads shorter ones. The ratio is to the better of",
        "Transformers' two: above 1, `hw.engine` is faster.",
        "",
        f"    python tests/bench/bench_transformers.py --output-tokens {args.output_tokens} --rounds {args.rounds} "
        "--out docs/results/gpu",
        "",
        "| requests | engine | tokens/s | ratio | TPOT, ms | ratio | TTFT, ms | tokens as `generate` |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for batch in dict.fromkeys(row.batch for row in rows):
        found = {row.engine: row for row in rows if row.batch == batch}
        others = [row for name, row in found.items() if name != OURS]
        for name in ENGINES:
            if (row := found.get(name)) is None:
                continue
            speed = tpot = ""
            if name == OURS and others:
                speed = f"{row.tokens_per_s / max(other.tokens_per_s for other in others):.2f}"
                tpot = f"{min(other.tpot_ms for other in others) / row.tpot_ms:.2f}"
            lines.append(
                f"| {batch} | {TITLES[name]} | {row.tokens_per_s:.1f} | {speed} | {row.tpot_ms:.1f} | {tpot} "
                f"| {row.ttft_ms:.0f} | {row.same_tokens:.0%} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
