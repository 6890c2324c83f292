"""The server of `stage=serve`: which weights a name stands for, and who may ask for them, how often and how much."""
