"""Backends with one fault each: proof that the conformance suite has teeth.

plugins    their entry points, which load no HTTP client
backends   the mutants: the reference backend for Nimbus, and one thing done wrong
eager      a package that does at its registration what it must not
suite      the suite on each of them, for a pytest of its own
_report    what that pytest writes down
_run       that pytest, and what it found

`python -m tests.mutants` prints who was caught by what.
"""
