"""What can go wrong, each with a name that callers can catch. Nothing here is ever swallowed: a failure is never "safe"."""


class ErasureError(Exception):
    """Base class of the suite's errors."""


class NotErased(ErasureError):
    """The model was about to run on something that no eraser has seen."""


class NothingAttached(ErasureError):
    """An eraser found nothing to change in this pipeline."""


class Conflict(ErasureError):
    """Two erasers claim the same place, or are taken off out of order."""


class UnsupportedFamily(ErasureError):
    """The pipeline's family is unknown, or the method has no formula for it."""


class ArtifactError(ErasureError):
    """A saved eraser is damaged, belongs to another base, or does not change the model."""


class UnknownName(ErasureError):
    """A name that no registry, suite or concept list has."""
