"""One run of the command line as data: what `run.json` holds, how it is checked and how it is carried out."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoTokenizer

from liar import checkpoint
from liar.api import BUDGETS, reconstruct, select
from liar.atomic import check_target
from liar.calibration import calibration
from liar.costs import Costs
from liar.criteria import CRITERIA, SCOPES, check_drop, check_keep
from liar.errors import CheckpointError, MaskError, OptionError, choose, reading
from liar.families import discover
from liar.mask import Mask
from liar.rebuild import BIASES, TARGETS
from liar.report import Report
from liar.solve import SOLVERS, check_ridge
from liar.texts import builder_of, texts

logger = logging.getLogger(__name__)

COMMANDS = ("prune", "reconstruct")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Run:
    """All arguments of `liar prune` or `liar reconstruct`.

    Attributes:
        command: `"prune"` or `"reconstruct"`.
        model: folder, or name on the hub.
        out: folder that is written.
        calib: text file (a text per line), JSON lines, or the name of a dataset.
        config: configuration of the dataset.
        split: of the dataset.
        column: that holds the texts.
        tokens: calibration tokens; all where None.
        max_length: tokens per sequence.
        batch_size: sequences per batch.
        pack: texts are joined and cut into full sequences.
        mixed_lengths: an encoder's long texts are taken in pieces of lengths from short to `max_length`.
        keep: share of the block parameters that stays (prune).
        criterion, scope, round_to, uniform, protect, seed: see `liar.select` (prune).
        drop: whether whole sub-layers may go: see `liar.select`, and for a mask `Mask.of`.
        budget: likewise; or the content of a file with costs, as `liar latency` writes it.
        mask: content of a mask file, in any form `Mask.of` takes or as `Mask.save` writes it (reconstruct).
        target, ridge, refit, solver, bias: see `liar.reconstruct`.
        dtype: of the loaded weights; `"auto"` is the stored one.
        device: to run on.
    """

    command: str
    model: str
    out: str
    calib: str
    config: str | None = None
    split: str = "train"
    column: str = "text"
    tokens: int | None = None
    max_length: int = 256
    batch_size: int = 32
    pack: bool = False
    mixed_lengths: bool = True
    keep: float | None = None
    criterion: str = "reconstruction"
    scope: str = "global"
    budget: str | Mapping[str, Any] = "params"
    round_to: int = 1
    uniform: bool = False
    protect: Sequence[str | int] = ()
    drop: bool = False
    seed: int = 0
    mask: Mapping[str, Any] | None = None
    target: str = "dense_stream"
    ridge: float | str = "auto"
    refit: bool = True
    solver: str = "auto"
    bias: str = "keep"
    dtype: str = "auto"
    device: str = "cpu"

    def check(self, *, force: bool) -> None:
        """Check everything that can be checked before anything is loaded.

        Raises:
            LiarError: of the kind that fits, with what was expected, what came, and what to do.
        """
        check_target(self.out, overwrite=force)
        if Path(self.out).resolve() == Path(self.model).resolve():
            raise OptionError(f"OUT is the folder of MODEL ({self.out}): it could not be repeated; choose another OUT")
        possible = {
            "command": COMMANDS, "criterion": CRITERIA, "scope": SCOPES, "target": TARGETS, "solver": SOLVERS,
            "bias": BIASES, "dtype": DTYPES,
        }  # fmt: skip
        for option, values in possible.items():
            choose(option, getattr(self, option), list(values))
        if self.command == "prune":
            check_keep(self.keep)
            if self.drop:
                check_drop(self.criterion, self.scope, uniform=self.uniform)
        if self.command == "reconstruct":
            self._checked_mask()
        if self.ridge != "auto":
            check_ridge(self.ridge)
        self._checked_budget()
        for option in ("tokens", "max_length", "batch_size", "round_to"):
            value = getattr(self, option)
            if value is not None and value < 1:
                raise OptionError(f"{option}={value}: expected at least 1")
        _check_device(self.device)
        builder_of(self.calib)

    def carry_out(self, *, force: bool = False, progress: bool = True) -> Report:
        """Check, load, prune or reconstruct, and write `out`: model, tokenizer, mask, report and `run.json`, in one step.

        Raises:
            LiarError: with what was expected, what came, and what to do; `out` is then as it was.
        """
        self.check(force=force)
        tokenizer = _tokenizer(self.model)
        batches = calibration(
            texts(self.calib, config=self.config, split=self.split, column=self.column),
            tokenizer,
            max_length=self.max_length,
            batch_size=self.batch_size,
            tokens=self.tokens,
            pack=self.pack,
            mixed_lengths=self.mixed_lengths,
        )
        model = checkpoint.load(self.model, dtype=self.dtype).to(self.device)  # type: ignore[arg-type]
        if self.command == "prune":
            assert self.keep is not None, "checked above"
            how = self._options("criterion", "scope", "round_to", "uniform", "protect", "drop", "seed")
            mask = select(model, batches, keep=self.keep, budget=self._checked_budget(), progress=progress, **how)
        else:
            mask = Mask.of(self._checked_mask(), discover(model), drop=self.drop)
        how = self._options("target", "ridge", "refit", "solver", "bias")
        report = reconstruct(model, mask, batches, progress=progress, **how)
        extra = {"mask.json": mask.to_json(), "run.json": self.to_json()}
        checkpoint.save(model, self.out, tokenizer=tokenizer, mask=mask, report=report, extra=extra, overwrite=force)
        return report

    def _options(self, *names: str) -> dict[str, Any]:
        """Some of the arguments, by name."""
        return {name: getattr(self, name) for name in names}

    def _checked_budget(self) -> str | Costs:
        """The budget, by name or from what was measured."""
        if isinstance(self.budget, Mapping):
            return Costs.from_json(json.dumps(self.budget))
        choose("budget", self.budget, list(BUDGETS))
        return self.budget

    def _checked_mask(self) -> Mask | Mapping[str, Any]:
        """The mask that was given, as far as it can be understood without a model."""
        if not isinstance(self.mask, Mapping):
            raise MaskError(f"expected the content of a mask file, a JSON object, got a {type(self.mask).__name__}")
        return Mask.from_json(json.dumps(self.mask)) if "mask" in self.mask else self.mask

    def to_json(self) -> str:
        """The arguments and the versions they ran with."""
        return json.dumps(
            {"run": asdict(self), "versions": {**checkpoint.versions(), "datasets": datasets.__version__}}, indent=1
        )

    @classmethod
    def from_json(cls, text: str) -> Run:
        """The inverse of `to_json`; versions other than today's are told in the log.

        Raises:
            OptionError: the text is not such a JSON.
        """
        known = ", ".join(field.name for field in fields(cls))
        with reading(OptionError, f'a run.json with {{"run": {{…}}}} of {known}'):
            content = json.loads(text)
            run = cls(**content["run"])
        for name, now in json.loads(run.to_json())["versions"].items():
            then = content.get("versions", {}).get(name)
            if then != now:
                logger.warning("the run was made with %s %s, this is %s: numbers may differ", name, then, now)
        return run


def _tokenizer(model: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{model}: expected a model folder with a tokenizer, or a name on the hub: {error}. Save the tokenizer to it"
        ) from error


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise OptionError(f"device={device!r}: expected one torch can use here, such as cpu or cuda: {reason}") from error
