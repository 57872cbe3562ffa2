"""Whatever goes wrong is reported in the library's own words; the model, its hooks and the random state stay as they were."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import liar
from liar.errors import BudgetError, CalibrationError, LiarError, MaskError, ModelError, OptionError
from liar.selection import CRITERIA
from liar.testing import assert_same_state, model_state, tiny_batches, tiny_model
from liar.verdicts import Verdict

HALF = {"neurons": torch.arange(64).repeat(2, 1) % 2 == 0}


def reconstruct(model, mask=HALF, batches=None, **options):
    batches = tiny_batches(model) if batches is None else batches
    return liar.reconstruct(model, mask, batches, progress=False, **options)


def select(model, batches=None, **options):
    batches = tiny_batches(model) if batches is None else batches
    return liar.select(model, batches, progress=False, **{"keep": 0.5, **options})


def heads(model):
    return liar.discover(model)["heads.0"].units


def used_up():
    generator = (batch for batch in [1])
    next(generator)
    return generator


def poisoned(model, value=float("nan"), layer=1, row=3):
    """A weight of a producer is damaged (or all of them): the activations of `neurons.1` are not finite."""
    block = model.get_submodule(liar.discover(model).blocks[layer])
    producer = block.intermediate.dense if model.config.model_type == "bert" else block.mlp.up_proj
    producer.weight.data[row, 5] = value
    return model


class Quantised(nn.Linear):
    """As many quantised layers are: a subclass of nn.Linear whose weight holds integers."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None)
        self.weight = nn.Parameter((layer.weight * 10).to(torch.int8), requires_grad=False)


