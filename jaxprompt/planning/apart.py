"""An estimate in a process of its own: a compiler that crashes takes no more than that with it.

`plan` and `search` come here. The child is this file run as a program; it lives as long as its
parent holds the other end of its standard input.
"""

import dataclasses
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxprompt.config import RunConfig, dump, load_config
from jaxprompt.files import write_file
from jaxprompt.planning.chips import Topology, open_topologies
from jaxprompt.planning.estimate import Estimate, estimate
from jaxprompt.planning.shapes import StepShape
from jaxprompt.typing import UserError

# -P: a file of the working directory must not take the place of a module.
COMMAND: Sequence[str] = (sys.executable, "-P", "-m", "jaxprompt.planning.apart")
_CHECK_FAILED = re.compile(r"^F\d{4} .*?\] (.+)", re.MULTILINE)  # last words of C++ that gives up
_WAYS_ON = (
    "other settings (mesh, backbone.remat, data.batch_size) or another version of libtpu may get "
    "through"
)


class CompilerFailed(UserError):
    """The compiler for a topology crashed, was killed, or gave up with an error of its own."""


def estimate_apart(config: RunConfig, topology: Topology, prompts: int = 1) -> Estimate:
    """As `estimate`; for TPUs in a process of its own, which ends if this one does.

    Raises: UserError as `estimate`; CompilerFailed where the compiler did not come to an end.
    """
    if topology.chip is None:
        return estimate(config, topology, prompts)
    with tempfile.TemporaryDirectory() as directory, tempfile.TemporaryFile() as noise:
        path = Path(directory, "config.yaml")
        write_file(path, dump(config))
        child = subprocess.Popen(
            [*COMMAND, str(path), topology.name, str(prompts)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=noise,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        )
        with child:
            try:
                assert child.stdout is not None
                answer = child.stdout.read()
                code = child.wait()
            except BaseException:
                child.kill()
                raise
        noise.seek(0)
        said = noise.read().decode("utf-8", "replace")
    if answer:
        return _read(json.loads(answer), topology)
    if code < 0:
        sentence = _crashed(topology, signal.Signals(-code), said)
        raise CompilerFailed(sentence) from RuntimeError(said)  # which --debug shows
    raise RuntimeError(f"a plan's process ended with exit code {code}:\n{said}")


def main(argv: Sequence[str]) -> None:
    """The child: a config's file, a topology and how many prompts -> a JSON object."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answer:
        os.dup2(2, 1)  # whatever else is printed is no answer
        threading.Thread(target=_end_with_parent, daemon=True).start()
        path, name, prompts = argv
        try:
            (topology,) = open_topologies([name])
            found = estimate(load_config(path), topology, int(prompts))
            told = {"estimate": dataclasses.asdict(found)}
        except UserError as error:
            told = {"error": str(error)}
        except jax.errors.JaxRuntimeError as error:
            told = {"failed": str(error).strip().split("\n")[0]}
        answer.write(json.dumps(told))


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def _read(told: Mapping[str, Any], topology: Topology) -> Estimate:
    """What a child answered."""
    if "error" in told:
        raise UserError(told["error"])
    if "failed" in told:
        raise CompilerFailed(
            f"{_compiler()} failed on the step for {topology.name} ({told['failed']}); {_WAYS_ON}"
        )
    found = dict(told["estimate"])
    return Estimate(
        **found
        | {
            "shape": StepShape(**found["shape"]),
            "dearest": [(name, cycles) for name, cycles in found["dearest"]],
            "seconds": found["seconds"] and tuple(found["seconds"]),
        }
    )


def _crashed(topology: Topology, ended_by: signal.Signals, said: str) -> str:
    if ended_by == signal.SIGKILL:
        return (
            f"{_compiler()} was killed on the step for {topology.name} ({ended_by.name}), as the "
            "system does when memory runs out; a machine with more of it, or fewer programs beside "
            "it, may get through"
        )
    words = _CHECK_FAILED.search(said)
    reason = f"{ended_by.name}: {words[1]}" if words else ended_by.name
    return f"{_compiler()} crashed on the step for {topology.name} ({reason}); {_WAYS_ON}"


def _compiler() -> str:
    try:
        return f"the TPU compiler (libtpu {importlib.metadata.version('libtpu')})"
    except importlib.metadata.PackageNotFoundError:
        return "the TPU compiler"


if __name__ == "__main__":
    main(sys.argv[1:])
