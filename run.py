#!/usr/bin/env python3
"""Sets up nanohybrid in an environment of its own and runs it. Needs Python 3.11 or newer and nothing else.

    python3 run.py quickstart [FLAGS]    the whole pipeline on a CPU, into runs/quickstart
    python3 run.py test [FLAGS]          the tests, in several processes; flags go to pytest
    python3 run.py COMMAND [FLAGS]       any other command of nanohybrid: chat, inspect, pretrain, ...
    python3 run.py setup                 only set up

The first call installs locked versions into .venv (a minute or two); later calls start at once. Where
there is no NVIDIA GPU, torch is a CPU build. Settings, from the environment:
    NANOHYBRID_VENV          another folder than .venv
    NANOHYBRID_TORCH_INDEX   a package index to take torch from
    NANOHYBRID_TORCH=cpu|cuda   which build, instead of looking for a GPU
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

if sys.version_info >= (3, 11):  # noqa: UP036 - older Pythons are told so below
    import tomllib

ROOT = Path(__file__).resolve().parent
VENV = Path(os.environ.get("NANOHYBRID_VENV", ROOT / ".venv")).absolute()
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "nanohybrid-setup"
LOCKS = [ROOT / "requirements" / "torch.lock", ROOT / "requirements" / "dev.lock"]


def main(arguments):
    if sys.version_info < (3, 11):  # noqa: UP036
        return complain(f"this is Python {platform.python_version()}; call run.py with Python 3.11 or newer")
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0
    if not set_up():
        return 1
    command, flags = arguments[0], arguments[1:]
    if command == "setup":
        return 0
    if command == "test":
        return run([PYTHON, "-m", "pytest", *workers(flags), *flags], cwd=ROOT)
    if command == "quickstart" and not any(flag.split("=")[0] in ("--out", "-h", "--help") for flag in flags):
        flags = ["--out", str(Path("runs") / "quickstart"), *flags]
    return run([PYTHON, "-m", "nanohybrid", command, *flags])


def workers(flags):
    """The flags that make pytest run the whole suite in a process per core, at most four. Named files run in
    one process.
    """
    processes = min(os.cpu_count() or 1, 4)
    named = any((ROOT / flag.split("::")[0]).exists() for flag in flags)
    if processes == 1 or named or "--pdb" in flags:
        return []
    return ["--numprocesses", str(processes), "--dist", "loadfile"]


def set_up():
    """Make the environment where it is missing or older than its locks; true where it is ready."""
    wanted = state()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return True
    print(f"setting up {VENV} ...", file=sys.stderr, flush=True)
    steps = [
        lambda: run([sys.executable, "-m", "venv", "--clear", VENV]) == 0,
        install_torch,
        lambda: pip("-r", LOCKS[1]),
        lambda: pip("--no-deps", "--no-build-isolation", "-e", ROOT),
    ]
    for step in steps:
        if not step():
            complain("the installation failed, see above; the same command tries again")
            return False
    STAMP.write_text(wanted)
    return True


def install_torch():
    """Install the locked torch: its CPU build where there is no GPU, from the first place that has one."""
    pin = next(line for line in LOCKS[0].read_text().split() if line.startswith("torch=="))
    index = os.environ.get("NANOHYBRID_TORCH_INDEX")
    if index:
        return pip("--index-url", index, pin)
    cpu = os.environ.get("NANOHYBRID_TORCH", "cuda" if has_gpu() else "cpu") == "cpu"
    if not cpu or platform.system() != "Linux" or platform.machine() != "x86_64":
        return pip(pin)  # the default build: CUDA on Linux x86_64, CPU elsewhere
    if pip(f"{pin}+cpu", quiet=True):  # an index or a folder that pip is configured with has the CPU build
        return True
    # uv knows where torch's CPU builds are kept; failing that, the default build runs on a CPU too, only
    # larger
    uv = [PYTHON, "-m", "uv", "pip", "install", "--quiet", "--python", PYTHON, "--torch-backend", "cpu", pin]
    return (pip("uv") and run(uv) == 0) or pip(pin)


def has_gpu():
    """Whether an NVIDIA GPU answers."""
    tool = shutil.which("nvidia-smi")
    return tool is not None and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def pip(*arguments, quiet=False):
    """Call the environment's pip install; true where it worked."""
    command = [PYTHON, "-m", "pip", "install", "-qq", "--disable-pip-version-check", *arguments]
    return run(command, stderr=subprocess.DEVNULL if quiet else None) == 0


def state():
    """What an environment is made from: when it changes, the environment is made anew."""
    digest = hashlib.sha256(sys.version.encode())
    for path in LOCKS:
        digest.update(path.read_bytes())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    digest.update(json.dumps(project, sort_keys=True).encode())
    return digest.hexdigest()


def run(command, **options):
    """Run a command and return its exit code; Ctrl-C goes to it too, and it decides."""
    process = subprocess.Popen([str(part) for part in command], **options)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def complain(message):
    """Say what is wrong on one line; returns the exit code."""
    print(f"run.py: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