class Wrapped(nn.Module):
    """As adapters are: the layer lies one level deeper."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.base_layer = layer

    def forward(self, x):
        return self.base_layer(x)


def exchanged(model, make):
    site = liar.discover(model).sites[-1]
    owner, _, name = site.module.rpartition(".")
    parent = model.get_submodule(owner)
    setattr(parent, name, make(getattr(parent, name)))
    return model


def renamed(model):
    model.config.model_type = "nobody-knows-this"
    return model


def nameless(model):
    del model.config
    return model


def batch_with(model, **entries):
    return [{**tiny_batches(model)[0], **entries}]


@dataclass(frozen=True)
class Case:
    """One mistake: the call that makes it, and what the message must say."""

    call: Callable[[Any], Any]
    error: type[LiarError]
    says: str
    damage: Callable[[Any], Any] = lambda model: model  # done to the model before its state is taken
    only: str | None = None


RECONSTRUCT = {
    # the mask
    "mask shape": Case(
        lambda m: reconstruct(m, {"neurons": torch.ones(2, 63)}),
        MaskError,
        r"mask of neurons\.0 .*expected shape \[64\].*got \[63\]",
    ),
    "mask layers": Case(
        lambda m: reconstruct(m, {"neurons": torch.ones(3, 64)}), MaskError, "expected one row for each of 2 layers, got 3"
    ),
    "mask name": Case(lambda m: reconstruct(m, {"neuron.0": [1]}), MaskError, r"mask\['neuron\.0'\]: no such site.*neurons\.0"),
    "mask dtype": Case(
        lambda m: reconstruct(m, {"neurons": torch.full((2, 64), 0.3)}),
        MaskError,
        "exactly 0 or 1, got torch.float32.*threshold",
    ),
    "mask of NaN": Case(lambda m: reconstruct(m, {"neurons": torch.full((2, 64), float("nan"))}), MaskError, "exactly 0 or 1"),
    "mask index": Case(lambda m: reconstruct(m, {"neurons": [[64], [0]]}), MaskError, "from 0 to 63, got 64"),
    "mask strings": Case(lambda m: reconstruct(m, {"neurons": [["a"], [0]]}), MaskError, "integers"),
    "mask no mapping": Case(lambda m: reconstruct(m, torch.ones(2, 64)), MaskError, "expected .*got a Tensor"),
    "mask is None": Case(lambda m: reconstruct(m, None), MaskError, "mask=None cuts nothing.* pass a mask, or the dense model"),
    "mask without rows": Case(lambda m: reconstruct(m, {"neurons": None}), MaskError, "neurons"),
    "mask of a number": Case(lambda m: reconstruct(m, {"heads": 3}), MaskError, "heads"),
    "nothing kept": Case(
        lambda m: reconstruct(m, {"neurons": torch.zeros(2, 64)}),
        MaskError,
        r"neurons\.0 .*nothing is kept; keep at least one of 64",
    ),
    "nothing kept in one layer": Case(
        lambda m: reconstruct(m, {"heads.1": torch.zeros(heads(m), dtype=torch.bool)}), MaskError, r"heads\.1 .*nothing is kept"
    ),
    "empty list": Case(lambda m: reconstruct(m, {"neurons.1": []}), MaskError, r"neurons\.1 .*nothing is kept"),
    # the model
    "unknown family": Case(
        reconstruct,
        ModelError,
        "known family, got config.model_type='nobody-knows-this'; `liar families` lists .*register",
        renamed,
    ),
    "no configuration": Case(
        lambda m: reconstruct(m, batches=tiny_batches(tiny_model())), ModelError, "without config.model_type", nameless
    ),
    "quantised": Case(
        reconstruct,
        ModelError,
        r"is a Quantised, expected Linear or Conv1D in float32.*unquantised",
        lambda m: exchanged(m, Quantised),
    ),
    "wrapped": Case(
        reconstruct, ModelError, r"is a Wrapped, expected Linear or Conv1D.*merge", lambda m: exchanged(m, Wrapped)
    ),
    "meta device": Case(
        lambda m: reconstruct(m, batches=tiny_batches(tiny_model())),
        ModelError,
        "meta device.*real weights",
        lambda m: m.to("meta"),
    ),
    "chunked feed-forward": Case(
        reconstruct,
        ModelError,
        "ran twice.*chunk",
        lambda m: [setattr(layer, "chunk_size_feed_forward", 3) for layer in m.encoder.layer] and m,
        only="bert",
    ),
    # the calibration data
    "no batches": Case(lambda m: reconstruct(m, batches=[]), CalibrationError, "empty: expected at least one batch"),
    "used-up generator": Case(lambda m: reconstruct(m, batches=used_up()), CalibrationError, "empty.*used-up generator"),
    "no kept token": Case(
        lambda m: reconstruct(m, batches=batch_with(m, attention_mask=torch.zeros(8, 12))),
        CalibrationError,
        "no token .* is kept: attention_mask is 0 everywhere",
    ),
    "wrong keys": Case(
        lambda m: reconstruct(m, batches=[{"tokens": torch.ones(2, 3, dtype=torch.int64)}]),
        CalibrationError,
        r"batch 0: expected input_ids, a tensor \[sequences, length\], got keys \['tokens'\]",
    ),
    "one dimension": Case(
        lambda m: reconstruct(m, batches=[torch.ones(5, dtype=torch.int64)]),
        CalibrationError,
        r"\[sequences, length\], got \[5\]",
    ),
    "lists of ids": Case(
        lambda m: reconstruct(m, batches=[{"input_ids": [[1, 2], [3]]}]), CalibrationError, "expected input_ids, a tensor"
    ),
    "mask as lists": Case(
        lambda m: reconstruct(m, batches=batch_with(m, attention_mask=[[1] * 12] * 7)), CalibrationError, "attention_mask"
    ),
    "ids too high": Case(
        lambda m: reconstruct(m, batches=[torch.full((2, 5), 96)]),
        CalibrationError,
        "from 0 to 96 - 1.*to 96; was another tokenizer used",
    ),
    "ids negative": Case(lambda m: reconstruct(m, batches=[torch.full((2, 5), -1)]), CalibrationError, "batch 0: .*from -1"),
    "second batch bad": Case(
        lambda m: reconstruct(m, batches=[*tiny_batches(m), torch.full((2, 5), 96)]),
        CalibrationError,
        "batch 4: expected integer ids",
    ),
    "ids as floats": Case(
        lambda m: reconstruct(m, batches=[torch.full((2, 5), 0.5)]), CalibrationError, "integer ids.*torch.float32"
    ),
    "mask of another shape": Case(
        lambda m: reconstruct(m, batches=batch_with(m, attention_mask=torch.ones(8, 11))),
        CalibrationError,
        r"attention_mask, a tensor of shape \[8, 12\], got \[8, 11\]",
    ),
    "too long": Case(
        lambda m: reconstruct(m, batches=tiny_batches(m, length=65)),
        CalibrationError,
        r"BertModel does not take calibration batch 0 with .*\[8, 65\]",
        only="bert",
    ),
    "token types out of range": Case(
        lambda m: reconstruct(m, batches=[*tiny_batches(m), *batch_with(m, token_type_ids=torch.full((8, 12), 9))]),
        CalibrationError,
        "does not take calibration batch 4",
        only="bert",
    ),
    "strings": Case(
        lambda m: reconstruct(m, batches=["a text"]), CalibrationError, r"tokenise them first with liar\.calibration"
    ),
    "one string": Case(lambda m: reconstruct(m, batches="a text"), CalibrationError, "tokenise them first"),
    "a number": Case(lambda m: reconstruct(m, batches=7), CalibrationError, "expected a DataLoader .*got a int"),
    "tuples": Case(
        lambda m: reconstruct(m, batches=[(torch.ones(2, 3), torch.ones(2))]),
        CalibrationError,
        "expected a mapping.*got a tuple",
    ),
    "NaN in the weights": Case(
        lambda m: reconstruct(m, target="layer_output"),
        CalibrationError,
        r"neurons\.1 \(.*\): NaN or Inf in the activations",
        poisoned,
    ),
    "NaN on the dense stream": Case(
        lambda m: reconstruct(m, refit=False), CalibrationError, r"neurons\.1 \(.*\): NaN or Inf in the activations", poisoned
    ),
    "Inf in the weights": Case(
        lambda m: reconstruct(m, refit=False),
        CalibrationError,
        "NaN or Inf in the activations.*float16",
        lambda m: poisoned(m, float("inf")),
    ),
    "NaN in a producer": Case(
        reconstruct,
        CalibrationError,
        r"neurons\.1 \(.*\): NaN or Inf in the weights of its producers",
        lambda m: poisoned(m, row=slice(None)),
    ),
    "a list of ids": Case(
        lambda m: reconstruct(m, batches=[{"input_ids": [[1, 2, 3], [4]]}]),
        CalibrationError,
        "expected input_ids, a tensor .*got a list; call the tokenizer with return_tensors='pt'",
    ),
    "NaN with lstsq": Case(lambda m: reconstruct(m, solver="lstsq"), CalibrationError, r"neurons\.1 \(.*NaN or Inf", poisoned),
    "NaN in the first layer": Case(reconstruct, CalibrationError, r"neurons\.0 \(.*NaN or Inf", lambda m: poisoned(m, layer=0)),
    "Inf in the embeddings": Case(
        lambda m: reconstruct(m, batches=[{"inputs_embeds": torch.full((2, 5, 32), float("inf"))}]),
        CalibrationError,
        r"neurons\.0 \(.*NaN or Inf",
    ),
    # options
    "target": Case(
        lambda m: reconstruct(m, target="dense"), OptionError, "target='dense' is not known; expected one of 'damped_stream'"
    ),
    "solver": Case(lambda m: reconstruct(m, solver="qr"), OptionError, "solver='qr'.*'cholesky'"),
    "bias": Case(lambda m: reconstruct(m, bias="no"), OptionError, "bias='no'.*'create'"),
    "ridge negative": Case(lambda m: reconstruct(m, ridge=-1), OptionError, 'ridge=-1: expected "auto" or a number >= 0'),
    "ridge infinite": Case(lambda m: reconstruct(m, ridge=float("inf")), OptionError, "ridge=inf"),
    "ridge NaN": Case(lambda m: reconstruct(m, ridge=float("nan")), OptionError, "ridge=nan"),
    "ridge a word": Case(lambda m: reconstruct(m, ridge="none"), OptionError, "ridge='none'"),
}

SELECT = {
    "keep 0": Case(lambda m: select(m, keep=0), OptionError, "keep=0: expected the share that stays"),
    "keep 1.5": Case(lambda m: select(m, keep=1.5), OptionError, "keep=1.5: expected the share that stays"),
    "keep -1": Case(lambda m: select(m, keep=-1.0), OptionError, "keep=-1.0"),
    "keep NaN": Case(lambda m: select(m, keep=float("nan")), OptionError, "keep=nan"),
    "keep too little": Case(lambda m: select(m, keep=0.01), BudgetError, "keep=0.01 cannot be met: the least that is"),
    "criterion": Case(lambda m: select(m, criterion="luck"), OptionError, "criterion='luck'.*'wanda'"),
    "widths": Case(lambda m: select(m, widths="any"), OptionError, "widths='any'.*'free', 'balanced', 'uniform'"),
    "budget": Case(lambda m: select(m, budget="time"), OptionError, "budget='time'.*'params', 'flops', 'latency'"),
    "round_to": Case(lambda m: select(m, round_to=0), OptionError, "round_to=0: expected a whole number, at least 1"),
    "protect": Case(
        lambda m: select(m, protect="heads.0"), OptionError, "protect='heads.0': expected a list of names of sites"
    ),
    "no batches given": Case(
        lambda m: liar.select(m, keep=0.5),
        CalibrationError,
        "criterion='reconstruction' needs activations: pass calibration batches",
    ),
    "no batches": Case(lambda m: select(m, []), CalibrationError, "empty"),
    "ids too high": Case(lambda m: select(m, [torch.full((2, 5), 96)]), CalibrationError, "was another tokenizer used"),
    "too long": Case(
        lambda m: select(m, tiny_batches(m, length=65)),
        CalibrationError,
        "BertModel does not take calibration batch 0",
        only="bert",
    ),
    "second batch not taken": Case(
        lambda m: select(m, [*tiny_batches(m), *tiny_batches(m, length=65)]),
        CalibrationError,
        "does not take calibration batch 4",
        only="bert",
    ),
    "NaN": Case(select, CalibrationError, r"neurons\.1.*NaN or Inf", poisoned),
    "NaN for wanda": Case(lambda m: select(m, criterion="wanda"), CalibrationError, r"neurons\.1.*NaN or Inf", poisoned),
    "unknown family": Case(select, ModelError, "nobody-knows-this", renamed),
    "meta device": Case(
        lambda m: liar.select(m, keep=0.5, criterion="magnitude"), ModelError, "meta device", lambda m: m.to("meta")
    ),
    "quantised": Case(select, ModelError, "Quantised", lambda m: exchanged(m, Quantised)),
}

PRUNE = {
    "a number": Case(lambda m: liar.prune(m, 7, keep=0.5), CalibrationError, "expected a DataLoader .*got a int"),
    "no batches given": Case(
        lambda m: liar.prune(m, None, keep=0.5), CalibrationError, "expected a DataLoader .*got a NoneType"
    ),
    "used-up generator": Case(lambda m: liar.prune(m, used_up(), keep=0.5), CalibrationError, "empty.*used-up generator"),
    "one string": Case(lambda m: liar.prune(m, "a text", keep=0.5), CalibrationError, "tokenise them first"),
    "keep": Case(lambda m: liar.prune(m, tiny_batches(m), keep=0), OptionError, "keep=0: expected the share that stays"),
    "solver": Case(lambda m: liar.prune(m, tiny_batches(m), keep=0.5, solver="qr"), OptionError, "solver='qr'"),
    "too little": Case(lambda m: liar.prune(m, tiny_batches(m), keep=0.01), BudgetError, "keep=0.01 cannot be met"),
    "unknown family": Case(lambda m: liar.prune(m, tiny_batches(m), keep=0.5), ModelError, "nobody-knows-this", renamed),
    "meta device": Case(
        lambda m: liar.prune(m, tiny_batches(tiny_model()), keep=0.5), ModelError, "meta device", lambda m: m.to("meta")
    ),
    "NaN": Case(
        lambda m: liar.prune(m, tiny_batches(m), keep=0.5, progress=False), CalibrationError, r"neurons\.1.*NaN", poisoned
    ),
}

CASES = [
    pytest.param(family, case, id=f"{verb}-{name}-{family}")
    for verb, table in (("reconstruct", RECONSTRUCT), ("select", SELECT), ("prune", PRUNE))
    for name, case in table.items()
    for family in ("bert", "llama")
    if case.only in (None, family)
]


def users_model(model_type):
    """A model as a user may bring it: half in training, some weights frozen, with hooks of its own."""
    model = tiny_model(model_type)
    model.train()
    next(model.children()).eval()
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad = number % 3 != 0
    model.register_forward_hook(lambda *_: None)
    return model


def recorded_state(model):
    """`model_state`; a model on the meta device has no weights that could be compared."""
    state = model_state(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        del state["weights"]
    return state


@pytest.mark.parametrize(("model_type", "case"), CASES)
def test_a_mistake_is_named_and_changes_nothing(model_type, case):
    model = case.damage(users_model(model_type))
    torch.manual_seed(3)
    before = recorded_state(model)
    with pytest.raises(case.error, match=f"(?s){case.says}"):
        case.call(model)
    assert_same_state(model, before)


@pytest.mark.parametrize(
    "verb",
    [lambda m, b: reconstruct(m, batches=b), lambda m, b: liar.prune(m, b, keep=0.5, progress=False)],
    ids=["reconstruct", "prune"],
)
@pytest.mark.parametrize("where", ["first block", "last consumer", "middle of the second pass"])
@pytest.mark.parametrize("raised", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_anywhere_changes_nothing(verb, where, raised):
    """Out of memory, Ctrl-C: not our errors, but the model is as before all the same."""
    model = users_model("bert")
    passes, last = [], 6 if where == "middle of the second pass" else 1

    def interrupt(*_):
        passes.append(1)
        if len(passes) == last:
            raise raised("planned")

    target = model.encoder.layer[0] if where == "first block" else model.encoder.layer[1].output.dense
    target.register_forward_pre_hook(interrupt)
    before = model_state(model)
    with pytest.raises((raised, CalibrationError), match="planned"):
        verb(model, tiny_batches(model))
    assert_same_state(model, before)


def test_progress_bars_do_not_keep_an_error_from_the_user(capsys):
    model = tiny_model()
    with pytest.raises(CalibrationError):
        liar.reconstruct(poisoned(model), HALF, tiny_batches(model))
    assert "reconstruct" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [
    lambda m: m.train(),
    lambda m: m.encoder.layer[0].output.dense.weight.data.neg_(),
    lambda m: m.encoder.layer[0].register_forward_hook(lambda *_: None),
    lambda m: setattr(m.encoder.layer[0], "forward", m.encoder.layer[0].forward),
    lambda m: setattr(m.config, "num_attention_heads", 2),
    lambda m: m.encoder.layer[1].output.dense.weight.requires_grad_(False),
    lambda m: setattr(m.encoder.layer[1].output.dense, "in_features", 3),
    lambda m: torch.rand(()),
    lambda m: setattr(m.encoder.layer[1].output.dense, "weight", nn.Parameter(m.encoder.layer[1].output.dense.weight.clone())),
])  # fmt: skip
def test_the_comparison_of_states_notices(damage):
    """Negative control of every test above."""
    model = tiny_model()
    before = model_state(model)
    assert_same_state(model, before)
    damage(model)
    with pytest.raises(AssertionError, match="changed"):
        assert_same_state(model, before)


def test_success_leaves_the_rest_alone():
    """After a call that works: no hooks, modes as before, random state untouched, nothing recorded for autograd."""
    for verb in (reconstruct, lambda m: liar.prune(m, tiny_batches(m), keep=0.5, progress=False), select):
        model = users_model("llama")
        before = model_state(model)
        verb(model)
        after = model_state(model)
        for what in ("training modes", "hooks", "forward overrides", "gradient mode"):
            assert after[what] == before[what], what
        assert torch.equal(after["random state"], before["random state"])
        assert after["requires_grad"] == before["requires_grad"]
        assert all(parameter.grad_fn is None for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["bert", "llama", "gpt2"])
def test_select_changes_nothing(model_type):
    model = users_model(model_type)
    before = model_state(model)
    for criterion in CRITERIA:
        select(model, criterion=criterion)
        assert_same_state(model, before)


def test_gradients_stay_on_for_the_user():
    model = tiny_model()
    reconstruct(model)
    assert torch.is_grad_enabled()
    model(**tiny_batches(model)[0])[0].sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "pooler" not in name)


def test_called_without_gradients_or_in_inference_mode():
    """A user may well be inside torch.no_grad or inference_mode."""
    model = tiny_model()
    with torch.no_grad():
        reconstruct(model)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_too_few_tokens_is_a_verdict():
    model = tiny_model()
    report = reconstruct(model, batches=tiny_batches(model, batches=1, sequences=2))
    assert report.verdicts["neurons.0"] is Verdict.TOO_FEW_TOKENS
    assert "use more text" in report.verdicts["neurons.0"].text
    assert bool(torch.isfinite(model(**tiny_batches(model)[0])[0]).all())


def test_a_pruned_model_is_no_error():
    model = tiny_model("llama")
    reconstruct(model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MaskError, match=r"expected shape \[32\], got \[64\]"):
        reconstruct(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    reconstruct(model, {"neurons": torch.arange(32).repeat(2, 1) % 2 == 0})
    assert [site.units for site in liar.discover(model).of_kind("neurons")] == [16, 16]


def test_every_error_is_one_kind_of_value_error():
    for kind in (ModelError, MaskError, CalibrationError, BudgetError, OptionError):
        assert issubclass(kind, LiarError)
    assert issubclass(LiarError, ValueError)


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_has_a_sentence(verdict):
    assert len(verdict.text) > 10
    assert str(verdict.value) == verdict.value.lower()
