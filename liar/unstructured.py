"""Removing single weights: by magnitude, by Wanda, or by SparseGPT with its update; a share of them, or patterns such as 2:4.

The model keeps its shapes, so it is not smaller or faster on ordinary hardware. It is the setting of studies of
reconstruction: the masks that come back are held while the weights that stay are trained (`hold_masks`).

As in the published code, the layers of a block are measured together, on what the blocks before it give once they are pruned.
Sources: Han et al. 2015 (magnitude), Sun et al. 2023 (Wanda), Frantar and Alistarh 2023 (SparseGPT).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from liar.data import Calibration, transformer_and_data
from liar.errors import CalibrationError, ModelError, OptionError, at_site
from liar.mask import Mask, WeightMasks, apply_masks, hold_masks
from liar.models import LayerView, check_one_stack, layout_with_weights, linear_layers, plain_block, transformer_in
from liar.options import UnstructuredOptions
from liar.progress import ProgressOption, progress_of
from liar.repair import RepairStep, SiteState, apply_steps
from liar.runtime import distributed, exclusive
from liar.statistics import ChannelMoments, Moments, check_finite
from liar.surgery import adopt, all_or_nothing, copy_block

__all__ = ["Sparsified", "WeightMasks", "apply_masks", "hold_masks", "prune"]

# SparseGPT: columns whose weights are compared with each other, and the share of the Gram matrix's mean diagonal that is
# added to its diagonal.
COLUMNS = 128
DAMPING = 0.01

Sparsity = float | str


def lowest(scores: Tensor, sparsity: Sparsity) -> Tensor:
    """The weights with the lowest scores of each row, or, with a pattern, of each group in a row: bool, True is removed.

    Args:
        scores: [rows, in].
        sparsity: a share, or a pattern such as `"2:4"`, whose groups divide the inputs.

    Example:
        >>> lowest(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), "2:4")
        tensor([[False,  True,  True, False]])
    """
    if isinstance(sparsity, str):
        kept, group = map(int, sparsity.split(":"))
        groups, count = scores.reshape(-1, group), group - kept
    else:
        groups, count = scores, round(sparsity * scores.shape[1])
    removed = torch.zeros_like(groups, dtype=torch.bool)
    return removed.scatter_(1, groups.argsort(dim=1, stable=True)[:, :count], True).reshape(scores.shape)


def by_magnitude(weight: Tensor, _: None, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """Absolute weights, compared within the whole layer: weight [out, in] -> new weight, and what is removed."""
    scores = weight.abs()
    scores = scores if isinstance(sparsity, str) else scores.reshape(1, -1)
    removed = lowest(scores, sparsity).reshape(weight.shape)
    return weight.masked_fill(removed, 0), removed


def by_wanda(weight: Tensor, inputs: ChannelMoments, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """Absolute weights times the norm of their input, compared within each output (Wanda, equation 1)."""
    removed = lowest(weight.abs() * (inputs.mean.square() + inputs.variance).sqrt(), sparsity)
    return weight.masked_fill(removed, 0), removed


def by_sparsegpt(weight: Tensor, inputs: Moments, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """SparseGPT, algorithm 1: column by column, what is removed is made up for by the columns that follow.

    With H the damped Gram matrix of the inputs and U the upper Cholesky factor of its inverse, row i of U holds the update that
    removing an entry of column i asks of the columns from i on, and U_ii squared is the diagonal of the inverse without the
    columns before.
    """
    gram = inputs.normal(affine=False).gram
    silent = gram.diagonal() == 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean()).masked_fill_(silent, 1)
    # What a silent input is multiplied by does not matter, so it goes first.
    weight = weight.masked_fill(silent, 0)
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(gram)), upper=True)
    removed = torch.zeros_like(weight, dtype=torch.bool)
    for start in range(0, weight.shape[1], _columns(sparsity)):
        part = slice(start, start + _columns(sparsity))
        error = _remove_columns(weight[:, part], upper[part, part], sparsity, removed[:, part])
        weight[:, part.stop :] -= error @ upper[part, part.stop :]
    return weight, removed


def _columns(sparsity: Sparsity) -> int:
    """Columns that are handled together: whole groups."""
    group = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else 1
    return max(COLUMNS // group, 1) * group


def _remove_columns(weight: Tensor, upper: Tensor, sparsity: Sparsity, removed: Tensor) -> Tensor:
    """Remove entries of some columns, in place: what is lost of each, [out, columns], for the columns that follow."""
    error = torch.zeros_like(weight)
    group = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else weight.shape[1]
    for column, pivot in enumerate(upper.diagonal()):
        if column % group == 0:
            chosen = slice(column, column + group)
            scores = (weight[:, chosen] / upper.diagonal()[chosen]).square()
            scores = scores if isinstance(sparsity, str) else scores.reshape(1, -1)
            removed[:, chosen] = lowest(scores, sparsity).reshape(len(weight), -1)
        error[:, column] = weight[:, column].where(removed[:, column], 0) / pivot
        weight[:, column:] -= error[:, column, None] * upper[column, column:]
    # Exactly, not but for rounding.
    weight.masked_fill_(removed, 0)
    return error


@dataclass(frozen=True)
class Sparsified:
    """What `prune` removed; frozen.

    Attributes:
        masks: name of a weight -> bool, of its shape: True where an entry stays.
        options: sparsity and criterion.
        tokens: calibration tokens that were used.

    Example:
        >>> pruned = liar.unstructured.prune(model, sparsity="2:4", criterion="magnitude")
        >>> pruned.sparsity
        0.5
    """

    masks: WeightMasks
    options: UnstructuredOptions
    tokens: int

    @property
    def sparsity(self) -> float:
        """The share of the weights in these layers that was removed."""
        return 1 - sum(int(mask.sum()) for mask in self.masks.values()) / sum(mask.numel() for mask in self.masks.values())


@dataclass(frozen=True)
class Criterion:
    """How weights are chosen.

    Attributes:
        remove: weight [out, in] float64, statistics of the inputs, sparsity -> new weight, and what is removed.
        statistics: makes an accumulator of what it needs to know of a layer's inputs, given the rows that earlier processes
            have; None where it needs nothing.
        update: adds inputs [tokens, in] to an accumulator.
    """

    remove: Callable[[Tensor, Any, Sparsity], tuple[Tensor, Tensor]]
    statistics: Callable[..., Any] | None = None
    update: Callable[[Any, Tensor], None] = lambda part, rows: part.update(rows)


CRITERIA = {
    "magnitude": Criterion(by_magnitude),
    "wanda": Criterion(by_wanda, lambda origin=0: ChannelMoments()),
    "sparsegpt": Criterion(by_sparsegpt, Moments, lambda part, rows: part.update(rows, rows[:, :0])),
}


@dataclass
class RemoveWeights(RepairStep):
    """The step of the walk that removes weights of all linear layers of a block at once.

    Attributes:
        options: sparsity and criterion.
        advance: called after every block.
        masks: of the blocks that are done.
    """

    options: UnstructuredOptions
    advance: Callable[[], Any]
    masks: dict[str, Tensor] = field(default_factory=dict)
    changes_all = True

    def repair(self, site: SiteState) -> None:
        """At the first site of a block, measure and prune its layers."""
        if site.site == site.block.sites[0]:
            layers = linear_layers(site.pruned_block)
            self.remove(site.site.block, layers, self._statistics(site, layers))

    def remove(self, block: str, layers: Mapping[str, LayerView], statistics: Mapping[str, Any]) -> None:
        """Prune the layers of a block, given the statistics of what each of them reads; processes take turns."""
        choices = [partial(self._pruned, f"{block}.{name}", layer, statistics.get(name)) for name, layer in layers.items()]
        for (name, layer), (weight, removed) in zip(layers.items(), distributed.answers(choices), strict=True):
            layer.write(weight.T, layer.initial_weights()[1])
            self.masks[f"{block}.{name}.weight"] = layer.as_matrix(~removed.T).contiguous()
        self.advance()

    def _pruned(self, full_name: str, layer: LayerView, statistics: Any) -> tuple[Tensor, Tensor]:
        """The new weight of a layer [out, in], and what is removed of it."""
        weight = layer.initial_weights()[0].T.contiguous()
        with at_site(full_name, type(layer.module).__name__):
            check_finite(weight, what="weights")
            return CRITERIA[self.options.criterion].remove(weight, statistics, self.options.sparsity)

    def _statistics(self, site: SiteState, layers: Mapping[str, LayerView]) -> dict[str, Any]:
        """By layer, of what it reads on the pruned stream; layers that read one tensor share them."""
        criterion, leaders = CRITERIA[self.options.criterion], dict[str, str]()
        assert criterion.statistics is not None
        parts: dict[str, Any] = {}
        origin = sum(site.walk.sample(site.site.stack).origins)
        for batch, token_mask in enumerate(site.walk.calibration.token_masks):
            with _first_inputs(layers) as inputs:
                site.run_block(batch)
            leaders = leaders or _leaders(inputs)
            for name in dict.fromkeys(leaders.values()):
                with site.walk.timed("statistics"), at_site(f"{site.site.block}.{name}", "its input"):
                    rows = _tokens(inputs[name], token_mask, name)
                    criterion.update(parts.setdefault(name, criterion.statistics(origin)), rows)
        # A process without batches has seen no layer.
        leaders = next(each for each in distributed.gather(leaders) if each)
        for name in dict.fromkeys(leaders.values()):
            parts.setdefault(name, criterion.statistics(origin)).reduce(distributed)
        return {name: parts[leader] for name, leader in leaders.items()}


@contextmanager
def _first_inputs(layers: Mapping[str, LayerView]) -> Iterator[dict[str, Tensor]]:
    """By layer, what it reads when it runs for the first time (DeBERTa runs some again, on positions)."""
    inputs: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, args[0])

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.module.register_forward_pre_hook(reader(name)).remove)
        yield inputs
    if idle := [name for name in layers if name not in inputs]:
        raise ModelError(f"{', '.join(idle)}: the layer did not run in a pass of its block, so nothing is known of its input")


def _leaders(inputs: Mapping[str, Tensor]) -> dict[str, str]:
    """Layer -> the first one that reads the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in inputs.items()}


