"""Prompt methods: small modules whose parameters are the only trained ones; see `METHODS`."""

from jaxprompt import schema
from jaxprompt.prompts.attempt import ATTEMPT
from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, NoPrompt, PromptMethod
from jaxprompt.prompts.delta import ADEPT, DEPT
from jaxprompt.prompts.low_rank import DPT, LOPT
from jaxprompt.prompts.mixture import PT_MOE, SMOP
from jaxprompt.prompts.multitask import MPT, MULTITASK
from jaxprompt.prompts.p_tuning import P_TUNING
from jaxprompt.prompts.p_tuning_v2 import P_TUNING_V2
from jaxprompt.prompts.per_layer import PER_LAYER
from jaxprompt.prompts.prefix import PREFIX
from jaxprompt.prompts.residual import RESIDUAL
from jaxprompt.prompts.soft import SOFT
from jaxprompt.prompts.superpos import SUPERPOS
from jaxprompt.prompts.xprompt import XPROMPT

METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        SOFT,
        P_TUNING,
        RESIDUAL,
        P_TUNING_V2,
        PREFIX,
        DPT,
        LOPT,
        SUPERPOS,
        DEPT,
        ADEPT,
        SMOP,
        PT_MOE,
        MULTITASK,
        MPT,
        ATTEMPT,
        PER_LAYER,
        XPROMPT,
    )
}


def slots_of(config: MethodConfig) -> int:
    """Encoder slots that an example has."""
    return METHODS[config.name].slots(config)


schema.variants(MethodConfig, "name", {name: info.config for name, info in METHODS.items()})

__all__ = [
    "METHODS",
    "MethodConfig",
    "MethodInfo",
    "MethodInputs",
    "NoPrompt",
    "PromptMethod",
    "slots_of",
]
