"""What can go wrong in training, collecting and measuring.

TrainingError
├── GradeError      an answer cannot be graded: no right answer, one that does not fit, a judge without a score
├── CollectError    a collection cannot be started or carried on: prompts, experts, ceiling, a folder of another run
├── TrainJobError   a training run cannot be started or carried on: config, folder, another run's checkpoints
├── CorpusError     a retrieval collection is malformed; names file and line
└── SubmitError     a job could not be handed to a Ray cluster, or ended there in failure

Malformed tables raise `routers.errors.ObservationError`, wrong settings of a router `routers.errors.RouterConfigError`.
"""

from __future__ import annotations


class TrainingError(Exception):
    """Any failure of training, collecting or measuring."""


class GradeError(TrainingError):
    """An answer cannot be graded."""


class CollectError(TrainingError):
    """A collection cannot be started or carried on."""


class TrainJobError(TrainingError):
    """A training run cannot be started or carried on."""


class CorpusError(TrainingError):
    """A retrieval collection is malformed."""


class SubmitError(TrainingError):
    """A job could not be handed to a Ray cluster, or ended there in failure."""
