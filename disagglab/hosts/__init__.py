"""Machines, reached and known: here and over SSH, made hosts, links, devices, weights."""
