"""A stand-in for the process in which a TPU compiler works: it plans for CPUs, or it ends badly.

A program, called as `planning.apart` calls its child. What becomes of a topology says `ENDS`;
besides, v3:1x1 fails with an error of its own and v5e:2x2 never ends.
"""

import os
import signal
import sys
import time

ENDS = {"v4:1x1x1": signal.SIGSEGV, "v5p:1x1x1": signal.SIGABRT, "v6e:1x1": signal.SIGKILL}

name = sys.argv[2]
if name in ENDS:
    print("F1124 00:00:00.000001 17 emitter.cc:9] Check failed: a == b", file=sys.stderr)
    sys.stderr.flush()
    os.kill(os.getpid(), ENDS[name])

import jax  # noqa: E402

from jaxprompt.planning import apart, chips  # noqa: E402

compile_lowered = jax.stages.Lowered.compile


def compile_here(self, **options):
    if name == "v3:1x1":
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nat a place")
    if name == "v5e:2x2":
        time.sleep(600)
    return compile_lowered(self, **options)


chips._check_tpu = lambda name: None
chips._devices_there = lambda name: jax.devices("cpu")[:1]
jax.stages.Lowered.compile = compile_here
apart.main(sys.argv[1:])
