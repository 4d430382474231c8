"""Runs ``vllm bench serve`` jobs in one process, because starting it costs 7 s of imports each time.

Run as a program: ``python -m disagglab.loadworker SOCKET``. It listens on a unix socket; a connection sends
one JSON line with the options of ``vllm bench serve`` and gets one JSON line back: its result, as vLLM
computed it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import sys
import time
import traceback
from typing import Any


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def serve(path: str) -> None:
    """Import vLLM's load engine, then answer jobs until ended from outside."""
    from vllm.benchmarks.serve import add_cli_args, main_async
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser: Any = FlexibleArgumentParser()
    add_cli_args(parser)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    temporary = f"{path}.new"
    listener.bind(temporary)
    listener.listen()
    os.replace(temporary, path)  # the socket appears under its name when it answers
    while True:
        connection, _ = listener.accept()
        with connection, connection.makefile("rwb") as stream, contextlib.suppress(BrokenPipeError):
            options = json.loads(stream.readline())
            start, cpu = time.perf_counter(), _cpu_s()
            try:
                result: dict[str, Any] = asyncio.run(main_async(parser.parse_args(options)))
            except (Exception, SystemExit) as error:  # noqa: BLE001 - the answer carries it to who asked
                traceback.print_exc()
                answer: dict[str, Any] = {"error": f"{type(error).__name__}: {error}"}
            else:
                wall = time.perf_counter() - start
                answer = {"result": result, "client_cpu_share": (_cpu_s() - cpu) / wall}
            stream.write(json.dumps(answer, default=float).encode() + b"\n")


if __name__ == "__main__":
    serve(sys.argv[1])
