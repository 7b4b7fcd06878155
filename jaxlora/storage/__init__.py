"""Versions of adapters and training states, in RAM, on disk and in object storage.

May import core; policy and bytes, no device arrays but those Orbax writes.
Files are synced, then renamed. Locks go in the order disk, counters, state; version numbers are never reused.
"""
