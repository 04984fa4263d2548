"""What the user did next: thanks, a correction, the same request again. Cheap, without a model, English by default.

Words only hint at what someone thinks, so confidences are low, and to go on with something else is no opinion at all.
A correction wins over thanks in the same message ("thanks, but that's wrong").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from metaclaw_hooks.hookspecs import hookimpl
from metaclaw_hooks.rewards.following import HumanText, human_text, said_after
from metaclaw_hooks.types import Reward, Trace

SOURCE = "next_turn"

_CORRECTION = (
    r"no[,.!]",
    r"nope",
    r"wrong",
    r"incorrect",
    r"not (?:right|correct|true|what i)",
    r"(?:that|this|it)(?:'s| is| was) not (?:it|what|right)",
    r"(?:does|did)(?:n't| not) (?:work|help|answer)",
    r"still (?:broken|fails|failing|wrong|not)",
    r"i (?:said|asked|told you|meant|already)",
    r"you (?:forgot|missed|ignored|misunderstood|didn't|did not)",
    r"try again",
    r"(?:please )?(?:re-?do|undo|revert) (?:it|that|this)",
    r"bad (?:answer|bot|reply)",
    r"useless",
    r"stop (?:doing|using|saying|adding)",
)
_THANKS = (
    r"thanks?(?: you| a lot| so much)?",
    r"thx",
    r"perfect",
    r"great",
    r"awesome",
    r"excellent",
    r"brilliant",
    r"well done",
    r"good (?:job|answer|work|bot)",
    r"nice(?: one| work)?",
    r"exactly(?: right)?",
    r"(?:that|this|it) (?:works|worked|helps|helped)",
    r"(?:that|this)(?:'s| is) (?:right|correct|it|perfect|great|helpful)",
    r"love (?:it|this|that)",
)
_OPENING = 160  # characters: a verdict comes first; later words belong to the next request
_HINT = 500  # characters
_FILLER = frozenset(
    {"that", "thats", "this", "it", "its", "is", "was", "s", "no", "please", "the", "a", "you", "sorry"}
)
_FORM = (
    "a about all an and any are as at be by can could do doe for from give have hi how i in is it its ju just let ll "
    "make me my need now of on or our please s so some tell that the their them there these they thi this to want we "
    "what when where which who why will with would you your"
)
_FORM_WORDS = frozenset(_FORM.split())


class NextTurnReward:
    """Rewards a reply by the user's next message; ``positive`` and ``negative`` add words, in any language."""

    SCORES_LONE_REPLY = False
    INLINE = True

    def __init__(
        self, positive: Iterable[str] = (), negative: Iterable[str] = (), human: HumanText = human_text
    ) -> None:
        self._thanks = _pattern(_THANKS, positive)
        self._correction = _pattern(_CORRECTION, negative)
        self._human = human

    @hookimpl
    def score_trace(self, trace: Trace, next_trace: Trace | None) -> Reward | None:
        said = said_after(trace, next_trace, self._human)
        if said is None:
            return self._left(trace) if next_trace is None else None
        asked = self._asked(trace)
        opening = said[:_OPENING].lower()
        if self._correction.search(opening):
            return Reward(SOURCE, -0.8, "the user corrected it", 0.6, hint=_hint(said, self._correction))
        if _repeats(asked, said):
            return Reward(SOURCE, -0.7, "the user said the same again", 0.5)
        if _rephrases(asked, said):
            return Reward(SOURCE, -0.4, "the user put the same request in other words", 0.3)
        if self._thanks.search(opening):
            return Reward(SOURCE, 0.8, "the user was pleased", 0.5)
        return None

    def _asked(self, trace: Trace) -> str:
        return next((text for message in reversed(trace.messages) if (text := self._human(message))), "")

    def _left(self, trace: Trace) -> Reward | None:
        """Nothing came any more, and the wait is over: a bad sign only if this reply answered a correction."""
        if trace.exchange > 0 and self._correction.search(self._asked(trace)[:_OPENING].lower()):
            return Reward(SOURCE, -0.3, "the user had corrected it, and left without another word", 0.2)
        return None


def _pattern(built_in: Sequence[str], own: Iterable[str]) -> re.Pattern[str]:
    words = [*built_in, *(re.escape(word.lower()) for word in own)]
    return re.compile(r"(?<!\w)(?:" + "|".join(words) + r")(?!\w)")


def _repeats(asked: str, said: str) -> bool:
    one, two = (re.findall(r"\w+", text.lower()) for text in (asked, said))
    return len(one) >= 3 and one == two


def _rephrases(asked: str, said: str) -> bool:
    """Whether nearly all that the request was about comes again, and not much more; form words do not count."""
    one, two = ({_stem(w) for w in re.findall(r"\w+", text.lower())} - _FORM_WORDS for text in (asked, said))
    return len(one) >= 3 and len(one & two) >= 0.9 * len(one) and len(two) <= 2 * len(one)


def _stem(word: str) -> str:
    return word[:-1] if len(word) > 3 and word.endswith("s") else word


def _hint(said: str, correction: re.Pattern[str]) -> str | None:
    """The user's own words, if they say more than that it was wrong."""
    rest = correction.sub(" ", said[:_OPENING].lower()) + said[_OPENING:]
    words = [word for word in re.findall(r"\w+", rest) if word not in _FILLER]
    return said[:_HINT] if len(words) >= 2 else None
