"""A load generator for any OpenAI-compatible server: who is asked, by whom and when, and what the answers took.
Imports asyncio and the standard library only, so that it leaves a shared machine's cores to the server.
`jaxlora bench serve`, `bench quantum` and benchmarks/ drive it; nothing here imports the server."""
