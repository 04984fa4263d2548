"""Merging: what extends, token by token and under one adapter version, is one sample."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from metaclaw_hooks.errors import InvalidSampleError

from metaclaw_plugin.store.forwarding import ScoredTurn
from metaclaw_plugin.worker.samples import make_sample, merge, sample_id


def turn(number: int, prompt: tuple[int, ...], response: tuple[int, ...], **changes: object) -> ScoredTurn:
    made = ScoredTurn(
        seq=number + 1,
        trace_id=f"t{number}",
        agent="alpha",
        session="s1",
        turn=number,
        adapter_version=3,
        skill_generation=0,
        prompt=prompt,
        response=response,
        logprobs=tuple(-0.1 * (i + 1) for i in range(len(response))),
        reward=0.1 * number,
        hint=None,
    )
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


FIRST = turn(0, (1, 2), (3, 4))
SECOND = turn(1, (1, 2, 3, 4, 5, 6), (7,))


def test_a_prompt_that_extends_the_turn_before_is_merged_with_it() -> None:
    [run] = merge([SECOND, FIRST], 100)
    sample = make_sample(run)
    assert sample.token_ids == (1, 2, 3, 4, 5, 6, 7)
    assert sample.loss_mask == (0, 0, 1, 1, 0, 0, 1)
    assert [(t.trace_id, t.start, t.logprobs, t.reward) for t in sample.turns] == [
        ("t0", 2, FIRST.logprobs, 0.0),
        ("t1", 6, SECOND.logprobs, 0.1),
    ]
    assert sample.adapter_version == 3


@pytest.mark.parametrize(
    "second",
    [
        turn(1, (1, 2, 3, 9, 5, 6), (7,)),  # one token differs in the response
        turn(1, (1, 9, 3, 4, 5, 6), (7,)),  # one differs in the prompt
        turn(1, (1, 2, 3), (7,)),  # the response is cut off
        turn(1, (1, 2, 3, 4, 5, 6), (7,), adapter_version=4),
        turn(1, (1, 2, 3, 4, 5, 6), (7,), session="s2"),
    ],
)
def test_what_differs_in_a_token_a_version_or_the_session_is_not_merged(second: ScoredTurn) -> None:
    assert [len(run) for run in merge([FIRST, second], 100)] == [1, 1]


def test_two_choices_of_one_request_are_two_samples_and_the_chosen_one_goes_on() -> None:
    chosen, other = turn(0, (1, 2), (3, 4)), turn(0, (1, 2), (8, 9), trace_id="other", seq=2)
    runs = merge([chosen, other, dataclasses.replace(SECOND, seq=3)], 100)
    assert sorted([t.trace_id for t in run] for run in runs) == [["other"], ["t0", "t1"]]


def test_a_sample_never_grows_past_the_limit() -> None:
    assert [len(run) for run in merge([FIRST, SECOND], 7)] == [2]
    assert [len(run) for run in merge([FIRST, SECOND], 6)] == [1, 1]


def test_the_id_depends_on_the_traces_alone() -> None:
    other_reward = dataclasses.replace(FIRST, reward=-1.0, hint="shorter")
    assert make_sample([FIRST]).id == make_sample([other_reward]).id == sample_id(["t0"])
    assert sample_id(["t0", "t1"]) != sample_id(["t1", "t0"])


@pytest.mark.parametrize("changes", [{"logprobs": (-0.1,)}, {"prompt": ()}, {"response": (), "logprobs": ()}])
@pytest.mark.law(2)
def test_lengths_that_disagree_are_refused_and_never_padded(changes: dict[str, object]) -> None:
    with pytest.raises(InvalidSampleError, match="t0"):
        make_sample([dataclasses.replace(FIRST, **changes)])  # type: ignore[arg-type]


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.booleans()), min_size=1, max_size=8),
    st.integers(4, 40),
)
@pytest.mark.law(2)
def test_every_turn_is_in_one_sample_with_its_own_tokens(steps: list[tuple[list[int], bool]], limit: int) -> None:
    turns: list[ScoredTurn] = []
    history: tuple[int, ...] = (0,)
    for number, (response, rewritten) in enumerate(steps):
        history = (9, *history[1:]) if rewritten else history
        turns.append(turn(number, history, tuple(response)))
        history = (*history, *response, 7)
    samples = [make_sample(run) for run in merge(turns, limit)]
    found = {t.trace_id: (sample, t) for sample in samples for t in sample.turns}
    assert len(found) == len(turns) == sum(len(sample.turns) for sample in samples)
    for given_turn in turns:
        sample, span = found[given_turn.trace_id]
        assert sample.token_ids[: span.start] == given_turn.prompt
        assert sample.token_ids[span.start : span.end] == given_turn.response
        assert span.logprobs == given_turn.logprobs
        assert len(sample.turns) == 1 or len(sample.token_ids) <= limit
