"""Runs that were stopped go on, with the same answer; run folders that are damaged or of another run are refused."""

import copy
import hashlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import word_tokenizer

import liar
from liar.errors import CheckpointError
from liar.repair import walker
from liar.runtime import journal as journals
from liar.runtime import places
from liar.runtime.journal import open_journal, remove_journal
from liar.selection import CRITERIA, Criterion, register_criterion
from liar.selection.scores import SUMMARIES
from liar.testing import tiny_batches, tiny_model

CASES = {
    "bert": ("bert", {}),
    "llama": ("llama", {}),
    "parallel blocks": ("gpt_neox", {}),
    "own output": ("bert", {"target": "layer_output", "solver": "lstsq"}),
    "all of the drift": ("llama", {"target": "residual_stream"}),
    "new biases": ("llama", {"bias": "create", "refit": False}),
    "two steps": ("llama", {"steps": 2}),
    "gradients": ("bert", {"criterion": "taylor"}),
    "query heads": ("llama", {"heads": "query"}),
}


class Stopped(KeyboardInterrupt):
    """As if Ctrl-C had been pressed."""


@pytest.fixture(autouse=True)
def _everything_is_kept_elsewhere(monkeypatch):
    """Tiny tensors too."""
    monkeypatch.setattr(places, "LITTLE", 1)


@pytest.fixture
def case(request):
    """A model, its batches and options."""
    family, options = CASES[request.param]
    model = tiny_model(family)
    return model, tiny_batches(model), {"keep": 0.6, "progress": False, **options}


def state(model):
    """Everything that a repair may change."""
    sizes = [(name, size) for _, module in model.named_modules() for name, size in vars(module).items() if type(size) is int]
    return model.state_dict(), sizes, [each.requires_grad for each in model.parameters()]


def assert_same(one, other):
    torch.testing.assert_close(state(one)[0], state(other)[0], rtol=0, atol=0)
    assert state(one)[1:] == state(other)[1:]


def told(report):
    """A report without times."""
    content = json.loads(report.to_json())
    del content["seconds"]
    for site in content["sites"]:
        del site["seconds"]
    return content


def stop_after(monkeypatch, commits):
    """Stop the process, as Ctrl-C does, after so many entries were written."""
    commit, left = journals.Journal.commit, iter(range(commits))

    def committing(self, name, content):
        commit(self, name, content)
        if next(left, None) is None:
            raise Stopped

    monkeypatch.setattr(journals.Journal, "commit", committing)
    return partial(monkeypatch.setattr, journals.Journal, "commit", commit)


PLACES = [(case, "disk") for case in CASES] + [("bert", "host"), ("llama", "auto")]


@pytest.mark.parametrize(("case", "activations"), PLACES, indirect=["case"])
def test_where_activations_are_does_not_matter(case, activations):
    model, batches, options = case
    expected, other = copy.deepcopy(model), copy.deepcopy(model)
    report = liar.prune(expected, batches, **options)
    assert told(liar.prune(other, batches, activations=activations, **options)) == told(report)
    assert_same(other, expected)


def test_activations_are_on_the_disk_while_a_walk_goes_on(tmp_path, monkeypatch):
    model = tiny_model("llama")
    found, visit = [], walker._visit

    def looking(site, steps):
        visit(site, steps)
        kept = [value for series in site.walk.store._series.values() for value in series.values()]
        found.append({type(each).__name__ for value in kept for each in (value if isinstance(value, tuple) else [value])})

    monkeypatch.setattr(walker, "_visit", looking)
    folder = tmp_path / "run"
    liar.prune(model, tiny_batches(model), keep=0.6, activations="disk", run_folder=folder, progress=False)
    assert found
    assert all("File" in kinds and "Tensor" not in kinds for kinds in found)
    assert not list((folder / "prune" / "activations").iterdir()), "what is not needed any more is deleted"


