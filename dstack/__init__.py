"""Runs tasks and services on whichever machines are cheapest and available. The API is in `dstack.api`."""
