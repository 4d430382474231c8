"""Environments on other hosts, made over SSH."""
