"""One plain pass of the dense model: moments of what every site's consumer reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from liar.data import Calibration
from liar.errors import MaskError, at_site
from liar.models import Layout, base_and_prefix, layout_with_weights
from liar.options import check_list
from liar.progress import Progress, ProgressOption, progress_of
from liar.runtime import Point, by_sequence, distributed, exclusive, preserve_model_state, receive_activations, run_model
from liar.statistics import ChannelMoments, Moments


def moments(
    model: nn.Module, calib: Iterable[Any], *, sites: Sequence[str] | None = None, progress: ProgressOption = True
) -> dict[str, Moments]:
    """Moments of the input of each site's consumer in the dense model, in one pass, for any mask.

    Args:
        model: a Hugging Face model of a known family; it is not changed.
        calib: calibration batches (see `Calibration.of`).
        sites: names of sites, all by default; memory is 8 bytes times the square of the channels for each.
        progress: show a bar, or a function that is called in its place (see `ProgressUpdate`).

    Returns:
        Site name -> `Moments`; `liar.interpolation` turns one into Q and P.

    Raises:
        MaskError, CalibrationError, ModelError: the message says what was expected and given, and what to do.

    Example:
        >>> gathered = liar.moments(model, calib, sites=["neurons.0"])
        >>> liar.interpolation(gathered["neurons.0"], mask["neurons.0"]).Q.shape[0] == mask.kept("neurons.0")
        True
    """
    if sites is not None:
        check_list("sites", sites)
    layout = layout_with_weights(model)
    site_names = [site.name for site in layout.sites]
    chosen = site_names if sites is None else list(sites)
    if unknown := [name for name in chosen if not isinstance(name, str) or name not in site_names]:
        raise MaskError(f"no such site: {', '.join(map(str, unknown))}; expected some of {', '.join(site_names)}")
    with distributed.together():
        calibration = distributed.share(Calibration.of(calib, model), model)
        origins = [_earlier_tokens(calibration.of_stack(stack)) for stack in range(len(layout.stacks))]
        accumulators = {name: Moments(origins[layout[name].stack]) for name in chosen or site_names}
        updates = {name: lambda rows, part=part: part.update(rows, rows[:, :0]) for name, part in accumulators.items()}
        with progress_of(progress, "moments", {"moments": 1}) as shown:
            _read(model, layout, calibration, updates, shown)
        for accumulator in accumulators.values():
            accumulator.reduce(distributed)
    return accumulators


def channel_moments(
    model: nn.Module, layout: Layout, calibration: Calibration, progress: Progress
) -> dict[str, dict[str, Tensor]]:
    """By site: `mean` and `variance` of every channel of the consumer's input, [channels] float64 each.

    Raises:
        CalibrationError: NaN or Inf in the activations of a site, which it names.
    """
    streamed = {site.name: ChannelMoments() for site in layout.sites}
    updates = {name: part.update for name, part in streamed.items()}
    _read(model, layout, distributed.share(calibration, model), updates, progress)
    for part in streamed.values():
        part.reduce(distributed)
    moments_of = {}
    for site in layout.sites:
        with at_site(site.name, site.module):
            moments_of[site.name] = {"mean": streamed[site.name].mean, "variance": streamed[site.name].variance}
    return moments_of


def _earlier_tokens(calibration: Calibration) -> int:
    """How many tokens earlier processes have."""
    return sum(distributed.gather(calibration.own_tokens)[: distributed.rank()])


def _read(
    model: nn.Module,
    layout: Layout,
    calibration: Calibration,
    updates: Mapping[str, Callable[[Tensor], None]],
    progress: Progress,
) -> None:
    """One forward pass of the dense model.

    What a site's consumer reads, [tokens, channels] per batch, goes to its update at once: it is never kept of several sites.
    """
    consumers = {name: model.get_submodule(layout[name].module) for name in updates}
    points = {name: Point(consumer, 0) for name, consumer in consumers.items()}
    base, _ = base_and_prefix(model)

    def receive(number: int, name: str, value: Tensor) -> None:
        tokens = calibration.of_stack(layout[name].stack).token_masks[number]
        updates[name](by_sequence(value, tokens)[tokens])

    with exclusive(model), preserve_model_state(model), progress.stage("moments", calibration.own_tokens) as advance:
        for number, batch in enumerate(calibration.batches):
            with receive_activations(points, partial(receive, number)):
                run_model(base, batch, calibration.numbers[number])
            advance(int(calibration.token_masks[number].sum()))
