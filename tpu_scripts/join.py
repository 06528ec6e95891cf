"""Joins this worker to the others of the machine, then is the `jaxprompt` command.

python join.py                          counts the chips
python join.py FILE train CONFIG ...    runs; FILE gets this worker's number, 0 the one that writes
"""

import sys
from pathlib import Path

import jax


def main(words: list[str]) -> int:
    """Runs the command; exit codes are its own, 2 for what a user can put right."""
    jax.distributed.initialize()
    workers, kind = jax.process_count(), jax.devices()[0].device_kind
    print(
        f"worker {jax.process_index()} of {workers}: {jax.local_device_count()} of "
        f"{jax.device_count()} chips, {kind}",
        file=sys.stderr,
    )
    if jax.default_backend() != "tpu":
        print("jaxprompt: error: there is no TPU here", file=sys.stderr)
        return 2
    if not words:
        return 0
    Path(words[0]).write_text(str(jax.process_index()), encoding="utf-8")
    if workers > 1:
        print("jaxprompt: error: trains on one host only, this is one of", workers, file=sys.stderr)
        return 2
    from jaxprompt.cli import main as jaxprompt

    sys.argv = ["jaxprompt", *words[1:]]
    return jaxprompt()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
