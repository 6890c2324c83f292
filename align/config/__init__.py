"""The configuration: a dataclass of settings for each stage and group, command-line parsing, sweeps and help texts.

Nothing here imports torch.
"""
