"""LoRA on a slim model: trained, merged, saved and loaded; adapters that are not merged are refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import liar
from liar.errors import ModelError
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model


def adapted(model, **options):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", **options))


@pytest.mark.parametrize("name", ["slim_bert", "slim_llama"])
def test_lora_after_pruning(name, request, tmp_path):
    slim = request.getfixturevalue(name)
    batch = tiny_batches(slim)[0]
    labels = batch["input_ids"] if name == "slim_llama" else torch.arange(len(batch["input_ids"])) % 3
    with torch.no_grad():
        before = slim(**batch, labels=labels)
    torch.manual_seed(0)
    model = adapted(slim).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(5):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    merged = model.merge_and_unload().eval()
    with torch.no_grad():
        after = merged(**batch, labels=labels)
    assert after.loss < before.loss
    liar.save(merged, tmp_path / "tuned")
    loaded = liar.load(tmp_path / "tuned")
    assert type(loaded) is type(slim)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, after.logits)
    # Merged, it is a model like any other.
    assert liar.prune(merged, tiny_batches(merged, length=32), keep=0.8, progress=False).achieved <= 0.8


def wrapped(model):
    return adapted(model)


def unwrapped(model):
    """Adapters inside, as of `PeftModel.base_model.model` or `model.add_adapter`."""
    return adapted(model).base_model.model


@pytest.mark.parametrize("adapters", [wrapped, unwrapped])
def test_adapters_that_are_not_merged_are_refused(adapters, tmp_path):
    model = adapters(tiny_model("llama", head="causal-lm"))
    before = model_state(model)
    for verb in (
        lambda: liar.prune(model, tiny_batches(model), keep=0.5, progress=False),
        lambda: liar.save(model, tmp_path / "model"),
    ):
        with pytest.raises(ModelError, match="merge"):
            verb()
    assert_same_state(model, before)
