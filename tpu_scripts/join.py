"""Joins this worker to the others of the machine, then is the `jaxprompt` command.

python join.py                          counts the chips
python join.py FILE train CONFIG ...    runs; FILE gets this worker's number, 0 the one that writes
"""

import argparse
import functools
import sys
from pathlib import Path

from jaxprompt import joining
from jaxprompt.arguments import host_arguments


def main(words: list[str]) -> int:
    """Runs the command; exit codes are its own, 2 for what a user can put right."""
    parser = argparse.ArgumentParser()
    host_arguments(parser)
    args = parser.parse_args(["--distributed"])
    args.debug = False
    return joining.run(args, functools.partial(work, words))


def work(words: list[str], args: argparse.Namespace) -> int:
    """What this worker does once all are there."""
    import jax

    print(f"chips: {jax.devices()[0].device_kind}", file=sys.stderr)
    if jax.default_backend() != "tpu":
        print("jaxprompt: error: there is no TPU here", file=sys.stderr)
        return 2
    if not words:
        return 0
    Path(words[0]).write_text(str(jax.process_index()), encoding="utf-8")
    from jaxprompt.cli import main as jaxprompt

    sys.argv = ["jaxprompt", *words[1:]]
    return jaxprompt()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
