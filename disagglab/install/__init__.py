"""Environments of this machine, made from pins; standard library alone, because it runs first."""
