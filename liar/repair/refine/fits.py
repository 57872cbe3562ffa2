"""What a window is fitted to: inputs and targets by granularity and propagation, and the error of the window as it is.

With x the residual stream that enters the blocks of a window, in the teacher and (with a hat) in the student, f the window:

| propagation | is fitted | source |
| --- | --- | --- |
| dense | f_student(x) to f_teacher(x) | |
| pruned | f_student(x^) to f_teacher(x^) | block-wise reconstruction, "BR" in Shin et al. 2024 |
| global | f_student(x^) to f_teacher(x) | global propagation, "GP" in Shin et al. 2024 |

For a matrix and a sub-layer, x is what they read themselves. A matrix that lost inputs cannot read the teacher's, nor can the
teacher's read its: there the blocks are run from the residual stream that the propagation says.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

from torch import Tensor, nn

from liar.repair.refine.plan import Window
from liar.repair.refine.streams import Side
from liar.runtime import ActivationStore, widen

READS, REPLAYED, TARGET = "window reads", "window replayed", "window target"


class Fit(ABC):
    """One window between teacher and student: what it reads, what it should give, what it gives.

    Args:
        window: what is trained.
        teacher: the dense model's side.
        student: the side that is trained.
        propagation: as in `RefineOptions`.
        masks: per batch, which positions are real tokens: bool [sequences, length].
    """

    def __init__(self, window: Window, teacher: Side, student: Side, propagation: str, masks: tuple[Tensor, ...]) -> None:
        self.window, self.teacher, self.student, self.propagation, self.masks = window, teacher, student, propagation, masks
        self.store: ActivationStore = student.store

    @abstractmethod
    def prepare(self, batch: int) -> None:
        """Keep what the window reads on a batch, and the target: [tokens, channels], in at least float32."""

    @abstractmethod
    def predict(self, batch: int) -> Tensor:
        """What the window gives: [tokens, channels]."""

    def baseline(self, batch: int) -> Tensor | float:
        """What the energy of the target is measured from: the stream that enters the window, [tokens, channels]."""
        return self.real(self.student_input(batch), batch)

    def loss(self, batch: int) -> Tensor:
        """Mean squared error over real tokens and channels."""
        return nn.functional.mse_loss(self.predict(batch), self.target(batch))

    def error(self, batches: range) -> float:
        """The same over several batches, every token counted alike."""
        return _mean_square(self.predict(batch) - self.target(batch) for batch in batches)

    def energy(self, batches: range) -> float:
        """Mean square of what the window is to add."""
        return _mean_square(self.target(batch) - self.baseline(batch) for batch in batches)

    def target(self, batch: int) -> Tensor:
        """The target of a batch: [tokens, channels]."""
        value: Tensor = self.store.get(TARGET, batch)
        return value

    def put_target(self, batch: int, value: Tensor) -> None:
        """Keep the target of a batch."""
        self.store.put(TARGET, batch, self.real(value, batch))

    def real(self, value: Tensor, batch: int) -> Tensor:
        """The rows of real tokens in at least float32: [sequences, length, channels] -> [tokens, channels]."""
        return widen(value[self.masks[batch]])

    def student_input(self, batch: int) -> Tensor:
        """The stream that the student's blocks read: [sequences, length, channels]."""
        value: Tensor = self.store.get((self.teacher if self.propagation == "dense" else self.student).stream, batch)
        return value

    def teacher_input(self, batch: int) -> Tensor:
        """The stream that the teacher's blocks read."""
        value: Tensor = self.store.get((self.student if self.propagation == "pruned" else self.teacher).stream, batch)
        return value

    def discard(self) -> None:
        """Drop what was kept."""
        self.store.discard(READS, REPLAYED, TARGET)


class FitBlocks(Fit):
    """Whole blocks."""

    def prepare(self, batch: int) -> None:
        """The teacher's blocks on their stream."""
        self.put_target(batch, self.teacher.run(self.window.blocks, batch, self.teacher_input(batch)))

    def predict(self, batch: int) -> Tensor:
        """The student's blocks on theirs."""
        return self.real(self.student.run(self.window.blocks, batch, self.student_input(batch)), batch)


class FitSite(Fit):
    """Attention or feed-forward part of a block, with its norm and the residual stream around it."""

    def prepare(self, batch: int) -> None:
        """The teacher's stream after the site; and what earlier sites of the block add, if another side's is read."""
        own = self.propagation == "pruned"
        replayed = self.student.added(self.window, batch, self.student_input(batch)) if own else []
        self.put_target(batch, self.teacher.run_site(self.window, batch, self.teacher_input(batch), replayed))
        if self.propagation == "dense":
            self.store.put(REPLAYED, batch, self.teacher.added(self.window, batch, self.teacher_input(batch)))

    def predict(self, batch: int) -> Tensor:
        """The student's stream after the site."""
        replayed = self.store.get(REPLAYED, batch) if self.propagation == "dense" else ()
        return self.real(self.student.run_site(self.window, batch, self.student_input(batch), replayed), batch)


class FitMatrix(Fit):
    """One layer, on rows that it reads."""

    def prepare(self, batch: int) -> None:
        """What the layer reads, and what the teacher's gives."""
        reads, gives = self.teacher.matrix(self.window, batch, self.teacher_input(batch))
        own, _ = self.student.matrix(self.window, batch, self.student_input(batch))
        if own.shape == reads.shape:
            if self.propagation == "pruned":
                gives = self.teacher.layer(self.window)(own.to(reads.dtype))
            if self.propagation == "dense":
                own = reads
        self.store.put(READS, batch, self.real(own, batch))
        self.put_target(batch, gives)

    def predict(self, batch: int) -> Tensor:
        """What the student's layer gives."""
        given: Tensor = self.student.layer(self.window)(self.store.get(READS, batch))
        return given

    def baseline(self, batch: int) -> float:
        """Zero: a matrix adds to nothing."""
        return 0.0


def fit_of(window: Window, teacher: Side, student: Side, propagation: str, masks: tuple[Tensor, ...]) -> Fit:
    """The fit of a window by its granularity."""
    kind = FitMatrix if window.matrix is not None else FitBlocks if window.site is None else FitSite
    return kind(window, teacher, student, propagation, masks)


def _mean_square(parts: Iterable[Tensor]) -> float:
    total, count = 0.0, 0
    for part in parts:
        total, count = total + float(part.double().square().sum()), count + part.numel()
    return total / count
