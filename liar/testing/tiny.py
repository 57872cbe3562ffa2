"""Tiny random models and batches, on which everything can be tried in a second."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

_HEADS = {
    None: transformers.AutoModel,
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "sequence-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
}
_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
_TYPE_SIZES: dict[str, dict[str, Any]] = {"llama": {"num_key_value_heads": 2}}


def tiny_model(
    model_type: str = "bert",
    *,
    head: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    **config: Any,
) -> Any:
    """A tiny random model in evaluation mode; weights are large enough that every layer matters, biases and norms too.

    Args:
        model_type: as in a Hugging Face configuration.
        head: None for the bare model, or `"causal-lm"`, `"masked-lm"`, `"question-answering"`,
            `"sequence-classification"`, `"token-classification"`.
        seed: of the weights; the global random state is left alone.
        dtype: of the weights.
        attention: implementation, such as `"sdpa"` or `"eager"`.
        config: entries of the configuration, beside or instead of the tiny defaults.

    Example:
        >>> model = tiny_model("bert", head="sequence-classification", num_labels=3)
        >>> model(**tiny_batches(model)[0]).logits.shape
        torch.Size([8, 3])
    """
    entries = {**_SIZES, **_TYPE_SIZES.get(model_type, {}), **config}
    configuration = transformers.AutoConfig.for_model(model_type, **entries)
    with torch.random.fork_rng(devices=[]):
        model = _HEADS[head].from_config(configuration, attn_implementation=attention)  # type: ignore[no-untyped-call]
    randomise(model, seed)
    return model.to(dtype).eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give all parameters random values, in place: large enough that every layer matters, biases and norms too."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = 1 + 0.2 * values if name.endswith("weight") else 0.3 * values
        elif "embed" not in name:
            values /= parameter.shape[-1] ** 0.5
        parameter.data.copy_(values)


def tiny_batches(
    model: nn.Module,
    *,
    batches: int = 4,
    sequences: int = 8,
    length: int = 12,
    padding: str | None = "right",
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Random calibration batches for a model: sequences of `length // 2` to `length` tokens.

    Args:
        model: decides the vocabulary and the device.
        batches: how many.
        sequences: in each batch.
        length: of the longest sequence.
        padding: `"right"`, `"left"`, or None for sequences of one length.
        seed: of the tokens and lengths.

    Example:
        >>> batch = tiny_batches(tiny_model(), padding="left")[0]
        >>> batch["input_ids"].shape, int(batch["attention_mask"][:, 0].min())
        (torch.Size([8, 12]), 0)
    """
    generator = torch.Generator().manual_seed(seed)
    device, vocabulary = next(model.parameters()).device, int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    result = []
    for _ in range(batches):
        ids = torch.randint(1, vocabulary, (sequences, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (sequences,), generator=generator)
        lengths[0] = length
        real = torch.arange(length) < lengths[:, None] if padding else torch.ones_like(ids, dtype=torch.bool)
        if padding == "left":
            real = real.flip(1)
        result.append({"input_ids": ids.where(real, 0).to(device), "attention_mask": real.long().to(device)})
    return result
