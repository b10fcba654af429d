"""`python -m cli`: the command line where it is not installed as `espalier`."""

from cli.main import app

if __name__ == "__main__":
    app(prog_name="espalier")
