"""Pointing clients at the gateway: OpenClaw's configuration, and snippets for everything else."""
