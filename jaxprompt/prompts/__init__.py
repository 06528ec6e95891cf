"""Prompt methods: small modules whose parameters are the only trained ones; see `METHODS`."""

from jaxprompt.prompts.base import MethodConfig, MethodInfo, MethodInputs, NoPrompt, PromptMethod
from jaxprompt.prompts.soft import SOFT

METHODS: dict[str, MethodInfo] = {info.name: info for info in (SOFT,)}

__all__ = ["METHODS", "MethodConfig", "MethodInfo", "MethodInputs", "NoPrompt", "PromptMethod"]
