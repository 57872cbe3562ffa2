"""Models with an encoder and a decoder: two stacks of blocks, each with tokens of its own, cut in one walk."""

from dataclasses import replace

import pytest
import torch
import transformers

import liar
from liar.data import Calibration
from liar.errors import CalibrationError, CheckpointError, OptionError
from liar.models import family_of, layout_of
from liar.models.tables.bart import BART
from liar.models.tables.t5 import T5
from liar.options import ReconstructOptions
from liar.repair import RepairContext, RepairStep, apply_steps, closed_form_steps
from liar.runtime import Point, capture_activations
from liar.testing import check_family, tiny_batches, tiny_model

HEADS = {"bart": "seq2seq-lm", "t5": "seq2seq-lm", "whisper": "speech-seq2seq"}


def half(layout):
    return liar.Mask({site.name: torch.arange(site.units) % 2 == 0 for site in layout.sites})


class _Seen(RepairStep):
    """What the consumers of the pruned model read, once they are repaired."""

    def __init__(self):
        self.inputs = {}

    def repair(self, site):
        self.inputs[site.name] = [read["consumer_input"] for _, read in site.run_pruned("consumer_input")]


@pytest.mark.parametrize("model_type", HEADS)
def test_the_pruned_decoder_reads_the_pruned_encoder(model_type):
    model = tiny_model(model_type, head=HEADS[model_type])
    batches, layout, seen = tiny_batches(model, batches=2), layout_of(model), _Seen()
    steps = [*closed_form_steps(RepairContext(ReconstructOptions(), int)), seen]
    calibration = Calibration.of(batches, model)
    apply_steps(model, layout, calibration, steps, half(layout))
    points = {site.name: Point(model.get_submodule(site.module), 0) for site in layout_of(model).sites}
    for number, batch in enumerate(calibration.batches):
        with capture_activations(points) as inputs, torch.no_grad():
            model(**batch)
        for site in layout.sites:
            tokens = calibration.of_stack(site.stack).token_masks[number]
            torch.testing.assert_close(seen.inputs[site.name][number][tokens], inputs[site.name][tokens], rtol=1e-4, atol=1e-5)


def test_blocks_of_both_stacks_are_counted_through():
    model = tiny_model("t5")
    layout = layout_of(model)
    assert [len(stack) for stack in layout.stacks] == [2, 2]
    assert [(site.name, site.stack, site.block) for site in layout.of_kind("neurons")] == [
        ("neurons.0", 0, "encoder.block.0"),
        ("neurons.1", 0, "encoder.block.1"),
        ("neurons.2", 1, "decoder.block.0"),
        ("neurons.3", 1, "decoder.block.1"),
    ]
    assert all("EncDecAttention" in name for name in layout.uncovered)


def test_each_stack_has_tokens_of_its_own():
    model = tiny_model("bart", head="seq2seq-lm")
    (batch,) = tiny_batches(model, batches=1)
    calibration = Calibration.of([batch], model)
    assert calibration.tokens == int(batch["decoder_attention_mask"].sum())
    assert calibration.encoder.tokens == int(batch["attention_mask"].sum())
    assert [part.tokens for part in (calibration.of_stack(0), calibration.of_stack(1))] == [
        calibration.encoder.tokens,
        calibration.tokens,
    ]
    assert Calibration.of(tiny_batches(tiny_model()), tiny_model()).encoder is None


@pytest.mark.parametrize("model_type", ["bart", "t5"])
def test_labels_say_what_the_decoder_reads(model_type):
    model = tiny_model(model_type, head="seq2seq-lm")
    (batch,) = tiny_batches(model, batches=1)
    labels = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    (made,) = Calibration.of([{**inputs, "labels": labels}], model).batches
    with torch.no_grad():
        # As the model itself does it.
        expected = model(**inputs, labels=labels, decoder_attention_mask=(labels != -100).long()).logits
        torch.testing.assert_close(model(**made).logits, expected)


def test_rows_of_a_data_set_are_padded_each_by_its_length():
    model = tiny_model("t5", head="seq2seq-lm")
    rows = [{"input_ids": [5, 6, 7], "labels": [8, 9]}, {"input_ids": [5], "labels": [6, 7, 8, 9]}]
    calibration = Calibration.of(rows, model)
    assert calibration.encoder.token_masks[0].tolist() == [[True, True, True], [True, False, False]]
    assert calibration.token_masks[0].tolist() == [[True, True, False, False], [True, True, True, True]]


@pytest.mark.parametrize(
    ("batch", "says"),
    [
        ({}, "has a decoder, which reads a text of its own: expected decoder_input_ids, .* as labels"),
        ({"labels": torch.ones(2)}, "has a decoder, which reads a text of its own"),
        ({"decoder_input_ids": torch.ones(2).long()}, "expected decoder_input_ids, a tensor .* got .2."),
    ],
)
def test_a_decoder_without_a_text_is_refused(batch, says):
    model = tiny_model("bart", head="seq2seq-lm")
    with pytest.raises(CalibrationError, match=says):
        liar.prune(model, [{"input_ids": torch.ones(2, 4).long(), **batch}], keep=0.5, progress=False)


