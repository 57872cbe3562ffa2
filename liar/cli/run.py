"""One run of the command line as data: what `run.json` holds, how it is checked and how it is carried out."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import finalize

import torch
import typer
from torch import Tensor, nn

from liar.api import prune_with, reconstruct_with, refine_with
from liar.cli.processes import is_first, process_group
from liar.cli.source import SourceTexts
from liar.data import builder_of
from liar.errors import MaskError, OptionError, check_choice, wrap_parse_errors
from liar.files import user_path
from liar.io import check_target, load, load_tokenizer, save
from liar.mask import Mask
from liar.models import compute_on, layout_of, why_unusable
from liar.options import (
    BUDGETS,
    CalibrationOptions,
    LoadOptions,
    PruneOptions,
    ReconstructOptions,
    RefineOptions,
    RunOptions,
    SaveOptions,
    SelectOptions,
    SourceOptions,
    TeacherOptions,
    check_text,
)
from liar.report import Report
from liar.runtime import distributed, remove_journal
from liar.selection import Costs
from liar.versions import versions

logger = logging.getLogger(__name__)

GROUPS: dict[str, type] = {
    "source": SourceOptions,
    "calibration": CalibrationOptions,
    "load": LoadOptions,
    "select": SelectOptions,
    "reconstruct": ReconstructOptions,
    "refine": RefineOptions,
    "stepping": PruneOptions,
    "workspace": RunOptions,
    "teacher": TeacherOptions,
    "save": SaveOptions,
}
# What each subcommand has options for.
COMMANDS: dict[str, tuple[str, ...]] = {
    "prune": ("source", "calibration", "load", "select", "reconstruct", "stepping", "workspace", "save"),
    "reconstruct": ("source", "calibration", "load", "reconstruct", "teacher", "workspace", "save"),
    "refine": ("source", "calibration", "load", "refine", "teacher", "save"),
}
# A run.json may be from before these were there.
DEFAULTED = {"stepping", "teacher", "workspace", "save"}
# What has to be given, in words, and whether it is: units to select, a mask, a teacher.
EXPECTED: dict[str, tuple[str, Callable[[bool, bool, bool], bool]]] = {
    "prune": ("options that select units and no mask", lambda select, mask, _: select and not mask),
    "reconstruct": (
        "a mask and no options that select units, or the dense model as a teacher",
        lambda select, mask, teacher: (mask or teacher) and not select,
    ),
    "refine": (
        "the dense model as a teacher (--teacher), and no mask",
        lambda select, mask, teacher: teacher and not (select or mask),
    ),
}


@dataclass(frozen=True)
class Run:
    """All arguments of `liar prune`, `liar reconstruct` or `liar refine`.

    Attributes:
        command: `"prune"`, `"reconstruct"` or `"refine"`.
        model: folder, or name on the hub.
        out: folder that is written.
        source: where the texts are.
        calibration: how they become batches.
        load: how the model is loaded.
        reconstruct: how it is repaired (prune, reconstruct).
        select: which units stay (prune). A `budget` that is a mapping is the content of a file that `liar latency` wrote.
        stepping: in how many steps (prune).
        workspace: where activations and finished blocks are kept (prune, reconstruct).
        teacher: the dense model (reconstruct, refine).
        refine: how it is trained (refine).
        save: how the result is saved.
        mask: content of a mask file, in any form `Mask.of` takes or as `Mask.save` writes it (reconstruct).
    """

    command: str
    model: str
    out: str
    source: SourceOptions
    calibration: CalibrationOptions
    load: LoadOptions
    reconstruct: ReconstructOptions | None = None
    select: SelectOptions | None = None
    stepping: PruneOptions = field(default_factory=PruneOptions)
    workspace: RunOptions = field(default_factory=RunOptions)
    teacher: TeacherOptions = field(default_factory=TeacherOptions)
    refine: RefineOptions | None = None
    save: SaveOptions = field(default_factory=SaveOptions)
    mask: Mapping[str, Any] | None = None

    def check(self, *, overwrite: bool) -> None:
        """Check everything that can be checked before anything is loaded.

        Raises:
            LiarError: of the kind that fits, the message says what was expected and given, and what to do.
        """
        check_choice("command", self.command, COMMANDS)
        check_text("model", self.model)
        check_text("out", self.out)
        check_target(self.out, overwrite=overwrite)
        for name in GROUPS:
            if (group := getattr(self, name)) is not None:
                group.check()
        for what, folder in (("MODEL", self.model), ("the teacher", self.teacher.teacher)):
            if folder is not None and user_path(self.out).resolve() == user_path(folder).resolve():
                raise OptionError(f"OUT is the folder of {what} ({self.out}): it could not be repeated; choose another OUT")
        if (kept := self.workspace.run_folder) is not None and user_path(kept).resolve().is_relative_to(
            user_path(self.out).resolve()
        ):
            raise OptionError(f"run_folder={str(kept)!r} is in OUT ({self.out}), which is written as a whole: choose another")
        given = {"select": self.select, "mask": self.mask, "teacher": self.teacher.teacher}
        expected, is_met = EXPECTED[self.command]
        if not is_met(*(value is not None for value in given.values())):
            named = " and ".join(name for name, value in given.items() if value is not None) or "neither"
            raise OptionError(f"command={self.command!r}: expected {expected}, got {named}")
        for name in ("reconstruct", "refine"):
            belongs = name in COMMANDS[self.command]
            if belongs != (getattr(self, name) is not None):
                words = ("", "none") if belongs else ("no ", "some")
                raise OptionError(f"command={self.command!r}: expected {words[0]}options of {name!r}, got {words[1]}")
        if self.mask is not None:
            self._checked_mask()
        _ = self._selection()
        check_source(self.source, self.load)

    def carry_out(self, *, overwrite: bool = False, progress: bool = True) -> Report:
        """Check, load, prune or reconstruct, and write `out`: model, tokenizer, mask, report and `run.json`, in one step.

        Raises:
            LiarError: the message says what was expected and given, and what to do; `out` is then as it was.
        """
        self.check(overwrite=overwrite)
        tokenizer = load_tokenizer(self.model)
        source = SourceTexts(self.source, tokenizer, self.calibration)
        batches = source.batches(progress=progress)
        model = load_model(self.model, self.load)
        mask, report = self._applied(model, source, batches, progress=progress)
        extra = {**({} if mask is None else {"mask.json": mask.to_json()}), "run.json": self.to_json()}
        how: dict[str, Any] = {**asdict(self.save), "extra": extra, "overwrite": overwrite}
        distributed.answer(partial(save, model, self.out, tokenizer=tokenizer, mask=mask, report=report, **how))
        return report

    def _applied(
        self, model: nn.Module, source: SourceTexts, batches: list[dict[str, Tensor]], *, progress: bool
    ) -> tuple[Mask | None, Report]:
        """Prune, reconstruct or refine: the mask, if there is one, and the report."""
        folder = self.teacher.teacher
        teacher = None if folder is None else load_model(folder, self.load)
        if self.refine is not None:
            assert teacher is not None
            return None, refine_with(model, teacher, batches, self.refine, progress=progress)
        options = self.reconstruct
        assert options is not None
        held_out = None if options.set_aside else source.left_over(options.quality, batches)
        if (selection := self._selection()) is not None:
            groups = (selection, options, self.stepping, self.workspace)
            return prune_with(model, batches, *groups, held_out=held_out, progress=progress)
        mask = None if self.mask is None else Mask.of(self._checked_mask(), layout_of(model))
        more: dict[str, Any] = {"teacher": teacher, "held_out": held_out, "progress": progress}
        return mask, reconstruct_with(model, mask, batches, options, self.workspace, **more)

    def _selection(self) -> SelectOptions | None:
        """The options that select units, with a measured budget as `Costs`."""
        if self.select is None or not isinstance(self.select.budget, Mapping):
            return self.select
        return replace(self.select, budget=Costs.from_json(json.dumps(self.select.budget)))

    def _checked_mask(self) -> Mask | Mapping[str, Any]:
        """The mask that was given, as far as it can be understood without a model."""
        if not isinstance(self.mask, Mapping):
            raise MaskError(f"expected the content of a mask file, a JSON object, got a {type(self.mask).__name__}")
        return Mask.from_json(json.dumps(self.mask)) if "mask" in self.mask else self.mask

    def to_json(self) -> str:
        """The arguments and the versions they ran with."""
        # Where work was kept meanwhile is this machine's, and gone.
        run = replace(self, workspace=replace(self.workspace, run_folder=None))
        return json.dumps({"run": asdict(run), "versions": {**versions(), "datasets": version("datasets")}}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The inverse of `to_json`; versions other than today's are logged.

        Raises:
            OptionError: the text is not such a JSON.
        """
        names = ", ".join(field.name for field in fields(cls))
        with wrap_parse_errors(OptionError, f'a run.json with {{"run": {{…}}}} of {names}'):
            content = json.loads(text)
            entries = dict(content["run"])
            own = COMMANDS.get(entries["command"], COMMANDS["prune"])
            needed = set(own) - {"select"} - (DEFAULTED - entries.keys())
            given = [name for name in GROUPS if name in needed or entries.get(name) is not None]
            groups = {name: GROUPS[name](**entries[name]) for name in given}
            run = cls(**{**entries, **groups})
            earlier = dict(content.get("versions", {}))
        for name, now in json.loads(run.to_json())["versions"].items():
            then = earlier.get(name)
            if then != now:
                logger.warning("the run was made with %s %s, this is %s: numbers may differ", name, then, now)
        return run


