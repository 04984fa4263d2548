"""Losses against values worked out by hand, and against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metaclaw_trainer.errors import UnknownLossError
from metaclaw_trainer.losses import BUILT_IN, LossOptions, find_loss, token_weights
from torch import Tensor

OPTIONS = LossOptions()
LN2 = math.log(2.0)


def run(name: str, now: list[float], sampled: list[float], advantages: list[float], options: LossOptions = OPTIONS):
    """Loss terms and the gradient of their sum, in float64."""
    now_N = torch.tensor(now, dtype=torch.float64, requires_grad=True)
    terms = find_loss(name)(
        now_N, torch.tensor(sampled, dtype=torch.float64), torch.tensor(advantages, dtype=torch.float64), options
    )
    terms.loss_N.sum().backward()
    assert now_N.grad is not None
    return terms.loss_N.tolist(), now_N.grad.tolist(), terms.clipped_N.tolist()


def test_importance_sampling_by_hand() -> None:
    # r = 2 and A = 3: loss -6; r = 1/2 and A = -1: loss 1/2. The gradient of r is r.
    losses, gradient, clipped = run("importance_sampling", [-1.0, -2.0], [-1.0 - LN2, -2.0 + LN2], [3.0, -1.0])
    assert losses == pytest.approx([-6.0, 0.5])
    assert gradient == pytest.approx([-6.0, 0.5])
    assert clipped == [False, False]


def test_importance_weights_are_cut_at_the_cap() -> None:
    losses, gradient, clipped = run(
        "importance_sampling", [-1.0, -1.0], [-1.0 - 3 * LN2, -1.0 - LN2], [1.0, 1.0], LossOptions(importance_cap=4.0)
    )
    assert losses == pytest.approx([-4.0, -2.0])  # r = 8 counts as 4
    assert gradient == pytest.approx([-4.0, -2.0])
    assert clipped == [True, False]


def test_ppo_by_hand() -> None:
    # r = 2: bounded at 1.2 for A = 1 (no gradient left), free for A = -1; r = 1/2: free for A = 1, bounded for A = -1.
    now, sampled = [-1.0, -1.0, -1.0, -1.0], [-1.0 - LN2, -1.0 - LN2, -1.0 + LN2, -1.0 + LN2]
    losses, gradient, clipped = run("ppo", now, sampled, [1.0, -1.0, 1.0, -1.0])
    assert losses == pytest.approx([-1.2, 2.0, -0.5, 0.8])
    assert gradient == pytest.approx([0.0, 2.0, -0.5, 0.0])
    assert clipped == [True, False, False, True]


def test_cispo_keeps_the_gradient_where_ppo_has_none() -> None:
    # The fork's "cispo" is ppo under another name: at r = 2, A = 1 its gradient is zero. The real one's is not.
    losses, gradient, _ = run("cispo", [-1.0], [-1.0 - LN2], [1.0], LossOptions(cispo_clip=(0.8, 1.2)))
    assert losses == pytest.approx([1.2])  # - 1.2 * 1 * (-1)
    assert gradient == pytest.approx([-1.2])
    assert run("ppo", [-1.0], [-1.0 - LN2], [1.0])[1] == [0.0]


def test_cispo_default_bounds_let_a_ratio_of_two_through() -> None:
    assert run("cispo", [-1.0], [-1.0 - LN2], [1.0])[1] == pytest.approx([-2.0])
    assert run("cispo", [-1.0], [-1.0 - 3 * LN2], [1.0])[1] == pytest.approx([-4.0])  # 8, cut at 4


def test_cross_entropy_by_hand() -> None:
    losses, gradient, _ = run("cross_entropy", [-1.5, -0.5], [0.0, 0.0], [1.0, 2.0])
    assert losses == pytest.approx([1.5, 1.0])
    assert gradient == pytest.approx([-1.0, -2.0])


def test_on_policy_all_policy_losses_have_the_same_gradient() -> None:
    now, advantages = [-0.3, -1.7, -4.0], [0.5, -1.0, 0.25]
    for name in ("importance_sampling", "ppo", "cispo"):
        assert run(name, now, now, advantages)[1] == pytest.approx([-0.5, 1.0, -0.25]), name


@given(
    st.lists(
        st.tuples(st.floats(-6, -0.01), st.floats(-1.5, 1.5), st.floats(-2, 2)), min_size=1, max_size=6
    )
)  # fmt: skip
def test_gradients_agree_with_finite_differences(rows: list[tuple[float, float, float]]) -> None:
    step = 1e-6
    options = LossOptions(importance_cap=3.0)
    now, sampled = [row[0] for row in rows], [row[0] - row[1] for row in rows]
    advantages = [row[2] for row in rows]
    edges = [math.log(edge) for edge in (0.8, 1.2, 3.0, 4.0)]
    if any(abs(row[1] - edge) < 1e-3 for row in rows for edge in edges):
        return  # a kink has no derivative
    for name in ("ppo", "cross_entropy"):
        gradient = run(name, now, sampled, advantages, options)[1]
        for i in range(len(rows)):
            up, down = list(now), list(now)
            up[i], down[i] = up[i] + step, down[i] - step
            high, low = (sum(run(name, x, sampled, advantages, options)[0]) for x in (up, down))
            assert gradient[i] == pytest.approx((high - low) / (2 * step), abs=1e-5), name


def test_importance_sampling_gradient_agrees_with_finite_differences_below_the_cap() -> None:
    now, sampled, advantages, step = [-1.0, -2.5], [-1.3, -2.1], [0.7, -0.4], 1e-6

    def plain(values: list[float]) -> float:
        return sum(-math.exp(v - s) * a for v, s, a in zip(values, sampled, advantages, strict=True))

    gradient = run("importance_sampling", now, sampled, advantages)[1]
    for i in range(2):
        up, down = list(now), list(now)
        up[i], down[i] = up[i] + step, down[i] - step
        assert gradient[i] == pytest.approx((plain(up) - plain(down)) / (2 * step), abs=1e-6)


def test_a_ratio_beyond_all_bounds_stays_finite() -> None:
    for name in BUILT_IN:
        losses, gradient, _ = run(name, [-0.1], [-900.0], [1.0], LossOptions(importance_cap=4.0))
        assert math.isfinite(losses[0]), name
        assert math.isfinite(gradient[0]), name


def test_an_unknown_loss_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnknownLossError, match="unknown loss 'grpo'; known here: cispo, cross_entropy"):
        find_loss("grpo")


def test_normalisation_is_what_it_says() -> None:
    lengths = [2, 6]
    assert token_weights(lengths, LossOptions(normalisation="token")) == [1 / 8, 1 / 8]
    assert token_weights(lengths, LossOptions(normalisation="sequence")) == [1 / 4, 1 / 12]
    assert token_weights(lengths, LossOptions(normalisation="constant", normalisation_constant=4.0)) == [0.25, 0.25]
    assert token_weights(lengths, LossOptions()) == [1.0, 1.0]  # Tinker's sum


def test_losses_do_not_share_or_change_their_inputs() -> None:
    now, sampled, advantages = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    copies: list[Tensor] = [x.clone() for x in (now, sampled, advantages)]
    for loss in BUILT_IN.values():
        loss(now, sampled, advantages, OPTIONS)
    assert all(torch.equal(a, b) for a, b in zip((now, sampled, advantages), copies, strict=True))
