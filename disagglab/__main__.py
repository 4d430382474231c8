"""What the suite computes without a lab: ``kv CONFIG``, a model's KV cache in bytes; ``gate FILE``, a
verdict on pairs of figures; ``history``, figures over many runs and where their level changed; ``predict``,
where disaggregation would pay off on a lab; ``reference``, finished sessions as files to commit. And two that
go to a lab's hosts: ``provision``, which makes their environments, and ``scatter``, which reads scattered
memory of one from another.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from disagglab.errors import ConfigError, LabError, Problem
from disagglab.kv import layout, shape
from disagglab.kv import table as kv_table
from disagglab.paths import REPORTS

LEFT_OUT = 1  # exit status: a part of the input could not be read; the rest was computed
MISSING = 1  # exit status: a host lacks something
REFUSED = 2  # exit status: the input cannot be computed
INTERRUPTED = 130

LOADS = (0.25, 0.5, 0.75)  # of what the replicas can bear
DTYPE_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


class _OneLineParser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help", file=sys.stderr)
        sys.exit(REFUSED)


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="python -m disagglab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_OneLineParser)
    table = commands.add_parser("kv", help="KV cache bytes of a model", description=kv_table.__doc__)
    table.add_argument(
        "config", help="model folder, config.json, or a shipped name (Llama-3.1-8B-Instruct …)"
    )
    table.add_argument("--tokens", type=int, default=2048, help="prompt length (%(default)s)")
    table.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", *shape.DTYPES, *DTYPE_SHORT],
        help="of the KV cache (%(default)s: the model's own)",
    )
    table.add_argument("--tp", type=int, default=1, help="tensor parallel size (%(default)s)")
    table.add_argument(
        "--block-size",
        type=int,
        default=layout.DEFAULT_BLOCK_SIZE,
        help="tokens per block (%(default)s; 128 on CPUs)",
    )
    table.add_argument("--link", help="rate for the transfer time: 100Gbps, 12.5GB/s")
    table.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    gate = commands.add_parser(
        "gate", help="verdict on pairs of figures", description="Print a verdict as JSON."
    )
    gate.add_argument(
        "file", type=Path, help='{"metric": …, "better": "lower", "margin": 0.05, "pairs": [[a, b], …]}'
    )
    history = commands.add_parser(
        "history",
        help="figures over many runs, with change points",
        description="Print one line a series of run medians, and write a page with a chart of each.",
    )
    history.add_argument("--reports", type=Path, default=REPORTS, help="folder of run folders (%(default)s)")
    history.add_argument("--html", type=Path, help="the page (history.html in the folder of run folders)")
    for column in ("lab", "workload", "arm", "metric"):
        history.add_argument(
            f"--{column}", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
        )
    history.add_argument(
        "--across-fingerprints",
        action="store_true",
        help="join runs of different hardware and package versions",
    )
    predicted = commands.add_parser(
        "predict",
        help="where disaggregation would answer sooner",
        description="Print a map of prompt and output lengths from a lab file alone, with its assumptions.",
    )
    predicted.add_argument("--lab", required=True, help="a lab by its name or path; it wants [speed]")
    predicted.add_argument("--model", help="model folder, config.json or shipped name (the lab's)")
    predicted.add_argument(
        "--load",
        type=float,
        action="append",
        help="share of what the replicas can bear; may be repeated (0.25, 0.5, 0.75)",
    )
    predicted.add_argument("--link", help="rate of the link: 100Gbps, 12.5GB/s (the lab's link_gbit_s)")
    predicted.add_argument("--peak-tflop-s", type=float, help="of a node (the lab's [speed])")
    predicted.add_argument("--memory-gb-s", type=float, help="of a node (the lab's [speed])")
    predicted.add_argument(
        "--prefill-efficiency", type=float, default=0.5, help="share of the arithmetic reached (%(default)s)"
    )
    predicted.add_argument(
        "--decode-efficiency", type=float, default=0.7, help="share of the bandwidth reached (%(default)s)"
    )
    predicted.add_argument("--json", action="store_true", help="one JSON object instead of tables")
    _add_provision(commands)
    _add_scatter(commands)
    _add_reference(commands)
    return parser


def _add_provision(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    asked = commands.add_parser(
        "provision",
        help="environments on the hosts of a lab, over SSH",
        description="Bring files and environments of a lab's hosts up to date, and print what they hold.",
    )
    asked.add_argument("--lab", required=True, help="a lab by its name or path")
    asked.add_argument("--vllm", default="", metavar="X.Y.Z", help="for this vLLM version (the lab's)")
    asked.add_argument(
        "--check", action="store_true", help="change nothing; exit status 1 if something lacks"
    )
    asked.add_argument(
        "--host", action="append", default=[], metavar="NAME", help="only this one; may be repeated"
    )
    asked.add_argument(
        "--offline", action="store_true", help="the hosts reach no registry: download wheels here, copy them"
    )
    asked.add_argument(
        "--wheels", type=Path, metavar="FOLDER", help="keep these wheels here (the user's cache); implies it"
    )


def _add_scatter(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    asked = commands.add_parser(
        "scatter",
        help="NIXL reads of scattered memory on a lab, without servers",
        description="Read memory between two nodes in pieces, and print what bytes and pieces cost.",
    )
    asked.add_argument("--lab", required=True, help="a lab by its name or path")
    asked.add_argument(
        "--env", action="extend", nargs="+", default=[], metavar="UCX_X=1", help="beside the lab's own"
    )
    asked.add_argument("--threads", type=int, help="of NIXL's UCX backend (the connector's); 0: none")
    asked.add_argument("--mib", help="of a read, with commas between (256,1024 on GPUs, else 4,16)")
    asked.add_argument("--pieces", help="of a read, with commas between (1,128,512,4096)")
    asked.add_argument("--at-once", default="1", help="reads posted together (%(default)s)")
    asked.add_argument(
        "--repeats", type=int, default=9, help="of each, after one that does not count (%(default)s)"
    )
    asked.add_argument("--json", type=Path, metavar="FILE", help="also write every time to a file")


def _add_reference(commands: argparse._SubParsersAction[_OneLineParser]) -> None:
    asked = commands.add_parser(
        "reference",
        help="finished sessions as files to commit",
        description="Make reports/reference/NAME/ from run folders, without paths and names of their hosts.",
    )
    asked.add_argument("folder", type=Path, nargs="+", metavar="RUN_FOLDER", help="of a session that ended")
    asked.add_argument("name", metavar="NAME", help="lower-case letters, digits, dots, hyphens")
    asked.add_argument(
        "--allow-failures", action="store_true", help="also sessions that failed; the README says which tests"
    )
    asked.add_argument(
        "--replace",
        action="append",
        default=[],
        metavar="TEXT=BY",
        help="replace a further path or name; may be repeated",
    )
    asked.add_argument(
        "--note",
        action="append",
        default=[],
        metavar="TEXT",
        help="a paragraph for the README; may be repeated",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status is 2 if the input cannot be computed, and 1 if ``history`` had to
    leave out a part of it.
    """
    arguments = _parser().parse_args(argv)
    left_out: Sequence[Problem] = ()
    try:
        match arguments.command:
            case "kv":
                print(_kv(arguments))
            case "gate":
                print(_gate(arguments.file))
            case "predict":
                print(_predict(arguments))
            case "provision":
                return _provision(arguments)
            case "scatter":
                return _scatter(arguments)
            case "reference":
                print(_reference(arguments))
            case _:
                text, left_out = _history(arguments)
                print(text)
    except ConfigError as error:
        print(" | ".join(map(_one_line, error.problems)), file=sys.stderr)
        return REFUSED
    for problem in left_out:
        print(_one_line(problem), file=sys.stderr)
    return LEFT_OUT if left_out else 0


