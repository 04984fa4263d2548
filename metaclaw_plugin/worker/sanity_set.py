"""A small fixed set of questions with plain answers. A model that has learned anything useful still finds them likely;
one that babbles to please a reward does not. Candidate and base model are compared on the same text, so it does not
matter whether a model knows them by heart."""

from __future__ import annotations

from metaclaw_hooks.types import AdapterVersion, Kind, Sampling, Trace

SANITY_SET: tuple[tuple[str, str], ...] = (
    ("What is the capital of France?", "The capital of France is Paris."),
    ("How many days are there in a week?", "There are seven days in a week."),
    ("What do bees make?", "Bees make honey from the nectar of flowers."),
    ("Please count from one to five.", "One, two, three, four, five."),
    ("Why does ice float on water?", "Ice floats because it is less dense than liquid water."),
    ("What colour is the sky on a clear day?", "On a clear day the sky is blue."),
    ("Say thank you in a polite way.", "Thank you very much for your help. I really appreciate it."),
    ("What is two plus two?", "Two plus two is four."),
    ("What should I do if I feel cold?", "You could put on a warm jumper, or have a cup of hot tea."),
    ("Who wrote Romeo and Juliet?", "Romeo and Juliet was written by William Shakespeare."),
    ("What does a doctor do?", "A doctor examines people who are ill and helps them to get well again."),
    ("Give me one reason to read books.", "Books let you learn about places and people that you may never meet."),
)


def sanity_prompts(version: AdapterVersion) -> list[Trace]:
    """The questions as traces, for an agent whose own held-out ones cannot be replayed."""
    return [_prompt(version, number, question) for number, (question, _) in enumerate(SANITY_SET)]


def _prompt(version: AdapterVersion, number: int, question: str) -> Trace:
    return Trace(
        id=f"sanity-{number}",
        request_id=f"sanity-{number}",
        agent=version.agent,
        session="sanity",
        turn=0,
        exchange=0,
        kind=Kind.MAIN,
        route="chat",
        model=version.name,
        adapter_version=version.number,
        messages=({"role": "user", "content": question},),
        tools=(),
        response={"role": "assistant", "content": ""},
        finish_reason=None,
        prompt_token_ids=None,
        response_token_ids=None,
        response_logprobs=None,
        sampling=Sampling(temperature=1.0, top_p=1.0, max_tokens=64),
        skills=(),
        skill_generation=0,
        chat_template_hash=None,
        response_id=None,
        started_at=0.0,
        first_token_at=None,
        finished_at=0.0,
        trainable=False,
        reason="sanity",
    )
