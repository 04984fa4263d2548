"""What the demo's agents are asked: everyday questions, some of them never trained on.

Topics and question forms of the held-out set appear nowhere in the training set.
"""

from __future__ import annotations

import itertools
import random


def _words(text: str) -> list[str]:
    return text.split(", ")


_FORMS = (
    "In one sentence, what is {}?",
    "Give me one tip about {}.",
    "Why do people care about {}? One sentence.",
    "Describe {} to a child.",
    "Say a few words about {}.",
)
_TOPICS = _words(
    "sleep, bread, a good garden, the moon, money, friendship, a bicycle, rain, music, coffee, a library, walking, "
    "the sea, a map, honey, a clock, glass, a bridge, salt, winter, a train, football, silence, a diary, a kitchen, "
    "the wind, patience, a camera, soap, a river, chess, a market, wool, school, a candle, the heart, a window, "
    "an island, stories, tea, a bus trip, mountains, paper, dancing, a birthday, shoes, fire, a letter, sunlight, rice"
)

# The base model answers these with 159 characters on average, the training forms with 176: near the 165 at which the
# rewards of both agents change sign, so that neither starts with most of what it can earn.
_HELD_OUT_FORMS = (
    "What is {}, in one sentence?",
    "Name one good thing about {}.",
    "Tell me in one sentence about {}.",
    "How would you tell a child about {}?",
)
_HELD_OUT_TOPICS = _words(
    "a dog, cheese, a holiday, the stars, a job, cooking, a tree, a hospital, trust, painting, a phone, snow, "
    "a village, exercise, a horse, the news, a poem, a neighbour, electricity, a garden gate, summer, the radio, "
    "a museum, a sandwich"
)


def training_prompts(seed: int) -> list[str]:
    """All 250 training questions, shuffled."""
    prompts = [form.format(topic) for form, topic in itertools.product(_FORMS, _TOPICS)]
    random.Random(seed).shuffle(prompts)
    return prompts


def held_out_prompts(count: int) -> list[str]:
    """The first ``count`` of 96 held-out questions, the same ones on every run."""
    prompts = [form.format(topic) for topic, form in itertools.product(_HELD_OUT_TOPICS, _HELD_OUT_FORMS)]
    return prompts[:count]
