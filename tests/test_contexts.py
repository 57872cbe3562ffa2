"""What the caller has set around a call changes nothing, and an interrupted call leaves all or nothing."""

import copy
import os
import threading

import pytest
import torch
from torch import nn

import liar
import liar.repair.apply
from liar.errors import CalibrationError, ModelError
from liar.surgery import adopt, cut_site
from liar.testing import tiny_batches, tiny_model


class Settings:
    """A context that sets something of torch's and puts it back."""

    def __init__(self, get, put, value):
        self.get, self.put, self.value = get, put, value

    def __enter__(self):
        self.before = self.get()
        self.put(self.value)

    def __exit__(self, *_):
        assert self.get() == self.value, "the caller's setting is back after the call"
        self.put(self.before)


CONTEXTS = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "default dtype": lambda: Settings(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "half as default dtype": lambda: Settings(torch.get_default_dtype, torch.set_default_dtype, torch.float16),
    "low precision": lambda: Settings(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"),
    "a default device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_no_setting_around_a_call_changes_its_result(kind, context):
    model = tiny_model(kind, head=None if kind == "bert" else "causal-lm")
    batches = tiny_batches(model, batches=3)
    expected, own = copy.deepcopy(model), copy.deepcopy(model)
    report = liar.prune(expected, batches, keep=0.5, progress=False)
    with CONTEXTS[context]():
        found = liar.prune(own, batches, keep=0.5, progress=False)
    assert [site.ridge for site in found.sites] == [site.ridge for site in report.sites]
    for value, other in zip(own.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(value, other)
    assert not any(parameter.is_inference() for parameter in own.parameters()), "what comes out can be trained"


def test_the_settings_are_told_apart():
    """Negative control: the same product inside autocast and at the default dtype is another one."""
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x).dtype == torch.bfloat16
    with Settings(torch.get_default_dtype, torch.set_default_dtype, torch.float64):
        assert torch.zeros(1).dtype == torch.float64


@pytest.mark.parametrize("verb", ["select", "prune", "reconstruct", "collect"])
def test_on_the_meta_device_nothing_is_computed(verb):
    model = tiny_model("bert")
    batches = tiny_batches(model)
    calls = {
        "select": lambda: liar.select(model, batches, keep=0.5, progress=False),
        "prune": lambda: liar.prune(model, batches, keep=0.5, progress=False),
        "reconstruct": lambda: liar.reconstruct(model, {}, batches, progress=False),
        "collect": lambda: liar.collect(model, batches, progress=False),
    }
    with torch.device("meta"), pytest.raises(ModelError, match="torch's default device is meta"):
        calls[verb]()


@pytest.mark.parametrize("trainable", ["bias", "weight", "LayerNorm", ""])
def test_what_is_trainable_stays_trainable(trainable):
    model = tiny_model("bert")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trainable in name)
    liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if trainable in name
    }


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("block", [1, 2])
def test_interrupted_while_blocks_are_adopted(block, error, monkeypatch):
    model = tiny_model("llama", head="causal-lm")
    before = state(model)
    calls = []

    def interrupted(old, new):
        calls.append(old)
        if len(calls) == block:
            # Half of the block is the new one's by now.
            for module, cut in list(zip(old.modules(), new.modules(), strict=True))[:5]:
                vars(module).update(vars(cut))
            raise error
        adopt(old, new)

    monkeypatch.setattr(liar.repair.apply, "adopt", interrupted)
    with pytest.raises(error):
        liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    assert len(calls) == block
    assert state(model) == before


def test_interrupted_in_remove(monkeypatch):
    model = tiny_model("bert")
    before, calls = state(model), []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        cut_site(*arguments)

    monkeypatch.setattr(liar.surgery.cut, "cut_site", interrupted)
    with pytest.raises(KeyboardInterrupt):
        liar.remove(model, {"heads": [[0], [1]], "neurons": [[0], [1]]})
    assert state(model) == before


def state(model):
    """All that a verb may not leave half-changed, comparable."""
    modules = [
        (name, {key: value for key, value in vars(module).items() if key not in ("_parameters", "_modules")})
        for name, module in model.named_modules()
    ]
    parameters = [(name, id(p), p.shape, p.requires_grad, p._version) for name, p in model.named_parameters()]
    return modules, parameters, model.config.to_dict()


