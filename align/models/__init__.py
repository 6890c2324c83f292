"""Models: loading, adapters, the roles on one base."""
