"""The server of `stage=serve`: which weights a name refers to, and who may ask for them, how often and how much."""

import logging

operator_log = logging.getLogger("align.serve.operator")
"""Events for the operator of the server, in the run's log and on the console."""
