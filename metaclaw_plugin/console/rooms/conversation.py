"""One conversation as the model saw it, and what the owner thinks of it."""

from __future__ import annotations

import logging
import math
import time
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, RedirectResponse
from metaclaw_hooks.rewards.feedback import feedback_reward

from metaclaw_plugin.console.access import Acting, Looking
from metaclaw_plugin.console.conversation import MESSAGES, TURNS, read_turns, said
from metaclaw_plugin.console.house import house_of
from metaclaw_plugin.console.pages import back, fragment, page
from metaclaw_plugin.errors import UnknownSessionError, UnknownTraceError
from metaclaw_plugin.store.recent import find_session_row, place_of
from metaclaw_plugin.store.rewards import add_feedback, hold_trace, put_rewards
from metaclaw_plugin.store.traces import get_trace

logger = logging.getLogger(__name__)
router = APIRouter()

COMMENT = 20_000  # characters
WHOLE = 2_000_000  # characters of one message that are shown at most

Id = Annotated[str, Path(max_length=64)]


@router.get("/sessions/{session}")
def conversation(
    request: Request, session: Id, visitor: Looking, start: Annotated[int, Query(ge=0, le=10**9)] = 0
) -> Response:
    with house_of(request).reading() as c:
        row = find_session_row(c, session)
        if row is None:
            raise UnknownSessionError(f"no session {session!r}; it may have been deleted")
        turns = read_turns(c, session, start, TURNS + 1)
    return page(
        request,
        "conversation.html",
        visitor=visitor,
        session=row,
        turns=turns[:TURNS],
        start=start,
        before=max(0, start - TURNS) if start else None,
        after=start + TURNS if len(turns) > TURNS else None,
    )


@router.get("/traces/{trace_id}")
def find(request: Request, trace_id: Id, visitor: Looking) -> Response:
    """To the conversation that a trace is in."""
    del visitor
    with house_of(request).reading() as c:
        place = place_of(c, trace_id)
    if place is None:
        raise UnknownTraceError(f"no trace {trace_id!r}; it may have been deleted")
    session, number = place
    return RedirectResponse(f"/sessions/{session}?start={number // TURNS * TURNS}#{trace_id}", 303)


@router.get("/traces/{trace_id}/messages")
def messages(request: Request, trace_id: Id, visitor: Looking, end: Annotated[int, Query(ge=0)]) -> Response:
    """The messages before number ``end`` that the page left out, so many at a time."""
    del visitor
    with house_of(request).reading() as c:
        trace = get_trace(c, trace_id)
    end = min(end, len(trace.messages))
    start = max(0, end - MESSAGES)
    found = [said(index, trace.messages[index]) for index in range(start, end)]
    return HTMLResponse(fragment("messages.html", {"trace": trace, "messages": found, "left": start}))


@router.get("/traces/{trace_id}/messages/{index}")
def whole_message(
    request: Request, trace_id: Id, visitor: Looking, index: Annotated[int, Path(ge=-1, le=10**6)]
) -> Response:
    """One message, whole; -1 is the answer."""
    del visitor
    with house_of(request).reading() as c:
        trace = get_trace(c, trace_id)
    if index >= len(trace.messages):
        raise UnknownTraceError(f"trace {trace_id!r} has no message {index}")
    message = trace.response if index < 0 else trace.messages[index]
    return HTMLResponse(fragment("message.html", {"trace": trace, "said": said(index, message, WHOLE)}))


@router.get("/traces/{trace_id}/tokens")
def tokens(request: Request, trace_id: Id, visitor: Looking) -> Response:
    """The answer's tokens, tinted by how likely the model found them."""
    del visitor
    house = house_of(request)
    with house.reading() as c:
        trace = get_trace(c, trace_id)
    logprobs = trace.response_logprobs or ()
    shown = house.tokens.tinted(trace.response_token_ids or (), logprobs)
    values = {
        "tokens": shown,
        "count": len(logprobs),
        "mean": math.fsum(logprobs) / len(logprobs) if logprobs else None,
        "least": min(logprobs, default=None),
        "model": house.settings.base_model,
    }
    return HTMLResponse(fragment("tokens.html", values))


@router.post("/traces/{trace_id}/feedback")
def feedback(request: Request, trace_id: Id, action: Acting) -> Response:
    """Rate an answer. The opinion stands with the trace at once; the worker makes it the trace's reward."""
    comment = action.text("comment").replace("\x00", "")[:COMMENT]
    opinion = feedback_reward(_value(action.text("value")), comment)
    now = time.time()
    with house_of(request).writing() as c:
        trace = get_trace(c, trace_id)
        hold_trace(c, trace_id)
        put_rewards(c, trace_id, [opinion], now)
        add_feedback(c, trace.agent, trace_id, opinion.value, comment, now)
        place = place_of(c, trace_id)
    logger.info("console: an answer of %s is rated", trace.agent)
    number = place[1] if place else 0
    to = f"/sessions/{trace.session}?start={number // TURNS * TURNS}"
    return back(request, f"{to}#{trace_id}", f"rated {opinion.value:+g}")


def _value(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan  # which the reward refuses with the right words
