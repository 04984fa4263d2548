"""What an evolved skill may not say. Conversations are hostile text, and a skill made of them speaks with our voice.

The scan is strict rather than clever: a refused edit costs one lesson, an accepted attack stays in every prompt. Each
pattern takes time in proportion to the text: what repeats is bounded wherever what must follow may be missing.
Skills that the owner writes or imports are not held to the rules about wording, only to the format and to secrets.
"""

from __future__ import annotations

import re
import unicodedata

_SECRETS = (
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    ("an API key", r"\b(?:sk|pk|rk|mc|ghp|gho|ghs|glpat|hf|xox[abprs]|npm|pypi)[-_][A-Za-z0-9_-]{16,}"),
    ("an AWS key", r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"),
    ("a Google key", r"\bAIza[A-Za-z0-9_-]{30,}"),
    ("a signed token", r"\beyJ[A-Za-z0-9_-]{10,500}\.[A-Za-z0-9_-]{10}"),
    ("a credential in a link", r"://[^/\s:@]{1,100}:[^/\s:@]{3,100}@"),
    (
        "a password",
        r"(?i)\b(?:password|passwd|passphrase|secret|token|api[ _-]?key)\b\s*(?:is|=|:)\s*"
        r"(?=[^\s]{0,200}[0-9!@#$%^&*])[^\s<>{}$()]{6,}",
    ),
    (
        "a long random string",
        r"\b(?=[A-Za-z0-9_-]{0,200}[0-9])(?=[A-Za-z0-9_-]{0,200}[A-Z])(?=[A-Za-z0-9_-]{0,200}[a-z])"
        r"[A-Za-z0-9_-]{32}",
    ),
    ("a long random string", r"\b(?=[0-9a-f]*[0-9])(?=[0-9a-f]*[a-f])[0-9a-f]{32,}\b"),
    ("a card number", r"\b(?:\d[ -]?){15}\d\b"),
    ("an e-mail address", r"\b[\w.+-]{1,64}@(?!example\.)[\w-]{1,63}\.[\w.-]{0,200}[a-z]{2}"),
)
_NOT = r"(?<!never )(?<!not )(?<!don't )(?<!avoid )(?<!refuse to )(?<!without )(?<!nor )"
_PRIVATE = (
    r"(?:system prompt|hidden (?:prompt|instructions)|these instructions|your instructions|passwords?|api[ -]?keys?|"
    r"secrets?|credentials?|tokens?|private (?:data|keys?)|environment variables?|\.env|conversation(?: history)?|"
    r"chat (?:history|log)|personal data|user'?s? data)"
)
_GUARDS = (
    r"(?:safety|security|guard ?rails?|guards?|filters?|moderation|logging|logs|monitoring|audit\w*|confirmations?|"
    r"authentication|authori[sz]ation|verification|certificate|tls|ssl|sandbox\w*|permissions?|approvals?|metaclaw)"
)
_HIDE = r"\b(?:do not|don't|never|without)\b[^.\n]{0,20}\b(?:tell|inform|mention|warn|show|notif)\w*\b[^.\n]{0,30}"
_HOSTILE = (
    (
        "overrides other instructions",
        r"\b(?:ignore|disregard|forget|override|bypass)\b[^.\n]{0,40}\b"
        r"(?:instruction|rule|prompt|polic|guideline|message)",
    ),
    (
        "reveals what is private",
        _NOT + r"\b(?:reveal|print|show|output|repeat|disclose|expose|share|include|quote|leak|dump)\b"
        r"[^.\n]{0,60}(?<![A-Za-z])" + _PRIVATE,
    ),
    (
        "sends data away",
        _NOT + r"\b(?:send|post|upload|forward|transmit|exfiltrate|submit|e-?mail|copy|report|append|encode)\b"
        r"[^.\n]{0,60}(?<![A-Za-z])(?:"
        + _PRIVATE
        + r"|to (?:http|www|an? (?:external|remote)|this (?:address|url|server|endpoint|webhook)))",
    ),
    (
        "switches protection off",
        _NOT + r"\b(?:disable|turn off|switch off|skip|bypass|circumvent|deactivate|remove|suppress)\b"
        r"[^.\n]{0,40}\b" + _GUARDS,
    ),
    ("hides something from the user", _HIDE + r"\b(?:user|owner|human|anyone|them)\b"),
    ("claims a role", r"(?m)^[^\S\n]*(?:system|assistant|user|developer)\s*:|<\|[a-z_]+\|>|\[/?INST\]|<</?SYS>>"),
    (
        "pretends to come from above",
        r"\b(?:new|updated|real) (?:system prompt|instructions) (?:from|by|:)|\byou are now\b|\bjailbreak|"
        r"\bdeveloper mode\b",
    ),
    (
        "runs what it downloads",
        r"\b(?:curl|wget|iwr|invoke-webrequest)\b[^\n]{0,200}\|\s*(?:ba|z|)sh\b|"
        r"\bbase64\b[^\n]{0,60}\|\s*(?:ba|z|)sh\b",
    ),
    (
        "destroys data",
        r"\brm\s+-(?=[a-z]*[rf])[a-z]+\s+(?:/|~|\$HOME|\*)|\bmkfs\b|\bdd\s+if=|\bdrop\s+(?:table|database)\b|:\(\)\s*\{",
    ),
)
_LINK = re.compile(r"(?i)\b(?:https?|ftp|file|data|javascript)://?[^\s]{3,}|\bwww\.[^\s]+|\]\(\s*(?:/|\.\.)")
_HIDDEN = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]")


def find_secrets(text: str) -> list[str]:
    """What looks like a secret or like personal data in ``text``; never the thing itself."""
    return list(dict.fromkeys(what for what, pattern in _SECRETS if re.search(pattern, text)))


def find_hostile(text: str) -> list[str]:
    """What in ``text`` an evolved skill may not say, in a few words each."""
    found = ["has invisible characters"] if _HIDDEN.search(text) else []
    plain = " ".join(unicodedata.normalize("NFKC", _HIDDEN.sub("", text)).replace("’", "'").split(" "))
    lines = re.sub(r"[*_`]", "", plain)
    found += [what for what, pattern in _HOSTILE if re.search(pattern, lines, re.IGNORECASE)]
    image = plain.find("![")
    if _LINK.search(plain) or (image >= 0 and plain.find("](", image) >= 0):
        found.append("links out of its folder")
    return found


def objections(text: str) -> list[str]:
    """Everything that speaks against ``text`` in an evolved skill; empty: nothing was found."""
    return [f"holds {what}" for what in find_secrets(text)] + find_hostile(text)
