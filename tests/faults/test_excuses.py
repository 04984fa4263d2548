"""What a fault does not explain is found: a failure of another kind or time, one too many, a loss uncounted."""

from __future__ import annotations

import pytest

from tests.faults.accounts import LATE, LOST, UNRECORDED, Account
from tests.faults.clients import CLOSED, CUT, ERROR_EVENT, REFUSED, TIMED_OUT, Asked
from tests.faults.excuses import KILLED, STOPPED, UPSTREAM_AWAY, Excuse, check_failures
from tests.faults.findings import Findings


def failed(failure: str, error: str = "", at: float = 10.0) -> Asked:
    return Asked("n", "alpha", "s", [], True, at - 1.0, at, failure=failure, error=error)


DOWN = Excuse("vllm down", 5.0, 15.0, UPSTREAM_AWAY)
SHOT = Excuse("gateway worker killed", 9.0, 11.0, KILLED, 2)
ENDING = Excuse("gateway worker told to stop", 9.0, 11.0, STOPPED, 2)
REFUSAL = '{"error": {"message": "litellm.InternalServerError: Hosted_vllmException - Connection error."}}'


@pytest.mark.parametrize(
    ("excuse", "one"),
    [
        (DOWN, failed("500", "Traceback (most recent call last): KeyError")),
        (DOWN, failed("401", "unknown key")),
        (DOWN, failed("404", "the model does not exist")),
        (DOWN, failed(TIMED_OUT)),
        (DOWN, failed(CUT)),
        (DOWN, failed("500", REFUSAL, at=16.0)),
        (SHOT, failed("500", REFUSAL)),
        (SHOT, failed(TIMED_OUT)),
        (SHOT, failed(ERROR_EVENT, "Connection error")),
        (SHOT, failed(CUT, at=12.0)),
        (ENDING, failed(CUT)),
    ],
)
def test_a_failure_that_a_fault_does_not_explain_is_found(excuse: Excuse, one: Asked) -> None:
    findings = Findings()
    failures = check_failures([one], [excuse], findings)
    assert len(findings.wrong["failed"]) == 1
    assert failures.by_cause == {("unexcused", one.failure): 1}


def test_what_a_fault_explains_is_itemised_by_cause_and_kind() -> None:
    findings = Findings()
    asked = [failed("500", REFUSAL), failed(CUT), failed(CLOSED), failed(REFUSED)]
    starting = Excuse("gateway starting", 5.0, 15.0, {REFUSED: ""})
    failures = check_failures(asked, [DOWN, SHOT, starting], findings)
    assert findings.clean
    assert failures.by_cause == {
        ("vllm down", "500"): 1,
        ("gateway worker killed", CUT): 1,
        ("gateway worker killed", CLOSED): 1,
        ("gateway starting", REFUSED): 1,
    }
    assert len(failures.each) == len(asked)


def test_more_cuts_than_the_killed_process_held_are_found() -> None:
    findings = Findings()
    check_failures([failed(CUT) for _ in range(5)], [SHOT], findings)
    assert len(findings.wrong["failed"]) == 3


@pytest.mark.parametrize(
    ("account", "right"),
    [
        (Account("f", traces=0, bare=0, failed=0, counted={LATE: 7}), True),
        (Account("f", traces=2, bare=3, failed=0, counted={LOST: 2, UNRECORDED: 3}), True),
        (Account("f", traces=1, bare=0, failed=0, counted={LATE: 1}), False),  # late is not lost
        (Account("f", traces=1, bare=0, failed=0, counted={LATE: 1, LOST: 1, UNRECORDED: 4}), False),
        (Account("f", traces=0, bare=1, failed=0, counted={LOST: 1}), False),
        (Account("f", traces=0, bare=3, failed=0, counted={UNRECORDED: 4}), False),
        (Account("f", traces=2, bare=0, failed=1, counted={LATE: 5}, died_with=2), True),
        (Account("f", traces=3, bare=0, failed=1, counted={LATE: 5}, died_with=2), False),
        (Account("f", traces=0, bare=3, failed=1, counted={UNRECORDED: 4}), True),
    ],
)
def test_a_loss_that_nobody_counted_is_found(account: Account, right: bool) -> None:
    findings = Findings()
    account.check(True, findings)
    assert findings.clean == right


def test_a_loss_while_the_store_is_well_is_found_however_it_was_counted() -> None:
    findings = Findings()
    Account("f", traces=1, bare=0, failed=0, counted={LOST: 1}).check(False, findings)
    assert findings.wrong["lost"]
