"""`python -m unroll`: the command line."""

from unroll.cli import main

if __name__ == "__main__":
    main()
