"""What goes in and out of a store as files.

importing  prompts with candidate answers, from files
exporting  a project's votes, for others to train on
archive    a whole store in one file, and back
"""
