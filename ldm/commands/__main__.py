"""`python -m ldm.commands VERB`, as jobs of an experiment start a command."""

from ldm.commands import main

if __name__ == "__main__":
    main()