@pytest.mark.parametrize("case", CASES, indirect=True)
def test_a_stopped_run_goes_on_from_every_entry(case, tmp_path, monkeypatch, caplog):
    model, batches, options = case
    expected = copy.deepcopy(model)
    report = liar.prune(expected, batches, **options)
    whole = copy.deepcopy(model)
    assert told(liar.prune(whole, batches, run_folder=tmp_path / "whole", **options)) == told(report)
    assert_same(whole, expected)
    entries = len(list((tmp_path / "whole" / "prune").glob("*.safetensors")))
    assert entries > len(liar.discover(model).blocks)
    for commits in range(entries - 1):
        folder, own = tmp_path / str(commits), copy.deepcopy(model)
        undo = stop_after(monkeypatch, commits)
        with pytest.raises(Stopped):
            liar.prune(own, batches, run_folder=folder, **options)
        undo()
        assert "goes on from there" in caplog.text
        assert_same(own, model)
        before = {path.name for path in (folder / "prune").glob("*.safetensors")}
        assert len(before) == commits + 1
        assert told(liar.prune(own, batches, run_folder=folder, **options)) == told(report)
        assert_same(own, expected)
        assert before <= {path.name for path in (folder / "prune").glob("*.safetensors")}, "nothing was done twice"


def test_finished_blocks_are_not_computed_again(tmp_path, monkeypatch):
    model, batches = tiny_model("llama"), tiny_batches(tiny_model("llama"))
    liar.prune(copy.deepcopy(model), batches, keep=0.6, run_folder=tmp_path, progress=False)
    monkeypatch.setattr(walker, "_visit", lambda *_: pytest.fail("computed again"))
    liar.prune(model, batches, keep=0.6, run_folder=tmp_path, progress=False)


def test_other_verbs_go_on_too(tmp_path, monkeypatch):
    model = tiny_model("bert")
    batches = tiny_batches(model)
    mask = liar.select(model, batches, keep=0.6, progress=False)
    collected = liar.collect(model, batches, progress=False)
    teacher = copy.deepcopy(model)
    liar.remove(slim := copy.deepcopy(model), mask)
    expected = copy.deepcopy(slim)
    liar.reconstruct(expected, None, batches, teacher=teacher, progress=False)
    for commits in range(3):
        undo = stop_after(monkeypatch, commits)
        folder = tmp_path / str(commits)
        with pytest.raises(Stopped):
            liar.select(model, batches, keep=0.6, run_folder=folder, progress=False)
        undo()
        undo = stop_after(monkeypatch, commits)
        with pytest.raises(Stopped):
            liar.collect(model, batches, run_folder=folder, progress=False)
        undo()
        assert liar.select(model, batches, keep=0.6, run_folder=folder, progress=False) == mask
        again = liar.collect(model, batches, run_folder=folder, progress=False)
        for site, values in collected.sites.items():
            assert all(torch.equal(value, again.sites[site][name]) for name, value in values.items())
    undo = stop_after(monkeypatch, 0)
    with pytest.raises(Stopped):
        liar.reconstruct(slim, None, batches, teacher=teacher, run_folder=tmp_path / "teacher", progress=False)
    undo()
    liar.reconstruct(slim, None, batches, teacher=teacher, run_folder=tmp_path / "teacher", progress=False)
    assert_same(slim, expected)


def test_new_weights_live_in_files(tmp_path):
    model = tiny_model("llama")
    liar.prune(model, tiny_batches(model), keep=0.6, run_folder=tmp_path, progress=False)
    maps = Path("/proc/self/maps").read_text()
    assert str(tmp_path) in maps
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight.zero_()
    other = tiny_model("llama")
    liar.prune(other, tiny_batches(other), keep=0.6, run_folder=tmp_path, progress=False)
    assert other.layers[0].mlp.down_proj.weight.any(), "the files are not written to"


# Entries of a finished run that are read: the mask stands for the selection.
USED = ("mask", "repair")


def run(folder, model=None, batches=None, **options):
    """Prune a copy of a tiny LLaMA with a run folder."""
    model = tiny_model("llama") if model is None else model
    batches = tiny_batches(model) if batches is None else batches
    own = copy.deepcopy(model)
    try:
        return liar.prune(own, batches, run_folder=folder, **{"keep": 0.6, "progress": False, **options})
    except BaseException:
        assert_same(own, model)
        raise


