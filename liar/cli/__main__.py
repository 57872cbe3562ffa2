"""`python -m liar.cli`."""

from liar.cli import main

if __name__ == "__main__":
    main()
