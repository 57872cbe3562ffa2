"""Several processes that share a run, through `torch.distributed`; with a single process, or no process group, nothing is done.

Every process has the whole model and is given the same calibration data, of whose batches it runs its share. What depends on
all tokens is summed over the processes before anything is made of it; what is solved is solved in one process, and sent to all.
So all have the same model in the end, to the last bit, whatever the rounding of their machines.

An error in one process ends all of them: before anything is sent, each says whether it is well. One that fails says so in
`together`, where its error passes; the others hear of it wherever they next have something to send, and raise the same.
"""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor, nn
from torch import distributed as torch_distributed

from liar.data import Calibration, take_batches
from liar.errors import CalibrationError, LiarError, ProcessError
from liar.progress import without_bars

T = TypeVar("T")

# Numbers of each parameter by which models are compared.
PROBED = 16
# Set on errors that all processes know of.
KNOWN = "_liar_known_to_all"


def size() -> int:
    """How many processes share the run: 1 without a process group."""
    is_ready = torch_distributed.is_available() and torch_distributed.is_initialized()
    return torch_distributed.get_world_size() if is_ready else 1


def rank() -> int:
    """The number of this process: the first one, 0, is the one that writes and shows."""
    return torch_distributed.get_rank() if size() > 1 else 0


@contextmanager
def together() -> Iterator[None]:
    """Let all processes end the body in one way: if one of them raises an error, all of them do.

    The others raise an error of the same kind where it is one of this library's, else a `ProcessError`. Only the first process
    shows bars and logs warnings. Also a decorator.
    """
    if size() == 1:
        yield
        return
    with ExitStack() as stack:
        if rank():
            stack.enter_context(without_bars())
            stack.enter_context(_without_warnings())
        try:
            yield
        except Exception as error:
            if not _is_known(error):
                _agree(error)
            raise
        _agree()


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; a few numbers, no tensors."""
    if size() == 1:
        return [value]
    _agree()
    return _gather(value)


def add(*tensors: Tensor) -> None:
    """Replace tensors by their sums over all processes, in place; they have one shape everywhere."""
    if size() == 1:
        return
    _agree()
    for tensor in tensors:
        _send(torch_distributed.all_reduce, tensor)


def broadcast(value: T, source: int = 0) -> T:
    """The value of one process, whatever it is; its tensors come to the same kind of device. Others' values are dropped."""
    if size() == 1:
        return value
    _agree()
    is_source = rank() == source
    packed, tensors = _pack(value) if is_source else (b"", [])
    sent = [packed]
    with _lost():
        torch_distributed.broadcast_object_list(sent, src=source)
    if not is_source:
        value, tensors = _unpack(sent[0])
    for tensor in tensors:
        _send(lambda part: torch_distributed.broadcast(part, src=source), tensor)
    return value


def answer(compute: Callable[[], T]) -> T:
    """What the first process computes, in all of them."""
    return answers([compute])[0]


def answers(computations: Sequence[Callable[[], T] | None], *, first: int = 0) -> list[T]:
    """What several computations give, in all processes; they take turns (see `has_turn`), and work at the same time.

    Args:
        computations: None where another process computes.
        first: the process that has the first turn.
    """
    own = [compute() if compute and has_turn(first + turn) else None for turn, compute in enumerate(computations)]
    return [broadcast(value, (first + turn) % size()) for turn, value in enumerate(own)]  # type: ignore[misc]


def has_turn(turn: int) -> bool:
    """Whether this process has a turn, 0, 1, … one after the other."""
    return turn % size() == rank()


def share(calibration: Calibration, model: nn.Module) -> Calibration:
    """The batches that this process runs: its part of the whole, in order, possibly none.

    Sequences keep their global numbers, and `tokens`, `distinct_tokens` and `sequences` stay those of the whole. Processes
    have about equally many tokens, with padding.

    Raises:
        CalibrationError: the processes were given other data, or other models.
    """
    if size() == 1:
        return calibration
    check_same("calibration data", _digest(calibration))
    # What is kept elsewhere until it is needed is on the meta device.
    probed = (each.detach().flatten()[:PROBED] for each in model.parameters() if not each.is_meta)
    check_same("weights", [crc32(_bytes(each)) for each in probed])
    sizes = torch.tensor([mask.numel() for mask in calibration.token_masks], dtype=torch.float64)
    # A batch belongs to the process in whose part of all positions its middle is.
    owner = ((sizes.cumsum(0) - sizes / 2) / sizes.sum() * size()).long().clamp_max(size() - 1)
    own = (owner == rank()).nonzero().flatten().tolist()
    return take_batches(calibration, range(own[0], own[-1] + 1) if own else range(0))


