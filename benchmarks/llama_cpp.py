"""Whether llama.cpp computes what PyTorch computes, for a slim LLaMA written as a GGUF file.

    python -m benchmarks.llama_cpp [--model STORIES260K] [--keep 0.4]

A random LLaMA (4 layers, hidden 256), or a model of yours, is pruned with `widths="uniform"`, and with layers of different
widths. The first is written as the architecture `llama`, the second as `deci`, whose layers have numbers of heads and neurons
of their own. The logits of 64 random tokens are compared, in float32. Needs `gguf`, and `llama-cpp-python`, which has to be
compiled.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy
import torch
from gguf import GGUFWriter, TensorNameMap, get_tensor_name_map
from gguf.constants import MODEL_ARCH, MODEL_ARCH_NAMES
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import liar
from benchmarks.results import RESULTS, Record, ResultFile
from liar.testing import tiny_batches, tiny_model

TOKENS = 64


def write_gguf(model: Any, file: Path) -> None:
    """Write a LLaMA in float32, without a vocabulary: what is read and given are ids.

    Args:
        model: a `LlamaForCausalLM`, pruned or not, without biases and without scaled rotations.
        file: that is written.
    """
    config, layout = model.config, liar.discover(model)
    groups = [site.units for site in layout.of_kind("heads")]
    neurons = [site.units for site in layout.of_kind("neurons")]
    queries = model.model.layers[0].self_attn.num_key_value_groups
    even = len(set(groups)) == len(set(neurons)) == 1
    kind = MODEL_ARCH.LLAMA if even else MODEL_ARCH.DECI
    writer = GGUFWriter(file, MODEL_ARCH_NAMES[kind])
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(len(groups))
    writer.add_feed_forward_length(neurons[0] if even else neurons)
    writer.add_head_count(groups[0] * queries if even else [units * queries for units in groups])
    writer.add_head_count_kv(groups[0] if even else groups)
    # A head keeps its size when others go, so it is no longer the hidden size over the number of heads.
    head = model.model.layers[0].self_attn.head_dim
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    names = get_tensor_name_map(kind, len(groups))
    for name, value in model.state_dict().items():
        writer.add_tensor(_name(names, name), _stored(name, value, head))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _name(names: TensorNameMap, name: str) -> str:
    found: str | None = names.get_name(name, try_suffixes=(".weight",))
    if found is None:
        raise SystemExit(f"{name}: a GGUF file has no place for it; expected a LLaMA without biases")
    return found


def _stored(name: str, value: Tensor, head: int) -> numpy.ndarray:
    """A tensor as llama.cpp has it: it rotates pairs of neighbouring channels of a head, transformers the two halves."""
    stored = value.float()
    if name.endswith(("q_proj.weight", "k_proj.weight")):
        stored = stored.view(-1, 2, head // 2, stored.shape[1]).transpose(1, 2).reshape(stored.shape)
    array: numpy.ndarray = stored.contiguous().numpy()
    return array


def llama_cpp_logits(file: Path, ids: Tensor) -> Tensor:
    """The logits of llama.cpp for one sequence, on one thread: [tokens, vocabulary]."""
    from llama_cpp import Llama  # noqa: PLC0415 (writing files needs no compiler)

    # 0 is float32, for what is kept of earlier tokens as well.
    engine = Llama(str(file), n_ctx=len(ids), n_batch=len(ids), n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0)
    engine.eval(ids.tolist())
    return torch.from_numpy(numpy.array(engine.scores[: len(ids)]))


def measure(dense: nn.Module, keep: float, widths: str) -> Record:
    """How far llama.cpp's logits are from PyTorch's, relative to their size, and how often both have the same largest."""
    model = copy.deepcopy(dense)
    liar.prune(model, tiny_batches(dense, length=TOKENS), keep=keep, widths=widths)
    ids = torch.randint(3, model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))  # type: ignore[union-attr, arg-type]
    with torch.no_grad():
        expected = model(input_ids=ids[None]).logits[0].float()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(model, file)
        logits = llama_cpp_logits(file, ids)
    same = (logits.argmax(1) == expected.argmax(1)).float().mean()
    return {
        "kept": {site.name: site.units for site in liar.discover(model).sites},
        "error": float((logits - expected).norm() / expected.norm()),
        "same": float(same),
        "tokens": TOKENS,
        "llama_cpp_python": version("llama-cpp-python"),
    }


def main() -> None:
    """Compare what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder, or name on the hub; a small random LLaMA if left out")
    parser.add_argument("--keep", type=float, default=0.4)
    parser.add_argument("--results", type=Path, default=RESULTS / "llama_cpp.jsonl")
    arguments = parser.parse_args()
    if arguments.model:
        dense: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    else:
        sizes: dict[str, Any] = {
            "hidden_size": 256,
            "num_hidden_layers": 4,
            "intermediate_size": 768,
            "max_position_embeddings": 256,
        }
        heads: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
        dense = tiny_model("llama", head="causal-lm", vocab_size=512, **sizes, **heads)
    file, table = ResultFile(arguments.results), Table("widths", "relative error of the logits", "same largest logit")
    for widths in ("uniform", "free"):
        name = Path(arguments.model).name if arguments.model else "random LLaMA"
        key = {"model": name, "keep": arguments.keep, "widths": widths}
        run = file.get_or_run(key, partial(measure, dense, arguments.keep, widths))
        table.add_row(widths, f"{run['error']:.1e}", f"{run['same']:.0%}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
