"""Texts that a model writes itself: what is sampled, what is rejected, files that go on after a kill, errors."""

import copy
import json
import sys

import numpy as np
import pytest
import scipy.stats
import torch
from cases import word_tokenizer

import liar
from liar.data import texts as texts_of
from liar.errors import CalibrationError, CheckpointError, ModelError, OptionError
from liar.generation import language
from liar.generation.language import language_check
from liar.generation.sampling import PROMPT, Vocabulary, batch_seed, sample_texts
from liar.io import load_tokenizer
from liar.options import GenerateOptions
from liar.testing import assert_same_state, model_state, tiny_model

HOW = {"tokens": 300, "max_length": 12, "batch_size": 8, "language": "off", "progress": False}


@pytest.fixture(scope="module")
def words():
    """As LLaMA's tokenizer: no padding token, an end token."""
    made = word_tokenizer(frame=False, pad=False)
    made.eos_token = "w3"
    return made


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", head="causal-lm")


@pytest.fixture(scope="module")
def written(model, words):
    return liar.self_generate(model, words, **HOW)


@pytest.fixture(scope="module")
def stories(stories_folder):
    return liar.load(stories_folder), load_tokenizer(str(stories_folder))


def naive(model, first, length, ends, seed):
    """The tokens of texts that begin with some tokens: the whole of each in every forward pass, without a cache."""
    texts = [[token] for token in first]
    torch.manual_seed(seed)
    for position in range(1, length):
        going_on = [text for text in texts if len(text) == position]
        # Those that end while they are greedy are left out of the batch; others stay in it, and draw for nothing.
        batch = going_on if position < PROMPT else [text for text in texts if len(text) >= PROMPT]
        with torch.no_grad():
            logits = torch.stack([model(torch.tensor([text])).logits[0, -1] for text in batch])
        new = logits.argmax(1) if position < PROMPT else torch.multinomial(logits.softmax(1), 1)[:, 0]
        for text, token in zip(batch, new.tolist(), strict=True):
            if len(text) == position and token not in ends:
                text.append(token)
    return texts


# What is sampled


@pytest.mark.parametrize("ends", [(95,), (3, 95), (5, 40, 41, 42, 43, 44)])
def test_tokens_are_those_of_naive_sampling(model, ends):
    """With a cache and without one; some texts end while they are greedy, some later, some never."""
    vocabulary = Vocabulary(torch.arange(6, 40), ends, padding=ends[0])
    texts = sample_texts(model, vocabulary, 24, 20, seed=5)
    assert texts == naive(model, [text[0] for text in texts], 20, ends, seed=5)
    if len(ends) > 2:
        lengths = {len(text) for text in texts}
        assert min(lengths) < PROMPT < max(lengths)


def test_tokens_are_those_of_generate(model, words):
    """After the same seed, with the same settings: `generate` as any user would call it."""
    vocabulary = Vocabulary.of(model, words)
    end = list(vocabulary.ends)
    texts = [text for text in sample_texts(model, vocabulary, 32, 20, seed=7) if len(text) >= PROMPT]
    prompts = torch.tensor([text[:PROMPT] for text in texts])
    how = {"attention_mask": torch.ones_like(prompts), "eos_token_id": end, "pad_token_id": end[0]}
    torch.manual_seed(7)
    rows = model.generate(prompts, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_length=20, **how).tolist()
    assert [row[: next((n for n, token in enumerate(row) if token in end), 20)] for row in rows] == texts
    assert len({len(text) for text in texts}) > 1


def test_frequencies_are_the_probabilities(model):
    """4,000 draws after one prompt; at another temperature the test would fail."""
    vocabulary = Vocabulary(torch.tensor([11]), ends=(95,), padding=0)
    texts = sample_texts(model, vocabulary, 4000, PROMPT + 1, seed=0)
    drawn = np.bincount([text[PROMPT] if len(text) > PROMPT else 95 for text in texts], minlength=96)
    with torch.no_grad():
        logits = model(torch.tensor([texts[0][:PROMPT]])).logits[0, -1].double()
    p_value = lambda temperature: scipy.stats.chisquare(drawn, (logits / temperature).softmax(0).numpy() * 4000).pvalue  # noqa: E731
    assert p_value(1.0) > 0.01
    assert p_value(0.9) < 1e-4


