"""What a run will take, said before anything is loaded: memory by role and phase, cards, disk, time."""
