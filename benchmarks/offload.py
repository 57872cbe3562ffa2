"""Whether a model that is larger than the memory it may take is pruned and saved with its weights on the disk.

    python -m benchmarks.offload [--width 1024] [--tokens 2048]

A random LLaMA without a head in float32 (4 layers, hidden 1,024, feed-forward 2,816, a vocabulary of 32,000) is written to a
folder in shards, and `liar.prune` with a run folder and `liar.save` run in a process of their own. What it takes on top of
Python and its libraries, with the model in memory, less the model, is what the statistics take. With half of the model and the
statistics as the limit, the model is then pruned with its weights on the disk, and once more in memory, which should be killed.
The weights that are written should be the same.

The limit is a control group's (version 1, Linux, which takes a folder in /sys/fs/cgroup/memory that can be written to). Pages
of files that are in memory count, too, and none of the model's are there before; the system may drop them.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaModel

import liar
from benchmarks.results import RESULTS, Record, ResultFile, read_records
from benchmarks.summary import lined
from liar.testing import tiny_batches, tiny_model

FILE = RESULTS / "offload.jsonl"
GROUPS = Path("/sys/fs/cgroup/memory")
LAYERS, VOCABULARY, LENGTH = 4, 32_000, 256
UNLIMITED, ON_DISK = "in memory, no limit", "on disk"
# How the model is loaded.
ARMS: dict[str, dict[str, Any]] = {UNLIMITED: {}, "in memory": {}, ON_DISK: {"device_map": {"": "disk"}}}
HEADINGS = ("model", "tokens", "weights", "limit", "peak without pages of files", "finished", "seconds")


def write_model(folder: Path, width: int) -> int:
    """Write a random LLaMA in shards, and let no page of it stay in memory; its bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    LlamaModel(config).save_pretrained(folder, max_shard_size=4 * VOCABULARY * width)
    files = list(folder.glob("*.safetensors"))
    for file in files:
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return sum(file.stat().st_size for file in files)


def can_limit() -> bool:
    """Whether a control group for memory can be made here."""
    return os.access(GROUPS, os.W_OK) and (GROUPS / "memory.limit_in_bytes").exists()


def run_arm(folder: Path, arm: str, limit: int | None, tokens: int) -> Record:
    """Prune and save in a process of its own: whether it finished, its peak, its seconds, and the digest of what it wrote."""
    group = GROUPS / f"liar-{os.getpid()}"
    group.mkdir()
    try:
        if limit is not None:
            (group / "memory.limit_in_bytes").write_text(str(limit))
        with tempfile.TemporaryDirectory() as out:
            given = {"arm": arm, "tokens": tokens, "group": group, "folder": folder, "out": f"{out}/slim"}
            options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
            command = [sys.executable, "-m", "benchmarks.offload", *options]
            process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True), 0
            while process.poll() is None:
                lines = (group / "memory.stat").read_text().splitlines()
                peak = max(peak, *(int(line.split()[1]) for line in lines if line.startswith("rss ")))
                time.sleep(0.02)
            printed, _ = process.communicate()
        if process.returncode not in (0, -signal.SIGKILL):
            raise RuntimeError(f"{arm} ended with {process.returncode}: {' '.join(command)}")
        result = json.loads(printed.splitlines()[-1]) if process.returncode == 0 else {}
        return {"finished": process.returncode == 0, "peak_mb": peak / 1e6, **result}
    finally:
        group.rmdir()


def work(folder: Path, out: Path, arm: str, group: Path, tokens: int) -> Record:
    """What the process of an arm does."""
    # Whatever is loaded when it is first used, is not the model's.
    small = tiny_model("llama")
    liar.prune(small, tiny_batches(small), keep=0.5, progress=False)
    liar.save(small, out)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(VOCABULARY, (1, LENGTH), generator=generator) for _ in range(tokens // LENGTH)]
    (group / "cgroup.procs").write_text(str(os.getpid()))
    began = time.perf_counter()
    model = liar.load(folder, **ARMS[arm])
    if arm != ON_DISK:
        # Not mapped from the folder's files, as transformers leaves some, but there.
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    liar.prune(model, batches, keep=0.5, run_folder=out.parent / "run", progress=False)
    liar.save(model, out)
    seconds = time.perf_counter() - began
    weights = sha256()
    for file in sorted(out.glob("*.safetensors")):
        weights.update(file.read_bytes())
    return {"seconds": seconds, "weights": weights.hexdigest()}


def measure(folder: Path, width: int, tokens: int) -> Record:
    """All arms of one model, the one without a limit first."""
    size = write_model(folder, width)
    arms = {UNLIMITED: run_arm(folder, UNLIMITED, None, tokens)}
    limit = int(1e6 * arms[UNLIMITED]["peak_mb"]) - size // 2
    arms |= {arm: run_arm(folder, arm, limit, tokens) for arm in ARMS if arm != UNLIMITED}
    return {"model_mb": size / 1e6, "limit_mb": limit / 1e6, "arms": arms}


def rows(run: Record) -> list[list[str]]:
    """The table's lines of a run."""
    lines = []
    for arm, result in run["arms"].items():
        limit = f"{run['limit_mb']:.0f} MB" if arm != UNLIMITED else "none"
        seconds = f"{result['seconds']:.0f}" if result["finished"] else ""
        peak = f"{result['peak_mb']:.0f} MB"
        finished = "yes" if result["finished"] else "no, out of memory"
        lines.append([f"{run['model_mb']:.0f} MB", f"{run['tokens']:,}", arm.partition(",")[0], limit, peak, finished, seconds])
    return lines


def table() -> str:
    """The lines of all runs, for the docs."""
    return lined(HEADINGS, [line for run in read_records(FILE) for line in rows(run)])


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1_024)
    parser.add_argument("--tokens", type=int, default=2_048)
    for name in ("--arm", "--group", "--folder", "--out"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.arm:
        folder, out, group = map(Path, (arguments.folder, arguments.out, arguments.group))
        print(json.dumps(work(folder, out, arguments.arm, group, arguments.tokens)))
        return
    if not can_limit():
        raise SystemExit(f"no control group can be made in {GROUPS}: memory cannot be limited here")
    results = ResultFile(FILE)
    with tempfile.TemporaryDirectory() as place:
        key = {"width": arguments.width, "tokens": arguments.tokens}
        run = results.get_or_run(key, lambda: measure(Path(place), arguments.width, arguments.tokens))
    shown = Table(*HEADINGS, title="Pruned and saved")
    for line in rows(run):
        shown.add_row(*line)
    Console().print(shown)


if __name__ == "__main__":
    main()
