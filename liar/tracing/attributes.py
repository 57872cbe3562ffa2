"""Attributes and entries of the configuration that hold the sizes of a site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, combinations, product
from operator import attrgetter

import torch
from torch import nn

from liar.errors import ModelError
from liar.models import Family, Site, layer_of, layout_of
from liar.models.layers import storage_of
from liar.runtime import run_block
from liar.surgery import Width, build_stock, copy_block, cut_site, scaled_sizes
from liar.surgery.stock import shapes
from liar.tracing.findings import NotFoundError
from liar.tracing.small import Probe, own_entries
from liar.tracing.units import Units

# As many attributes at most have to be corrected beside those that a smaller model of the class shows.
MOST_SIZES = 3
# Parts of names, the likeliest first. Counts come last: their value may happen to be a width.
HEAD_WIDTHS = ("head_dim", "head_size", "head", "dim", "size")
GROUPS = ("group", "rep", "kv", "key")
COUNTS = ("num", "n_")


def unit_attributes(block: nn.Module, units: Units) -> Iterator[tuple[str | None, str | None]]:
    """Attributes that may hold the width of a head and the number of heads that share one, the likeliest first.

    Raises:
        NotFoundError: no attribute has the value; says which there are.
    """
    if units.kind == "neurons":
        yield None, None
        return
    integers = _integers(block, [*_modules(units)])
    widths = _by_name(integers, units.head, HEAD_WIDTHS, COUNTS)
    groups: Sequence[str | None] = _by_name(integers, units.heads, GROUPS, ()) if units.heads > 1 else [None]
    for name, value, found in (("unit_width", units.head, widths), ("group_size", units.heads, groups)):
        if not found:
            seen = ", ".join(f"{path}={number}" for path, number in integers.items()) or "none"
            raise NotFoundError(
                f"{name} of {units.consumer}", f"no integer attribute of its modules is {value}; they have {seen}"
            )
    yield from product(widths, groups)


def with_sizes(small: nn.Module, probe: Probe, family: Family, number: int) -> Family:
    """The family with `config_keys` and `size_attributes` of one pattern filled in.

    Attributes that are smaller in a smaller model of the class have to be corrected; if the cut block still does not compute
    what it did with zero weights, as few others as possible.

    Raises:
        NotFoundError: a cut block does not, whatever is corrected.
    """
    site = _site(small, family, number)
    family = _changed(family, number, config_keys=_config_keys(small, family, number))
    integers = _integers(probe.block, [edge.module for edge in site.edges])
    needed = _scaled_attributes(small, family, number, integers)
    # What is named after heads and is as large as all of them together: nothing may read it but the user.
    channels = site.units * site.consumer.width
    needed += [path for path, value in integers.items() if value == channels and "head" in path.rpartition(".")[2]]
    fixed = (*needed, family.patterns[number].unit_width, family.patterns[number].group_size)
    others = [path for path, value in integers.items() if value and value % site.units == 0 and path not in fixed]
    problems = []
    for count in range(min(MOST_SIZES, len(others)) + 1):
        for more in combinations(others, count):
            attributes = tuple(path for path in integers if path in (*needed, *more))
            problem = _problem(probe, replace(site, size_attributes=attributes))
            if problem is None:
                return _changed(family, number, size_attributes=attributes)
            problems.append(problem)
    raise NotFoundError(
        f"unit_width, group_size or size_attributes of {site.consumer.module}",
        "with every second unit cut, a block should compute what it does with zero weights for them, but "
        f"{problems[0]}; correcting {', '.join((*needed, *others)) or 'attributes'} does not help",
    )


def _site(small: nn.Module, family: Family, number: int) -> Site:
    try:
        return layout_of(small, family).sites[number]
    except ModelError as error:
        raise NotFoundError("table", str(error)) from error


def _changed(family: Family, number: int, **changes: tuple[str, ...]) -> Family:
    patterns = list(family.patterns)
    patterns[number] = replace(patterns[number], **changes)  # type: ignore[arg-type]
    return replace(family, patterns=tuple(patterns))


def _modules(units: Units) -> Iterator[str]:
    yield from (each if isinstance(each, str) else each.module for each in units.producers)
    yield units.consumer


def _integers(block: nn.Module, layers: Iterable[str]) -> dict[str, int]:
    """Integer attributes of the modules that hold some layers: path -> value."""
    layers = list(layers)
    return {
        f"{name}.{key}".lstrip("."): value
        for name, module in block.named_modules()
        if not storage_of(module) and (not name or any(layer.startswith(f"{name}.") for layer in layers))
        for key, value in vars(module).items()
        if type(value) is int
    }


def _by_name(integers: dict[str, int], value: int, likely: tuple[str, ...], unlikely: tuple[str, ...]) -> list[str]:
    """Paths of a value, those with a likely name first."""

    def rank(path: str) -> tuple[bool, int]:
        name = path.rpartition(".")[2]
        return name.startswith(unlikely), next((i for i, part in enumerate(likely) if part in name), len(likely))

    return sorted((path for path, actual in integers.items() if actual == value), key=rank)


def _config_keys(small: nn.Module, family: Family, number: int) -> tuple[str, ...]:
    """Entries that together change the number of units and nothing else; none if the class has no such entries.

    Best are entries that leave the width of a unit alone. (BERT has none for heads: fewer heads are wider there. Then it is the
    entry with the number.)
    """
    site = layout_of(small, family).sites[number]
    fewer = max(1, site.units // 2)
    entries = [
        key
        for key, value in own_entries(small.config).items()
        if value is None or (type(value) is int and value and value % site.units == 0)
    ]
    second_best: tuple[str, ...] = ()
    moving: list[str] = []
    for keys in chain(((key,) for key in entries), _pairs(moving)):
        stock = build_stock(small, scaled_sizes(small, keys, Width(fewer, site.query_heads), Width.of(site)))
        if stock is None or shapes(stock) != shapes(small):
            moving += keys
        match _match(stock, small, family, number, fewer):
            case "same widths":
                return keys
            case "other widths" if not second_best:
                second_best = keys
    return second_best


def _pairs(moving: list[str]) -> Iterator[tuple[str, str]]:
    """Pairs of entries that, as was found when it is asked for, change the model."""
    yield from combinations(tuple(moving), 2)


def _match(stock: nn.Module | None, small: nn.Module, family: Family, number: int, fewer: int) -> str | None:
    """Whether a model of the class has fewer units of one kind, all else being equal, and how wide they are."""
    if stock is None:
        return None
    before = layout_of(small, family).sites
    try:
        after = layout_of(stock, family).sites
    except ModelError:
        return None
    old, new = before[number], after[number]
    if len(after) != len(before) or new.units != fewer or new.units == old.units:
        return None
    others = [index for index in range(len(family.patterns)) if index != number]
    if any(after[index] != before[index] for index in others) or (new.out, new.query_heads) != (old.out, old.query_heads):
        return None
    widths = [[edge.width for edge in site.edges] for site in (old, new)]
    return "same widths" if widths[0] == widths[1] else "other widths"


def _scaled_attributes(small: nn.Module, family: Family, number: int, integers: dict[str, int]) -> list[str]:
    """Attributes that are smaller in a model of the class with half as many units."""
    layout, pattern = layout_of(small, family), family.patterns[number]
    site = layout.sites[number]
    units, fewer = site.units, max(1, site.units // 2)
    stock = build_stock(small, scaled_sizes(small, pattern.config_keys, Width(fewer, site.query_heads), Width.of(site)))
    if stock is None or not pattern.config_keys:
        return []
    block = stock.get_submodule(layout.blocks[0])
    after = {path: attrgetter(path)(block) for path in integers}
    return [path for path, value in integers.items() if after[path] != value and after[path] * units == value * fewer]


def _problem(probe: Probe, site: Site) -> str | None:
    """Why the first block cut to every second unit is not the one with zero weights for the others; None if it is."""
    kept = torch.arange(site.units) % 2 == 0
    cut, zeroed = copy_block(probe.block), copy_block(probe.block)
    layer = layer_of(zeroed, site.consumer)
    weight, bias = layer.initial_weights()
    weight[site.consumer.channels(~kept)] = 0
    layer.write(weight, bias)
    with torch.no_grad():
        expected = run_block(zeroed, probe.hidden, probe.call)
        try:
            cut_site(cut, site, kept)
            actual = run_block(cut, probe.hidden, probe.call)
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, ZeroDivisionError, ModelError) as error:
            return f"it stops ({error})"
    scale = float(expected.abs().max())
    same = actual.shape == expected.shape and torch.allclose(actual, expected, rtol=1e-4, atol=1e-5 * scale)
    return None if same else "it gives other values"
