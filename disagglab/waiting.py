"""Waiting for a condition, with a deadline and a message; the one loop of the suite that does."""
