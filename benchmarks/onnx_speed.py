"""How much faster a slim model is in ONNX Runtime, on one thread.

    python -m benchmarks.onnx_speed --model MINILM [--keep 0.5] [--rounds 51]

Masks are those of the default selection; weights need no repair to be timed. Both models are exported with any batch and
length, and their outputs compared with PyTorch's. Then they take turns, and the median of the ratios counts. Needs
`onnxruntime` and `onnxscript`.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import numpy
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from tqdm.auto import tqdm

from benchmarks.inference import LENGTH, loaded, slim_copy, tokens_of
from benchmarks.results import RESULTS, Record, ResultFile

BATCHES = (1, 8)
AXES = {0: torch.export.Dim("batch", max=256), 1: torch.export.Dim("length", max=512)}

Inputs = Mapping[str, numpy.ndarray]


def inputs_of(model: nn.Module, batch_size: int) -> dict[str, torch.Tensor]:
    """Random tokens, none of them padding."""
    ids = tokens_of(model, batch_size, LENGTH)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def session_of(model: nn.Module, folder: str) -> onnxruntime.InferenceSession:
    """The model in ONNX Runtime, on one thread.

    Raises:
        AssertionError: its outputs there are not those of the model.
    """
    file = Path(folder) / "model.onnx"
    example = inputs_of(model, 2)
    program = torch.onnx.export(model, (), kwargs=example, dynamo=True, dynamic_shapes=dict.fromkeys(example, AXES))
    assert program is not None, "exported by dynamo"
    program.save(file)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    with torch.no_grad():
        outputs = model(**example)[0]
    torch.testing.assert_close(torch.from_numpy(session.run(None, arrays(example))[0]), outputs, rtol=1e-3, atol=1e-4)
    return session


def arrays(batch: Mapping[str, torch.Tensor]) -> Inputs:
    """As ONNX Runtime takes them."""
    return {name: value.numpy() for name, value in batch.items()}


def seconds(session: onnxruntime.InferenceSession, batch: Inputs) -> float:
    """Of one run."""
    began = time.perf_counter()
    session.run(None, batch)
    return time.perf_counter() - began


def measure(folder: str, keep: float, rounds: int) -> Record:
    """The seconds of both models in turns, by batch size."""
    dense, tokenizer = loaded(folder)
    models = (dense, slim_copy(dense, tokenizer, keep))
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as other:
        sessions = [session_of(model, place) for model, place in zip(models, (one, other), strict=True)]
        batches = {f"{size} x {LENGTH}": arrays(inputs_of(dense, size)) for size in BATCHES}
        times: dict[str, list[list[float]]] = {name: [] for name in batches}
        # The first round warms up.
        for turn in tqdm(range(rounds + 1), desc="rounds"):
            for name, batch in batches.items():
                measured = [seconds(session, batch) for session in sessions]
                if turn:
                    times[name].append(measured)
    return {
        "parameters": [sum(p.numel() for p in model.parameters()) for model in models],
        "seconds": {name: [median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()},
        "faster": {name: median(long / short for long, short in rows) for name, rows in times.items()},
        "rounds": rounds,
        "onnxruntime": version("onnxruntime"),
    }


def main() -> None:
    """Measure what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder, or name on the hub")
    parser.add_argument("--name", help="of the model in the results; that of its folder if left out")
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5])
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--results", type=Path, default=RESULTS / "onnx_speed.jsonl")
    arguments = parser.parse_args()
    file, shown = ResultFile(arguments.results), Table("kept", "batch", "slim is faster by")
    for keep in arguments.keep:
        key = {"model": arguments.name or Path(arguments.model).name, "keep": keep}
        run = file.get_or_run(key, partial(measure, arguments.model, keep, arguments.rounds))
        for batch, ratio in run["faster"].items():
            shown.add_row(f"{keep:.0%}", batch, f"{ratio:.2f}x")
    Console(width=120).print(shown)


if __name__ == "__main__":
    main()
