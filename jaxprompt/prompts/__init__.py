"""Prompt methods: small modules whose parameters are the only trained ones; see `base` and `METHODS`."""

from jaxprompt.prompts.base import MethodConfig, MethodInputs, MethodInfo, PromptMethod, NoPrompt
from jaxprompt.prompts.soft import SOFT

METHODS: dict[str, MethodInfo] = {info.name: info for info in (SOFT,)}

__all__ = ["METHODS", "MethodConfig", "MethodInfo", "MethodInputs", "NoPrompt", "PromptMethod"]
