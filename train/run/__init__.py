"""`jaxlora train`: a file's tenants trained together, with metrics, pictures and a screen.

May import everything of train and jaxlora.
With several processes the lead alone writes and prints; what decides a step may not differ between them.
"""
