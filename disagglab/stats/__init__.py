"""Judgement on numbers: verdicts with intervals, change points, fits, a file of pairs."""
