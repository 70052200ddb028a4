"""What can go wrong, each with a name that callers can catch. Nothing here is ever swallowed: a failure is never "safe"."""

from typing import ClassVar


class ErasureError(Exception):
    """Base class of the suite's errors."""

    exit_code: ClassVar[int] = 2
    """Of the command line: 2 where the request or its input must change, 1 where the request was fine and a check failed."""


class NotErased(ErasureError):
    """The model was about to run on something that no eraser has seen."""

    exit_code = 1


class NothingAttached(ErasureError):
    """An eraser found nothing to change in this pipeline."""


class Conflict(ErasureError):
    """Two erasers claim the same place, or are taken off out of order."""


class UnsupportedFamily(ErasureError):
    """The pipeline's family is unknown, or the method has no formula for it."""


class ArtifactError(ErasureError):
    """A saved eraser is damaged, belongs to another base, or does not change the model."""

    exit_code = 1


class NoArtifact(ArtifactError):
    """A folder that holds no artefact, or cannot take one."""

    exit_code = 2


class WrongBase(ArtifactError):
    """A saved eraser that was made for another base than the one it is used on."""

    exit_code = 2


class UnknownName(ErasureError):
    """A name that no registry, suite or concept list has."""
