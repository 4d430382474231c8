"""What aiconfigurator is asked, and how its answers are read.

Oracle: files that aiconfigurator 0.12.0 wrote for Llama-3.1-8B on two H200 (vLLM 0.24.0, 2,048 tokens in and
128 out, TTFT 1 s, TPOT 10 ms), in selftest/predict/aiconfigurator as they were but for the folder of a
traceback; what stands in them is worked on by hand here.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from disagglab.config.labs import load_lab
from disagglab.errors import ConfigError
from disagglab.predict import aiconfigurator
from disagglab.predict.aiconfigurator import Question, Worker

RECORDED = Path(__file__).with_name("aiconfigurator")
CHAT = aiconfigurator.question(load_lab("two-h200"), "chat", "h200_sxm")
STARTED = {"max-num-seqs": 512, "max-num-batched-tokens": 4060}


def recorded(name: str) -> str:
    """Text of a recorded file."""
    return (RECORDED / name).read_text(encoding="utf-8")


def test_the_question_is_the_labs() -> None:
    """Lengths and concurrency of workloads/chat.toml, objective and memory of labs/two-h200.toml."""
    assert (
        Question(
            lab="two-h200",
            workload="chat",
            definition=load_lab("two-h200").workload("chat").definition,
            system="h200_sxm",
            prefill_nodes=1,
            decode_nodes=1,
            gpus=1,
            prompt_tokens=2048,
            output_tokens=128,
            prefix_tokens=0,
            concurrency=16,
            step_tokens=8192,
            ttft_s=1.0,
            tpot_s=0.01,
            memory_share=0.5,
        )
        == CHAT
    )
    assert (CHAT.nodes, CHAT.all_gpus) == (2, 2)


def test_the_search_is_told_everything() -> None:
    """The objective in ms, the GPUs of all nodes, and that prompts come in chunks."""
    line = " ".join(aiconfigurator.search_options(CHAT, "model", "found"))
    assert line == (
        "cli default --model-path model --system h200_sxm --backend vllm --no-color --isl 2048 --osl 128"
        " --prefix 0 --total-gpus 2 --ttft 1000 --tpot 10 --strict-sla --enable-chunked-prefill"
        " --free-gpu-memory-fraction 0.5 --top-n 20 --save-dir found"
    )


@pytest.mark.parametrize(("given", "context"), [(8192, 2048), (2048, 2048), (512, 512)])
def test_a_step_takes_no_more_than_a_prompt(given: int, context: int) -> None:
    """A prompt is 2,048 tokens, and one at a time is what the tool computes with when nothing is said."""
    options = aiconfigurator.estimate_options(CHAT, "model", None, Worker(1, 2, {}), 8, given)
    pairs = dict(pairwise(options))
    assert (pairs["--batch-size"], pairs["--tp-size"], pairs["--ctx-tokens"]) == ("8", "2", str(context))


def test_candidates_are_all_servers_together() -> None:
    """Two servers of one GPU have twice the requests of the row: 2 x 11.649 x 128 = 2982.144 tokens/s."""
    sharded, replicated, apart = aiconfigurator.read_search(RECORDED, CHAT)
    assert (sharded.prefill, sharded.decode) == (None, Worker(1, 2, STARTED))
    assert (sharded.concurrency, sharded.step_tokens, sharded.context_tokens) == (40, 551, 512)
    assert sharded.figures.output_tokens_per_s == pytest.approx(25.335 * 128)
    assert (sharded.figures.ttft_s, sharded.figures.tpot_s) == pytest.approx((0.108359, 0.009868))
    assert (replicated.prefill, replicated.decode) == (None, Worker(2, 1, STARTED))
    assert (replicated.concurrency, replicated.step_tokens) == (32, 527)
    assert replicated.figures.output_tokens_per_s == pytest.approx(2982.144)
    assert apart.prefill == Worker(1, 1, {"max-num-seqs": 1, "max-num-batched-tokens": 3548})
    assert apart.decode == Worker(1, 1, {"max-num-seqs": 512, "max-num-batched-tokens": 512})
    assert (apart.concurrency, apart.step_tokens) == (32, None)
    assert apart.figures.output_tokens_per_s == pytest.approx(18.851 * 128)
    assert {(one.dtype, one.kv_dtype, one.vllm) for one in (sharded, apart)} == {
        ("bfloat16", "bfloat16", "0.24.0")
    }


def test_its_own_throughput_counts_two_ways() -> None:
    """Why requests/s are taken: 127 tokens a request where servers do both, 128 where they are apart."""
    whole = recorded("agg/best_config_topn.csv").splitlines()[1].split(",")
    assert pytest.approx(127, abs=0.01) == 3217.543 / 25.335
    assert {"3217.543", "25.335"} <= set(whole)
    apart = recorded("disagg/best_config_topn.csv").splitlines()[1].split(",")
    assert pytest.approx(128, abs=0.01) == 2412.979 / 18.851
    assert {"2412.979", "18.851"} <= set(apart)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("num_total_gpus", "gpus"), "KeyError"),
        (("25.335", "many"), "ValueError"),
        (("3217.543,1608.771,101.34,2,2,", "3217.543,1608.771,101.34,2,1,"), "other ranks"),
    ],
)
def test_another_table_is_refused(change: tuple[str, str], said: str) -> None:
    """A column renamed, a number that is none, and a row that is not of its script's division."""
    table = recorded("agg/best_config_topn.csv")
    scripts = [recorded("agg/top1/run_0.sh"), recorded("agg/top2/run_0.sh")]
    assert len(aiconfigurator.candidates(table, scripts, CHAT, "f")) == 2
    assert change[0] in table
    with pytest.raises(ConfigError, match=said):
        aiconfigurator.candidates(table.replace(*change), scripts, CHAT, "f")
    with pytest.raises(ConfigError, match="2 rows and 1 start scripts"):
        aiconfigurator.candidates(table, scripts[:1], CHAT, "f")


