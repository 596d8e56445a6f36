"""The client: what `dstack.api` re-exports. Imports nothing at start-up but the standard library; see `connection`."""
