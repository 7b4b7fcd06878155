"""jaxlora beside what people would use instead: one model, the same adapters and prompts, on this machine, in turn.
Each peer runs in an environment of its own, at a stated version; one that cannot be installed is skipped with the reason.
`uv run python -m benchmarks.peers --help` says how; docs/benchmarks.md says what is measured."""