def _one_line(problem: Problem) -> str:
    return " ".join(f"{problem.file}: {problem.key}: {problem.wrong} (mend: {problem.mend})".split())


def _history(arguments: argparse.Namespace) -> tuple[str, Sequence[Problem]]:
    from disagglab.results import archive, history, historypage

    found_runs = archive.read(arguments.reports)
    filters = history.Filters(
        **{name: tuple(getattr(arguments, name)) for name in ("lab", "workload", "arm", "metric")}
    )
    joined = arguments.across_fingerprints
    found = history.collect(found_runs.runs, filters, joined)
    path = arguments.html or arguments.reports / historypage.NAME
    historypage.write(path, historypage.render(found_runs, found, joined))
    head = [historypage.JOINED] if joined else []
    table = history.lines(found) if found else []
    return "\n".join([*head, *table, history.summary(found_runs, found), str(path)]), found_runs.problems


def _gate(path: Path) -> str:
    from disagglab.stats import gatefile  # needs scipy; the arithmetic does without

    gate = gatefile.read(path)
    return json.dumps(gatefile.as_dict(gate, gate.judge()))


def _predict(arguments: argparse.Namespace) -> str:
    from disagglab.config import labs
    from disagglab.predict import breakeven_map, roofline

    result = breakeven_map.predict(
        labs.load_lab(arguments.lab),
        loads=arguments.load or LOADS,
        efficiency=roofline.Efficiency(arguments.prefill_efficiency, arguments.decode_efficiency),
        model=arguments.model,
        link_bytes_per_s=None if arguments.link is None else kv_table.parse_rate(arguments.link),
        peak_tflop_s=arguments.peak_tflop_s,
        memory_gb_s=arguments.memory_gb_s,
    )
    return json.dumps(result.as_dict()) if arguments.json else "\n".join(result.lines())


