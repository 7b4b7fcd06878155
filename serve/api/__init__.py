"""The wires: what a client sends and gets, one folder each.
May import http, access, runtime and jobs; nothing but serve/server imports them.
Bodies are parsed once, strictly, in schemas; routes do no work that blocks the event loop."""
