"""One module a stage, whose `run` tells the story; `inputs.py` says what goes into each; `execution.py` runs one."""
