"""`python -m liar`: the command line."""

from liar.cli import main

if __name__ == "__main__":
    main()
