"""``disagglab propose``: what NVIDIA's aiconfigurator proposes for a lab, as ways to measure."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disagglab.cli import command, words
from disagglab.errors import ConfigError, Problem

if TYPE_CHECKING:
    from disagglab.predict.aiconfigurator import Question
    from disagglab.predict.armforecast import ArmFigures
    from disagglab.predict.proposal import Deployment

TOOL = "aiconfigurator"
LIMIT_S = 300.0  # of one of its commands, which took 3 to 10 s for two GPUs on two cores
MODEL = "model"  # folder of config.json, beside which it runs


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "propose",
        run,
        "what NVIDIA's aiconfigurator proposes, as ways to measure",
        "Ask aiconfigurator, in an environment of its own, how to divide a lab's GPUs for a workload under"
        " the lab's [slo]. Print its proposals and forecasts; with --out write a lab file of ways and the"
        " forecasts.",
        [
            "disagglab propose --lab two-h200 --workload chat --system h200_sxm --aiconfigurator ~/aic",
            "disagglab propose --lab two-h200 --workload documents --system h200_sxm --aiconfigurator ~/aic"
            " --out proposed",
        ],
    )
    lab = asked.add_argument(
        "--lab", required=True, help="a lab by its name or path; it wants gpus and [slo]"
    )
    command.complete(lab, words.labs)
    workload = asked.add_argument("--workload", required=True, help="one of workloads/, without [steady]")
    command.complete(workload, words.workloads)
    asked.add_argument("--system", required=True, help="its name of the GPUs: h100_sxm, h200_sxm, gb200 …")
    asked.add_argument(
        "--aiconfigurator",
        required=True,
        type=Path,
        metavar="PATH",
        help="environment folder that it is installed in, that folder's Python, or its command",
    )
    model = asked.add_argument("--model", help="model folder, config.json or shipped name (the lab's)")
    command.complete(model, words.models)
    asked.add_argument("--out", type=Path, help="folder for the lab file of ways and for the forecasts")
    asked.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Ask, print and write."""
    from disagglab.config import labs
    from disagglab.predict import aiconfigurator, breakeven_map, proposal

    lab = labs.load_lab(arguments.lab)
    asked = aiconfigurator.question(lab, arguments.workload, arguments.system)
    _shown, config = breakeven_map.config_of(lab, arguments.model)
    with _tool(arguments.aiconfigurator, asked, {**config, "torch_dtype": lab.model.dtype}) as tool:
        release = tool.ask(["version"]).split()[-1]
        tool.ask(aiconfigurator.search_options(asked, MODEL, "found"))
        found = aiconfigurator.read_search(tool.folder / "found", asked)
        ways, left_out = proposal.proposals(lab, asked, found, release)
        forecasts = {}
        if asked.concurrency is not None:
            wanted = [*proposal.own(asked), *(one.deployment for one in ways)]
            forecasts = {one.arm: tool.forecast(one, asked.concurrency) for one in wanted}
    notes = (*proposal.notes(lab, asked, found), *left_out)
    answer = proposal.Answer(asked, release, found[0].vllm, ways, forecasts, notes)
    record = json.dumps(answer.as_dict())
    print(record if arguments.json else "\n".join(answer.lines()))
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / proposal.RECORD).write_text(record + "\n", encoding="utf-8")
        text = answer.lab_file(_name(Path(lab.file)))
        (arguments.out / proposal.LAB_FILE).write_text(text, encoding="utf-8")
    return 0


def _name(file: Path) -> str:
    """What another lab file extends this one by: the name of one that ships, else its whole path."""
    from disagglab.paths import LABS

    return file.stem if file.resolve().parent == LABS.resolve() else str(file.resolve())


@contextmanager
def _tool(path: Path, asked: Question, config: Mapping[str, Any]) -> Iterator[_Tool]:
    """The tool in a folder of its own that holds the model's config, so that it fetches none."""
    program = _program(path.expanduser())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / MODEL).mkdir()
        (folder / MODEL / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield _Tool(program, folder, asked)


def _program(path: Path) -> Path:
    """The command, of an environment folder, its Python, or the command itself.

    Raises:
        ConfigError: if there is none.
    """
    if path.is_dir():
        path = path / "bin" / TOOL
    elif path.name.startswith("python"):
        path = path.with_name(TOOL)
    if not path.is_file():
        mend = f"python3 -m venv ~/aic && ~/aic/bin/pip install {TOOL}==0.12.0, and --{TOOL} ~/aic"
        raise ConfigError([Problem(str(path), f"--{TOOL}", "no such command", mend)])
    return path.absolute()


class _Tool:
    """Its command line, run in a folder."""

    def __init__(self, program: Path, folder: Path, asked: Question) -> None:
        self.folder = folder
        self._program = program
        self._asked = asked
        self._answers: dict[tuple[str, ...], str] = {}

    def ask(self, options: Sequence[str]) -> str:
        """What it prints; the same question is asked once.

        Raises:
            ConfigError: with what it says, if it refuses or takes longer than LIMIT_S.
        """
        key = tuple(options)
        if key not in self._answers:
            self._answers[key] = self._run(options)
        return self._answers[key]

    def forecast(self, one: Deployment, concurrency: int) -> ArmFigures:
        """What it forecasts of a deployment with so many requests under way at once."""
        from disagglab.predict import aiconfigurator

        busy = one.busy(concurrency)
        decode = aiconfigurator.Worker(busy, one.decode.ranks, {})
        options = aiconfigurator.estimate_options(
            self._asked, MODEL, one.prefill, decode, one.batch(concurrency), one.context
        )
        return aiconfigurator.read_estimate(self.ask(options), self._asked, 1 if one.prefill else busy)

    def _run(self, options: Sequence[str]) -> str:
        from disagglab.predict import aiconfigurator

        # Its own packages only, and no look-up of a model on the internet.
        own = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        environment = {**own, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        try:
            done = subprocess.run(
                [str(self._program), *options],
                cwd=self.folder,
                env=environment,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            wrong = f"no answer within {LIMIT_S:.0f} s"
            raise ConfigError([Problem(TOOL, " ".join(options), wrong, "run it by hand")]) from error
        except OSError as error:
            wrong = f"does not start: {error.strerror}"
            raise ConfigError([Problem(str(self._program), f"--{TOOL}", wrong, "install it anew")]) from error
        if done.returncode != 0:
            raise aiconfigurator.refusal(done.stderr + "\n" + done.stdout, self._asked)
        return done.stdout
