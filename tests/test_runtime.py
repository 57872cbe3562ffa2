"""Running models and reading activations: what is captured is right, and nothing stays behind."""

import pytest
import reference
import torch
from torch import nn

from liar.errors import CalibrationError, ModelError
from liar.runtime import (
    ActivationStore,
    BlockCall,
    Point,
    calls_of,
    capture_activations,
    preserve_model_state,
    receive_activations,
    record_block_calls,
    run_block,
    run_model,
)
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model


@pytest.fixture(params=["bert", "llama"])
def model(request):
    return tiny_model(request.param)


def recorded(model, blocks, batches):
    """(what enters the first block by batch, how every block is called: [block][batch])."""
    store = ActivationStore()
    record_block_calls(model, blocks, batches, store, "dense")
    hidden = [store.get("dense", batch) for batch in range(len(batches))]
    return hidden, [[store.get(calls_of("dense", i), batch) for batch in range(len(batches))] for i in range(len(blocks))]


def batches_for(model):
    return [{**batch, "use_cache": False} for batch in tiny_batches(model, batches=3, padding="left")]


def test_inputs_and_outputs_are_captured():
    layer = nn.Linear(3, 2)
    x = torch.randn(5, 3)
    with capture_activations({"in": Point(layer, 0), "out": Point(layer, None)}) as activations:
        y = layer(x)
    assert list(activations) == ["in", "out"]
    assert torch.equal(activations["in"], x)
    assert torch.equal(activations["out"], y)
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_any_positional_argument_can_be_captured(model):
    block = reference.blocks(model)[0]
    point = Point(block.output, 1) if model.config.model_type == "bert" else Point(block.mlp, 0)
    with torch.no_grad(), capture_activations({"x": point}) as activations:
        model(**tiny_batches(model)[0])
    assert activations["x"].shape == (8, 12, 32)


def test_a_layer_that_runs_twice_is_an_error():
    layer = nn.Linear(3, 3)
    with (
        pytest.raises(ModelError, match=r"spot: the layer ran twice .*chunk"),
        capture_activations({"spot": Point(layer, None)}),
    ):
        layer(layer(torch.zeros(1, 3)))
    assert not layer._forward_hooks


@pytest.mark.parametrize("error", [OSError(28, "full"), TypeError("of mine"), MemoryError(), CalibrationError("NaN")])
def test_an_error_of_a_receiver_is_raised_as_it_is(model, error):
    """It says nothing of the batch, during whose pass it was raised."""

    def receive(_name, _value):
        raise error

    points = {"block": Point(reference.blocks(model)[1], None)}
    with pytest.raises(type(error)) as caught, torch.no_grad(), receive_activations(points, receive):
        run_model(model, tiny_batches(model)[0])
    assert caught.value is error
    assert not reference.blocks(model)[1]._forward_hooks


def test_a_hook_that_cannot_be_set_leaves_none_behind():
    layer = nn.Linear(3, 3)
    with pytest.raises(AttributeError), capture_activations({"a": Point(layer, 0), "b": Point(None, 0)}):
        pass
    assert not layer._forward_pre_hooks


def test_stopping_early(model):
    block = reference.blocks(model)[0]
    after = []
    (hidden, *_), calls = recorded(model, list(reference.blocks(model)), batches_for(model)[:1])
    block.register_forward_hook(lambda *_: after.append(1))
    inner = block.attention.self.query if model.config.model_type == "bert" else block.self_attn.q_proj
    with torch.no_grad(), capture_activations({"q": Point(inner, 0)}, stop=True) as activations:
        assert run_block(block, hidden, calls[0][0]) is hidden
    assert "q" in activations
    assert not after
    with torch.no_grad():
        assert run_block(block, hidden, calls[0][0]) is not hidden
    assert after


def test_blocks_one_by_one_are_the_whole_model(model):
    """Hidden states after each block, bit for bit, for every batch."""
    batches = batches_for(model)
    blocks = list(reference.blocks(model))
    with torch.no_grad():
        hidden, calls = recorded(model, blocks, batches)
        for number, batch in enumerate(batches):
            states = model(**batch, output_hidden_states=True)["hidden_states"]
            x = hidden[number]
            for layer, block in enumerate(blocks):
                torch.testing.assert_close(x, states[layer], rtol=0, atol=0)
                x = run_block(block, x, calls[layer][number])
            last = model.norm(x) if model.config.model_type == "llama" else x
            torch.testing.assert_close(last, states[-1], rtol=0, atol=0)


