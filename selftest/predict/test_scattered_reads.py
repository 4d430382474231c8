"""Scattered reads: the fit finds constants that are known, slots never touch, commands are refused early."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from disagglab.cli import scatter
from disagglab.cli.main import main
from disagglab.cli.scatter import Screen
from disagglab.config.labs import load_lab
from disagglab.config.schema import TransportSection
from disagglab.errors import ConfigError, InvalidRun
from disagglab.kv import attention, modelconfig
from disagglab.kv.layout import layout
from disagglab.measure.oracles import nixlprobe
from disagglab.measure.oracles.nixlprobe import Read
from disagglab.predict import scattered_reads
from disagglab.predict.scattered_reads import ReadTime, ScatterFit, fit

MIB = 2**20
LATENCY_S, PER_PIECE_S, BYTES_PER_S = 0.002, 3e-6, 300e9
SHAPES = list(itertools.product((256 * MIB, 1024 * MIB), (1, 128, 512, 4096)))


def time_s(size: int, pieces: int) -> float:
    """The known law."""
    return LATENCY_S + pieces * PER_PIECE_S + size / BYTES_PER_S


def row(read: Read, seconds: list[float], **other: Any) -> dict[str, Any]:
    """A row as the probe prints it."""
    return {
        "bytes": read.bytes,
        "pieces": read.pieces,
        "at_once": read.at_once,
        "threads": 4,
        "memory": "VRAM",
        "seconds": seconds,
        "post_s": [time / 2 for time in seconds],
        "descriptors": [read.pieces * read.at_once] * len(seconds),
        "equal": True,
        **other,
    }


def test_the_fit_finds_known_constants() -> None:
    """Of exact times all three constants come back, and no factor is off."""
    found = fit([ReadTime(size, pieces, time_s(size, pieces)) for size, pieces in SHAPES])
    assert found.latency_s == pytest.approx(LATENCY_S)
    assert found.per_piece_s == pytest.approx(PER_PIECE_S)
    assert found.bytes_per_s == pytest.approx(BYTES_PER_S)
    assert found.worst_factor == pytest.approx(1)
    assert found.time_s(256 * MIB, 4096) == pytest.approx(time_s(256 * MIB, 4096))
    assert found.even_bytes() == pytest.approx(900_000)


def test_the_fit_bears_noise() -> None:
    """With times off by a tenth, the piece's time is within a fifth, and the factors say a tenth or so."""
    noise = itertools.cycle((1.1, 0.9, 1.0))
    found = fit([ReadTime(size, pieces, next(noise) * time_s(size, pieces)) for size, pieces in SHAPES])
    assert found.per_piece_s == pytest.approx(PER_PIECE_S, rel=0.2)
    assert 1 < found.median_factor <= found.worst_factor < 1.3


def test_no_constant_is_negative() -> None:
    """Where more pieces were faster, a piece costs nothing; where bytes did, the bandwidth is infinite."""
    faster = fit([ReadTime(size, pieces, 1 + size / MIB - pieces / 1e4) for size, pieces in SHAPES])
    assert faster.per_piece_s == 0
    flat = fit([ReadTime(size, pieces, 1 + pieces - size / 2**40) for size, pieces in SHAPES])
    assert flat.bytes_per_s == float("inf")
    assert flat.time_s(2**40, 1) == pytest.approx(2, rel=0.1)


def test_a_misfit_shows() -> None:
    """Times that follow no such law have factors that say so."""
    found = fit([ReadTime(size, pieces, 10.0 ** (index % 3)) for index, (size, pieces) in enumerate(SHAPES)])
    assert found.worst_factor > 3


@pytest.mark.parametrize(
    "shapes", [SHAPES[:3], [(MIB, n) for n in (1, 2, 3, 4)], [(n * MIB, 1) for n in (1, 2, 3, 4)]]
)
def test_too_few_shapes_are_refused(shapes: list[tuple[int, int]]) -> None:
    """Three points, one size, or one number of pieces decide nothing."""
    with pytest.raises(InvalidRun, match="decide no fit"):
        fit([ReadTime(size, pieces, time_s(size, pieces)) for size, pieces in shapes])


def test_points_are_medians_of_single_reads_after_the_first() -> None:
    """The first repeat connects; reads at once belong to another law."""
    rows = [row(Read(MIB), [9.0, 1.0, 2.0, 3.0]), row(Read(MIB, 1, 4), [9.0, 8.0])]
    assert scattered_reads.points(rows) == [ReadTime(MIB, 1, 2.0)]
    with pytest.raises(InvalidRun, match="first repeat"):
        scattered_reads.points([row(Read(MIB), [1.0])])


