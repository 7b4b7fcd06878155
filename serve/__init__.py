"""Requests, time and HTTP: the engine, what is beside it, and where all is joined.
Imports everything below; nothing imports serve.
session is the notebook's entry. All device arrays belong to one thread (runtime), which others send messages."""