def test_a_folder_without_an_answer_is_refused(tmp_path: Path) -> None:
    """An empty answer is no answer."""
    with pytest.raises(ConfigError, match=r"no best_config_topn\.csv"):
        aiconfigurator.read_search(tmp_path, CHAT)


def test_an_estimate_is_read() -> None:
    """Of one server 7.275 requests/s x 128; two beside each other have twice that, and the same times."""
    one = aiconfigurator.read_estimate(recorded("estimate-agg.txt"), CHAT, 1)
    two = aiconfigurator.read_estimate(recorded("estimate-agg.txt"), CHAT, 2)
    assert one.output_tokens_per_s == pytest.approx(931.2)
    assert two.output_tokens_per_s == pytest.approx(1862.4)
    assert (two.ttft_s, two.tpot_s) == (one.ttft_s, one.tpot_s) == pytest.approx((0.095059, 0.00791))
    apart = aiconfigurator.read_estimate(recorded("estimate-disagg.txt"), CHAT, 1)
    assert apart.output_tokens_per_s == pytest.approx(16.897 * 128)
    assert (apart.ttft_s, apart.tpot_s) == pytest.approx((0.085936, 0.00686))


def test_a_figure_with_separators_is_read() -> None:
    """It writes thousands with a comma."""
    text = recorded("estimate-agg.txt").replace("95.059 ms", "1,095.059 ms")
    assert aiconfigurator.read_estimate(text, CHAT, 1).ttft_s == pytest.approx(1.095059)


def test_an_estimate_without_a_row_is_refused() -> None:
    """Never a zero in the place of what is missing."""
    with pytest.raises(ConfigError, match="TPOT"):
        aiconfigurator.read_estimate(recorded("estimate-agg.txt").replace("TPOT:", "ITL:"), CHAT, 1)


@pytest.mark.parametrize(
    ("name", "wrong", "mend"),
    [
        ("system", "Backend vllm is not supported for system gb10", "--system that it has times of"),
        ("model", "architecture Gemma3ForCausalLM is not supported", "a model that it knows"),
        ("slo", "no parallel configuration met TTFT/TPOT", r"relax \[slo\]"),
    ],
)
def test_its_refusals_are_told_with_a_mend(name: str, wrong: str, mend: str) -> None:
    """A system without times, a model that it does not know, an objective that nothing meets."""
    error = aiconfigurator.refusal(recorded(f"refused-{name}.txt"), CHAT)
    assert wrong in error.problems[0].wrong
    with pytest.raises(ConfigError, match=mend):
        raise error


def test_an_unknown_refusal_says_so() -> None:
    """Silence is not taken for an answer."""
    (problem,) = aiconfigurator.refusal("Killed", CHAT).problems
    assert "no word that is known" in problem.wrong


@pytest.mark.parametrize(
    ("lab", "workload", "said"),
    [
        ("embedded", "chat", "node.gpus: none on some node"),
        ("two-h200", "long-prompts-into-steady-decode", "two lengths of prompt"),
        ("hybrid", "chat", "slo: missing"),
    ],
)
def test_what_it_cannot_answer_is_refused_before_it_is_asked(lab: str, workload: str, said: str) -> None:
    """A lab without GPUs or objective, and a workload of two lengths."""
    with pytest.raises(ConfigError, match=said):
        aiconfigurator.question(load_lab(lab), workload, "h200_sxm")