def test_first_tokens_are_random_and_never_special(model, words):
    vocabulary = Vocabulary.of(model, words)
    first = [text[0] for text in sample_texts(model, vocabulary, 400, PROMPT + 1, seed=1)]
    assert set(first) <= set(range(len(words))) - set(words.all_special_ids) - set(vocabulary.ends)
    assert len(set(first)) > 70


def test_what_the_folder_recommends_is_not_used_and_stays(model, words, written):
    other = copy.deepcopy(model)
    recommended = other.generation_config
    recommended.update(temperature=0.1, top_k=1, repetition_penalty=5.0, do_sample=True, max_length=7, min_new_tokens=7)
    other.config.use_cache = False
    assert liar.self_generate(other, words, **HOW) == written
    assert other.generation_config is recommended
    assert recommended.top_k == 1


def test_further_end_tokens_end_a_text(model, words):
    other = copy.deepcopy(model)
    other.generation_config.eos_token_id = [10, 11, 12]
    result = liar.self_generate(other, words, **HOW)
    assert not {10, 11, 12, words.eos_token_id} & {token for record in result.records for token in record.input_ids[1:]}


def test_the_model_and_the_random_state_are_as_they_were(words):
    model = tiny_model("llama", head="causal-lm").train()
    before, state = model_state(model), torch.get_rng_state()
    liar.self_generate(model, words, **HOW)
    assert_same_state(model, before)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)


def test_a_pruned_model_writes(model, words):
    slim = copy.deepcopy(model)
    mask = {"heads.0": [1], "heads.1": [0, 1], "neurons.0": list(range(32)), "neurons.1": list(range(10, 64))}
    liar.remove(slim, mask)
    vocabulary = Vocabulary.of(slim, words)
    texts = sample_texts(slim, vocabulary, 8, 12, seed=3)
    assert texts == naive(slim, [text[0] for text in texts], 12, vocabulary.ends, seed=3)


@pytest.mark.parametrize("family", ["gpt2", "opt", "gpt_neox", "bloom"])
def test_other_families(family, words):
    """Of no family that can be pruned, too."""
    sizes = {} if family != "bloom" else {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": 96}
    model = tiny_model(family, head="causal-lm", eos_token_id=5, bos_token_id=4, **sizes)
    assert liar.self_generate(model, words, **HOW).tokens >= 300


# What comes back


def test_counts_and_texts(words, written):
    assert written.tokens >= 300 > written.tokens - len(written.records[-1].input_ids)
    assert written.texts == [words.decode(record.input_ids, skip_special_tokens=True) for record in written.records]
    assert all(len(record.input_ids) <= 12 for record in written.records)
    assert written.rejected == written.records[-1].number + 1 - len(written.records)


def test_seeds(model, words, written):
    assert liar.self_generate(model, words, **HOW) == written
    assert liar.self_generate(model, words, **HOW, seed=1) != written
    assert len({batch_seed(seed, batch) for seed in range(20) for batch in range(20)}) == 400


def test_texts_join_real_ones(words, written, tmp_path):
    batches = liar.calibration(["a text", *written.texts], words, progress=False)
    assert sum(len(batch["input_ids"]) for batch in batches) == 1 + len(written.records)


@pytest.mark.parametrize("stop", [0.0, 0.6])
def test_progress(model, words, written, stop):
    updates = []
    liar.self_generate(model, words, **{**HOW, "progress": updates.append})
    assert (updates[0].fraction, updates[-1].fraction) == (0, 1)
    assert [update.fraction for update in updates] == sorted(update.fraction for update in updates)


# Languages


def test_rejected_texts_are_counted(stories):
    """Texts of a few words are hardly told apart: some are kept, some are not."""
    pytest.importorskip("py3langid")
    how = {**HOW, "max_length": 16, "tokens": 400}
    everything, english = (liar.self_generate(*stories, **{**how, "language": code}) for code in ("off", "en"))
    is_english = language_check("en")
    assert english.rejected > 0
    kept = {record.number: record for record in english.records}
    assert len(kept) + english.rejected == english.records[-1].number + 1
    for record in everything.records:
        assert (record.number in kept) == is_english(record.text)
    assert all(is_english(text) for text in english.texts)


def test_stories_are_english(stories):
    pytest.importorskip("py3langid")
    how = {"tokens": 1500, "max_length": 128, "batch_size": 16, "progress": False}
    result = liar.self_generate(*stories, **how)
    assert result.rejected <= 1
    assert sum(text.count(" the ") for text in result.texts) > 20
    assert liar.self_generate(*stories, **how, language="en").texts[:5] == result.texts[:5]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("One day a little girl went to the park with her dog, and they saw a big red ball.", ["any", "en", "off"]),
        ("Es war einmal ein kleines Mädchen, das gerne im Wald spielte und sang.", ["any", "off"]),
        ("从前有一个小女孩，她喜欢在公园里和她的狗一起玩。", ["any", "off"]),
        ("0.12 43 5,5 7.70 12 98 4.4 20 11 = 3 | 9", ["off"]),
        ("xqzkjv wqpfgh zzxvbq jkqwrt pqxzvn kjhgfd qwxzpl vbnmqz", ["off"]),
        ("~!@#$%^&*()_+{}|:<>?[];',./", ["off"]),
        ("\ufffd" * 30, ["off"]),
        ("", []),
        (" \n\t ", []),
    ],
)
def test_what_is_a_language(text, kept):
    pytest.importorskip("py3langid")
    assert [code for code in ("any", "en", "off") if language_check(code)(text)] == kept


