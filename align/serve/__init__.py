"""The OpenAI-compatible server of `stage=serve`: model names, tenants with their API keys and limits, and answers."""

import logging

operator_log = logging.getLogger("align.serve.operator")
"""Logger of events for the operator of the server, which go to the run's log and to the console."""
