"""Several processes that share a run give what one gives, to the last bits; and none is left alone where another fails.

Real processes with gloo, forked from a server that has imported everything.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from datetime import timedelta
from functools import cache, partial
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch import distributed as torch_distributed
from transformers import AutoTokenizer
from typer.testing import CliRunner

import liar
from liar.cli import app
from liar.models import layout_of
from liar.progress import Progress
from liar.runtime import ActivationStore, OnDisk, distributed
from liar.runtime.places import LITTLE
from liar.selection import CRITERIA, params_of
from liar.selection.fisher import sensitivities
from liar.statistics import ChannelMoments, Factor, Folds, Moments, TokenIndex
from liar.testing import tiny_batches, tiny_model

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    [
        *("pytest", "typer.testing", "liar.api", "liar.cli.run", "liar.testing", "liar.unstructured"),
        *(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "llama", "t5")),
    ]
)
# Relative, of every weight in the Frobenius norm.
SAME = 1e-6


def start(rank, world, folder, job, arguments):
    """What one process does: its result, or its error, is left in a file."""
    torch.set_num_threads(1)
    sys.stderr = open(Path(folder) / f"stderr{rank}", "w", encoding="utf-8")  # noqa: SIM115 (open as long as the process lives)
    torch_distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    try:
        result = job(*arguments)
    except Exception as error:  # noqa: BLE001 (that is what is looked at)
        result = error
    sys.stderr.flush()
    torch.save(result, Path(folder) / f"result{rank}")
    torch_distributed.destroy_process_group()


def in_processes(world, job, *arguments, expect_exit=()):
    """The results of a job in so many processes, and what they wrote to stderr."""
    with tempfile.TemporaryDirectory() as folder:
        started = [
            PROCESSES.Process(target=start, args=(rank, world, folder, job, arguments), daemon=True) for rank in range(world)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join(120)
        hanging = [process for process in started if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, "a process waits for ever"
        left = [rank for rank in range(world) if rank not in expect_exit]
        results = [torch.load(Path(folder) / f"result{rank}", weights_only=False) for rank in left]
        return results, [(Path(folder) / f"stderr{rank}").read_text() for rank in left]


def batches_for(model_type, count, sequences=6, length=14):
    """Batches of different sizes, with padding."""
    draw = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        rows, columns = sequences + number % 3, length + 2 * (number % 2)
        ids = torch.randint(3, 96, (rows, columns), generator=draw)
        real = torch.randint(columns // 2, columns + 1, (rows, 1), generator=draw)
        batch = {"input_ids": ids, "attention_mask": (torch.arange(columns) < real).long()}
        if model_type == "t5":
            batch["decoder_input_ids"] = ids.flip(0)[:, : columns - 5]
        found.append(batch)
    return found


def model_of(model_type, **config):
    head = {"llama": "causal-lm", "t5": "seq2seq-lm"}.get(model_type)
    return tiny_model(model_type, head=head, **config)


def prune(model_type, count, options, sizes=(6, 14)):
    """Weights and report of a pruned model; the report without times."""
    model = model_of(model_type)
    report = liar.prune(model, batches_for(model_type, count, *sizes), keep=0.5, progress=False, **options)
    sites = [(each.site, each.kept, each.verdict, str(each.ridge)) for each in report.sites]
    errors = [number for each in report.sites for number in (each.before, each.after)]
    measures = [number for each in report.quality.measures for number in (each.repaired, each.mask_only)]
    return dict(model.state_dict()), (sites, report.tokens, report.sequences, report.quality.predictions), [*errors, *measures]


def difference(one, other):
    """The largest relative difference of any weight."""
    assert one.keys() == other.keys()
    assert all(one[name].shape == other[name].shape for name in one)
    norms = [((one[name] - other[name]).double().norm() / other[name].double().norm().clamp_min(1e-30)) for name in one]
    return max(map(float, norms))


# name -> model, batches, processes, options
CASES = {
    "llama": ("llama", 5, 2, {}),
    "llama, two without data": ("llama", 2, 4, {}),
    "bert": ("bert", 7, 3, {}),
    "bert, a group of one": ("bert", 3, 1, {}),
    "encoder and decoder": ("t5", 5, 3, {}),
    "layer_output": ("bert", 5, 4, {"target": "layer_output"}),
    "layer_output, one without data": ("llama", 1, 2, {"target": "layer_output", "bias": "create"}),
    "residual_stream": ("llama", 5, 3, {"target": "residual_stream"}),
    "no refit, a ridge": ("llama", 5, 2, {"refit": False, "ridge": 0.01}),
    "lstsq": ("llama", 5, 4, {"solver": "lstsq"}),
    "lstsq, one without data": ("bert", 2, 3, {"solver": "lstsq", "target": "layer_output"}),
    "set aside": ("llama", 5, 2, {"set_aside": True, "quality": 6}),
    "steps": ("llama", 5, 2, {"steps": 2, "criterion": "wanda"}),
    **{criterion: ("llama", 5, 3, {"criterion": criterion}) for criterion in ("fluctuation", "taylor", "fisher", "snip")},
}


def prune_all(world):
    """All cases for so many processes, by name."""
    return {name: prune(kind, count, options) for name, (kind, count, number, options) in CASES.items() if number == world}


@cache
def shared(world):
    return in_processes(world, prune_all, world)[0]


@pytest.mark.parametrize("name", CASES)
def test_several_processes_give_what_one_gives(name):
    model_type, count, world, options = CASES[name]
    weights, facts, numbers = prune(model_type, count, options)
    results = [each[name] for each in shared(world)]
    for others, their_facts, their_numbers in results:
        assert difference(others, weights) <= SAME
        # One solves, and all get the answer: not a bit may differ.
        assert all(torch.equal(others[key], results[0][0][key]) for key in others)
        assert their_facts == facts
        assert their_numbers == pytest.approx(numbers, rel=1e-5, abs=1e-9, nan_ok=True)


def prune_real_encoder(folder):
    """Weights and mask of the real BERT, on texts of different lengths."""
    model, tokenizer = liar.load(folder), AutoTokenizer.from_pretrained(folder)
    texts = [text for text in "\n\n".join(topics.values()).split("\n\n") if len(text) > 60]
    calib = liar.calibration(texts, tokenizer, tokens=4_096, max_length=128, batch_size=4, progress=False)
    report = liar.prune(model, calib, keep=0.6, progress=False)
    return dict(model.state_dict()), [site.kept for site in report.sites]


def test_a_real_encoder(minilm_folder):
    """One unit in the last place of a weight would grow over its six layers to ten times what is allowed."""
    weights, kept = prune_real_encoder(minilm_folder)
    for world in (2, 4):
        for others, kept_there in in_processes(world, prune_real_encoder, minilm_folder)[0]:
            assert kept_there == kept
            assert difference(weights, others) < SAME


def sensitivities_of(folder):
    """Those of a model whose matrices are large enough to be kept on disk."""
    model = tiny_model("llama", head="causal-lm", hidden_size=128, intermediate_size=64)
    data, progress = liar.Calibration.of(batches_for("llama", 5), model), Progress("test", {"sensitivity": 1.0}, show=False)
    store = None if folder is None else ActivationStore(OnDisk(Path(folder)))
    found = sensitivities(model, layout_of(model), data, progress, store)
    return {name: (each.fisher.clone(), each.coherence, each.outputs) for name, each in found.items()}


def test_sensitivities_on_disk(tmp_path):
    """Every process has the sums of all, where what is added in place has to be written anew."""
    expected = sensitivities_of(None)
    assert all(fisher.nbytes >= LITTLE for fisher, _, _ in expected.values())
    for others in in_processes(3, sensitivities_of, str(tmp_path))[0]:
        for name, (fisher, coherence, outputs) in expected.items():
            torch.testing.assert_close(others[name][0], fisher, rtol=1e-4, atol=1e-5 * float(fisher.abs().max()))
            assert others[name][1:] == (pytest.approx(coherence, rel=1e-4), outputs)


def test_full_chunks_are_those_of_one_process():
    """So many tokens that every fold has several chunks, which begin and end inside the parts of processes."""
    options, sizes = {"criterion": "magnitude", "quality": 0}, (64, 48)
    model_type = "bert"
    expected = prune_fast(model_type, 7, options, sizes)
    results, _ = in_processes(3, prune_fast, model_type, 7, options, sizes)
    assert all(difference(weights, expected) <= SAME for weights in results)


def prune_fast(model_type, count, options, sizes):
    model = model_of(model_type, num_hidden_layers=1)
    liar.prune(model, batches_for(model_type, count, *sizes), keep=0.5, progress=False, **options)
    return dict(model.state_dict())


def without_sums(name, job, *arguments):
    """A job without one of the collectives, in every process."""
    own = {"add": lambda *_: None, "gather": lambda value: [value] * distributed.size()}
    setattr(distributed, name, own[name])
    return job(*arguments)


@pytest.mark.parametrize("name", ["add", "gather"])
def test_without_the_sums_the_result_is_another(name):
    """Negative control."""
    arguments = ("llama", 3, {"criterion": "magnitude", "quality": 0}, (96, 48))
    expected = prune_fast(*arguments)
    results, _ = in_processes(2, without_sums, name, prune_fast, *arguments)
    assert isinstance(results[0], Exception) or difference(results[0], expected) > 100 * SAME


# Accumulators by themselves


def rows_of(count):
    draw = torch.Generator().manual_seed(count)
    return torch.randn(count, 5, generator=draw) + 3, torch.randn(count, 2, generator=draw), torch.rand(count, generator=draw)


# Rows by process.
PARTS = [(5000, 3000), (100, 100, 100), (0, 7000, 0), (2048, 0, 2048), (10, 4086, 1), (1000, 20, 30), (0, 0)]


def moments_of(parts, rank=None, weighted=False):
    """The normal equations of rows that are shared, or of all of them."""
    z, t, weight = rows_of(sum(parts))
    ends = torch.tensor([0, *parts]).cumsum(0).tolist()
    part = slice(0, None) if rank is None else slice(ends[rank], ends[rank + 1])
    moments = Moments(0 if rank is None else ends[rank])
    moments.update(z[part], t[part], weight[part] if weighted else None)
    if rank is not None:
        moments.reduce(distributed)
    return moments


def shared_moments(all_parts):
    found = []
    for parts in all_parts:
        parts = (*parts, *[0] * (distributed.size() - len(parts)))
        for weighted in (False, True):
            moments = moments_of(parts, distributed.rank(), weighted)
            found.append(moments.normal(affine=True) if moments.count else None)
    return found


def test_moments_do_not_depend_on_who_has_the_rows():
    results, _ = in_processes(3, shared_moments, PARTS)
    expected = [moments_of(parts, weighted=weighted) for parts in PARTS for weighted in (False, True)]
    for result in results:
        for found, moments in zip(result, expected, strict=True):
            if not moments.count:
                assert found is None
                continue
            normal = moments.normal(affine=True)
            assert found.count == normal.count
            for name in ("gram", "cross", "target_energies", "mean_z", "mean_t"):
                # Sums of float32 products are exact in float64: in another order they are the same.
                torch.testing.assert_close(getattr(found, name), getattr(normal, name), rtol=0, atol=0)


def test_chunks_that_begin_anywhere_give_other_moments():
    """Negative control: products of a chunk are rounded to float32."""
    z, t, _ = rows_of(8000)
    split, whole = Moments(), Moments()
    whole.update(z, t)
    other = Moments()
    split.update(z[:5000], t[:5000])
    other.update(z[5000:], t[5000:])
    split.merge(other)
    gap = (split.normal(affine=True).gram - whole.normal(affine=True).gram).norm() / whole.normal(affine=True).gram.norm()
    assert gap > 1e-11


def shared_accumulators(kind):
    """Folds, and channels, of which one process has nothing."""
    z, t, _ = rows_of(300)
    part = [slice(0, 0), slice(0, 200), slice(200, None)][distributed.rank()]
    folds, channels = Folds(3, kind), ChannelMoments()
    if len(z[part]):
        sizes = (len(z[part]) // 2, len(z[part]) - len(z[part]) // 2, 0)
        folds.update(z[part][None], t[part][None], TokenIndex(torch.arange(len(z[part])), sizes))
    channels.update(z[part])
    folds.reduce(distributed)
    channels.reduce(distributed)
    return folds.normals(affine=True, channels=5)[0].gram, channels.mean, channels.variance


@pytest.mark.parametrize("kind", [Moments, Factor])
def test_folds_and_channels_are_summed(kind):
    z, _, _ = rows_of(300)
    centred = z.double() - z.double().mean(0)
    for gram, mean, variance in in_processes(3, shared_accumulators, kind)[0]:
        torch.testing.assert_close(gram, centred.T @ centred, rtol=1e-5, atol=1e-3)
        torch.testing.assert_close(mean, z.double().mean(0), rtol=1e-6, atol=0)
        torch.testing.assert_close(variance, centred.square().mean(0), rtol=1e-5, atol=0)


# Other functions


def collect(criteria):
    statistics = liar.collect(model_of("bert"), batches_for("bert", 4), criteria=criteria, progress=False)
    gathered = liar.moments(model_of("bert"), batches_for("bert", 4), sites=["neurons.1"], progress=False)
    return statistics, gathered["neurons.1"].normal(affine=True).gram


def test_collected_statistics():
    expected, gram = collect(list(CRITERIA))
    for statistics, others in in_processes(3, collect, list(CRITERIA))[0]:
        torch.testing.assert_close(others, gram, rtol=0, atol=0)
        for site, tensors in expected.sites.items():
            for name, value in tensors.items():
                close = partial(torch.testing.assert_close, rtol=1e-4 if name == "increases" else 1e-9, atol=1e-9)
                close(statistics.sites[site][name], value)


def sparsify(criterion):
    model = model_of("llama")
    found = liar.unstructured.prune(model, batches_for("llama", 2), sparsity=0.5, criterion=criterion, progress=False)
    return dict(model.state_dict()), found.masks


@pytest.mark.parametrize("criterion", ["wanda", "sparsegpt"])
def test_unstructured(criterion):
    weights, masks = sparsify(criterion)
    for others, their_masks in in_processes(3, sparsify, criterion)[0]:
        assert difference(others, weights) <= SAME
        assert all(torch.equal(their_masks[name], mask) for name, mask in masks.items())


def mask_by_own_costs():
    """A mask by costs that are others in every process, as measured times are."""
    model = model_of("bert")
    costs = params_of(liar.discover(model))
    ratio = 1 + distributed.rank()
    sites = {site: {n: cost * (ratio if "heads" in site else 1) for n, cost in by.items()} for site, by in costs.sites.items()}
    return liar.select(model, keep=0.6, criterion="magnitude", budget=replace(costs, sites=sites), progress=False)


def test_one_process_measures_and_chooses():
    first, second = in_processes(2, mask_by_own_costs)[0]
    assert first == second == mask_by_own_costs()


def prune_again(folder):
    """Prune with a run folder, where the second process fails; then go on: the weights, and what was found."""
    model, data = model_of("bert"), batches_for("bert", 4)
    progress = partial(stop, "late") if distributed.rank() == 1 else lambda _: None
    with pytest.raises((KeyError, liar.LiarError)):
        liar.prune(model, data, keep=0.5, run_folder=folder, activations="disk", progress=progress)
    kept = {path.name.split(".")[0] for path in Path(folder).glob("prune/*.safetensors")}
    liar.prune(model, data, keep=0.5, run_folder=folder, activations="disk", progress=False)
    return dict(model.state_dict()), kept


def test_several_processes_go_on_where_they_failed(tmp_path):
    expected = prune("bert", 4, {})[0]
    for weights, kept in in_processes(3, prune_again, str(tmp_path))[0]:
        assert kept >= {"mask", "sensitivity-0000", "elimination-block-0001", "repair-block-0000"}
        assert difference(weights, expected) <= SAME


# Errors


def damaged_with_lstsq():
    """The message where a process meets NaN while sums are collected."""
    model = model_of("bert")
    if distributed.rank() == 1:
        model.encoder.layer[1].attention.output.dense.weight.data[-1, -1] = torch.nan
    with pytest.raises(liar.LiarError) as caught:
        liar.prune(model, batches_for("bert", 4), keep=0.5, criterion="magnitude", solver="lstsq", progress=False)
    return str(caught.value)


def test_the_site_is_named_once():
    (first, second), _ = in_processes(2, damaged_with_lstsq)
    assert first.count("heads.1 (") == second.count("heads.1 (") == 1
    assert first == f"process 1 of 2: {second}"


def failing(kind):
    """Prune, where the second of the processes fails in some way: the error, and whether the model is as it was."""
    model, data, progress, bad = model_of("bert"), batches_for("bert", 3), False, distributed.rank() == 1
    mask = None
    if kind == "batch" and bad:
        data[2] = {"input_ids": torch.full((2, 5), 1000)}
    if kind == "other data" and bad:
        data = data[::-1]
    if kind == "other model" and bad:
        model = tiny_model("bert", seed=1)
    if kind == "damaged model" and bad:
        model.encoder.layer[1].attention.output.dense.weight.data[-1, -1] = torch.nan
    if kind == "other mask":
        mask = {"heads.0": [0] if bad else [1]}
    if kind == "last of a reconstruction":
        mask = {"heads.0": [0]}
    if kind in ("late", "last", "exit", "last of a reconstruction"):
        progress = partial(stop, kind) if bad else lambda _: None
    before = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        if mask is None:
            liar.prune(model, data, keep=0.5, progress=progress)
        else:
            liar.reconstruct(model, mask, data, progress=progress)
    except Exception as error:  # noqa: BLE001 (that is what is looked at)
        after = model.state_dict()
        same = before.keys() == after.keys() and all(
            after[name].equal(value) for name, value in before.items() if not value.isnan().any()
        )
        return type(error).__name__, str(error), same
    return None


ENDS = []


def stop(kind, update):
    if kind == "exit" and update.stage == "reconstruct" and update.fraction > 0.7:
        os._exit(3)
    if kind == "late" and update.stage == "reconstruct" and update.fraction > 0.7:
        raise KeyError("a screw")
    if update.fraction > 0.9999:
        ENDS.append(update)
    # After the last site, and when the model has changed.
    if kind.startswith("last") and len(ENDS) == 2:
        raise OSError(28, "No space left on device")


# kind -> the error of the first process (and of the second, where that is another), and words of it
FAILURES = {
    "batch": ("CalibrationError", "CalibrationError", "process 1 of 2: calibration batch 2: expected integer ids from 0 to 96"),
    "other data": ("CalibrationError", "CalibrationError", "was given other calibration data than process 0"),
    "other model": ("CalibrationError", "CalibrationError", "was given other weights than process 0"),
    "damaged model": ("CalibrationError", "CalibrationError", "NaN or Inf"),
    "other mask": ("CalibrationError", "CalibrationError", "was given other mask and options than process 0"),
    "late": ("ProcessError", "KeyError", "a screw"),
    "last": ("ProcessError", "OSError", "process 1 of 2: [Errno 28] No space left on device"),
    "last of a reconstruction": ("ProcessError", "OSError", "process 1 of 2: [Errno 28] No space left on device"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_an_error_in_one_process_ends_all_and_changes_no_model(kind):
    first, second, words = FAILURES[kind]
    results, _ = in_processes(2, failing, kind)
    assert [name for name, _, _ in results] == [first, second]
    assert words in results[0][1]
    assert all(same for _, _, same in results)


def test_a_process_that_is_gone_is_noticed():
    ((name, message, same),), _ = in_processes(2, failing, "exit", expect_exit=[1])
    assert (name, same) == ("ProcessError", True)
    assert "has lost another one" in message


def test_only_the_first_process_shows_bars_and_warnings():
    _, texts = in_processes(2, noisy)
    assert "prune" in texts[0]
    assert "expected" in texts[0]
    assert texts[1] == ""


def noisy():
    logging_to_stderr()
    model = model_of("bert")
    liar.prune(model, [{"input_ids": torch.tensor([[5, 6, 7, 0, 0]] * 2)}, *tiny_batches(model)], keep=0.5)


def logging_to_stderr():
    import logging  # noqa: PLC0415 (in a process of its own)

    logging.basicConfig(stream=sys.stderr, format="expected %(message)s")


# The command line


@pytest.fixture(scope="module")
def home(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("home")
    model = tiny_model("bert", head="masked-lm", vocab_size=len(tokenizer))
    model.save_pretrained(folder / "bert")
    tokenizer.save_pretrained(folder / "bert")
    words = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
    draw = torch.Generator().manual_seed(0)
    lines = [" ".join(words[i] for i in torch.randint(0, len(words), (12,), generator=draw)) for _ in range(70)]
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder


def test_torchrun(home):
    """Three processes of which one has no batch; the folder is that of one process."""
    arguments = ["prune", home / "bert", home / "shared", "--keep", "0.5", "--calib", home / "texts.txt", "--tokens", "600"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "3", "--standalone", "-m", "liar", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=Path(liar.__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert done.stderr.count("100%") == 1 or done.stderr.count("prune:") > 0
    arguments[2] = home / "alone"
    alone = CliRunner().invoke(app, list(map(str, arguments)))
    assert alone.exit_code == 0, alone.output
    assert difference(liar.load(home / "shared").state_dict(), liar.load(home / "alone").state_dict()) <= SAME
    assert liar.Mask.load(home / "shared" / "mask.json") == liar.Mask.load(home / "alone" / "mask.json")


def test_commands_that_cannot_be_shared_are_refused(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, value)
    result = CliRunner().invoke(app, ["families"])
    assert result.exit_code == 1
    assert "torchrun has started 2 processes, but this command is for one" in " ".join(result.output.split())
