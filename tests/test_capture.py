"""Looking inside a model: what is seen is right, a silent point is noticed, and nothing stays behind."""

import pytest
import reference
import torch
from torch import nn

from liar.capture import Call, Point, block_calls, preserved, run, run_model, watching
from liar.errors import CalibrationError, ModelError
from liar.testing import assert_same_state, guest_state, tiny_batches, tiny_model


@pytest.fixture(params=["bert", "llama"])
def model(request):
    return tiny_model(request.param)


def batches_for(model):
    return [{**batch, "use_cache": False} for batch in tiny_batches(model, batches=3, padding="left")]


def test_watching_sees_inputs_and_outputs():
    layer = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    with watching({"in": Point(layer, 0), "out": Point(layer, None)}) as seen:
        y = layer(x)
    assert list(seen) == ["in", "out"]
    assert torch.equal(seen["in"], x)
    assert torch.equal(seen["out"], y)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_watching_takes_any_positional_argument(model):
    block = reference.blocks(model)[0]
    point = Point(block.output, 1) if model.config.model_type == "bert" else Point(block.mlp, 0)
    with torch.no_grad(), watching({"x": point}) as seen:
        model(**tiny_batches(model)[0])
    assert seen["x"].shape == (8, 12, 32)


def test_a_layer_that_runs_twice_is_an_error():
    layer = nn.Linear(3, 3)
    with pytest.raises(ModelError, match=r"spot: the layer ran twice .*chunk"), watching({"spot": Point(layer, None)}):
        layer(layer(torch.zeros(1, 3)))
    assert not layer._forward_hooks


def test_a_hook_that_cannot_be_set_leaves_none_behind():
    layer = nn.Linear(3, 3)
    with pytest.raises(AttributeError), watching({"a": Point(layer, 0), "b": Point(None, 0)}):
        pass
    assert not layer._forward_pre_hooks


def test_stopping_early(model):
    block = reference.blocks(model)[0]
    after = []
    (hidden, *_), calls = block_calls(model, list(reference.blocks(model)), batches_for(model)[:1])
    block.register_forward_hook(lambda *_: after.append(1))
    inner = block.attention.self.query if model.config.model_type == "bert" else block.self_attn.q_proj
    with torch.no_grad(), watching({"q": Point(inner, 0)}, stop_after=1) as seen:
        assert run(block, hidden, calls[0][0]) is hidden
    assert "q" in seen
    assert not after
    with torch.no_grad():
        assert run(block, hidden, calls[0][0]) is not hidden
    assert after


def test_blocks_one_by_one_are_the_whole_model(model):
    """Hidden states after each block, bit for bit, for every batch."""
    batches = batches_for(model)
    blocks = list(reference.blocks(model))
    with torch.no_grad():
        hidden, calls = block_calls(model, blocks, batches)
        for number, batch in enumerate(batches):
            states = model(**batch, output_hidden_states=True)["hidden_states"]
            x = hidden[number]
            for layer, block in enumerate(blocks):
                torch.testing.assert_close(x, states[layer], rtol=0, atol=0)
                x = run(block, x, calls[layer][number])
            last = model.norm(x) if model.config.model_type == "llama" else x
            torch.testing.assert_close(last, states[-1], rtol=0, atol=0)


def test_block_calls_runs_no_block_and_puts_forwards_back(model):
    blocks = list(reference.blocks(model))
    ran = []
    blocks[0].register_forward_pre_hook(lambda *_: None)
    inner = blocks[0].attention if model.config.model_type == "bert" else blocks[0].self_attn
    inner.register_forward_pre_hook(lambda *_: ran.append(1))
    before = guest_state(model)
    with torch.no_grad():
        block_calls(model, blocks, batches_for(model))
    assert not ran
    assert_same_state(model, before)


def test_an_override_of_forward_survives(model):
    """Other libraries replace `forward` on an instance (offloading does); ours puts back what was there."""
    block = reference.blocks(model)[1]
    original = block.forward
    called = []

    def theirs(*args, **kwargs):
        called.append(1)
        return original(*args, **kwargs)

    block.forward = theirs
    with torch.no_grad():
        block_calls(model, list(reference.blocks(model)), batches_for(model))
        assert vars(block)["forward"] is theirs
        model(**batches_for(model)[0])
    assert called


@pytest.mark.parametrize("bad", [{"input_ids": torch.ones(1, 500, dtype=torch.int64)}, {"nonsense": torch.ones(1)}, {}])
def test_a_batch_that_is_not_taken_is_named(bad):
    model = tiny_model("bert")
    before = guest_state(model)
    good = batches_for(model)[0]
    with torch.no_grad(), pytest.raises(CalibrationError, match="BertModel does not take calibration batch 1 with"):
        block_calls(model, list(model.encoder.layer), [good, bad])
    assert_same_state(model, before)
    with torch.no_grad(), pytest.raises(CalibrationError, match="does not take calibration batch 7 with"):
        run_model(model, bad, 7)


def test_blocks_that_are_never_called_are_noticed(model):
    lonely = nn.Linear(2, 2)
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match="did not call its last block; the family's table names the wrong blocks"),
    ):
        block_calls(model, [*reference.blocks(model), lonely], batches_for(model))
    assert "forward" not in vars(lonely)


def test_run_unpacks_tuples():
    class Pair(nn.Module):
        def forward(self, hidden, scale, *, shift):
            return hidden * scale + shift, "more"

    x = torch.ones(2, 3)
    assert torch.equal(run(Pair(), x, Call((2.0,), {"shift": 1.0})), torch.full((2, 3), 3.0))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_preserved_restores_modes_and_the_random_state(model, error):
    model.train()
    reference.blocks(model)[0].eval()
    torch.manual_seed(0)
    before = guest_state(model)
    try:
        with preserved(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert_same_state(model, before)
