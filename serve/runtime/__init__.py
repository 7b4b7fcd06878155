"""The device thread and its inbox; training beside serving, the budget between the two, publishing.
May import engine, train and jaxlora; no HTTP and no database.
What fails here ends its own request or tenant; anything else ends the thread, and the process exits with 1."""
