"""Logging in to the machines of runs, with the command `ssh`: the user's key, the tunnel, and what `ssh RUN` needs."""