def run_from(command: str, model: str, out: Path, options: Mapping[str, Any], *, mask: Any = None, resume: bool = False) -> Run:
    """A run from the parameters of a subcommand; options by the names they have in `liar.options`."""
    given = dict(options)
    if resume and given["run_folder"] is None:
        given["run_folder"] = f"{out}.run"
    if given.get("run_folder") is not None:
        given["run_folder"] = str(user_path(given["run_folder"]).resolve())
    if given.get("budget") not in (None, *BUDGETS):
        given["budget"] = json.loads(Costs.load(given["budget"]).to_json())
    # A run.json has to work from anywhere.
    given["calib"] = _absolute(given["calib"])
    if given.get("teacher") is not None:
        given["teacher"] = _absolute(given["teacher"])
    groups = {name: group_options(GROUPS[name], given) for name in COMMANDS[command]}
    return Run(command, _absolute(model), str(user_path(out).resolve()), mask=mask, **groups)


def finish(run: Run, *, overwrite: bool) -> None:
    """Carry out a run, in the processes that torchrun has started, and print its report.

    What it kept meanwhile goes when the result is written.
    """
    folder = run.workspace.run_folder
    try:
        with process_group(run.load.device):
            typer.echo(str(run.carry_out(overwrite=overwrite)))
            if folder is not None:
                distributed.answer(partial(remove_journal, folder, run.command))
    except KeyboardInterrupt as error:
        again = "to be able to go on, use --resume" if folder is None else f"the same command goes on; its work is in {folder}"
        if is_first():
            typer.echo(f"Interrupted: {again}", err=True)
        raise typer.Exit(130) from error
    typer.echo(f"written to {run.out}")


