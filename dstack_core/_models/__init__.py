"""The models: what users write, what client and server exchange, what backends are asked and answer.

Import each model from its own module; this package imports nothing.
"""
