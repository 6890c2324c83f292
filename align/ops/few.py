"""How many observations are few. It stands alone, so that whoever only shows figures imports no NumPy."""

FEW = 20
"""Below so many observations an interval says little, and whoever shows it says that."""
