"""How long a model takes to write calibration texts, and how many of them are rejected.

    python -m benchmarks.self_generation --model FOLDER [--tokens 256000] [--batch-size 128]

1,000 texts of 256 tokens by default: many texts end before, so there are more of them. Seconds are wall time and the processor
time of all threads; where other programs run, the first is the longer. Runs in results/self_generation.jsonl are skipped.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

import liar
from benchmarks.results import RESULTS, Record, ResultFile

HEADINGS = ("model", "texts", "tokens", "median length", "rejected", "batch", "seconds", "processor seconds")


def measure(folder: str, tokens: int, batch_size: int) -> Record:
    """One run with the library's defaults, but for the batch."""
    model, tokenizer = liar.load(folder), AutoTokenizer.from_pretrained(folder)
    began, processor = time.perf_counter(), time.process_time()
    written = liar.self_generate(model, tokenizer, tokens=tokens, batch_size=batch_size)
    return {
        "seconds": time.perf_counter() - began,
        "processor_seconds": time.process_time() - processor,
        "texts": len(written.records),
        "written": written.tokens,
        "length": median(len(record.input_ids) for record in written.records),
        "rejected": written.rejected,
    }


def row(record: Record) -> list[str]:
    """The cells of a record."""
    counts = [f"{record[name]:,.0f}" for name in ("texts", "written", "length", "rejected", "batch_size")]
    return [record["model"], *counts, f"{record['seconds']:.0f}", f"{record['processor_seconds']:.0f}"]


def main() -> None:
    """Measure what is not yet in the results, and print all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a language model")
    parser.add_argument("--tokens", type=int, default=256_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--results", type=Path, default=RESULTS / "self_generation.jsonl")
    arguments = parser.parse_args()
    file = ResultFile(arguments.results)
    key = {"model": Path(arguments.model).name, "tokens": arguments.tokens, "batch_size": arguments.batch_size}
    file.get_or_run(key, lambda: measure(arguments.model, arguments.tokens, arguments.batch_size))
    table = Table(*HEADINGS)
    for record in file.records:
        table.add_row(*row(record))
    Console().print(table)


if __name__ == "__main__":
    main()