@pytest.mark.parametrize("read", [Read(MIB, 1), Read(MIB, 16), Read(MIB, 1024, 4), Read(16 * MIB, 4096)])
def test_slots_are_disjoint_and_never_touch(read: Read) -> None:
    """All slots of all reads posted at once lie in the pool, apart from each other, in no order."""
    found = nixlprobe.slots(read.pool_bytes, read, 7)
    assert found.shape == (read.at_once, read.pieces)
    placed = np.sort(found.reshape(-1))
    assert (np.diff(placed) >= 2).all()
    assert placed[0] >= 0
    assert (placed[-1] + 1) * read.piece_bytes <= read.pool_bytes
    assert (found == nixlprobe.slots(read.pool_bytes, read, 7)).all()


def test_slots_of_two_sides_differ_and_are_scattered() -> None:
    """Another seed takes other slots, and neighbours in a read are no neighbours in memory."""
    read = Read(MIB, 1024)
    mine, theirs = (nixlprobe.slots(4 * MIB, read, seed)[0] for seed in (1, 2))
    assert len(set(mine.tolist()) & set(theirs.tolist())) < 512
    assert np.median(np.abs(np.diff(mine))) > 100


def test_a_pool_too_small_is_refused() -> None:
    """Half of the slots and one more do not fit without touching."""
    with pytest.raises(ValueError, match="every second"):
        nixlprobe.slots(MIB, Read(MIB, 16), 1)


def test_reads_travel_as_text_and_have_to_divide() -> None:
    """BYTES/PIECESxAT_ONCE there and back; pieces are whole words."""
    read = Read(256 * MIB, 4096, 16)
    assert Read.parse(str(read)) == read
    assert (read.piece_bytes, read.pool_bytes) == (65536, 2**33)
    for wrong in ((MIB, 3, 1), (MIB, MIB, 1), (0, 1, 1), (MIB, 1, 0)):
        with pytest.raises(ValueError, match="do not divide"):
            Read(*wrong)


