"""`python -m refollama` is `refollama`."""

from refollama.cli import main

if __name__ == "__main__":
    main()
