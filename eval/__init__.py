"""Measuring what an eraser removed, kept and cost: suites, generation, image store, scores, comparison, report."""
