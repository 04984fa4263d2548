// Optional: without it the gateway tells sessions apart by their affinity header and closes them when they are idle.
// With it, it is told: which session and turn each request belongs to, and when a session has ended.
//
// Works for the provider entries that `metaclaw connect openclaw` writes: metaclaw-AGENT, each with a key of its own.
import { definePluginEntry } from "openclaw/plugin-sdk/plugin-entry";

const PREFIX = "metaclaw-";
const TIMEOUT_MS = 1500; // OpenClaw gives all ends of sessions two seconds together when it shuts down
// The conversation goes on after these.
const GOES_ON = new Set(["shutdown", "restart"]);

function providersOf(config) {
  const all = config?.models?.providers ?? {};
  return Object.entries(all).filter(([id]) => id.startsWith(PREFIX));
}

function turnHeaders({ sessionId, turnId }) {
  return sessionId ? { headers: { "x-session-id": sessionId, "x-metaclaw-turn": turnId } } : null;
}

async function endSession(api, event, context) {
  const provider = api.config?.models?.providers?.[PREFIX + (context.agentId ?? "main")];
  if (!provider?.apiKey || GOES_ON.has(event.reason)) return;
  const root = provider.baseUrl.replace(/\/v1\/?$/, "");
  const url = `${root}/metaclaw/v1/sessions/${encodeURIComponent(event.sessionId)}/end`;
  const options = {
    method: "POST",
    headers: { authorization: `Bearer ${provider.apiKey}` },
    signal: AbortSignal.timeout(TIMEOUT_MS),
  };
  try {
    const reply = await fetch(url, options);
    // 404: no request of that session came through the gateway, so there is nothing to end.
    if (!reply.ok && reply.status !== 404) api.logger.warn(`metaclaw: the end of a session was answered with ${reply.status}`);
  } catch (error) {
    api.logger.warn(`metaclaw: the end of a session could not be told: ${error.message}`);
  }
}

export default definePluginEntry({
  id: "metaclaw",
  name: "MetaClaw",
  description: "Tells a MetaClaw gateway which session and turn a request belongs to, and when a session ends.",
  register(api) {
    for (const [id] of providersOf(api.config)) {
      api.registerProvider({ id, label: `MetaClaw (${id.slice(PREFIX.length)})`, auth: [], resolveTransportTurnState: turnHeaders });
    }
    api.on("session_end", (event, context) => endSession(api, event, context), { timeoutMs: TIMEOUT_MS });
  },
});