def test_the_run_folder_of_another_run_is_refused(tmp_path):
    run(tmp_path)
    model = tiny_model("llama")
    batches = tiny_batches(model)
    with torch.no_grad():
        (other := copy.deepcopy(model)).layers[1].mlp.up_proj.weight[0, 0] += 1
    changed = copy.deepcopy(batches)
    changed[0]["input_ids"][0, 0] += 1
    for difference, given in {
        "model differs": {"model": other},
        "calibration data differs": {"batches": changed},
        "option keep (0.6 there, 0.5 here) differs": {"keep": 0.5},
        'option ridge ("auto" there, 1.0 here) differs': {"ridge": 1.0},
        'option criterion ("reconstruction" there, "random" here), option seed (0 there, 3 here) differ': {
            "criterion": "random",
            "seed": 3,
        },
    }.items():
        with pytest.raises(CheckpointError, match=re.escape(f"is of another run: its {difference}")):
            run(tmp_path, **given)
    run(tmp_path, quality=0)  # changes no weight


def test_another_criterion_of_the_same_name_is_another_run(tmp_path, monkeypatch):
    monkeypatch.setitem(CRITERIA, "own", Criterion(lambda units: units.consumer.flatten(1).norm(dim=1), needs=None))
    monkeypatch.setitem(SUMMARIES, "own", "of this test")
    run(tmp_path, criterion="own")
    run(tmp_path, criterion="own")
    register_criterion("own", Criterion(lambda units: -units.consumer.flatten(1).norm(dim=1), needs=None), "the other way")
    with pytest.raises(CheckpointError, match="another run: its score differs"):
        run(tmp_path, criterion="own")


def test_numbers_of_numpy_are_those_of_python(tmp_path):
    run(tmp_path, keep=0.9, steps=2, seed=3, protect=[0])
    run(tmp_path, keep=np.float64(0.9), steps=np.int64(2), seed=np.int32(3), protect=np.array([0]))
    for protect in ([np.int64(0)], {0}, range(1)):
        run(tmp_path, keep=0.9, steps=2, seed=3, protect=protect)


@pytest.mark.parametrize("place", [0.05, 0.5, 0.95])
def test_a_flipped_bit_is_noticed(tmp_path, place):
    run(tmp_path)
    for entry in sorted((tmp_path / "prune").glob("*.safetensors")):
        whole = entry.read_bytes()
        damaged = bytearray(whole)
        damaged[int(place * len(whole))] ^= 4
        entry.write_bytes(damaged)
        if entry.name.startswith(USED):
            with pytest.raises(CheckpointError, match=f"{entry.name} is damaged.*Delete the file"):
                run(tmp_path)
        entry.write_bytes(whole)
    about = tmp_path / "prune" / "run.json"
    text = about.read_bytes()
    for position in random.Random(0).sample(range(len(text)), 40):
        damaged = bytearray(text)
        damaged[position] ^= 4
        about.write_bytes(damaged)
        if damaged.strip() != text.strip() and json_or_none(damaged) != json.loads(text):
            with pytest.raises(CheckpointError, match=r"run\.json|another run"):
                run(tmp_path)
    about.write_bytes(text)
    run(tmp_path)


def test_an_entry_that_cannot_be_read_is_named(tmp_path):
    run(tmp_path)
    entry = next((tmp_path / "prune").glob("mask.*"))
    entry.unlink()
    entry.mkdir()
    with pytest.raises(CheckpointError, match=rf"{entry.name} is damaged: it cannot be read \(Is a directory\).*Delete"):
        run(tmp_path)
    entry.rmdir()
    content = b"of another program"
    (entry.parent / f"mask.{hashlib.blake2b(content, digest_size=16).hexdigest()}.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="is damaged: it cannot be read"):
        run(tmp_path)


def test_activations_need_a_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match=r"activations cannot be kept in .* No such file.*gone.*TMPDIR"):
        run(None, activations="disk")
    run(None, activations="auto")
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "activations").write_text("")
    with pytest.raises(CheckpointError, match=r"activations cannot be kept in .*activations: File exists"):
        run(tmp_path, activations="disk")


def json_or_none(data):
    try:
        return json.loads(data)
    except ValueError:
        return None


