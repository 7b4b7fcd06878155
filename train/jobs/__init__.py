"""Many jobs over a trainer's few slots: states, turns, checkpoints, held-out losses.

May import the trainer, step and data; no HTTP, no database.
All happens between two steps, on the trainer's thread. Moves are the table NEXT; a turn is charged ahead.
"""
