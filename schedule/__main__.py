"""`python -m schedule`: one of the schedules of a service; the one that leads does the duties."""

from schedule.clock import main

if __name__ == "__main__":
    main()
