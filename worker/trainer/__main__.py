"""`python -m worker.trainer`: the trainer process, confined before it loads anything but Python itself."""

from core.sandbox import die_with_parent, shed_capabilities

if __name__ == "__main__":
    die_with_parent()
    shed_capabilities()

    from worker.trainer.process import main

    main()
