"""``python -m odlkit`` is the command ``odlkit``."""

from odlkit.cli import main

if __name__ == "__main__":
    main(prog_name="odlkit")
