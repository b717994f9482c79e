"""`python -m voltana` is the `voltana` command."""

from voltana.experiments.cli import main

if __name__ == "__main__":
    main()
