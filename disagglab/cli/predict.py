"""``disagglab predict``: where disaggregation would pay off on a lab, from its lab file alone."""

from __future__ import annotations

import argparse
import json

from disagglab.cli import command, words

LOADS = (0.25, 0.5, 0.75)  # of what the replicas can bear


def add(commands: command.Commands) -> None:
    """Add the command."""
    asked = command.add(
        commands,
        "predict",
        run,
        "where disaggregation would answer sooner",
        "Print a map of prompt and output lengths from a lab file alone, with its assumptions.",
        [
            "disagglab predict --lab spark --load 0.5",
            "disagglab predict --lab two-h200 --model Llama-3.1-8B-Instruct --link 400Gbps --json",
            "disagglab predict --lab spark --workload chat --load 0.5",
        ],
    )
    lab = asked.add_argument("--lab", required=True, help="a lab by its name or path; it wants [speed]")
    command.complete(lab, words.labs)
    model = asked.add_argument("--model", help="model folder, config.json or shipped name (the lab's)")
    command.complete(model, words.models)
    workload = asked.add_argument(
        "--workload", help="in place of the map: every way to use the nodes at rates of this workload"
    )
    command.complete(workload, words.workloads)
    asked.add_argument(
        "--load",
        type=float,
        action="append",
        help="share of what the replicas can bear; may be repeated (0.25, 0.5, 0.75)",
    )
    asked.add_argument("--link", help="rate of the link: 100Gbps, 12.5GB/s (the lab's link_gbit_s)")
    asked.add_argument("--peak-tflop-s", type=float, help="of a node (the lab's [speed])")
    asked.add_argument("--memory-gb-s", type=float, help="of a node (the lab's [speed])")
    asked.add_argument(
        "--prefill-efficiency", type=float, default=0.5, help="share of the arithmetic reached (%(default)s)"
    )
    asked.add_argument(
        "--decode-efficiency", type=float, default=0.7, help="share of the bandwidth reached (%(default)s)"
    )
    asked.add_argument("--json", action="store_true", help="one JSON object instead of tables")


def run(arguments: argparse.Namespace) -> int:
    """Compute and print the map."""
    from disagglab.config import labs
    from disagglab.kv.table import parse_rate
    from disagglab.predict import breakeven_map, roofline, ways_forecast
    from disagglab.predict.breakeven_map import Prediction
    from disagglab.predict.ways_forecast import WaysForecast

    lab, loads = labs.load_lab(arguments.lab), arguments.load or LOADS
    known = breakeven_map.assumed(
        lab,
        loads=loads,
        efficiency=roofline.Efficiency(arguments.prefill_efficiency, arguments.decode_efficiency),
        model=arguments.model,
        link_bytes_per_s=None if arguments.link is None else parse_rate(arguments.link),
        peak_tflop_s=arguments.peak_tflop_s,
        memory_gb_s=arguments.memory_gb_s,
    )
    result: Prediction | WaysForecast
    if arguments.workload is None:
        result = breakeven_map.predict(lab, known, loads)
    else:
        result = ways_forecast.predict(lab, known, lab.workload(arguments.workload), loads)
    print(json.dumps(result.as_dict()) if arguments.json else "\n".join(result.lines()))
    return 0
