"""`python -m mexit`."""

from mexit.cli import main

if __name__ == "__main__":
    main()
