"""Built-in rewards: plugins like any other, made by whoever loads them with the owner's settings.

Explicit feedback is no plugin: someone says it, nobody infers it; see ``feedback.py``.
"""
