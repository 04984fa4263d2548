"""What came after a reply, read from the next request of the conversation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from metaclaw_hooks.types import Message, Trace, message_text

HumanText = Callable[[Message], str | None]  # what a human wrote in a message; None: no human wrote it

_INTERNAL = "<<<BEGIN_OPENCLAW_INTERNAL_CONTEXT>>>"


def human_text(message: Message) -> str | None:
    """The text of a user message that is not a client's internal context."""
    text = message_text(message).strip()
    return text if message.get("role") == "user" and text and not text.startswith(_INTERNAL) else None


def messages_after(trace: Trace, next_trace: Trace) -> Sequence[Message]:
    """The messages that were added after the reply ``trace``: those behind the last assistant message.

    Empty if that message is not this reply: the client started anew, or went on from another choice.
    """
    messages = next_trace.messages
    for index in range(len(messages) - 1, -1, -1):
        if messages[index].get("role") == "assistant":
            return messages[index + 1 :] if _same_reply(trace.response, messages[index]) else ()
    return ()


def _same_reply(reply: Message, sent_back: Message) -> bool:
    """Whether a client sent back this reply; it may have trimmed white space or reasoning, or renamed call ids."""
    one, two = ("".join(message_text(message).split()) for message in (reply, sent_back))
    if bool(reply.get("tool_calls")) != bool(sent_back.get("tool_calls")):
        return False
    return one == two or (bool(one) and bool(two) and (one in two or two in one)) or bool(reply.get("tool_calls"))


def said_after(trace: Trace, next_trace: Trace | None, human: HumanText) -> str | None:
    """What the human said next; ``None`` if nothing, or only tools answered."""
    if next_trace is None:
        return None
    said = [text for message in messages_after(trace, next_trace) if (text := human(message))]
    return "\n".join(said) or None
