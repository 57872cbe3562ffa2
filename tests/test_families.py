"""Every family that the library knows passes the contract, on a tiny random model."""

import pytest
import transformers

import liar
from liar.testing import check_family, tiny_model

FAMILIES = {family.model_type: family for family in liar.families()}
# Of some families a part is not cut; their notes say why.
HEADS_ONLY = {"gpt_oss", "mixtral", "opt", "qwen2_moe", "qwen3_moe"}
NEURONS_ONLY = {"deberta-v2", "olmo2", "olmo3", "phi3"}


def head_of(model_type):
    """Language models have their head on, so that they generate text; the others are bare."""
    config = transformers.CONFIG_MAPPING[model_type]
    causal = config in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and config not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    return "causal-lm" if causal else None


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_passes_the_contract(model_type):
    layout = check_family(tiny_model(model_type, head=head_of(model_type)))
    parts = {"neurons"} if model_type in NEURONS_ONLY else {"heads"} if model_type in HEADS_ONLY else {"heads", "neurons"}
    assert {site.kind for site in layout.sites} == parts
    assert len(layout.sites) == 2 * len(parts)
    if len(parts) == 2:
        assert layout.uncovered == ()
    else:
        assert "only" in FAMILIES[model_type].note or "experts" in FAMILIES[model_type].note


def test_there_are_the_families_that_people_have():
    assert len(FAMILIES) >= 25
