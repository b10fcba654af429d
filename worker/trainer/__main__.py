"""`python -m worker.trainer`: the trainer process, confined before it loads anything but Python itself."""

import os

from core.sandbox import die_with_parent, hide_secret_files, shed_capabilities

if __name__ == "__main__":
    die_with_parent()
    shed_capabilities()
    are_secrets_hidden = hide_secret_files()

    from core.telemetry.logs import configure_logs

    # Before the libraries are loaded, because they warn while loading. Standard output is the pipe for messages.
    configure_logs("trainer", captured=(2,))
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    from worker.trainer.process import main

    main(are_secrets_hidden=are_secrets_hidden)
