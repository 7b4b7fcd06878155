"""A load generator for any OpenAI-compatible server: who is asked, by whom and when, and what the answers took.
Imports asyncio and the standard library only (Matplotlib for a picture, afterwards): a shared machine's cores are the server's.
`jaxlora bench serve`, `bench quantum` and benchmarks/ drive it; nothing here imports the server."""
