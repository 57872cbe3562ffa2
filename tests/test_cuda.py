"""Everything runs on a GPU as it does on the CPU, and gives the same."""

from functools import partial

import pytest
import torch

import liar
from benchmarks.baselines import CLOSED_FORM, RULES
from benchmarks.selections import SELECTIONS
from liar.options import BIASES, BUDGETS, SOLVERS, TARGETS, WIDTHS
from liar.selection import CRITERIA
from liar.testing import tiny_batches, tiny_model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

MODELS = {
    "bert": partial(tiny_model, "bert", head="sequence-classification", num_labels=3, max_position_embeddings=128),
    "llama": partial(tiny_model, "llama", head="causal-lm", max_position_embeddings=128),
}
KEEP = 0.6


def setup(family, device, dtype=torch.float64, labels=True):
    """A model, and batches with labels: what is sampled differs from device to device."""
    model = MODELS[family](dtype=dtype).to(device)
    batches = tiny_batches(model)
    for number, batch in enumerate(batches):
        if labels:
            batch["labels"] = (
                batch["input_ids"].where(batch["attention_mask"] > 0, -100)
                if family == "llama"
                else torch.arange(number, number + len(batch["input_ids"]), device=device) % 3
            )
    return model, batches


def logits(model):
    batch = tiny_batches(model, seed=9)[0]
    return model(**batch).logits.detach().cpu()


@pytest.fixture(params=MODELS)
def family(request):
    return request.param


# The reconstruction criterion draws directions of the output, by the generator of the device.
@pytest.mark.parametrize("criterion", sorted(set(CRITERIA) - {"reconstruction"}))
def test_masks_are_the_same(family, criterion):
    masks = [liar.select(*setup(family, device), keep=KEEP, criterion=criterion, progress=False) for device in ("cpu", "cuda")]
    assert masks[0] == masks[1]


@pytest.mark.parametrize("budget", sorted(set(BUDGETS) - {"latency"}))
@pytest.mark.parametrize("widths", WIDTHS)
def test_budgets_run(family, budget, widths):
    model, batches = setup(family, "cuda", torch.float32)
    liar.prune(model, batches, keep=0.8, budget=budget, widths=widths, progress=False)
    assert next(model.parameters()).is_cuda


def test_layers_are_timed(family):
    assert liar.latency(setup(family, "cuda")[0], batch_size=2, length=16, progress=False).dense > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_labels_are_sampled(family, dtype):
    model, batches = setup(family, "cuda", dtype, labels=False)
    report = liar.prune(model, batches, keep=KEEP, progress=False)
    assert model(**batches[0]).logits.isfinite().all()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert liar.Report.from_json(report.to_json()).to_json() == report.to_json()


@pytest.mark.parametrize(
    "options",
    [
        *({"target": target} for target in TARGETS),
        *({"solver": solver} for solver in SOLVERS),
        *({"bias": bias} for bias in BIASES),
        {"refit": False},
        {"ridge": 0.1},
    ],
    ids=str,
)
def test_repairs_are_the_same(family, options):
    mask = liar.select(*setup(family, "cpu"), keep=KEEP, progress=False)
    outputs = []
    for device in ("cpu", "cuda"):
        model, batches = setup(family, device)
        liar.reconstruct(model, mask, batches, progress=False, **options)
        outputs.append(logits(model))
    assert (outputs[0] - outputs[1]).norm() <= 1e-6 * outputs[0].norm()


def test_saved_and_loaded(family, tmp_path):
    model, batches = setup(family, "cuda", torch.float32)
    liar.prune(model, batches, keep=KEEP, progress=False)
    liar.save(model, tmp_path / "out")
    loaded = liar.load(tmp_path / "out")
    assert torch.allclose(logits(loaded.cuda()), logits(model), atol=1e-5)


def test_what_is_inside(family):
    model, batches = setup(family, "cuda")
    moments = liar.moments(model, batches, progress=False)
    mask = liar.select(model, batches, keep=KEEP, progress=False)
    for name, of_site in moments.items():
        liar.interpolation(of_site, mask.masks[name])


@pytest.mark.parametrize("rule", CLOSED_FORM)
def test_rules_of_the_benchmarks(family, rule):
    mask = liar.select(*setup(family, "cpu"), keep=KEEP, progress=False)
    outputs = []
    for device in ("cpu", "cuda"):
        model, batches = setup(family, device)
        RULES[rule](model, mask, batches)
        outputs.append(logits(model))
    assert (outputs[0] - outputs[1]).norm() <= 1e-5 * outputs[0].norm()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_selections_of_the_benchmarks(family, selection):
    model, batches = setup(family, "cuda", torch.float32, labels=False)
    if family == "bert" and selection.startswith(("llm_pruner", "searched")):
        pytest.skip("for language models")
    mask = SELECTIONS[selection](model, batches, KEEP, 0)
    assert mask.parameters(liar.discover(model)) > 0