def test_labels_without_a_start_token_are_refused():
    model = tiny_model("mbart")
    model.config.decoder_start_token_id = None
    with pytest.raises(CalibrationError, match="no decoder_start_token_id"):
        Calibration.of([{"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(2, 4).long()}], model)


# Tables


def test_the_configuration_says_which_table():
    plain, gated = tiny_model("t5"), tiny_model("t5", feed_forward_proj="gated-gelu")
    assert [len(family_of(model).patterns[1].producers) for model in (plain, gated)] == [1, 2]
    check_family(gated)


@pytest.mark.parametrize(
    ("model_type", "entries"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("wav2vec2", {"do_stable_layer_norm": True}),
        ("hubert", {"do_stable_layer_norm": True}),
    ],
)
def test_the_other_versions_of_a_family_pass_the_contract(model_type, entries):
    model = tiny_model(model_type, **entries)
    assert family_of(model).requires != family_of(tiny_model(model_type)).requires
    check_family(model)


def test_an_encoder_alone_has_one_stack():
    model = transformers.T5EncoderModel(tiny_model("t5").config).train(False)
    assert len(layout_of(model).stacks) == 1
    check_family(model)


WRONG = {
    "the encoder's residual in the decoder": (
        replace(
            BART, decoder=replace(BART.decoder, patterns=(replace(BART.patterns[0], residual=("fc1", 0)), BART.patterns[1]))
        ),
        "heads.2",
    ),
    "the decoder's feed-forward part read before its attention to the encoder": (
        replace(
            T5,
            decoder=replace(
                T5.decoder,
                patterns=(T5.decoder.patterns[0], replace(T5.decoder.patterns[1], residual=("layer.1.layer_norm", 0))),
            ),
        ),
        "neurons.2: .*residual",
    ),
    "a bias that is not handed on": (
        replace(
            T5,
            patterns=(
                replace(T5.patterns[0], head_argument=replace(T5.patterns[0].head_argument, returned=None)),
                T5.patterns[1],
            ),
        ),
        "does not run|differs",
    ),
    "a bias that nothing makes": (
        replace(
            T5,
            patterns=(replace(T5.patterns[0], head_argument=replace(T5.patterns[0].head_argument, maker=None)), T5.patterns[1]),
        ),
        "does not run|differs",
    ),
    "decoder before encoder": (
        replace(BART, blocks="decoder.layers", decoder=replace(BART.decoder, blocks="encoder.layers")),
        "the data passes the sites in the order",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_table_fails_the_contract(name, registry):
    family, says = WRONG[name]
    liar.register(family)
    with pytest.raises(AssertionError, match=says):
        check_family(tiny_model(family.model_type))


# Folders


@pytest.mark.parametrize("model_type", HEADS)
@pytest.mark.parametrize("name", ["heads.1", "neurons.3"])
def test_no_stock_class_fills_a_cut_stack_at_random(model_type, name, tmp_path):
    model = tiny_model(model_type)
    liar.remove(model, {name: [0]})
    liar.save(model, tmp_path / "slim")
    transformers.AutoConfig.from_pretrained(tmp_path / "slim")
    with pytest.raises(Exception, match="per-layer attribute"):
        type(model).from_pretrained(tmp_path / "slim", ignore_mismatched_sizes=True)
    assert layout_of(liar.load(tmp_path / "slim"))[name].units == layout_of(model)[name].units


def test_a_decoder_of_another_depth_and_width(tmp_path):
    model = tiny_model("bart", head="seq2seq-lm", decoder_layers=3, decoder_ffn_dim=48, num_hidden_layers=1)
    report = liar.prune(model, tiny_batches(model), keep=0.6, progress=False)
    assert len(report.sites) == 8
    liar.save(model, tmp_path / "slim", standalone=True)
    (batch,) = tiny_batches(model, batches=1)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "slim", trust_remote_code=True).train(False)
    for loaded in (again, liar.load(tmp_path / "slim")):
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)


def test_a_missing_block_of_the_decoder_is_damage(tmp_path):
    model = tiny_model("t5")
    model.save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_decoder_layers": 2', '"num_decoder_layers": 1000000'))
    with pytest.raises(CheckpointError, match=r"config\.json says 1000000 blocks, the weights have 2"):
        liar.load(tmp_path)


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher", "taylor", "snip", "fluctuation", "wanda", "magnitude"])
def test_every_criterion_runs(criterion):
    model = tiny_model("t5", head="seq2seq-lm")
    mask = liar.select(model, tiny_batches(model), keep=0.7, criterion=criterion, progress=False)
    assert mask.parameters(layout_of(model)) <= 0.7 * layout_of(model).parameters


def test_time_is_measured_for_one_stack():
    with pytest.raises(OptionError, match=r"with one stack of blocks, .* got a T5Model: choose a budget in parameters"):
        liar.latency(tiny_model("t5"))


def test_the_repair_is_better_than_the_cut():
    model = tiny_model("bart", head="seq2seq-lm")
    *calib, new = tiny_batches(model, batches=8, sequences=32, length=16)
    mask = half(layout_of(model))
    cut, repaired = (tiny_model("bart", head="seq2seq-lm") for _ in range(2))
    liar.remove(cut, mask)
    liar.reconstruct(repaired, mask, calib, progress=False)
    tokens = new["decoder_attention_mask"].bool()
    with torch.no_grad():
        worse, better = (((m(**new).logits - model(**new).logits)[tokens]).square().mean() for m in (cut, repaired))
    assert better < 0.5 * worse
