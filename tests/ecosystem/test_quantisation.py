"""torchao quantises a slim model to int8, and its state is saved and loaded."""

import copy

import pytest
import torch
from torchao.quantization import Int8WeightOnlyConfig, quantize_

import liar
from liar.errors import ModelError
from liar.testing import tiny_batches


@pytest.mark.parametrize("name", ["slim_bert", "slim_llama", "slim_minilm"])
def test_int8_weights_after_pruning(name, request, tmp_path):
    model = request.getfixturevalue(name)
    batch = tiny_batches(model)[0]
    empty = copy.deepcopy(model)
    with torch.no_grad():
        before = model(**batch)[0]
        quantize_(model, Int8WeightOnlyConfig())
        after = model(**batch)[0]
    error = (after - before).norm() / before.norm()
    assert 0 < error < 0.05
    torch.save(model.state_dict(), tmp_path / "int8.pt")
    for parameter in empty.parameters():
        parameter.data.zero_()
    quantize_(empty, Int8WeightOnlyConfig())
    empty.load_state_dict(torch.load(tmp_path / "int8.pt", weights_only=True), assign=True)
    with torch.no_grad():
        assert torch.equal(empty(**batch)[0], after)
    # First prune, then quantise: the other way is refused.
    with pytest.raises(ModelError, match="then quantise"):
        liar.prune(model, [batch], keep=0.5, progress=False)
