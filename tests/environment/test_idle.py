"""What the servers cost while nobody asks them anything.

On a small machine an idle server that polls takes the core from one that works. The lab file's
``progress_delay_us`` and ``keep_node_cpus`` exist for that reason; ``--lab embedded-stock`` shows the same
machine without them.
"""

from __future__ import annotations

import time

from disagglab.results.recorder import Recorder
from disagglab.serving.topology import Deployment

WINDOW_S = 5.0  # long against the servers' own timers (1 s of spinning after the last message)
SAMPLES = 3


def test_idle_servers_leave_their_cores(deployment: Deployment, record: Recorder) -> None:
    """CPU time that each idle server uses is recorded; none uses more than all the cores it was given."""
    for server in deployment.servers:
        shares = []
        for _ in range(SAMPLES):
            before, start = server.cpu_s(), time.perf_counter()
            time.sleep(WINDOW_S)  # the measurement window itself, not a wait for something
            shares.append((server.cpu_s() - before) / (time.perf_counter() - start))
        record.numbers("idle CPU use", shares, "cores", arm=server.name, what="windows of 5 s")
        cores = len(server.plan.node.cpus)
        assert not cores or max(shares) <= cores * 1.05, (
            f"{server.name} uses {max(shares):.2f} of {cores} cores idle"
        )


def test_threads_of_a_server_stay_on_its_cores(deployment: Deployment, record: Recorder) -> None:
    """Every thread of a server may run only on the cores of its node.

    NixlConnector on CPU moves the worker's main thread to the machine's last core: without the lab's setting
    both workers compute on one core while the other idles, and no comparison of topologies means anything.
    """
    for server in deployment.servers:
        given = set(server.plan.node.cpus)
        if not given:
            continue
        threads = server.process.cores_of_threads()
        strays = {thread: sorted(allowed) for thread, allowed in threads.items() if not allowed <= given}
        assert threads, f"{server.name}: no thread was seen"
        assert not strays, (
            f"{server.name}: {len(strays)} threads may leave cores {sorted(given)}: {strays};"
            f" set keep_node_cpus = true in [transport]"
        )
