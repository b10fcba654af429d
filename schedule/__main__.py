"""`python -m schedule`: one schedule process. Several may run; the leading one does the duties."""

from schedule.clock import main

if __name__ == "__main__":
    main()
