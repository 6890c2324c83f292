"""The registry of runs: queries, lineage, gates, aliases and deletion of data, computed from the run folders.

The folders are the truth; what is kept beside them can be thrown away.
"""
