"""MetaClaw for the LiteLLM proxy: gateway plugin, worker and command line."""

__version__ = "0.1.0"
