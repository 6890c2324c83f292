"""Files that go into a store or come from it.

importing  prompts with candidate answers, from files
exporting  a project's votes as training files
archive    backup of a whole store in one file, and its restoration
"""
