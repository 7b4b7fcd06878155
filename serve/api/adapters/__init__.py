"""Adapters of a running server: import, list, download, pin, delete; vLLM's two routes.
May import http, access, runtime, jaxlora/peft.
An upload is checked whole before anything changes; a version is announced when it is on disk."""
