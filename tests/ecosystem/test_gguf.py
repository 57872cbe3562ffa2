"""A model that comes from a GGUF file is pruned and saved; a slim one goes into a GGUF file."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import liar
from benchmarks.llama_cpp import write_gguf
from liar.testing import tiny_batches, tiny_model


def from_gguf(file):
    return AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


@torch.no_grad()
def logits(model):
    return model(**tiny_batches(model)[0]).logits


def test_a_model_from_a_gguf_file_is_pruned_and_saved(tmp_path):
    dense = tiny_model("llama", head="causal-lm")
    write_gguf(dense, tmp_path / "dense.gguf")
    model = from_gguf(tmp_path / "dense.gguf")
    torch.testing.assert_close(logits(model), logits(dense))
    report = liar.prune(model, tiny_batches(model, length=32), keep=0.6, progress=False)
    assert report.achieved <= 0.6
    liar.save(model, tmp_path / "slim")
    assert torch.equal(logits(liar.load(tmp_path / "slim")), logits(model))


def test_a_slim_model_of_even_widths_goes_through_a_gguf_file(tmp_path):
    model = tiny_model("llama", head="causal-lm")
    liar.reconstruct(model, {"heads": [[0]] * 2, "neurons": [list(range(40))] * 2}, tiny_batches(model), progress=False)
    write_gguf(model, tmp_path / "slim.gguf")
    torch.testing.assert_close(logits(from_gguf(tmp_path / "slim.gguf")), logits(model))


def test_what_a_gguf_file_has_no_place_for_is_refused(tmp_path):
    model = tiny_model("llama", head="causal-lm", attention_bias=True)
    with pytest.raises(SystemExit, match=r"q_proj\.bias: a GGUF file has no place for it"):
        write_gguf(model, tmp_path / "model.gguf")
