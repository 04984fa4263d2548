"""A say in which adapters serve, and word of those that do."""

import json
import os
import urllib.request

LARGEST_STEP = 0.5  # nats that the new adapter may be away from the base model


def accept_adapter(candidate):
    """Veto an adapter that has gone far from the base model; anything but False leaves it to the policy."""
    return False if candidate.metrics.get("kl", 0.0) > LARGEST_STEP else None


def adapter_published(version):
    """Tell a webhook, if METACLAW_WEBHOOK names one."""
    if url := os.environ.get("METACLAW_WEBHOOK"):
        body = json.dumps({"text": f"{version.name} serves, trained on {len(version.trace_ids)} replies"}).encode()
        request = urllib.request.Request(url, body, {"content-type": "application/json"})
        urllib.request.urlopen(request, timeout=10).close()
