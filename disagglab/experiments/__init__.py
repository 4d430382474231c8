"""Runs compared: rounds, arms, calibration, routing, scaling, and the plan of a session."""
