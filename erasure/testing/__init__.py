"""The contract that every method owes every pipeline, for our own methods and for those of other packages."""

from .contract import CHECKS, Failure, Subject, check_method

__all__ = ["CHECKS", "Failure", "Subject", "check_method"]
