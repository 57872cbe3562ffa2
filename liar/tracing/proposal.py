"""`propose_family`: from findings to a table that passes the contract; and `discover`, which uses it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice, product

import torch
from torch import Tensor, nn

from liar.errors import ModelError
from liar.models import Family, Layout, SitePattern, check_model, is_registered, layout_of, model_type_of, registered
from liar.runtime import exclusive, preserve_model_state
from liar.surgery import Width, scaled_sizes
from liar.testing import check_family
from liar.testing.table_checks import streams
from liar.tracing.attributes import unit_attributes, with_sizes
from liar.tracing.blocks import find_blocks
from liar.tracing.findings import Findings, NotFoundError
from liar.tracing.small import Probe, probe_of, random_model, small_model
from liar.tracing.streams import Streams, check_consumers, find_consumers, find_streams, find_sublayer, residual_of
from liar.tracing.trace import Trace, trace_block
from liar.tracing.units import Units, find_effects, find_units

# Tables that are tried with the contract at most, and units that the model has for it.
TRIES = 8
CHECKED_UNITS = {"heads": 4, "neurons": 32}


def propose_family(model: nn.Module, batch: Mapping[str, Tensor]) -> Family:
    """Find the table of a model's family by running it and changing single channels.

    The model itself runs once, on the batch. All else is tried on a small random model of its class, or on a copy if the class
    cannot be built from the configuration. The table has passed `liar.testing.check_family` there. It is not registered.

    Args:
        model: a Hugging Face model of any family, with its weights; it is not changed.
        batch: `input_ids` and perhaps other arguments of the model, as in `Calibration.of`.

    Returns:
        The table. `pprint.pp(family)` prints it as Python; `liar.register(family)` makes it known.

    Raises:
        ModelError: no table was found; says which fields are missing and what was seen, and what was found.

    Example:
        >>> family = liar.propose_family(model, calib[0])
        >>> [(pattern.kind, pattern.consumer) for pattern in family.patterns]
        [('heads', 'attention.output.dense'), ('neurons', 'output.dense')]
    """
    with exclusive(model):
        findings = Findings()
        with findings.looking():
            return _propose(model, batch, findings)
        raise findings.error(model)


def discover(model: nn.Module, batch: Mapping[str, Tensor] | None = None) -> Layout:
    """Find all sites of a model, dense or already cut: sizes are read off the layers, not off the configuration.

    Args:
        model: a Hugging Face model; it is not changed.
        batch: for a model of an unknown family: what to run it on, as for `propose_family`, which then finds the table. The
            table is not registered. Left out, the family must be known.

    Returns:
        The model's `Layout`: its sites in the order of the data, its blocks, and the parameters in them.

    Raises:
        ModelError: unknown family (and, with a batch, no table was found), the model's modules are not what the family's table
            says, or its layers cannot be rewritten: it is wrapped or quantised, layers share a weight, a module has a forward
            of its own.

    Example:
        >>> layout = liar.discover(model)
        >>> [site.name for site in layout.sites]
        ['heads.0', 'neurons.0', 'heads.1', 'neurons.1']
    """
    check_model(model)
    if batch is None or is_registered(model_type_of(model)):
        return layout_of(model)
    return layout_of(model, propose_family(model, batch))


@dataclass(frozen=True)
class _Observed:
    """What was seen of a model, and of the first block of a small one."""

    model_type: str
    blocks: str
    small: nn.Module
    probe: Probe
    trace: Trace
    units: Sequence[Units]
    streams: Streams


def _propose(model: nn.Module, batch: Mapping[str, Tensor], findings: Findings) -> Family:
    observed = _observe(model, batch, findings)
    for family in islice(_tables(observed, findings), TRIES):
        try:
            _check(observed.small, family)
            _check_all_blocks(model, family, batch)
        except (AssertionError, ModelError) as error:
            reason, *_ = str(error).split("\n")
            findings.missing.append(f"a table that passes liar.testing.check_family: {reason}")
        else:
            return replace(family, note=f"proposed from {type(model).__name__}")
    raise findings.error(model)


def _observe(model: nn.Module, batch: Mapping[str, Tensor], findings: Findings) -> _Observed:
    model_type = model_type_of(model)
    if model_type is None:
        raise NotFoundError("model_type", "the model has no config.model_type")
    if "input_ids" not in batch:
        raise NotFoundError("blocks", f"expected a batch with input_ids, got one with {', '.join(batch) or 'nothing'}")
    blocks = find_blocks(model, batch)
    findings.found.append(f"blocks={blocks!r}")
    small = small_model(model, blocks)
    probe = probe_of(small, blocks)
    trace = trace_block(probe)
    consumers = find_consumers(trace)
    with findings.looking():
        check_consumers(probe.block, trace, consumers)
    effects = find_effects(probe, trace, consumers)
    units = []
    for consumer in consumers:
        with findings.looking():
            units.append(find_units(trace, consumer, effects))
            findings.found.append(f"{units[-1].kind}: from {', '.join(map(str, units[-1].producers))} to {consumer}")
    if findings.missing:
        raise findings.error(model)
    streams = find_streams(trace, consumers)
    if len({each.kind for each in units}) < len(units):
        raise NotFoundError("kind", f"expected one consumer of heads and one of neurons, got two of {units[0].kind}")
    return _Observed(model_type, blocks, small, probe, trace, units, streams)


def _tables(observed: _Observed, findings: Findings) -> Iterator[Family]:
    """Tables with the attributes and sublayers that are possible, the likeliest first."""
    for attributes in product(*(unit_attributes(observed.probe.block, units) for units in observed.units)):
        patterns = [
            SitePattern(
                units.kind,
                units.producers,
                units.consumer,
                residual=observed.streams.residuals[units.consumer][0],
                unit_width=unit_width,
                group_size=group_size,
            )
            for units, (unit_width, group_size) in zip(observed.units, attributes, strict=True)
        ]
        streams = observed.streams
        family = Family(observed.model_type, observed.blocks, tuple(patterns), streams.is_pre_norm, streams.is_parallel)
        with findings.looking():
            for number in range(len(patterns)):
                family = with_sizes(observed.small, observed.probe, family, number)
            yield from _with_sublayers(family, observed)


def _with_sublayers(family: Family, observed: _Observed) -> Iterator[Family]:
    for sublayers in product(*(_sublayers(observed.trace, units, observed.streams) for units in observed.units)):
        patterns = (
            replace(pattern, sublayer=sublayer, residual=residual)
            for pattern, (sublayer, residual) in zip(family.patterns, sublayers, strict=True)
        )
        yield replace(family, patterns=tuple(patterns))


def _sublayers(trace: Trace, units: Units, streams: Streams) -> list[tuple[str | None, tuple[str, int]]]:
    """Sublayers, none in the end, each with a residual that is captured where its output is replayed."""
    places, sublayers = streams.residuals[units.consumer], dict.fromkeys([find_sublayer(trace, units), None])
    found = [(sublayer, residual_of(places, units.consumer, sublayer)) for sublayer in sublayers]
    return [(sublayer, residual) for sublayer, residual in found if residual is not None]


def _check_all_blocks(model: nn.Module, family: Family, batch: Mapping[str, Tensor]) -> None:
    """What the contract says of streams, on every block of the model itself: blocks may differ.

    Raises:
        AssertionError: the table does not hold for one of them.
        ModelError: it does not fit the model.
    """
    layout = layout_of(model, family)
    wide = model
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        wide = nn.Module.to(copy.deepcopy(model), torch.float32)
    with torch.no_grad(), preserve_model_state(wide):
        streams(wide, layout, [batch])


def _check(small: nn.Module, family: Family) -> None:
    """The contract, on a model with few units in each layer where the class can be built so.

    Raises:
        AssertionError: the table breaks it.
    """
    sizes: dict[str, int] = {}
    for pattern, site in zip(family.patterns, layout_of(small, family).sites, strict=False):  # those of the first block
        fewer = Width(min(site.units, CHECKED_UNITS[pattern.kind]), site.query_heads)
        sizes |= scaled_sizes(small, pattern.config_keys, fewer, Width.of(site))
    with registered(family):
        check_family(random_model(small, sizes) or small)