def _tokens(value: Tensor, token_mask: Tensor, name: str) -> Tensor:
    """Of what a layer reads, [sequences, length, channels] or flattened, the real tokens: [tokens, channels]."""
    rows = value.flatten(0, -2)
    if len(rows) != token_mask.numel():
        shape = list(token_mask.shape)
        raise ModelError(f"{name} reads {list(value.shape)}, expected a row for each of {shape} tokens")
    return rows[token_mask.flatten()]


def prune(
    model: nn.Module,
    calib: Iterable[Any] | None = None,
    *,
    sparsity: float | str = UnstructuredOptions.sparsity,
    criterion: str = UnstructuredOptions.criterion,
    progress: ProgressOption = True,
) -> Sparsified:
    """Set single weights of all linear layers in the transformer blocks to zero.

    Args:
        model: a Hugging Face model of a known family, or a model of sentence-transformers; changed in place at the very end,
            or not at all on an error.
        calib: calibration batches (see `Calibration.of`); may be left out for `"magnitude"`.
        sparsity: share of the weights that is removed from every layer, or a pattern: with `"2:4"`, of 4 neighbouring inputs of
            an output the best 2 stay.
        criterion: `"magnitude"`, `"wanda"`, or `"sparsegpt"`, which also changes the weights that stay.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        A `Sparsified`, with a mask for every weight.

    Raises:
        OptionError, CalibrationError, ModelError: with what was expected, what came, and what to do.

    Example:
        >>> pruned = liar.unstructured.prune(model, calib, sparsity=0.5)
        >>> weight = model.get_parameter("encoder.layer.0.output.dense.weight")
        >>> torch.equal(weight != 0, pruned.masks["encoder.layer.0.output.dense.weight"])
        True
    """
    options = UnstructuredOptions(sparsity, criterion).checked()
    inner = transformer_in(model)
    with exclusive(inner):
        layout = layout_with_weights(inner)
        check_one_stack(layout, inner, "unstructured.prune")
        layers = {block: linear_layers(inner.get_submodule(block)) for block in layout.blocks}
    _check_groups(layers, options.sparsity)
    with distributed.together():
        calibration = _calibration(model, calib, options.criterion)
    with (
        exclusive(inner),
        progress_of(progress, "prune", {"weights": 1}) as shown,
        all_or_nothing(inner),
        distributed.together(),
        shown.stage("weights", len(layers)) as advance,
    ):
        step = RemoveWeights(options, lambda: advance(1))
        if calibration is None:
            for name in layers:
                block = inner.get_submodule(name)
                sparse = copy_block(plain_block(block))
                step.remove(name, linear_layers(sparse), {})
                adopt(block, sparse)
        else:
            all_units = Mask({site.name: torch.ones(site.units, dtype=torch.bool) for site in layout.sites})
            apply_steps(inner, layout, calibration, [step], all_units)
    return Sparsified(step.masks, options, 0 if calibration is None else calibration.tokens)


def _check_groups(layers: Mapping[str, Mapping[str, LayerView]], sparsity: Sparsity) -> None:
    """Check that a pattern's groups divide the inputs of every layer."""
    group = int(sparsity.split(":")[1]) if isinstance(sparsity, str) else 1
    for block, views in layers.items():
        for name, layer in views.items():
            if layer.size("in") % group:
                raise OptionError(
                    f"sparsity={sparsity!r}: expected a multiple of {group} inputs in every layer, {block}.{name} has "
                    f"{layer.size('in')}; give a share, or prune the model with round_to={group}"
                )


def _calibration(model: nn.Module, calib: Any, criterion: str) -> Calibration | None:
    """The data a criterion needs; None where it needs none."""
    if CRITERIA[criterion].statistics is None:
        return None
    if calib is None:
        raise CalibrationError(f"criterion={criterion!r} needs activations: pass calibration batches")
    inner, batches = transformer_and_data(model, calib)
    return Calibration.of(batches, inner)