def test_a_deleted_entry_is_made_again(tmp_path):
    report = run(tmp_path)
    for entry in sorted((tmp_path / "prune").glob("*.safetensors")):
        entry.unlink()
        assert told(run(tmp_path)) == told(report)
        name = entry.name.split(".")[0]
        assert bool(list(entry.parent.glob(f"{name}.*"))) == name.startswith(USED)


def test_a_folder_with_something_else_is_refused(tmp_path):
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"expected an empty folder, or one that an earlier run began.* thesis\.tex"):
        run(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="run folder"):
        run(tmp_path / "file")


def test_one_process_at_a_time(tmp_path):
    identity = {"model": "one"}
    with (
        open_journal(tmp_path, identity),
        pytest.raises(CheckpointError, match="another process works in this run folder"),
        open_journal(tmp_path, identity),
    ):
        pytest.fail("opened twice")
    with open_journal(tmp_path, identity):
        pass


def test_a_folder_that_was_half_deleted_is_begun_anew(tmp_path):
    report = run(tmp_path, activations="disk")
    for entry in (tmp_path / "prune").glob("*.*"):
        entry.unlink()
    assert (tmp_path / "prune" / "activations").is_dir()
    assert told(run(tmp_path)) == told(report)


def test_what_a_kill_left_half_done_is_removed(tmp_path):
    run(tmp_path)
    (tmp_path / "prune" / ".liar-0a0b0c0d.safetensors").write_bytes(b"half")
    (tmp_path / "prune" / "activations").mkdir()
    (tmp_path / "prune" / "activations" / "00000001.safetensors").write_bytes(b"half")
    (tmp_path / "prune" / "activations" / ".tmpB3Xq1z").write_bytes(b"as safetensors names what it is writing")
    run(tmp_path)
    assert not list(tmp_path.rglob(".liar-*"))
    assert not list(tmp_path.rglob("activations/*"))


def test_machines_with_equal_process_numbers_share_a_folder(tmp_path):
    """As containers have them, where each process is the first."""
    first, second = (places.OnDisk(tmp_path) for _ in range(2))
    one, two = first.keep(torch.zeros(3)), second.keep(torch.ones(3))
    assert one.fetch().sum() == 0
    assert two.fetch().sum() == 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_a_forked_child_deletes_nothing_of_its_parent(tmp_path):
    kept = [places.OnDisk(tmp_path).keep(torch.ones(3))]
    child = os.fork()
    if not child:
        kept.clear()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept[0].fetch().sum() == 3
    kept.clear()
    assert not list(tmp_path.iterdir())


