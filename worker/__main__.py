"""`python -m worker`: the supervisor of one GPU."""

from worker.supervisor.tasks import main

if __name__ == "__main__":
    main()
