"""What the training loop reports after a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class StepReport:
    """The metrics after a step.

    Attributes:
        epoch: current epoch, from 1.
        epochs: epochs of the run; in a run by the clock their expected number.
        samples: samples processed in all epochs.
        done, total: the part of the run that is done, and the whole run: in samples, or in seconds in a run by the
            clock.
        remaining_s: seconds until the end of the run, validations included.
        loss: mean loss of the epoch so far.
        clean_accuracy: accuracy on the clean training batches of the epoch so far, mean over exits.
        attacked_accuracy: accuracy on the attacked training batches of the epoch so far, mean over exits; None
            without an attack.
        epoch_record: the log record, after the last step of an epoch; None otherwise.
    """

    epoch: int
    epochs: int
    samples: int
    done: int
    total: int
    remaining_s: float
    loss: float
    clean_accuracy: float
    attacked_accuracy: float | None
    epoch_record: dict[str, Any] | None = None