def check_same(what: str, value: Any) -> None:
    """Check that all processes have the same.

    Raises:
        CalibrationError: they do not.
    """
    values = gather(value)
    others = [number for number, other in enumerate(values) if other != values[0]]
    if others:
        raise CalibrationError(
            f"process {others[0]} of {len(values)} was given other {what} than process 0: expected the same in every process, "
            "which takes its share by itself; load the same model, and pass all batches everywhere"
        )


def _agree(error: Exception | None = None) -> None:
    """Hear whether all processes are well, and say whether this one is; raise what another has raised."""
    failed = torch.tensor([0 if error is None else 1])
    _send(torch_distributed.all_reduce, failed)
    if not failed:
        return
    first, message, kind = next(
        (number, *report) for number, report in enumerate(_gather(error and (str(error), _kind(error)))) if report
    )
    if error is not None:
        setattr(error, KNOWN, True)
        return
    other = kind(f"process {first} of {size()}: {message}")
    setattr(other, KNOWN, True)
    raise other


def _kind(error: Exception) -> type[LiarError]:
    """The kind of error that other processes raise."""
    return type(error) if isinstance(error, LiarError) else ProcessError


def _is_known(error: BaseException | None) -> bool:
    """Whether all processes know of an error, or of one that it was made from."""
    while error is not None:
        if getattr(error, KNOWN, False):
            return True
        error = error.__cause__ or error.__context__
    return False


def _gather(value: T) -> list[T]:
    values: list[Any] = [None] * size()
    with _lost():
        torch_distributed.all_gather_object(values, value)
    return values


def _send(collective: Callable[[Tensor], Any], tensor: Tensor) -> None:
    """Run a collective on a tensor, in place, on a device that its backend knows."""
    if not tensor.numel():
        return
    staged = tensor.cuda() if torch_distributed.get_backend() == "nccl" else tensor
    staged = staged.contiguous()
    with _lost():
        collective(staged)
    if staged is not tensor:
        tensor.copy_(staged)


@contextmanager
def _lost() -> Iterator[None]:
    """Say what it means that a collective fails: another process is gone. Nobody is left to be told."""
    try:
        yield
    except RuntimeError as error:
        lost = ProcessError(f"process {rank()} of {size()} has lost another one, which was stopped, or ran too long: {error}")
        setattr(lost, KNOWN, True)
        raise lost from error


class _Pickler(pickle.Pickler):
    """Leaves tensors out, which are sent by themselves."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().contiguous())
        return value.shape, value.dtype, value.device.type


class _Unpickler(pickle.Unpickler):
    """Makes empty tensors where some were left out."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_load(self, pid: Any) -> Tensor:
        shape, dtype, device = pid
        self.tensors.append(torch.empty(shape, dtype=dtype, device=device))
        return self.tensors[-1]


def _pack(value: Any) -> tuple[bytes, list[Tensor]]:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return file.getvalue(), [_as_bytes(tensor) for tensor in pickler.tensors]


def _unpack(packed: bytes) -> tuple[Any, list[Tensor]]:
    unpickler = _Unpickler(io.BytesIO(packed))
    value = unpickler.load()
    return value, [_as_bytes(tensor) for tensor in unpickler.tensors]


def _as_bytes(tensor: Tensor) -> Tensor:
    """The memory of a tensor: not every backend knows every type."""
    return tensor.reshape(-1).view(torch.uint8)


def _digest(calibration: Calibration) -> list[int]:
    """Numbers that tell calibration data from other data."""
    values = [value for pair in calibration.inputs for value in pair]
    contents = [_bytes(value) for value in [*values, *calibration.labels] if isinstance(value, Tensor)]
    return [calibration.tokens, calibration.first_sequence, *map(crc32, contents)]


def _bytes(value: Tensor) -> bytes:
    return bytes(_as_bytes(value.contiguous().cpu()).numpy())


@contextmanager
def _without_warnings() -> Iterator[None]:
    logger = logging.getLogger("liar")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)
