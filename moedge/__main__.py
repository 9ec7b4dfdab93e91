"""`python -m moedge` is the command `moedge`."""

from moedge.cli import main

if __name__ == "__main__":
    main()
