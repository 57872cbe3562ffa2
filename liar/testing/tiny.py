"""Tiny random models and batches, on which everything can be tried in a second."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_HEADS = {
    None: transformers.AutoModel,
    "causal-lm": transformers.AutoModelForCausalLM,
    "masked-lm": transformers.AutoModelForMaskedLM,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "seq2seq-lm": transformers.AutoModelForSeq2SeqLM,
    "speech-seq2seq": transformers.AutoModelForSpeechSeq2Seq,
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
# Further entries, of the types whose configuration has them.
_GROUPS = {"num_key_value_heads": 2}
_SOUND = {
    "conv_dim": (32, 32),
    "conv_kernel": (8, 4),
    "conv_stride": (8, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
# What a type needs, or should have so that everything in its table matters.
_TWO_STACKS = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "forced_eos_token_id": None,
}
_T5 = {"d_kv": 8, "d_ff": 64, "num_decoder_layers": 2, "decoder_start_token_id": 0, "eos_token_id": 1}
_TYPE_SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bart", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus"), _TWO_STACKS),
    "bert-generation": {"is_decoder": True},
    "clip_vision_model": {"image_size": 16, "patch_size": 8},
    "cohere": {"use_qk_norm": True},
    "deberta-v2": {"relative_attention": True, "share_att_key": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8},
    "distilbert": {"hidden_dim": 64},
    "deit": {"image_size": 16, "patch_size": 8},
    "dinov2": {"image_size": 16, "patch_size": 8, "mlp_ratio": 2},
    "gpt_neo": {"attention_types": [[["global"], 2]]},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gptj": {"rotary_dim": 4, "n_inner": 64, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {"residual_multiplier": 0.5},
    "hubert": _SOUND,
    "mixtral": {"num_local_experts": 4},
    "mt5": _T5,
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "roberta": {"max_position_embeddings": 70},
    "siglip_vision_model": {"image_size": 16, "patch_size": 8},
    "t5": _T5,
    "vit": {"image_size": 16, "patch_size": 8},
    "wav2vec2": _SOUND,
    "whisper": {**_TWO_STACKS, "num_mel_bins": 8, "max_source_positions": 24, "max_target_positions": 64},
}
# By main input of models of images and sound, the shape of one.
_SIGNALS: dict[str, Callable[[Any], tuple[int, ...]]] = {
    "pixel_values": lambda config: (config.num_channels, config.image_size, config.image_size),
    "input_values": lambda config: (640,),
    "input_features": lambda config: (config.num_mel_bins, 2 * config.max_source_positions),
}
# Models that no automatic class knows.
_CLASSES = {"siglip_text_model": transformers.SiglipTextModel}


def tiny_model(
    model_type: str = "bert",
    *,
    head: str | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    **config: Any,
) -> Any:
    """A tiny random model in evaluation mode; weights are large enough that every layer matters, biases and norms too.

    Args:
        model_type: as in a Hugging Face configuration.
        head: None for the bare model, or `"causal-lm"`, `"masked-lm"`, `"question-answering"`, `"seq2seq-lm"`,
            `"sequence-classification"`, `"speech-seq2seq"`, `"token-classification"`.
        seed: of the weights; the global random state is left alone.
        dtype: of the weights.
        attention: implementation, such as `"sdpa"` or `"eager"`; the one that the class prefers if None.
        config: entries of the configuration, beside or instead of the tiny defaults.

    Example:
        >>> model = tiny_model("bert", head="sequence-classification", num_labels=3)
        >>> model(**tiny_batches(model)[0]).logits.shape
        torch.Size([8, 3])
    """
    configuration = _configuration(model_type, config)
    with torch.random.fork_rng(devices=[]):
        if model_type in _CLASSES:
            model: Any = _CLASSES[model_type]._from_config(configuration, attn_implementation=attention)  # type: ignore[no-untyped-call]
        else:
            model = _HEADS[head].from_config(configuration, attn_implementation=attention)  # type: ignore[no-untyped-call]
    randomise(model, seed)
    for parameter in model.parameters():  # buffers stay in float32, as in models that are loaded in 16 bits
        parameter.data = parameter.data.to(dtype)
    return model.train(False)


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Give all parameters random values, in place: large enough that every layer matters, biases and norms too.

    Args:
        model: any model.
        seed: of the values; the global random state is left alone.

    Example:
        >>> from liar.testing import randomise
        >>> bias = model.encoder.layer[0].output.dense.bias
        >>> torch.nn.init.zeros_(bias).any().item()
        False
        >>> randomise(model)
        >>> bias.any().item()
        True
    """
    generator = torch.Generator().manual_seed(seed)
    # Tables of positions that a class makes anew whenever it is built.
    fixed = getattr(model, "_keys_to_ignore_on_save", None) or ()
    for name, parameter in model.named_parameters():
        if name in fixed:
            continue
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = 1 + 0.2 * values if name.endswith(("weight", "lambda1")) else 0.3 * values
        elif parameter.ndim and "embed" not in name:
            values /= parameter[0].numel() ** 0.5
        parameter.data.copy_(values)


def _configuration(model_type: str, changes: Mapping[str, Any]) -> Any:
    """The tiny configuration of a type, with changes."""
    kind = transformers.CONFIG_MAPPING[model_type]
    known = {name: value for name, value in _GROUPS.items() if hasattr(kind(), name) and name not in kind.attribute_map}
    entries = {**_SIZES, **known, **_TYPE_SIZES.get(model_type, {}), **changes}
    if "head_dim" in vars(kind()):
        entries.setdefault("head_dim", entries["hidden_size"] // entries["num_attention_heads"])
    return kind(**entries)


def tiny_batches(
    model: nn.Module,
    *,
    batches: int = 4,
    sequences: int = 8,
    length: int = 12,
    padding: str | None = "right",
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Random calibration batches for a model: sequences of `length // 2` to `length` tokens, or images, or sound.

    Of a model with two stacks, they have a text for the decoder as well.

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
    config: Any = model.config
    device, generator = next(model.parameters()).device, torch.Generator().manual_seed(seed)

    def texts(length: int, side: str | None) -> dict[str, Tensor]:
        ids = torch.randint(1, config.vocab_size, (sequences, length), generator=generator)
        lengths = torch.randint(length // 2, length + 1, (sequences,), generator=generator)
        lengths[0] = length
        real = torch.arange(length) < lengths[:, None] if side else torch.ones_like(ids, dtype=torch.bool)
        if side == "left":
            real = real.flip(1)
        return {"input_ids": ids.where(real, 0), "attention_mask": real.long()}

    def inputs() -> dict[str, Tensor]:
        if model.main_input_name not in _SIGNALS:
            return texts(length, padding)
        shape = _SIGNALS[str(model.main_input_name)](config)
        return {str(model.main_input_name): torch.randn(sequences, *shape, generator=generator)}

    def batch() -> dict[str, Tensor]:
        first = inputs()
        # What the decoder reads has another length.
        second = texts(length - 2, "right" if padding else None) if config.is_encoder_decoder else {}
        both = first | {f"decoder_{name}": value for name, value in second.items()}
        return {name: value.to(device) for name, value in both.items()}

    return [batch() for _ in range(batches)]
