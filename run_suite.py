"""NormSuite from a checkout: `python run_suite.py --help`."""

if __name__ == "__main__":
    from suite.cli import main

    main()
