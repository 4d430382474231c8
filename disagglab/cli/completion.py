"""``disagglab completion SHELL``: what to source so that the shell completes this command line."""

from __future__ import annotations

import argparse

from disagglab.cli import command

SHELLS = ("bash", "zsh", "fish")
PROGRAM = "disagglab"


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "completion",
        run,
        "completion for bash, zsh or fish",
        "Print what to source for completion of commands, options, names of labs, ways and models.",
        [
            'eval "$(disagglab completion bash)"     # in ~/.bashrc; zsh in the same way, in ~/.zshrc',
            "disagglab completion fish | source      # in ~/.config/fish/config.fish",
        ],
    )
    asked.add_argument("shell", choices=SHELLS, help="the shell")


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    from argcomplete import shell_integration

    print(shell_integration.shellcode([PROGRAM], shell=arguments.shell))
    return 0
