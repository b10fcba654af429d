"""Prints what pyproject.toml names for the processes of an image: `requirements.py EXTRA...`. Python's library only."""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
extras = [project["optional-dependencies"][name] for name in sys.argv[1:]]
sys.stdout.write("\n".join(sorted({*project["dependencies"], *(line for extra in extras for line in extra)})) + "\n")