def test_threads_take_turns_with_one_model():
    """Without the lock, one thread's hooks and flags are in the way of another's: sums are wrong, or the model stays frozen."""
    model = tiny_model("bert", head="sequence-classification")
    batches = tiny_batches(model, batches=2)
    expected = liar.select(model, batches, keep=0.5, progress=False)
    before = [(p.requires_grad, module.training) for module in model.modules() for p in module.parameters()]
    found, errors = [], []

    def work():
        try:
            found.append(liar.select(model, batches, keep=0.5, progress=False))
        except Exception as error:  # noqa: BLE001 (whatever a race makes)
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert found == [expected] * 4
    assert [(p.requires_grad, module.training) for module in model.modules() for p in module.parameters()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_models_are_locked_one_by_one():
    """A thread with another model does not wait."""
    first, second = tiny_model("bert"), tiny_model("bert")
    with liar.runtime.exclusive(first):
        done = threading.Event()
        thread = threading.Thread(target=lambda: (liar.select(second, keep=0.5, criterion="magnitude"), done.set()))
        thread.start()
        assert done.wait(20)
        thread.join()


def test_tuples_in_place_of_named_outputs():
    """`return_dict=False` is the user's choice for their own calls; ours read outputs by name, and leave it as it is."""
    model = tiny_model("bert", head="sequence-classification")
    batches, other = tiny_batches(model), copy.deepcopy(model)
    other.config.return_dict = False
    expected = liar.select(model, batches, keep=0.5, progress=False)
    assert liar.select(other, batches, keep=0.5, progress=False) == expected
    assert other.config.return_dict is False
    assert isinstance(other(**batches[0]), tuple)


def test_a_stream_beyond_all_bounds_changes_no_weight():
    """Errors that are not numbers decide nothing."""
    from liar.solve.ridge import decide  # noqa: PLC0415 (an inner part)
    from liar.statistics import Moments  # noqa: PLC0415

    z = torch.randn(200, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    parts = []
    for rows in z.chunk(2):
        moments = Moments()
        moments.update(rows, 1e150 * rows @ torch.randn(4, 3, dtype=torch.float64))
        parts.append(moments.normal(affine=True))
    weight, bias = torch.full((4, 3), 1e160, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    decision = decide([tuple(parts)], weight, bias, "auto", "auto", enough=True)
    assert decision.ridge == float("inf")
    assert not decision.updated < decision.unchanged


def test_a_model_of_no_rows_is_no_module():
    with pytest.raises(ModelError, match="a Linear without config"):
        liar.prune(nn.Linear(2, 2), [torch.ones(1, 2)], keep=0.5)


@pytest.mark.parametrize("criterion", ["magnitude", "wanda"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_choose_nothing(criterion, value):
    model = tiny_model("bert")
    model.encoder.layer[1].output.dense.weight.data[0, 3] = value
    with pytest.raises(
        CalibrationError,
        match=rf"neurons\.1 \(encoder\.layer\.1\.output\.dense\): NaN or Inf in the scores of criterion='{criterion}'",
    ):
        liar.select(model, tiny_batches(model), keep=0.5, criterion=criterion, progress=False)


@pytest.mark.parametrize("size", [1e12, 1e15, 1e18, 1e19, 1e30])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_a_stream_in_which_the_layers_are_rounding(kind, size):
    """What a layer adds is lost in float32 then, so no error says anything: the weights stay, or the call is refused."""
    model = tiny_model(kind)
    embeddings = model.get_input_embeddings()
    embeddings.weight.data *= size
    batches, cut = tiny_batches(model, batches=3), copy.deepcopy(model)
    mask = liar.select(model, keep=0.5, criterion="magnitude")
    liar.remove(cut, mask)
    try:
        report = liar.reconstruct(model, mask, batches, refit=False, progress=False)
    except CalibrationError:
        return
    for site in report.sites:
        assert site.ridge == float("inf") or site.after < site.before, "nothing changes without evidence"
    if kind != "bert":  # which normalises its embeddings
        assert set(report.verdicts.values()) == {liar.Verdict.NOTHING_HELD_OUT}
        assert all(torch.equal(*pair) for pair in zip(model.parameters(), cut.parameters(), strict=True))


def test_an_iterable_may_use_the_model_in_another_thread():
    """It is read before the model is locked."""
    model = tiny_model("bert")
    batches = tiny_batches(model)

    def slow():
        done = threading.Event()
        worker = threading.Thread(target=lambda: (liar.select(model, keep=0.5, criterion="magnitude"), done.set()))
        worker.start()
        assert done.wait(20), "the model is locked while its batches are read"
        worker.join()
        yield from batches

    calls = [
        lambda: liar.select(model, slow(), keep=0.5, progress=False),
        lambda: liar.collect(model, slow(), progress=False),
        lambda: liar.reconstruct(copy.deepcopy(model), {}, slow(), progress=False),
        lambda: liar.prune(model, slow(), keep=0.5, progress=False),
    ]
    for call in calls:
        call()


def test_settings_of_the_process_are_back_when_threads_are_done():
    """Two models at once: the last one to end puts back what the first one found."""
    models, ready = [tiny_model("bert"), tiny_model("bert")], threading.Barrier(2)
    before = torch.get_float32_matmul_precision(), torch.get_default_dtype()
    torch.set_float32_matmul_precision("high")
    torch.set_default_dtype(torch.float64)
    inside = []

    def work(model):
        with liar.runtime.exclusive(model):
            ready.wait(20)
            inside.append((torch.get_float32_matmul_precision(), torch.get_default_dtype()))

    try:
        threads = [threading.Thread(target=work, args=(model,)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert inside == [("highest", torch.float32)] * 2
        assert (torch.get_float32_matmul_precision(), torch.get_default_dtype()) == ("high", torch.float64)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_default_dtype(before[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks are POSIX")
def test_a_forked_child_is_not_locked_out():
    model = tiny_model("bert")
    with liar.runtime.exclusive(model):
        child = os.fork()
        if child == 0:
            thread = threading.Thread(target=lambda: liar.select(model, keep=0.5, criterion="magnitude"), daemon=True)
            thread.start()
            thread.join(20)
            os._exit(int(thread.is_alive()))
        assert os.waitpid(child, 0)[1] == 0


def test_the_newer_way_to_set_precision():
    """Where the user takes it, torch refuses the older one."""
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    try:
        model = tiny_model("bert")
        liar.prune(model, tiny_batches(model), keep=0.5, progress=False)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
