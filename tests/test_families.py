"""Every family that the library knows passes the contract, on a tiny random model."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import liar
from liar.errors import BudgetError, CalibrationError, CheckpointError, ModelError, OptionError
from liar.models import layout_of
from liar.testing import assert_same_state, check_family, model_state, tiny_batches, tiny_model

FAMILIES = {family.model_type: family for family in liar.families()}
# Of some families a part is not cut; their notes say why.
HEADS_ONLY = {"gpt_oss", "mixtral", "qwen2_moe", "qwen3_moe"}
NEURONS_ONLY = {"deberta-v2", "olmo2", "olmo3", "phi3"}


def head_of(model_type):
    """Language models have their head on, so that they generate text; the others are bare."""
    config = transformers.CONFIG_MAPPING[model_type]
    if config().is_encoder_decoder:
        return "speech-seq2seq" if model_type == "whisper" else "seq2seq-lm"
    causal = config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and config not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return "causal-lm" if causal else None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_passes_the_contract(model_type):
    layout = check_family(tiny_model(model_type, head=head_of(model_type)))
    parts = {"neurons"} if model_type in NEURONS_ONLY else {"heads"} if model_type in HEADS_ONLY else {"heads", "neurons"}
    assert {site.kind for site in layout.sites} == parts
    assert len(layout.sites) == 2 * len(parts) * len(layout.stacks)
    if len(layout.stacks) == 2:
        assert len(layout.uncovered) == 2 * 4
        assert "attention between the two is not cut" in FAMILIES[model_type].note
    elif len(parts) == 2:
        assert layout.uncovered == ()
    else:
        assert "only" in FAMILIES[model_type].note or "experts" in FAMILIES[model_type].note


def test_there_are_the_families_that_people_have():
    assert len(FAMILIES) >= 25


# What the contract on tiny models that were never loaded does not see


@pytest.mark.parametrize("model_type", ["vit", "nomic_bert", "gpt_neox"])
def test_a_loaded_model_whose_tensors_had_other_names_is_saved_standalone(model_type, tmp_path):
    """Their first releases named tensors in another way; `save_pretrained` of a loaded model goes back to that."""
    tiny_model(model_type, head=head_of(model_type)).save_pretrained(tmp_path / "dense")
    model = liar.load(tmp_path / "dense")
    liar.remove(model, {"heads.0": [0, 1], "neurons.1": list(range(20))})
    liar.make_standalone(model)
    model.save_pretrained(tmp_path / "slim")
    automatic = transformers.AutoModelForCausalLM if head_of(model_type) else transformers.AutoModel
    again = automatic.from_pretrained(tmp_path / "slim", trust_remote_code=True).train(False)
    batch = tiny_batches(model)[0]
    assert torch.equal(again(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("model_type", ["bloom", "cohere", "gpt_oss", "mpnet", "t5"])
def test_the_code_of_a_folder_cuts_what_belongs_to_heads(model_type, tmp_path):
    """Parameters with rows for each head, and arguments with entries for each."""
    model = tiny_model(model_type, head=head_of(model_type))
    liar.remove(model, {"heads.0": [0]})
    liar.save(model, tmp_path / "slim", standalone=True)
    auto = {"causal-lm": "AutoModelForCausalLM", "seq2seq-lm": "AutoModelForSeq2SeqLM"}.get(head_of(model_type), "AutoModel")
    again = getattr(transformers, auto).from_pretrained(tmp_path / "slim", trust_remote_code=True).train(False)
    assert type(again) is not type(model)
    (batch,) = tiny_batches(model, batches=1)
    assert torch.equal(again(**batch)[0], model(**batch)[0])
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(liar.load(tmp_path / "again")(**batch)[0], model(**batch)[0])


@pytest.mark.parametrize("model_type", ["bloom", "dinov2", "mpnet", "nomic_bert", "opt", "vit", "wav2vec2"])
def test_the_stock_class_never_fills_cut_heads_at_random(model_type, tmp_path):
    model = tiny_model(model_type)
    liar.remove(model, {"heads.0": [0, 1]})
    liar.save(model, tmp_path / "slim")
    with pytest.raises((ValueError, RuntimeError, AttributeError)):
        type(model).from_pretrained(tmp_path / "slim", ignore_mismatched_sizes=True)
    assert [site.units for site in layout_of(liar.load(tmp_path / "slim")).of_kind("heads")] == [2, 4]


def test_loading_does_not_fill_cut_layers_at_random_either(tmp_path):
    tiny_model("vit").save_pretrained(tmp_path / "dense")
    model = liar.load(tmp_path / "dense")
    liar.remove(model, {"heads.0": [0, 1]})
    model.save_pretrained(tmp_path / "slim")
    with pytest.raises(CheckpointError, match="expected the shapes of the model's layers"):
        liar.load(tmp_path / "slim", ignore_mismatched_sizes=True)


@pytest.mark.parametrize(
    ("model_type", "entries"), [("deberta-v2", {"conv_kernel_size": 3}), ("stablelm", {"use_parallel_residual": True})]
)
def test_other_versions_of_a_family_are_refused(model_type, entries):
    with pytest.raises(ModelError, match="which builds other blocks"):
        layout_of(tiny_model(model_type, **entries))


def test_a_scale_of_zero_does_no_harm():
    model = tiny_model("dinov2")
    with torch.no_grad():
        model.encoder.layer[0].layer_scale1.lambda1[3] = 0
    report = liar.prune(model, tiny_batches(model), keep=0.6, progress=False)
    assert all(site.after <= site.before for site in report.sites)


# Images and sound


def test_images_leave_the_model_and_the_random_state_alone():
    model = tiny_model("wav2vec2", layerdrop=0.9).train()
    batches = tiny_batches(model)
    before, numbers = model_state(model), np.random.get_state()[1].copy()
    for _ in range(5):
        liar.Calibration.of(batches, model)
    assert_same_state(model, before)
    assert (np.random.get_state()[1] == numbers).all()


def test_padded_sound_counts_as_its_frames():
    model = tiny_model("wav2vec2")
    (batch,) = tiny_batches(model, batches=1, sequences=3)
    lengths = (640, 320, 480)
    mask = (torch.arange(640) < torch.tensor(lengths)[:, None]).long()
    (frames,) = liar.Calibration.of([{**batch, "attention_mask": mask}], model).token_masks
    alone = [
        liar.Calibration.of([{"input_values": batch["input_values"][i : i + 1, :length]}], model).tokens
        for i, length in enumerate(lengths)
    ]
    assert frames.sum(1).tolist() == alone
    for wrong in (mask[:, :300], mask * 0.5):
        with pytest.raises(CalibrationError, match=r"expected (an )?attention_mask"):
            liar.Calibration.of([{**batch, "attention_mask": wrong}], model)


@pytest.mark.parametrize("data", [["a text"], "a text", [Image.new("RGB", (16, 16))], Image.new("RGB", (16, 16))])
def test_texts_and_pictures_are_not_what_a_model_of_images_reads(data):
    with pytest.raises(
        CalibrationError, match=r"got (strings, but a ViTModel reads pixel_values|a picture): call its processor"
    ):
        liar.Calibration.of(data, tiny_model("vit"))


def test_sound_that_ends_in_zeros_is_told(caplog):
    model = tiny_model("wav2vec2")
    (batch,) = tiny_batches(model, batches=1, sequences=3)
    liar.Calibration.of([batch], model)
    assert not caplog.records
    batch["input_values"][1, -100:] = 0
    liar.Calibration.of([batch], model)
    assert "1 of its 3 sounds end in zeros, which count as sound" in caplog.text


@pytest.mark.parametrize("criterion", ["magnitude", "wanda", "fluctuation"])
def test_scores_count_what_reaches_the_stream(criterion):
    """DINOv2 multiplies every channel of what a layer gives: a unit that writes to channels times zero is worth nothing."""
    model = tiny_model("dinov2")
    block = model.encoder.layer[0]
    with torch.no_grad():
        block.layer_scale2.lambda1[:16] = 0
        block.mlp.fc2.weight[16:, 0] = 0
        block.mlp.fc2.weight[:, 0] *= 100
        block.mlp.fc1.weight[0] *= 1e-3
        block.mlp.fc1.bias[0] = 1
    mask = liar.select(model, tiny_batches(model), keep=0.97, criterion=criterion, progress=False)
    assert not mask["neurons.0"][0]


def test_experts_are_named_where_a_share_cannot_be_met():
    model = tiny_model("mixtral")
    with pytest.raises(BudgetError, match=r"\d\d% are in layers that are never cut, such as experts"):
        liar.select(model, tiny_batches(model), keep=0.3, progress=False)


@pytest.mark.parametrize("pixels", [torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "a path", torch.zeros(3)])
def test_other_images_are_refused(pixels):
    with pytest.raises(CalibrationError, match="expected pixel_values, a tensor of floats"):
        liar.Calibration.of([{"pixel_values": pixels}], tiny_model("vit"))


def test_repeated_images_are_in_one_fold():
    model = tiny_model("vit", image_size=32)
    (batch,) = tiny_batches(model, batches=1, sequences=6)
    pixels = torch.cat([batch["pixel_values"], batch["pixel_values"]])
    calibration = liar.Calibration.of([{"pixel_values": pixels}], model)
    (fold,) = calibration.folds
    first, second = fold.view(2, 6, -1)
    assert torch.equal(first, second)
    assert calibration.distinct_tokens < calibration.tokens


@pytest.mark.parametrize("criterion", ["reconstruction", "fisher"])
def test_a_vector_for_every_sequence_is_an_output(criterion):
    config = tiny_model("clip_text_model").config
    config.projection_dim = 8
    model = transformers.CLIPTextModelWithProjection(config).train(False)
    mask = liar.select(model, tiny_batches(model), keep=0.6, criterion=criterion, progress=False)
    assert mask.parameters(layout_of(model)) <= 0.6 * layout_of(model).parameters


def test_outputs_that_are_nothing_known_are_refused():
    config = tiny_model("vit").config
    model = transformers.ViTForMaskedImageModeling(config).train(False)
    with pytest.raises(ModelError, match=r"the model's first output is .* expected logits, a vector for each sequence"):
        liar.select(model, tiny_batches(model), keep=0.6, progress=False)
    liar.select(model, tiny_batches(model), keep=0.6, criterion="wanda", progress=False)


def test_a_budget_in_time_is_for_models_of_texts():
    with pytest.raises(OptionError, match=r"expected a model of texts, .* got a ViTModel: choose a budget in parameters"):
        liar.select(tiny_model("vit"), keep=0.6, criterion="magnitude", budget="latency")
