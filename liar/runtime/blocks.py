"""Running a model, or its blocks one by one with the arguments the model gives them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

from safetensors import SafetensorError
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from liar.errors import CalibrationError, LiarError, ModelError
from liar.runtime.hooks import StopForward
from liar.runtime.store import ActivationStore


class BlockCall(NamedTuple):
    """How a model calls one of its blocks for one batch: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """Run a block: hidden states in, hidden states out (those that came in if `capture_activations` stopped the pass)."""
    try:
        output = block(hidden, *call.args, **call.kwargs)
    except StopForward:
        return hidden
    hidden = output[0] if isinstance(output, tuple) else output
    assert isinstance(hidden, Tensor)
    return hidden


def run_model(model: nn.Module, batch: Mapping[str, Any], number: int = 0) -> Any:
    """Run the bare model, or the model with its head, on a calibration batch; its outputs.

    Raises:
        CalibrationError: the model does not take the batch.
        ModelError: it runs attention in a way that not every device and pass has, and stops; or its files are gone.
    """
    try:
        return model(**batch)
    except (StopForward, LiarError):
        raise
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"{type(model).__name__}: a weight that is kept in a file cannot be read ({error}): the files of an offloaded "
            "model have to stay where they were; load it again"
        ) from error
    except Exception as error:
        attention = getattr(getattr(model, "config", None), "_attn_implementation", None) or "eager"
        if attention not in ("eager", "sdpa"):
            raise ModelError(
                f"{type(model).__name__} with attn_implementation={attention!r} stops ({error}). Not every device and backward "
                'pass has it: call model.set_attn_implementation("sdpa") first, and set it back afterwards'
            ) from error
        shapes = {name: list(value.shape) for name, value in batch.items() if isinstance(value, Tensor)}
        longest, most = max((shape[1] for shape in shapes.values() if len(shape) > 1), default=0), _positions(model)
        more = f" (sequences may have at most {most} tokens)" if most and longest > most else ""
        raise CalibrationError(
            f"{type(model).__name__} does not take calibration batch {number} with {shapes}{more}: {error}"
        ) from error


def _positions(model: nn.Module) -> int | None:
    """The most tokens a sequence may have, where the configuration says so."""
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return positions if isinstance(positions, int) else None


def record_block_calls(
    base: nn.Module,
    blocks: Sequence[nn.Module],
    batches: Sequence[Mapping[str, Tensor]],
    store: ActivationStore,
    stream: str,
    *,
    numbers: Sequence[int] | None = None,
    encoder: Sequence[nn.Module] = (),
) -> None:
    """Store what enters the first block for every batch (as `stream`), and how every block is called (see `calls_of`).

    The blocks themselves do not run, but for the first: for this pass each only notes its arguments and hands the hidden states
    on, beside what the first returns with them. `numbers` are the places of the batches in what the user gave, where these are
    some of them.

    `encoder`: the blocks of the stack before, if there is one. They do not run: that the last of them gives what the stream is
    now is all that this stack sees of them.

    Raises:
        CalibrationError: the model does not take a batch.
    """
    running, before = 0, len(encoder)
    first, first_of_encoder = _FirstBlock(blocks[0]), _FirstBlock(encoder[0]) if encoder else None

    def recorder(index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if index == 0:
                first.see(hidden_states, *args, **kwargs)
                store.put(stream, running, hidden_states)
            store.put(calls_of(stream, before + index), running, BlockCall(args, kwargs))
            if index == len(blocks) - 1:
                raise StopForward
            return first.returned(hidden_states)

        return forward

    def replayer(index: int) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            assert first_of_encoder is not None
            if index == 0:
                first_of_encoder.see(hidden_states, *args, **kwargs)
            return first_of_encoder.returned(store.get(stream, running) if index == before - 1 else hidden_states)

        return forward

    forwards = [*map(replayer, range(before)), *map(recorder, range(len(blocks)))]
    with replace_forwards([*encoder, *blocks], forwards):
        for number, batch in enumerate(batches):
            running = number
            try:
                run_model(base, batch, number if numbers is None else numbers[number])
            except StopForward:
                continue
            raise ModelError(f"{type(base).__name__} did not call its last block; the family's table names the wrong blocks")


class _FirstBlock:
    """What the first block of a stack returns beside hidden states (nothing, or a tuple): all blocks do it in that way.

    It runs once; where it makes what the blocks after it read (T5's biases by position), once for every batch.
    """

    def __init__(self, block: nn.Module) -> None:
        self.run, self.has_run = block.forward, False
        self.rest: tuple[Any, ...] | None = None

    def see(self, *args: Any, **kwargs: Any) -> None:
        """Run the block, if needed, on the arguments that it gets."""
        if self.has_run and not any(isinstance(value, Tensor) for value in self.rest or ()):
            return
        output, self.has_run = self.run(*args, **kwargs), True
        self.rest = output[1:] if isinstance(output, tuple) else None

    def returned(self, hidden: Tensor) -> Any:
        """Hidden states as a block returns them."""
        return hidden if self.rest is None else (hidden, *self.rest)


@contextmanager
def replace_forwards(blocks: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let other functions run in place of some modules; whatever happens, the modules are then as they were."""
    owned: list[Callable[..., Any] | None] = [vars(block).get("forward") for block in blocks]
    try:
        for block, forward in zip(blocks, forwards, strict=True):
            block.forward = forward
        yield
    finally:
        for block, own in zip(blocks, owned, strict=True):
            vars(block).pop("forward", None)
            if own is not None:
                block.forward = own


@contextmanager
def recompute_blocks(blocks: Sequence[nn.Module], store: ActivationStore | None = None) -> Iterator[None]:
    """Let blocks run once more for their gradients, so that the weights of one of them are there at a time.

    Gradients flow down to what enters the first of them, of a stack, and to no weights: their own come and go.

    Args:
        blocks: of all stacks.
        store: keeps what enters each block until it runs again; autograd does, if left out.
    """

    def recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not hidden_states.requires_grad:
                hidden_states = hidden_states.detach().requires_grad_()
            with nullcontext() if store is None else saved_tensors_hooks(store.keep, store.fetch):
                return checkpoint(forward, hidden_states, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    # To its end: a hook that brought weights in has to take them away again.
    with (
        set_checkpoint_early_stop(enable=False),
        replace_forwards(blocks, [recomputed(block.forward) for block in blocks]),
    ):
        yield


def calls_of(stream: str, block: int) -> str:
    """The name under which the calls of a block are stored."""
    return f"{stream} calls {block}"
