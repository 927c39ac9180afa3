"""An environment of its own for a benchmark whose peers the project's must not have.

Without any package, since it comes before the imports that only the environment has.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path


def go_on_in(cache: Path, *installs: list[str]) -> None:
    """With --install on the command line: make the environment (once), and go on there.

    Args:
        cache: its folder, unless --env names another one.
        installs: what each call of pip is given.
    """
    if "--install" not in sys.argv:
        return
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--env", type=Path, default=cache)
    folder = parser.parse_known_args()[0].env.expanduser()
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = folder / "installed"
    if not done.exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        for packages in installs:
            subprocess.run([*pip, *packages], check=True)
        done.touch()
    words = [word for word in sys.argv if word != "--install"]
    sys.exit(subprocess.run([str(python), *words]).returncode)
