"""Plans: what runs are said to need, beside what they hold and take; bad input; a plan without streams would be seen."""

import copy
import inspect
import json
import threading
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, LlamaConfig, masking_utils
from typer.testing import CliRunner

import liar
from benchmarks.speed import random_llama
from liar.cli import app
from liar.data import FOLDS
from liar.errors import CheckpointError, LiarError, ModelError, OptionError
from liar.models import layout_of
from liar.options import PlanOptions, ReconstructOptions, SelectOptions, options_in
from liar.planning import choose_activations
from liar.planning.imitation import Tally, fakes, imitation
from liar.planning.memory import phases
from liar.planning.passes import kept_units, workload_of
from liar.planning.places import memory
from liar.planning.workload import Data
from liar.statistics import Folds, TokenIndex
from liar.testing import tiny_batches, tiny_model

FAMILIES = ("bert", "gpt2", "llama", "t5", "vit", "gptj", "whisper")


def planned(model, batches, **options):
    return liar.plan(model, batches, **{"keep": 0.5, "measure": False, **options})


def workload(model, batches, keep=0.5):
    layout, calibration = layout_of(model), liar.Calibration.of(batches, model)
    return workload_of(model, layout, Data.of_calibration(calibration), kept_units(layout, keep), weights=False)


@pytest.fixture(scope="module")
def llama():
    """Large enough that its tensors, and not the interpreter, decide: 2 layers of 256, 8,192 tokens."""
    return random_llama(8_192, width=256, feed_forward=688, layers=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_imitation_computes_what_the_model_does(family):
    """Products of one pass: those that torch counts with real tensors, where attention is not fused."""
    model = tiny_model(family, attention="eager")
    batch = tiny_batches(model, padding=None)[0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(**batch)
    with imitation(model) as fake, Tally() as tally, torch.no_grad():
        fake(**fakes(batch))
    assert tally.flops == counter.get_total_flops() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_family_is_planned(family):
    model = tiny_model(family)
    need = planned(model, tiny_batches(model)).memory
    assert need["device"].host > need["disk"].host > 0
    assert need["disk"].disk > 0


def test_a_tally_counts_what_is_held():
    with Tally() as tally:
        kept = torch.zeros(1000)
        view = kept.view(10, 100)
        gone = torch.zeros(500)
        del gone
        assert tally.held == 4000
        assert tally.peak == 6000
        del kept, view
        assert tally.held == 0


def test_a_plan_of_a_configuration_is_that_of_the_model():
    config = LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    from transformers import LlamaForCausalLM  # noqa: PLC0415 (after the configuration, for reading)

    model = LlamaForCausalLM(config)
    batches = [{"input_ids": torch.randint(1, 100, (4, 32))} for _ in range(8)]
    ours, theirs = planned(model, batches), planned(config, 1024, max_length=32, batch_size=4)
    assert ours.memory == theirs.memory
    assert ours.flops == theirs.flops
    assert (ours.parameters, ours.model_bytes) == (theirs.parameters, theirs.model_bytes)


def test_a_large_model_needs_no_memory():
    """Two billion parameters, planned in a second."""
    config = LlamaConfig(architectures=["LlamaForCausalLM"], num_hidden_layers=8)
    plan = planned(config, 262_144, max_length=2048, batch_size=1, dtype="bfloat16", device="cuda")
    assert plan.model_bytes == pytest.approx(2 * plan.parameters, rel=1e-4)
    assert plan.parameters > 1.8e9
    assert plan.memory["host"].device < plan.memory["device"].device
    assert plan.memory["host"].host > plan.memory["device"].host == 0
    assert plan.memory["disk"].disk == plan.memory["host"].host
    offloaded = planned(config, 262_144, max_length=2048, batch_size=1, dtype="bfloat16", device="cuda", offload=True,
                        criterion="magnitude")  # fmt: skip
    assert offloaded.memory["host"].device < plan.memory["host"].device - 0.8 * plan.model_bytes


def test_memory_of_moments_is_that_of_accumulators():
    """The sums of all folds as they are, beside the formula."""
    folds = Folds(FOLDS)
    z, t = torch.randn(4, 64, 24), torch.randn(4, 64, 16)
    fold = torch.arange(4).repeat_interleave(64)
    folds.update(z, t, TokenIndex.of(torch.ones(4, 64, dtype=torch.bool), fold, FOLDS))
    held = sum(part[name].nbytes for part in folds.state_dict()["parts"] for name in ("gram", "cross"))
    from liar.planning.memory import folds as formula  # noqa: PLC0415 (its name is taken)

    assert formula(24, 16) == held


def of_tensors(step):
    return step.slim + step.activations + step.work


@pytest.mark.parametrize(("stage", "refit"), [("selection", True), ("reconstruction", True), ("reconstruction", False)])
def test_a_run_holds_what_was_planned(llama, stage, refit):
    """The tensors of a real run, counted as those of the imitation; what the allocator adds, `benchmarks.planning` measures."""
    model, batches = llama
    numbers = workload(model, batches)
    mask = liar.select(model, batches, keep=0.5, criterion="magnitude", widths="balanced", progress=False)
    steps = phases(numbers, SelectOptions(0.5), ReconstructOptions(refit=refit))
    expected = max(of_tensors(step) for step in steps if step.stage == stage)
    with Tally() as tally:
        if stage == "selection":
            liar.collect(model, batches, progress=False)
        else:
            liar.reconstruct(copy.deepcopy(model), mask, batches, quality=0, refit=refit, progress=False)
    assert tally.peak == pytest.approx(expected, rel=0.15)
    assert tally.peak != pytest.approx(expected - max(step.activations for step in steps), rel=0.15)


def test_a_plan_that_forgets_streams_is_seen(llama):
    """More tokens need more memory on the device, and hardly any with the activations on disk."""
    model, batches = llama
    few, many = (workload(model, batches * times) for times in (1, 4))
    steps = [phases(each, SelectOptions(0.5, "magnitude"), ReconstructOptions()) for each in (few, many)]
    on = {place: [memory(w, s, place, on_cpu=True, offload=False).added for w, s in zip((few, many), steps, strict=True)]
          for place in ("device", "disk")}  # fmt: skip
    assert on["device"][1] > 3 * on["device"][0] - 2 * on["disk"][0]
    assert on["disk"][1] == pytest.approx(on["disk"][0], rel=0.1)
    forgotten = [replace(step, activations=0.0) for step in steps[1]]
    assert memory(many, forgotten, "device", on_cpu=True, offload=False).added < 0.5 * on["device"][1]


def test_activations_are_kept_where_they_fit(llama):
    model, batches = llama
    calibration = liar.Calibration.of(batches, model)

    def chosen(**free):
        return choose_activations(model, calibration, ReconstructOptions(), free={"device": 0.0, "disk": 1e12, **free})

    need = planned(model, batches, criterion="magnitude", keep=1.0).memory
    assert chosen(host=1e12) == "device"
    assert chosen(host=1.01 * need["device"].added / 0.85) == "device"
    assert chosen(host=0.9 * need["device"].added / 0.85) == "disk"
    assert choose_activations(model, calibration, ReconstructOptions()) == "device"


def looks(_module, _args, output):
    if torch.isnan(output).any():
        pytest.fail("no value is lost here")


def stops(_module, _args, output):
    assert type(output) is torch.Tensor, "expected an ordinary tensor"


@pytest.mark.parametrize("hook", [looks, stops])
def test_a_model_that_cannot_be_planned_is_pruned_all_the_same(llama, hook, caplog):
    model, batches = copy.deepcopy(llama[0]), llama[1]
    model.get_input_embeddings().register_forward_hook(hook)
    options = {"keep": 0.6, "criterion": "magnitude", "quality": 0, "progress": False}
    liar.prune(expected := copy.deepcopy(model), batches, **options)
    liar.prune(model, batches, activations="auto", **options)
    assert "cannot be planned" in caplog.text
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)


def test_threads_leave_transformers_as_it_was(llama):
    find, inside, outside = masking_utils.find_packed_sequence_indices, threading.Event(), threading.Event()

    def other():
        with imitation(llama[0]):
            inside.set()
            outside.wait(10)

    with imitation(llama[0]):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait(1)
    outside.set()
    thread.join()
    assert masking_utils.find_packed_sequence_indices is find


def test_a_step_that_looks_at_values_is_named_as_such(llama):
    model = copy.deepcopy(llama[0])
    model.get_input_embeddings().register_forward_hook(looks)
    with pytest.raises(ModelError, match="cannot be planned: one of its steps looks at values"):
        planned(model, 1000)


def test_outputs_without_names_are_planned(llama, caplog):
    model, batches = copy.deepcopy(llama[0]), llama[1]
    model.config.return_dict = False
    calibration = liar.Calibration.of(batches, model)
    assert choose_activations(model, calibration, ReconstructOptions()) == "device"
    assert not caplog.text
    assert model.config.return_dict is False


def test_options_change_what_they_should(llama):
    model, batches = llama
    whole = planned(model, batches)
    assert planned(model, batches, refit=False).flops["reconstruction: moments"] < whole.flops["reconstruction: moments"]
    assert planned(model, batches, keep=0.9).flops["reconstruction: solves"] > whole.flops["reconstruction: solves"]
    assert "reconstruction: pruned forward" not in planned(model, batches, target="layer_output").flops
    full = planned(model, batches, target="residual_stream")
    for stage in ("pruned forward", "moments", "solves"):
        assert full.flops[f"reconstruction: {stage}"] < whole.flops[f"reconstruction: {stage}"]
    assert planned(model, batches, quality=0).flops["comparison"] == 0
    assert set(planned(model, batches, activations="disk").memory) == {"disk"}
    cheap = planned(model, batches, criterion="fluctuation")
    assert "selection: elimination" not in cheap.flops
    assert cheap.memory["device"].added <= whole.memory["device"].added


def test_time_is_estimated_from_measured_rates():
    model = tiny_model("llama", head="causal-lm")
    plan = liar.plan(model, tiny_batches(model), keep=0.5)
    assert plan.seconds is not None
    assert set(plan.seconds) == set(plan.flops)
    assert all(seconds > 0 for stage, seconds in plan.seconds.items() if plan.flops[stage])
    assert "together" in str(plan)
    assert json.loads(plan.to_json())["memory"]["disk"]["disk"] == plan.memory["disk"].disk


def test_options_are_those_of_prune():
    parameters, run = (inspect.signature(verb).parameters for verb in (liar.plan, liar.prune))
    own = {each.name: each.default for each, _ in options_in(PlanOptions) if each.name != "tokens"}
    assert {name: parameters[name].default for name in own} == own
    shared = parameters.keys() - own.keys() - {"dtype", "device"}
    assert shared == run.keys() - {"steps", "held_out", "progress", "activations", "run_folder"}
    assert all(parameters[name].default == run[name].default for name in shared)


@pytest.mark.parametrize(
    ("model", "calib", "options", "error", "message"),
    [
        (BertConfig(), 1000, {"keep": 0}, OptionError, "keep=0: expected the share that stays"),
        (BertConfig(), 1000, {"keep": 1.5}, OptionError, "above 0 and at most 1"),
        (BertConfig(), 0, {}, OptionError, "tokens=0: expected a whole number, at least 1"),
        (BertConfig(), 1.5, {}, OptionError, "tokens=1.5"),
        (BertConfig(), True, {}, OptionError, "tokens=True"),
        (BertConfig(), 1000, {"activations": "moon"}, OptionError, "expected one of 'device', 'host', 'disk'"),
        (BertConfig(), 1000, {"max_length": 0}, OptionError, "max_length=0"),
        (BertConfig(), 1000, {"criterion": "luck"}, OptionError, "expected one of 'reconstruction'"),
        (BertConfig(), 1000, {"device": "warp", "measure": True}, OptionError, "torch cannot use it here"),
        (BertConfig(), [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], {}, OptionError, "a number of tokens"),
        ("no/such/../folder", 1000, {}, LiarError, "no/such"),
        (3, 1000, {}, ModelError, "expected a Hugging Face model"),
    ],
)
def test_bad_input_is_refused(model, calib, options, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        planned(model, calib, **options)


def test_folders_without_a_known_configuration_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a model folder with a readable config\.json"):
        planned(tmp_path, 1000)
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="model_type='mamba', which is no family that can be pruned"):
        planned(tmp_path, 1000)


def test_only_the_configuration_is_read(tmp_path):
    config = LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config.save_pretrained(tmp_path)
    assert planned(tmp_path, 1000).memory == planned(config, 1000).memory


def test_the_command_line_prints_the_plan(tmp_path):
    LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4
    ).save_pretrained(tmp_path)
    arguments = ["plan", str(tmp_path), "--keep", "0.5", "--tokens", "1000", "--no-measure"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0
    assert "activations on" in done.output
    written = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).output)
    assert written["tokens"] == 1000
    offloaded = [CliRunner().invoke(app, [*arguments, *more]).output for more in (["--weights", "disk"], ["--offload"])]
    assert offloaded[0] == offloaded[1] != done.output
    refused = CliRunner().invoke(app, ["plan", str(tmp_path / "none"), "--keep", "0.5", "--tokens", "10"])
    assert refused.exit_code == 1
    assert "expected a model folder" in refused.output
