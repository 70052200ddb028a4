"""The contract that every method owes every pipeline, for our own methods and for those of other packages."""

from .contract import CHECKS, Failure, check_method
from .subject import Subject

__all__ = ["CHECKS", "Failure", "Subject", "check_method"]
