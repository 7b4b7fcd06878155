"""Versions of adapters and training states, in RAM, on disk and in object storage.

May import core; handles policy and bytes, no device arrays except those Orbax writes.
Files are synced, then renamed. Locks are taken in the order disk, counters, state; version numbers are never reused.
"""
