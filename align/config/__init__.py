"""Schemas: one dataclass file a stage, no torch anywhere."""
