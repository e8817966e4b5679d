"""`python -m specjax.cli`: the command line without its script."""

from specjax.cli.main import main

if __name__ == "__main__":
    main()