def _provision(arguments: argparse.Namespace) -> int:
    from disagglab.config import labs
    from disagglab.hosts.provision import audit, provision

    want = provision.wanted(
        labs.load_lab(arguments.lab), arguments.vllm, arguments.host, arguments.offline, arguments.wheels
    )
    try:
        rows = provision.check(want) if arguments.check else provision.provision(want)
    except ConfigError:
        raise
    except LabError as error:
        print(error, file=sys.stderr)
        return MISSING
    except KeyboardInterrupt:
        print("interrupted; what was started on the host has ended", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(audit.table(rows)))
    return MISSING if any(row.missing for row in rows) else 0


def _reference(arguments: argparse.Namespace) -> str:
    from disagglab.results import publish  # needs matplotlib and jinja2; the arithmetic does without

    parts = [text.partition("=") for text in arguments.replace]
    further = {text: by for text, equals, by in parts if text and equals}
    if len(further) < len(parts):
        wrong = f"{' '.join(arguments.replace)}: TEXT=BY is wanted, each TEXT once"
        raise ConfigError([Problem("reference", "--replace", wrong, "--replace '/mnt/models=$MODELS'")])
    made = publish.make(
        arguments.folder, arguments.name, arguments.allow_failures, further, notes=arguments.note
    )
    return str(made)


def _scatter(arguments: argparse.Namespace) -> int:
    from disagglab.cli import scatter
    from disagglab.config import labs
    from disagglab.measure.oracles import nixlprobe

    for key, least in (("threads", 0), ("repeats", 1)):
        given = getattr(arguments, key)
        if given is not None and given < least:
            wrong = f"{given} is too few"
            raise ConfigError([Problem("command line", f"--{key}", wrong, f"write --{key} {least} or more")])
    chosen = scatter.with_variables(labs.load_lab(arguments.lab), arguments.env)
    sizes = scatter.MEBIBYTES[nixlprobe.memory_of(chosen)]
    wanted = scatter.reads(
        sizes if arguments.mib is None else scatter.whole_numbers(arguments.mib, "mib"),
        scatter.PIECES if arguments.pieces is None else scatter.whole_numbers(arguments.pieces, "pieces"),
        scatter.whole_numbers(arguments.at_once, "at-once"),
    )
    if arguments.json:
        scatter.require_writable(arguments.json)
    try:
        found = scatter.run(chosen, wanted, arguments.repeats, arguments.threads)
    except ConfigError:
        raise
    except LabError as error:
        print(error, file=sys.stderr)
        return MISSING
    except KeyboardInterrupt:
        print("interrupted; what was started on the hosts has ended", file=sys.stderr)
        return INTERRUPTED
    print("\n".join(found.lines()))
    if arguments.json:
        scatter.write(arguments.json, found)
    if found.wrong:
        print("\n".join(found.wrong), file=sys.stderr)
    return MISSING if found.wrong else 0


def _kv(arguments: argparse.Namespace) -> str:
    result = kv_table.table(
        arguments.config,
        tokens=arguments.tokens,
        dtype=DTYPE_SHORT.get(arguments.dtype, arguments.dtype),
        tensor_parallel=arguments.tp,
        block_size=arguments.block_size,
        link_bytes_per_s=None if arguments.link is None else kv_table.parse_rate(arguments.link),
    )
    return json.dumps(result.as_dict()) if arguments.json else "\n".join(result.lines())


if __name__ == "__main__":
    sys.exit(main())
