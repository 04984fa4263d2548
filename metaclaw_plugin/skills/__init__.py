"""Skills: the right few, from the agent's own library, better every week.

On the request path: skill_file, library, retrieval, injection. In the worker: traces, evolution, library.
"""