def test_a_model_that_writes_no_language(model, words, tmp_path):
    pytest.importorskip("py3langid")
    with pytest.raises(CalibrationError, match=r"of the first 256 texts .* kept with language='th'; the last one is 'w"):
        liar.self_generate(model, words, **{**HOW, "language": "th", "file": tmp_path / "own.jsonl"})


def test_unknown_languages(model, words):
    pytest.importorskip("py3langid")
    with pytest.raises(OptionError, match=r"language='english': expected any, off, or one of ace, af, .*en, "):
        liar.self_generate(model, words, **{**HOW, "language": "english"})


def test_without_the_extra(model, words, monkeypatch):
    language._detector.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(CalibrationError, match=r'pip install "liar-prune\[language\]", or take all texts with language="off"'):
        liar.self_generate(model, words, **{**HOW, "language": "any"})
    assert liar.self_generate(model, words, **HOW).tokens >= 300


# Files


@pytest.fixture(scope="module")
def complete(model, words, tmp_path_factory):
    """The content of the file of a whole run."""
    file = tmp_path_factory.mktemp("complete") / "own.jsonl"
    liar.self_generate(model, words, **HOW, file=file)
    return file.read_bytes()


def test_lines_are_the_records(complete, written, tmp_path):
    lines = [json.loads(line) for line in complete.splitlines()]
    assert [(line["number"], line["text"], line["input_ids"]) for line in lines] == [
        (record.number, record.text, list(record.input_ids)) for record in written.records
    ]
    (tmp_path / "own.jsonl").write_bytes(complete)
    assert list(texts_of(str(tmp_path / "own.jsonl"))) == written.texts


def test_a_file_goes_on_wherever_it_was_cut(model, words, written, complete, tmp_path):
    file, lines = tmp_path / "own.jsonl", complete.splitlines(keepends=True)
    boundaries = np.cumsum([len(line) for line in lines])
    for size in {0, 1, *boundaries[::5], *(boundaries[3::7] - 1), *(boundaries[::9] + 20), len(complete)}:
        file.write_bytes(complete[:size])
        assert liar.self_generate(model, words, **HOW, file=file) == written
        assert file.read_bytes() == complete, size


def test_a_run_that_is_stopped_goes_on(model, words, written, complete, tmp_path):
    file = tmp_path / "own.jsonl"

    def stop(update):
        if update.fraction > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        liar.self_generate(model, words, **{**HOW, "progress": stop}, file=file)
    begun = file.read_bytes()
    assert complete.startswith(begun)
    assert 0 < len(begun) < len(complete)
    assert liar.self_generate(model, words, **HOW, file=file) == written
    assert file.read_bytes() == complete


def test_more_and_fewer_tokens(model, words, written, complete, tmp_path):
    file = tmp_path / "own.jsonl"
    file.write_bytes(complete)
    more = liar.self_generate(model, words, **{**HOW, "tokens": 500}, file=file)
    assert more == liar.self_generate(model, words, **{**HOW, "tokens": 500})
    longer = file.read_bytes()
    assert longer.startswith(complete)
    for tokens in (20, 300):
        fewer = liar.self_generate(model, words, **{**HOW, "tokens": tokens}, file=file)
        assert fewer == liar.self_generate(model, words, **{**HOW, "tokens": tokens})
        assert file.read_bytes() == longer


