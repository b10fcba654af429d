"""`python -m worker.trainer`: the trainer process, confined before it loads anything but Python itself."""

from core.sandbox import die_with_parent, hide_secret_files, shed_capabilities

if __name__ == "__main__":
    die_with_parent()
    shed_capabilities()
    are_secrets_hidden = hide_secret_files()

    from worker.trainer.process import main

    main(are_secrets_hidden=are_secrets_hidden)
