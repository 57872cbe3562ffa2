"""Tables of problems that more than one test file uses. Rows are built in float64 with numpy; nothing here is random twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from liar.progress import Progress

# tokens, channels, out
SHAPES = {"tall": (400, 12, 7), "wide_out": (300, 5, 40), "one_channel": (50, 1, 3), "one_out": (200, 16, 1)}
CONDITIONS = (1e0, 1e2, 1e4, 1e6)
SOLVERS = ("auto", "cholesky", "eigh", "lstsq")
# relative size of rounding in each dtype of the rows
DTYPES = ("float64", "float32", "bfloat16", "float16")


def quiet() -> Progress:
    """The progress of any run, without a bar."""
    return Progress("test", dict.fromkeys(("sensitivity", "elimination", "moments", "gradients"), 1.0), show=False)


def rows(tokens: int, channels: int, condition: float = 10.0, seed: int = 0, mean: float = 1.0) -> np.ndarray:
    """[tokens, channels] whose centred singular values run from 1 to 1 / condition (times sqrt(tokens)), with a mean."""
    generator = np.random.default_rng(seed)
    left = generator.normal(size=(tokens, channels))
    left = np.linalg.qr(left - left.mean(0))[0]
    right = np.linalg.qr(generator.normal(size=(channels, channels)))[0]
    return left * np.geomspace(1, 1 / condition, channels) * np.sqrt(tokens) @ right + mean * generator.normal(size=channels)


@dataclass(frozen=True)
class Problem:
    """Rows z beside targets t, and the weights that stand if nothing is done."""

    z: np.ndarray
    t: np.ndarray
    start: np.ndarray
    bias: np.ndarray


def problem(
    tokens: int, channels: int, out: int, condition: float = 10.0, noise: float = 0.1, seed: int = 0, mean: float = 1.0
) -> Problem:
    """Targets that are linear in z, plus noise; the start is near the truth but not it."""
    generator = np.random.default_rng(seed + 1)
    z = rows(tokens, channels, condition, seed, mean)
    truth = generator.normal(size=(channels, out))
    t = z @ truth + generator.normal(size=out) + noise * generator.normal(size=(tokens, out))
    start = truth + 0.5 * generator.normal(size=truth.shape)
    return Problem(z, t, start, generator.normal(size=out))


def _dead(z: np.ndarray) -> np.ndarray:
    z[:, 2] = 0
    return z


def _constant(z: np.ndarray) -> np.ndarray:
    z[:, 2] = 3.25
    return z


def _duplicate(z: np.ndarray) -> np.ndarray:
    z[:, 2] = z[:, 5]
    return z


def _combination(z: np.ndarray) -> np.ndarray:
    z[:, 2] = 0.5 * z[:, 5] - 2 * z[:, 1]
    return z


def _rank_one(z: np.ndarray) -> np.ndarray:
    return np.outer(z[:, 0] - z[:, 0].mean(), z[0])


# name -> (what is done to the rows [tokens, channels], tokens)
SINGULARITIES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], int]] = {
    "dead_channel": (_dead, 200),
    "constant_channel": (_constant, 200),
    "duplicated_channel": (_duplicate, 200),
    "linear_combination": (_combination, 200),
    "rank_one": (_rank_one, 200),
    "fewer_tokens_than_channels": (lambda z: z, 6),
    "one_token": (lambda z: z, 1),
    "all_dead": (np.zeros_like, 200),
}


def _pattern(rule: Callable[[int, int], bool]) -> Callable[[int, int], list[bool]]:
    """(units, layer) -> the units a rule (unit, layer) keeps; a site of one unit keeps it."""
    return lambda units, layer: [units == 1 or rule(unit, layer) for unit in range(units)]


KEEPS: dict[str, Callable[[int, int], list[bool]]] = {
    "every_other": _pattern(lambda unit, layer: (unit + layer) % 2 == 0),
    "first": _pattern(lambda unit, layer: unit == 0),
    "all_but_first": _pattern(lambda unit, layer: unit != 0),
    "unequal": _pattern(lambda unit, layer: unit <= layer or unit % 3 == 0),
    "one_layer_only": _pattern(lambda unit, layer: layer != 1 or unit % 2 == 0),
}

# name -> arguments of liar.testing.tiny_model; the models a family's own variants are tried on
MODELS: dict[str, dict] = {
    "bert": {"model_type": "bert"},
    "bert-classifier": {"model_type": "bert", "head": "sequence-classification"},
    "bert-qa": {"model_type": "bert", "head": "question-answering"},
    "bert-mlm": {"model_type": "bert", "head": "masked-lm"},
    "bert-tokens": {"model_type": "bert", "head": "token-classification"},
    "llama": {"model_type": "llama"},
    "llama-lm": {"model_type": "llama", "head": "causal-lm"},
    "llama-8q-2kv": {"model_type": "llama", "head": "causal-lm", "num_attention_heads": 8, "num_key_value_heads": 2},
    "llama-4q-4kv": {"model_type": "llama", "head": "causal-lm", "num_key_value_heads": 4},
    "llama-4q-1kv": {"model_type": "llama", "head": "causal-lm", "num_key_value_heads": 1},
    "llama-wide-heads": {"model_type": "llama", "head": "causal-lm", "head_dim": 12},
    "llama-biases": {"model_type": "llama", "head": "causal-lm", "attention_bias": True, "mlp_bias": True},
    "llama-tied": {"model_type": "llama", "head": "causal-lm", "tie_word_embeddings": True},
    "llama-classifier": {"model_type": "llama", "head": "sequence-classification"},
    "gpt2-lm": {"model_type": "gpt2", "head": "causal-lm", "n_inner": 64, "bos_token_id": None, "eos_token_id": None},
}


def word_tokenizer(*, frame: bool, pad: bool) -> transformers.PreTrainedTokenizerFast:
    """Words w0 … w89 and a few more; with `frame` as BERT has it: [CLS] a [SEP] b [SEP], and token types."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "text", "another", "one", *(f"w{number}" for number in range(80))]
    made = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    names = {"unk_token": "[UNK]", **({"pad_token": "[PAD]"} if pad else {})}
    inputs = ["input_ids", "attention_mask"]
    if frame:
        made.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        names |= {"cls_token": "[CLS]", "sep_token": "[SEP]"}
        inputs.append("token_type_ids")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, model_input_names=inputs, **names)
