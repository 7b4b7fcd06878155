"""`jaxlora demo`: eight tenants with eight tasks train, answer while they train, and are measured.
May import server, train and jaxlora.
Every figure it prints is measured in that run; tasks make their data from a seed."""
