"""What LiteLLM answers without a key of ours: each route by itself, with the statuses that it may answer with.

They were taken from a running gateway without a database, each with no key, a wrong one, a revoked one and an agent's.
A route that is not here must be 401 without a key that works, and 403 with an agent's if it is not open.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_BY_STATUS: Mapping[tuple[int, ...], str] = {
    # what it is, whether it lives, how its pages look, lists of what it can do, and the first step of signing in
    (200,): """
        GET / /.well-known/jwks.json /.well-known/litellm-cli-auth /.well-known/litellm-ui-config
            /.well-known/oauth-authorization-server /.well-known/oauth-authorization-server/mcp
            /.well-known/oauth-authorization-server/v1/mcp/oauth /.well-known/oauth-protected-resource
            /.well-known/oauth-protected-resource/mcp /.well-known/openid-configuration /docs/oauth2-redirect
            /fallback/login /get/ui_theme_settings /get_favicon /get_image /get_logo_url /health/liveliness
            /health/liveness /health/readiness /litellm/.well-known/litellm-ui-config /mcp/docs
            /mcp/docs/oauth2-redirect /mcp/enabled /mcp/openapi.json /mcp/redoc /openapi.json
            /public/agent_hub /public/agents/fields /public/autorouter_presets
            /public/complexity_router/fuse_presets /public/complexity_router/scorer_defaults /public/endpoints
            /public/litellm_blog_posts /public/litellm_model_cost_map /public/mcp_hub /public/model_hub
            /public/model_hub/info /public/providers /public/providers/fields /redoc /sso/key/generate
            /v1/mcp/oauth/protected-resource
        POST /api/event_logging/batch /register /sso/cli/start /{mcp_server_name}/register
    """,
    # OAuth and sign-in in a terminal: each wants its own secret
    (400,): """
        GET /callback /sso/cli/poll/{key_id} /v1/mcp/oauth/authorize
        POST /sso/cli/complete/{login_id}
    """,
    # sign-ins, and routes that take another credential than a key of ours, whatever key comes along
    (401,): """
        GET /gemini/{endpoint:path}
        POST /gemini/{endpoint:path} /login /realtime/calls /v1/mcp/oauth/authorize /v1/realtime/calls
        PUT /gemini/{endpoint:path}
        PATCH /gemini/{endpoint:path}
        DELETE /gemini/{endpoint:path}
    """,
    # the same, and only so often
    (401, 429): """
        POST /v2/login
    """,
    # a credential of LiteLLM's own services
    (401, 503): """
        GET /lens/internal/ingestion-credentials /lens/worker/{lens_id}/{job_id}/content
            /lens/worker/{lens_id}/{job_id}/reviews /lens/worker/{lens_id}/{job_id}/sample
        POST /lens/worker/claim /lens/worker/{lens_id}/{job_id}/heartbeat /lens/worker/{lens_id}/{job_id}/model
            /lens/worker/{lens_id}/{job_id}/progress /lens/worker/{lens_id}/{job_id}/result
    """,
    # SCIM, which is not on
    (403,): """
        GET /scim/v2 /scim/v2/ /scim/v2/Groups /scim/v2/Groups/{group_id} /scim/v2/ResourceTypes
            /scim/v2/ResourceTypes/{resource_type_id} /scim/v2/Schemas /scim/v2/Schemas/{schema_id:path}
            /scim/v2/ServiceProviderConfig /scim/v2/Users /scim/v2/Users/{user_id} /scim/v2/placeholders
        POST /scim/v2/Groups /scim/v2/Users /scim/v2/placeholders/{user_id}/merge
        PUT /scim/v2/Groups/{group_id} /scim/v2/Users/{user_id}
        PATCH /scim/v2/Groups/{group_id} /scim/v2/Users/{user_id}
        DELETE /scim/v2/Groups/{group_id} /scim/v2/Users/{user_id}
    """,
    # not on, or about what is not there
    (404,): """
        GET /.well-known/agent-skills/index.json /.well-known/oauth-authorization-server/mcp/{mcp_server_name}
            /.well-known/oauth-authorization-server/{mcp_server_name}
            /.well-known/oauth-authorization-server/{mcp_server_name}/mcp
            /.well-known/oauth-authorization-server/{root_path:path}/v1/mcp/oauth
            /.well-known/oauth-protected-resource/mcp/{mcp_server_name}
            /.well-known/oauth-protected-resource/{mcp_server_name}/mcp /.well-known/skills/index.json
            /claude_code_gateway/.well-known/oauth-authorization-server /health/drain
            /liteadmin/slack/connect/{token} /mcp/mcp /oauth/client-metadata.json /robots.txt /sso/debug/callback
            /sso/debug/login /v1/mcp/registry.json /v1/skills/{skill_id}/archive /{mcp_server_name}/mcp
        POST /claude_code_gateway/oauth/device_authorization /claude_code_gateway/oauth/revoke
            /claude_code_gateway/oauth/token /claude_code_gateway/v1/messages
            /claude_code_gateway/v1/messages/count_tokens /liteadmin/slack/connect/{token} /mcp/mcp /v3/login
            /v3/login/exchange /{mcp_server_name}/mcp
        PUT /{mcp_server_name}/mcp
        PATCH /{mcp_server_name}/mcp
        DELETE /{mcp_server_name}/mcp
    """,
    # takes nothing in
    (410,): """
        POST /v1/logs /v1/traces
    """,
    # OAuth and sign-in: each wants its own fields, and its own secret among them
    (422,): """
        GET /authorize /authorize/flow /authorize/mcp-session /onboarding/get_token /{mcp_server_name}/authorize
        POST /authorize/complete /moyai/connect/exchange /onboarding/claim_token /revoke /token
            /v1/mcp/oauth/token /{mcp_server_name}/token
    """,
    # LiteLLM without a database, or without its enterprise package, before it looks at a key
    (500,): """
        GET /claude-code/marketplace.json /get/ui_settings /langfuse/{endpoint:path} /public/skill_hub
            /sso/callback
        POST /langfuse/{endpoint:path} /sso/saml/callback
        PUT /langfuse/{endpoint:path}
        PATCH /langfuse/{endpoint:path}
        DELETE /langfuse/{endpoint:path}
    """,
    # SAML, which is not installed
    (501,): """
        GET /sso/saml/login /sso/saml/metadata
    """,
    # MCP, of which nothing is set up
    (503,): """
        GET /toolset/{toolset_name}/mcp
        POST /toolset/{toolset_name}/mcp
        PUT /toolset/{toolset_name}/mcp
        PATCH /toolset/{toolset_name}/mcp
        DELETE /toolset/{toolset_name}/mcp
    """,
}

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE"})


def _read() -> Iterator[tuple[str, tuple[int, ...]]]:
    for statuses, text in _BY_STATUS.items():
        method = ""
        for word in text.split():
            if word in _METHODS:
                method = word
            else:
                yield f"{method} {word}", statuses


PUBLIC = dict(_read())  # statuses, by `METHOD path`