@pytest.mark.parametrize("change", [{"seed": 1}, {"max_length": 13}, {"batch_size": 7}, {"model": 1}])
@pytest.mark.parametrize("tokens", [20, 400])
def test_files_of_other_settings(model, words, complete, tmp_path, change, tokens):
    """Also where the file has more texts than are asked for."""
    change = dict(change)
    file = tmp_path / "own.jsonl"
    file.write_bytes(complete)
    model = tiny_model("llama", head="causal-lm", seed=change.pop("model", 0))
    with pytest.raises(CheckpointError, match=r"own.jsonl holds other texts than this model writes with these settings"):
        liar.self_generate(model, words, **{**HOW, **change, "tokens": tokens}, file=file)
    assert file.read_bytes() == complete


@pytest.mark.parametrize(
    "content",
    [
        b"one text\nanother\n",
        b'{"text": "a"}\n',
        b"[1]\n",
        b"\xff\xfe\n",
        b'{"number": 3, "text": "", "input_ids": [1]}\n{"number": 3, "text": "", "input_ids": [1]}\n',
        b'{"number": -1, "text": "", "input_ids": []}\n',
        b'{"number": 0, "text": "", "input_ids": 5}\n',
        b"a note without an end of line",
    ],
)
def test_files_of_something_else(model, words, tmp_path, content):
    file = tmp_path / "own.jsonl"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"expected texts as liar.self_generate writes them|holds other texts"):
        liar.self_generate(model, words, **HOW, file=file)
    assert file.read_bytes() == content


@pytest.mark.parametrize("place", ["", "none/own.jsonl"])
def test_places_that_cannot_be_written(model, words, tmp_path, place):
    with pytest.raises(CheckpointError, match="expected a file to write, in a folder that is there"):
        liar.self_generate(model, words, **HOW, file=tmp_path / place)


# Errors


@pytest.mark.parametrize(
    ("family", "head", "says"),
    [
        ("bert", "masked-lm", "BertForMaskedLM cannot write texts: expected a causal language model with its head"),
        ("llama", None, "LlamaModel cannot write texts"),
        ("vit", None, "ViTModel cannot write texts"),
    ],
)
def test_models_that_do_not_write(words, family, head, says):
    with pytest.raises(ModelError, match=says):
        liar.self_generate(tiny_model(family, head=head), words, **HOW)


def test_something_that_is_no_model(words):
    with pytest.raises(ModelError, match=r"expected a Hugging Face model, got a str; read a folder with liar.load"):
        liar.self_generate("llama", words, **HOW)
    with pytest.raises(ModelError, match="Linear cannot write texts"):
        liar.self_generate(torch.nn.Linear(2, 2), words, **HOW)


def test_models_that_cannot_run(words):
    model = tiny_model("llama", head="causal-lm")
    model.lm_head.weight.data[5] = torch.nan
    recommended = model.generation_config
    with pytest.raises(ModelError, match=r"LlamaForCausalLM stops while it writes 8 texts of 12 tokens: .* Is the"):
        liar.self_generate(model, words, **HOW)
    assert model.generation_config is recommended
    with pytest.raises(ModelError, match="the model is on the meta device"):
        liar.self_generate(model.to("meta"), words, **HOW)


def test_tokenizers(model, words):
    with pytest.raises(CalibrationError, match="expected a Hugging Face tokenizer, got a NoneType"):
        liar.self_generate(model, None, **HOW)
    with pytest.raises(CalibrationError, match=r"the tokenizer has no end token, .* set tokenizer.eos_token"):
        liar.self_generate(model, word_tokenizer(frame=False, pad=False), **HOW)
    small = tiny_model("llama", head="causal-lm", vocab_size=11)
    with pytest.raises(CalibrationError, match=r"has 88 tokens \(its end token is number 11\), the model 11: expected"):
        liar.self_generate(small, words, **HOW)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tokens": 0}, "tokens=0: expected a whole number, at least 1"),
        (
            {"max_length": 5},
            "max_length=5: expected at least 6: one random token, the next 4 greedily, and one",
        ),
        ({"max_length": 65}, "max_length=65: expected at most 64, the positions of this LlamaForCausalLM"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number, at least 1"),
        ({"language": ""}, "language='': expected a text"),
        ({"seed": 0.5}, "seed=0.5: expected a whole number"),
    ],
)
def test_options(model, words, options, says):
    with pytest.raises(OptionError, match=says):
        liar.self_generate(model, words, **{**HOW, **options})


def test_the_defaults_are_those_of_the_options():
    assert GenerateOptions(10).checked() == GenerateOptions(10, 256, 32, "any", 0)