def test_the_check_of_content_can_fail() -> None:
    """A pool that holds the pattern of other places, or one wrong bit, is told from the right one."""
    torch = pytest.importorskip("torch")
    read, seed = Read(2**13, 16), 5
    pool = nixlprobe._Pool.__new__(nixlprobe._Pool)
    pool._torch, pool.memory, pool.device = torch, "DRAM", torch.device("cpu")
    pool.words = torch.empty(read.pool_bytes // 8, dtype=torch.int64)
    pool.fill(seed)
    owned = pool.words.view(-1, read.piece_bytes // 8).clone()
    assert len(set(owned.flatten().tolist())) == owned.numel()
    mine, theirs = (nixlprobe.slots(read.pool_bytes, read, number) for number in (1, 2))
    assert not pool.holds(mine, theirs, read, seed)
    table = pool.words.view(-1, read.piece_bytes // 8)
    table[torch.from_numpy(mine[0])] = owned[torch.from_numpy(theirs[0])]
    assert pool.holds(mine, theirs, read, seed)
    table[mine[0, -1], -1] ^= 1
    assert not pool.holds(mine, theirs, read, seed)


def test_descriptors_of_a_prompt() -> None:
    """2,048 tokens of Llama-3.1-8B are 128 blocks in 32 layers; with layers together 128 descriptors."""
    config = modelconfig.shipped_config("meta-llama/Llama-3.1-8B-Instruct")
    blocks = layout(attention.shape(config, "bfloat16", "llama"), 16)
    assert scattered_reads.descriptors(blocks, 2048, "0.26.0") == 4096
    assert scattered_reads.descriptors(blocks, 2048, "0.26.0", cross_layer=True) == 128
    assert blocks.bytes_to_move(2048, "0.26.0") // 4096 == 65536


def test_descriptors_of_a_hybrid_prompt() -> None:
    """Groups are counted by the pages that move; layers of several groups do not lie together."""
    config = modelconfig.shipped_config("google/gemma-3-1b-it")
    blocks = layout(attention.shape(config, "bfloat16", "gemma"), 128)
    found = scattered_reads.descriptors(blocks, 2048, "0.31.0")
    assert found * blocks.groups[0].page_bytes[0] == blocks.bytes_to_move(2048, "0.31.0")
    with pytest.raises(ValueError, match="do not lie together"):
        scattered_reads.descriptors(blocks, 2048, "0.31.0", cross_layer=True)


def test_settings_of_the_lab_reach_the_probe() -> None:
    """GPUs, memory and threads are those of the servers; given variables replace the lab's."""
    lab = load_lab("two-h200")
    lab = lab.model_copy(update={"transport": TransportSection(kv_buffer_device="cuda", trace=True)})
    env = nixlprobe.environment(scatter.with_variables(lab, ["UCX_TLS=tcp", "UCX_X=a=b"]), lab.decode[0])
    assert env == {"CUDA_VISIBLE_DEVICES": "1", "UCX_TLS": "tcp", "UCX_X": "a=b"}
    assert nixlprobe.memory_of(lab) == "VRAM"
    assert nixlprobe.connector_threads(lab) == nixlprobe.CONNECTOR_THREADS
    transport = lab.transport.model_copy(update={"extra": {"num_threads": 8}})
    assert nixlprobe.connector_threads(lab.model_copy(update={"transport": transport})) == 8


def test_wrong_rows_are_named_and_a_table_shows_all() -> None:
    """Damage and merged descriptors are said; each row has a line with its prediction."""
    good, merged = Read(MIB, 4), Read(MIB, 8)
    rows = [row(good, [1.0, 1.0], equal=False), row(merged, [1.0, 2.0], descriptors=[8, 5])]
    found = Screen("x", {"UCX_A": "1"}, "command", rows, ScatterFit(0.5, 0.0, float("inf"), 1.0, 1.0, 4))
    assert found.wrong == [f"{good}: bytes arrived damaged", f"{merged}: NIXL used [5, 8] descriptors"]
    assert len(found.lines()) == 5
    assert found.lines()[2].split()[-1] == "500.000"
    assert json.loads(json.dumps(found.as_dict()))["fit"]["bytes_per_s"] is None


def test_reads_are_every_combination() -> None:
    """Sizes by pieces by reads at once."""
    assert len(scatter.reads((4, 16), (1, 128), (1, 16))) == 8
    with pytest.raises(ConfigError, match="do not divide"):
        scatter.reads((1,), (3,), (1,))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lab", "no-such-lab"], "no-such-lab"),
        (["--lab", "embedded", "--env", "PATH=/x"], "PATH=/x"),
        (["--lab", "embedded", "--env", "UCX_TLS"], "--env: "),
        (["--lab", "embedded", "--pieces", "1,x"], "--pieces 1,16"),
        (["--lab", "embedded", "--pieces", "0"], "--pieces: "),
        (["--lab", "embedded", "--mib", "1", "--pieces", "3"], "do not divide"),
        (["--lab", "embedded", "--threads", "-1"], "--threads: "),
        (["--lab", "embedded", "--repeats", "0"], "--repeats 1"),
        (["--lab", "embedded", "--json", "/no/such/folder/x.json"], "--json: "),
        (["--lab", "embedded", "--json", "/"], "--json: "),
        ([], "--lab"),
    ],
)
def test_a_wrong_command_line_starts_nothing(
    argv: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line on stderr, exit status 2."""
    monkeypatch.setattr(scatter, "screen", lambda *_: pytest.fail("something was started"))
    try:
        status = main(["scatter", *argv])
    except SystemExit as stop:
        status = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert says in err


def test_the_check_of_a_file_leaves_no_trace(tmp_path: Path) -> None:
    """A file that is there keeps its content; one that is not there is not made."""
    kept, new = tmp_path / "kept.json", tmp_path / "new.json"
    kept.write_text("{}")
    scatter.require_writable(kept)
    scatter.require_writable(new)
    assert kept.read_text() == "{}"
    assert not new.exists()


def test_a_file_takes_the_whole_screen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows and fit are in the file; damaged bytes end with status 1."""
    asked: list[tuple[Any, ...]] = []

    def run(*arguments: Any) -> Screen:
        asked.append(arguments)
        return Screen("embedded", {}, "command", [row(Read(MIB), [1.0, 1.0], equal=False)], None)

    monkeypatch.setattr(scatter, "screen", run)
    path = tmp_path / "screen.json"
    options = ["--env", "UCX_A=1", "UCX_B=2", "--env", "UCX_C=3", "--at-once", "1,2", "--json", str(path)]
    assert main(["scatter", "--lab", "embedded", *options]) == 1
    assert "damaged" in capsys.readouterr().err
    assert json.loads(path.read_text())["rows"][0]["bytes"] == MIB
    (lab, reads, repeats, threads) = asked[0]
    assert {"UCX_A", "UCX_B", "UCX_C"} <= set(lab.transport.env)
    assert (len(reads), repeats, threads) == (16, 9, None)
