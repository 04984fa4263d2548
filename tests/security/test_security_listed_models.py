"""Which names the owner's LiteLLM config answers to, asked of a real router."""

from __future__ import annotations

import pytest
from litellm.router import Router

from metaclaw_plugin.gateway.upstream import is_listed

CLOUD = {"model": "openai/gpt-4o", "api_key": "none"}
OURS = {"model": "hosted_vllm/*", "api_base": "http://127.0.0.1:9/v1", "api_key": "none"}


@pytest.fixture(scope="module")
def router() -> Router:
    return Router(
        model_list=[
            {"model_name": "cloud", "litellm_params": CLOUD, "model_info": {"id": "cloud-1"}},
            {"model_name": "groq/*", "litellm_params": {"model": "groq/*", "api_key": "none"}},
            {"model_name": "metaclaw/*", "litellm_params": OURS, "model_info": {"id": "ours-1"}},
        ],
        model_group_alias={
            "gpt-4": "cloud",
            "hidden": {"model": "cloud", "hidden": True},
            "to-beta": "metaclaw/beta@v1",
            "to-group": "clouds",
            "to-ours": "mixed",
        },
        routing_groups=[
            {"group_name": "clouds", "models": ["cloud"], "routing_strategy": "simple-shuffle"},
            {"group_name": "mixed", "models": ["groq/*", "metaclaw/*"], "routing_strategy": "simple-shuffle"},
        ],
    )


@pytest.mark.parametrize("model", ["cloud", "cloud-1", "gpt-4", "hidden", "clouds", "to-group", "groq/llama"])
def test_what_the_owner_lists_by_any_means_is_the_owners(router: Router, model: str) -> None:
    assert is_listed(model, router)


@pytest.mark.law(4)
@pytest.mark.parametrize(
    "model", ["openclaw", "", "metaclaw/alpha", "metaclaw/*", "ours-1", "to-beta", "mixed", "to-ours", "x" * 500]
)
def test_law_4_no_name_leads_to_an_adapter_past_its_agent(router: Router, model: str) -> None:
    assert not is_listed(model, router)


def test_without_a_router_nothing_is_listed() -> None:
    assert not is_listed("cloud")
