"""The server: the one composer of store, engine, backends and transport, and the HTTP API in front of them."""