def test_recording_runs_the_first_block_once_and_puts_forwards_back(model):
    blocks = list(reference.blocks(model))
    ran = []
    blocks[0].register_forward_pre_hook(lambda *_: None)
    for number, block in enumerate(blocks):
        inner = block.attention if model.config.model_type == "bert" else block.self_attn
        inner.register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    before = model_state(model)
    with torch.no_grad():
        recorded(model, blocks, batches_for(model))
    assert ran == [0]
    assert_same_state(model, before)


@pytest.mark.parametrize("length", [None, 1, 2])
def test_recording_hands_hidden_states_on_as_the_blocks_do(length):
    """Alone, or in a tuple of one or more: what comes after the blocks unpacks it."""
    model = tiny_model("bert")
    blocks = list(reference.blocks(model))
    for block in blocks:
        original = block.forward
        block.forward = lambda *args, original=original, **kwargs: (
            original(*args, **kwargs) if length is None else (original(*args, **kwargs), *[None] * (length - 1))
        )
    returned = []
    for block in blocks[:-1]:
        block.register_forward_hook(lambda _module, _args, output: returned.append(output))
    with torch.no_grad():
        recorded(model, blocks, batches_for(model))
    for output in returned:
        assert isinstance(output, torch.Tensor) if length is None else [type(output), len(output)] == [tuple, length]
    assert returned


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
        recorded(model, list(reference.blocks(model)), batches_for(model))
        assert vars(block)["forward"] is theirs
        model(**batches_for(model)[0])
    assert called


@pytest.mark.parametrize("bad", [{"input_ids": torch.ones(1, 500, dtype=torch.int64)}, {"nonsense": torch.ones(1)}, {}])
def test_a_batch_that_is_not_taken_is_named(bad):
    model = tiny_model("bert")
    before = model_state(model)
    good = batches_for(model)[0]
    with torch.no_grad(), pytest.raises(CalibrationError, match="BertModel does not take calibration batch 1 with"):
        recorded(model, list(model.encoder.layer), [good, bad])
    assert_same_state(model, before)
    with torch.no_grad(), pytest.raises(CalibrationError, match="does not take calibration batch 7 with"):
        run_model(model, bad, 7)


def test_blocks_that_are_never_called_are_noticed(model):
    lonely = nn.Linear(2, 2)
    with (
        torch.no_grad(),
        pytest.raises(ModelError, match="did not call its last block; the family's table names the wrong blocks"),
    ):
        recorded(model, [*reference.blocks(model), lonely], batches_for(model))
    assert "forward" not in vars(lonely)


def test_run_block_unpacks_tuples():
    class Pair(nn.Module):
        def forward(self, hidden, scale, *, shift):
            return hidden * scale + shift, "more"

    x = torch.ones(2, 3)
    assert torch.equal(run_block(Pair(), x, BlockCall((2.0,), {"shift": 1.0})), torch.full((2, 3), 3.0))


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_preserve_model_state_restores_modes_and_the_random_state(model, error):
    model.train()
    reference.blocks(model)[0].eval()
    torch.manual_seed(0)
    before = model_state(model)
    try:
        with preserve_model_state(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            torch.rand(3)
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error
    assert_same_state(model, before)


def test_the_store_keeps_series_by_batch():
    store, first, second = ActivationStore(), torch.ones(2), torch.zeros(2)
    store.put("dense", 1, second)
    store.put("dense", 0, first)
    assert store.batches("dense") == [0, 1]
    store.share("dense", "pruned")
    assert store.get("pruned", 0) is first  # without a copy
    store.put("pruned", 0, second)
    assert store.get("dense", 0) is first  # each changes for itself
    store.discard("dense", "never there")
    assert store.names() == ["pruned"]
    assert store.batches("dense") == []
    with pytest.raises(KeyError):
        store.get("dense", 0)


def test_a_recorded_model_keeps_nothing_but_what_is_in_the_store(model):
    """The calls and the first hidden states are all that outlives the pass."""
    store = ActivationStore()
    blocks = list(reference.blocks(model))
    with torch.no_grad():
        record_block_calls(model, blocks, batches_for(model), store, "dense")
    assert store.names() == sorted(["dense", *(calls_of("dense", i) for i in range(len(blocks)))])
    assert all(store.batches(name) == [0, 1, 2] for name in store.names())
