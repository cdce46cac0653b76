#!/usr/bin/env python3
"""NormSuite from a checkout: `python run_suite.py --help`."""

if __name__ == "__main__":
    try:
        from suite.cli import main

        main()
    except KeyboardInterrupt:  # before the command line could take care of it
        raise SystemExit(130) from None
