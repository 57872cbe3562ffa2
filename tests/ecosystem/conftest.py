"""Slim models with layers of different widths, as pruning leaves them."""

import pytest
from transformers import AutoModel

import liar
from liar.testing import tiny_batches, tiny_model


def slim(model_type, **options):
    model = tiny_model(model_type, **options)
    liar.prune(model, tiny_batches(model, length=32), keep=0.6, progress=False)
    units = [site.units for site in liar.discover(model).of_kind("neurons")]
    assert len(set(units)) > 1, "the layers are to differ in width"
    return model


@pytest.fixture
def slim_bert():
    return slim("bert", head="sequence-classification", num_labels=3)


@pytest.fixture
def slim_llama():
    return slim("llama", head="causal-lm")


@pytest.fixture
def slim_minilm(minilm_folder):
    model = AutoModel.from_pretrained(minilm_folder)
    liar.remove(model, liar.select(model, keep=0.5, criterion="magnitude", progress=False))
    return model.eval()
