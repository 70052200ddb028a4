"""Concepts, suites and prompt lists, found by scanning these folders."""
