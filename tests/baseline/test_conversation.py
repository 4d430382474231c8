"""Conversations: each turn sends the whole history again, and the server has most of it in its prefix cache.

Oracle: the token ids that the server saw and made, which say exactly what two prompts have in common
(held_tokens in measure/conversation.py), against the server's own counters of prompt tokens by source. No
text is tokenized by the client. Times are recorded only.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Mapping, Sequence

import pytest

from disagglab.errors import InvalidRun
from disagglab.kv.shape import KvShape, reusable_tokens
from disagglab.measure import ledger
from disagglab.measure.conversation import Conversation, Transcript, converse, held_tokens
from disagglab.results.recorder import Recorder
from disagglab.results.records import Ledger, Reading, Sent
from disagglab.serving.topology import Topology

OUTPUT_TOKENS = 16
SITES = ("Aarhus", "Bergen", "Cork")
QUESTIONS = (
    "I look after a small data centre in {site}. Each of its forty racks has two power feeds, a switch at the"
    " top and a sensor for the temperature of the air at the front and at the back. Last night the sensors of"
    " row seven showed thirty-one degrees at the front and thirty-three at the back, for about two hours, and"
    " then everything was as before. None of the servers in that row reported an error, and the fans did not"
    " run faster than usual. The cooling unit next to the row had been serviced on the day before, by people"
    " who had not been here earlier. What would you look at first, and in which order would you go on?",
    "I have looked at that. The valve of the cooling unit was half closed, which explains the front. It does"
    " not explain the back: with the same load the difference between front and back has always been eleven"
    " degrees in {site}, and last night it was two. Two sensors of different makers agree about it. The power"
    " meters show that the row took forty kilowatts before, during and after, so the heat has to have gone"
    " somewhere, or less air was warmed by more, or the numbers are not what I think they are. Please name"
    " the simplest explanation that fits all of it, and one measurement which would prove it wrong.",
    "That was it, thank you. Now I have to write a note of half a page about the night for the people who own"
    " the servers. They are not engineers, they pay for the racks in {site}, and they want to know whether it"
    " can happen again, what we have changed, and whether they have to do anything themselves. Nothing was"
    " damaged, no server stopped, and from now on somebody checks the valve whenever the unit was serviced."
    " Write the first two sentences of the note, in plain words, without numbers, and without an excuse.",
)


def talks(salts: Mapping[str, str], turns: int = len(QUESTIONS)) -> list[Conversation]:
    """A conversation for each site, with the salt of its own that keeps caches of tenants apart."""
    return [
        Conversation(
            tuple(question.format(site=site) for question in QUESTIONS[:turns]),
            OUTPUT_TOKENS,
            {"cache_salt": salt},
        )
        for site, salt in salts.items()
    ]


def prove_held(
    single: Topology,
    before: Reading,
    found: Transcript,
    held: Sequence[int],
    shape: KvShape,
) -> Ledger:
    """Fail unless the server counted the client's tokens, and found exactly ``held`` of them in its cache."""
    after = ledger.settle(single, before, len(found.turns))
    sent = [
        Sent(turn.prompt_tokens, turn.output_tokens, held_by_decode=tokens)
        for turn, tokens in zip(found.turns, held, strict=True)
    ]
    return ledger.prove(single, before, after, sent, shape, single.version)


@pytest.fixture
def block(one_table: None, prefix_cache: None, single: Topology) -> int:
    """Tokens of a KV block, where one table of blocks says what is held."""
    return ledger.block_size(single.servers[0].metrics())


def test_history_is_computed_once(single: Topology, shape: KvShape, record: Recorder, block: int) -> None:
    """Three conversations of three turns: prompts grow, and the server finds the whole blocks of the history.

    The session state of a chat is the KV cache of its history; the client sends the history again, and the
    server recognises its pages by their content. What it finds: whole blocks of the last prompt and its
    answer, but not the last token of either. An answer's last token was sampled and never computed; a
    prompt's last one is computed again for its logits. The prediction compares token ids: text that comes
    back through the chat template need not be cut into the tokens it was generated in.
    """
    conversations = talks({site: secrets.token_hex(4) for site in SITES})
    before = ledger.read(single)
    found = converse(single.router.url, single.served_name, conversations)
    held = [tokens for number in range(len(SITES)) for tokens in held_tokens(found.of(number), block)]
    book = prove_held(single, before, found, held, shape)
    for number in range(len(SITES)):
        turns = found.of(number)
        prompts = [turn.prompt_tokens for turn in turns]
        for earlier, later in itertools.pairwise(turns):
            assert later.prompt_tokens > earlier.prompt_tokens + earlier.output_tokens, (
                f"conversation {number}: a turn does not hold the one before it: prompts of {prompts} tokens"
            )
    assert sum(held) > 0, (
        f"no turn shares a whole block of {block} tokens with the one before; nothing proved"
    )
    prompt_tokens = sum(turn.prompt_tokens for turn in found.turns)
    record.numbers("prompt tokens sent", [prompt_tokens], "tokens", arm="single", what="sum")
    record.numbers(
        "prompt tokens found in the prefix cache",
        [book.cached_tokens],
        "tokens",
        arm="single",
        what="sum",
        note=f"as computed from token ids; {book.cached_tokens / prompt_tokens:.0%} of those sent",
    )
    for turn in range(len(QUESTIONS)):
        rows = [place for place, one in enumerate(found.turns) if one.turn == turn]
        sent = [found.turns[place].prompt_tokens for place in rows]
        computed = [found.turns[place].prompt_tokens - held[place] for place in rows]
        record.numbers(
            f"TTFT, turn {turn + 1}",
            [found.turns[place].ttft_s for place in rows],
            "s",
            arm="single",
            what="requests",
            note=f"prompts of {sent} tokens, of which {computed} were computed",
        )
    if found.client is not None:
        record.numbers("CPU share of the client", [found.client.cpu_share], "ratio", arm="single")


@pytest.mark.parametrize("tenant", ["the same", "another"])
def test_history_is_found_only_under_its_own_salt(
    single: Topology, shape: KvShape, block: int, tenant: str
) -> None:
    """The same words a second time: found whole under the same salt, not at all under another.

    The control of the test above: the arithmetic that is right for one salt is refused for the other.
    """
    salt = secrets.token_hex(4)
    again = salt if tenant == "the same" else secrets.token_hex(4)
    start = ledger.read(single)
    first = converse(single.router.url, single.served_name, talks({SITES[0]: salt}, turns=1))
    before = ledger.settle(single, start, 1)
    second = converse(single.router.url, single.served_name, talks({SITES[0]: again}, turns=1))
    tokens = second.turns[0].prompt_tokens
    assert second.turns[0].prompt_ids == first.turns[0].prompt_ids
    whole = reusable_tokens(tokens, block)
    assert whole > 0, f"a prompt of {tokens} tokens has no whole block of {block}; nothing to find"
    if tenant == "the same":
        prove_held(single, before, second, [whole], shape)
        return
    prove_held(single, before, second, [0], shape)
    with pytest.raises(InvalidRun, match="prompt tokens held already"):
        prove_held(single, before, second, [whole], shape)
