"""`python -m unroll`: the command line."""

from __future__ import annotations

from unroll.cli.main import main

if __name__ == "__main__":
    main()