def test_batches_made_in_inference_mode_are_kept_on_disk():
    model = tiny_model("llama")
    with torch.inference_mode():
        batches = [{**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]} for batch in tiny_batches(model)]
    options = {"keep": 0.6, "criterion": "magnitude", "progress": False}
    liar.prune(expected := copy.deepcopy(model), batches, **options)
    liar.prune(model, batches, activations="disk", **options)
    assert_same(model, expected)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 KiB."""
    where = tmp_path / "disk"
    where.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("this process may not mount a tmpfs")
    yield where
    subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("options", [{"activations": "disk"}, {}])
def test_a_full_disk_loses_nothing(small_disk, options):
    """With room again, the run goes on."""
    filler = small_disk / "filler"
    model, expected = tiny_model("llama"), tiny_model("llama")
    batches = tiny_batches(model)
    report = liar.prune(expected, batches, keep=0.6, progress=False)
    filler.write_bytes(b"0" * 230 * 1024)
    with pytest.raises(CheckpointError, match=r"[Nn]o space left on device.*[Ff]ree space"):
        run(small_disk / "run", **options)
    filler.unlink()
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert told(run(small_disk / "run", **options)) == told(report)


def test_a_limit_on_the_size_of_files_is_reported(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(CheckpointError, match="File too large"):
            run(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    run(tmp_path)


# 30 kills of the command line, in forked children: starting Python each time would take minutes.


def command(home, out, *options, verb="prune"):
    """`liar prune --resume` in this process."""
    from liar.cli import app  # noqa: PLC0415 (needs typer)

    code = app(
        [verb, str(home / "model"), str(out), "--keep", "0.6", "--calib", str(home / "texts.txt"),
         "--activations", "disk", "--max-length", "16", "--batch-size", "8", *(options or ["--resume"])],
        standalone_mode=False,
    )  # fmt: skip
    assert not code, code


def forked(work):
    """The number of a child that does some work, in silence."""
    child = os.fork()
    if child:
        return child
    try:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        work()
        os._exit(0)
    finally:
        os._exit(1)


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    tokenizer = word_tokenizer(frame=False, pad=False)
    words = sorted(tokenizer.get_vocab())
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    draw = random.Random(0)
    (tmp_path / "texts.txt").write_text("\n".join(" ".join(draw.choices(words, k=24)) for _ in range(60)))
    return tmp_path


def written(folder):
    """The files of a result, without times and places."""
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    report = json.loads(files.pop("report.json"))
    del report["seconds"]
    for site in report["sites"]:
        del site["seconds"]
    about = files.pop("run.json").replace(str(folder).encode(), b"OUT")
    return {**files, "report.json": report, "run.json": about}


def test_a_result_removes_the_work_of_its_own_verb_only(home):
    folder = home / "run"
    model = tiny_model("llama")
    liar.select(model, tiny_batches(model), keep=0.5, run_folder=folder, progress=False)
    kept = sorted(path.name for path in (folder / "select").glob("*.safetensors"))
    command(home, home / "slim", "--run-folder", str(folder))
    assert [path.name for path in folder.iterdir()] == ["select"]
    assert kept == sorted(path.name for path in (folder / "select").glob("*.safetensors"))
    assert kept


def test_a_mask_that_is_written_removes_its_work(home):
    command(home, home / "mask.json", "--run-folder", str(home / "run"), verb="select")
    assert (home / "mask.json").is_file()
    assert not (home / "run").exists()


def test_an_entry_that_is_written_again_replaces_the_first(tmp_path):
    with open_journal(tmp_path / "prune", {"model": "one"}) as journal:
        for number in (1, 2, 2):
            journal.commit("mask", {"mask": number})
            assert journal.read("mask") == {"mask": number}
        assert journal.names() == ["mask"]


def test_work_of_another_process_is_not_removed(tmp_path):
    with open_journal(tmp_path / "prune", {"model": "one"}) as journal:
        journal.commit("mask", {"mask": ""})
        remove_journal(tmp_path, "prune")
        assert journal.read("mask") == {"mask": ""}
    remove_journal(tmp_path, "prune")
    assert not tmp_path.exists()


def test_a_run_folder_in_the_folder_of_the_result_is_refused(home, capsys):
    for where in (home / "slim", home / "other" / ".." / "slim" / "run"):
        with pytest.raises(AssertionError, match=r"assert not 1$"):  # the exit code
            command(home, home / "slim", "--run-folder", str(where))
        assert "is in OUT" in capsys.readouterr().err
        assert not (home / "slim").exists(), "nothing has run"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs forks")
def test_thirty_kills_and_always_the_same_folder(home):
    (home / "whole").mkdir()
    began = time.perf_counter()
    assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda: command(home, home / "whole" / "slim")), 0)[1]) == 0
    takes, expected = time.perf_counter() - began, written(home / "whole" / "slim")
    assert not (home / "whole" / "slim.run").exists()
    draw, kills, finished, resumed = random.Random(1), 0, 0, 0
    out = home / "slim"
    while kills < 30:
        resumed += bool(list(home.glob("slim.run/prune/*.safetensors")))
        child = forked(lambda: command(home, out))
        time.sleep(draw.uniform(0.1, 1.1) * takes)
        os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), "what a kill left is never in the way"
        kills += code == -signal.SIGKILL
        if out.exists():
            assert written(out) == expected
            finished += 1
            subprocess.run(["rm", "-r", out], check=True)
    assert resumed > 5, "kills fall on runs that have finished something"
    assert finished, "and some come too late"
    if not out.exists():
        assert os.waitstatus_to_exitcode(os.waitpid(forked(lambda: command(home, out)), 0)[1]) == 0
        assert written(out) == expected