def group_options(group: Any, given: Mapping[str, Any]) -> Any:
    """An object of one of the classes of `liar.options` from parameters by name."""
    return group(**{each.name: given[each.name] for each in fields(group)})


def _absolute(name: str) -> str:
    path = user_path(name)
    return str(path.resolve()) if path.exists() else name


def load_model(model: str, options: LoadOptions) -> nn.Module:
    """The model of a folder, on the device, or kept elsewhere and computed there."""
    return LOADERS[options.weights](model, options)


def _load_whole(model: str, options: LoadOptions) -> nn.Module:
    loaded: nn.Module = load(model, dtype=options.dtype)
    return loaded.to(options.device)


def _load_to_host(model: str, options: LoadOptions) -> nn.Module:
    from accelerate import cpu_offload  # noqa: PLC0415 (an extra)

    loaded: nn.Module = cpu_offload(load(model, dtype=options.dtype), execution_device=torch.device(options.device))
    return loaded


def _leave_on_disk(model: str, options: LoadOptions) -> nn.Module:
    # Only what is not kept in files as the model needs it is written there.
    more = TemporaryDirectory(prefix="liar-offload-")
    loaded: nn.Module = load(model, dtype=options.dtype, device_map={"": "disk"}, offload_folder=more.name)
    finalize(loaded, more.cleanup)
    compute_on(loaded, torch.device(options.device))
    return loaded


LOADERS: dict[str, Callable[[str, LoadOptions], nn.Module]] = {
    "device": _load_whole,
    "host": _load_to_host,
    "disk": _leave_on_disk,
}


def check_source(source: SourceOptions | None, load: LoadOptions) -> None:
    """Check, before anything is loaded, that texts can be read and the device used."""
    if source is not None:
        builder_of(source.calib)
    if reason := why_unusable(load.device):
        raise OptionError(f"device={load.device!r}: expected one torch can use here, such as cpu or cuda: {reason}")
    if load.weights != "device" and find_spec("accelerate") is None:
        raise OptionError(
            f'weights={load.weights!r} needs the package accelerate, which is not installed: pip install "liar-prune[offload]"'
        )
