"""`python -m dstack_core._cli` is `dstack`."""

from dstack_core._cli import main

main()
