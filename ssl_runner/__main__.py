"""`python -m ssl_runner` is the same as `ssl-run`."""

from ssl_runner.cli import main

if __name__ == "__main__":
    main()
