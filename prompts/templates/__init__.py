"""Concept files to copy and fill in; they do not load as they are."""
