"""Why some of PEFT's methods cannot work on a plain vision model, by what they ask for."""

from __future__ import annotations

import peft

from peft_vision.adapters._origin import Origin
from peft_vision.errors import UnsupportedSite

ASKED: dict[str, str] = {
    "adapter_len": "it puts learned words into a language model's attention",
    "use_qalora": "PEFT has it for layers that GPTQ quantized, and would do without it elsewhere",
    "monteclora_config": "its loss has a term that a training loop would have to ask PEFT for, "
    "and once it has run, PEFT's model can be neither copied nor merged",
    "token_indices": "it trains rows of an embedding of words, and images have none",
    "n_tasks": "its router asks for the id of a task with every input",
    "adapters": "it mixes adapters that were trained before, and routes by a language model's "
    "hidden states",
    "shadow_model": "it runs a smaller decoder of words beside the model",
    "arrow_config": "it routes between adapters that were trained before",
    "alora_invocation_tokens": "it begins at words of a prompt",
    "corda_config": "it rewrites the base's weights by data, which a saved folder could not redo",
    "lora_ga_config": "it rewrites the base's weights by gradients, which a saved folder could "
    "not redo",
}
"""Field of a configuration -> why a method that is about it is refused."""
INSTEAD = "On a vision model work, for example: dora, vera, ia3, boft, pissa."


def refuse(origin: Origin) -> None:
    """Refuse a method that a plain vision model cannot feed.

    Raises:
        UnsupportedSite: with the reason, and with what works.
    """
    reason = reason_against(origin)
    if reason:
        raise UnsupportedSite(f"{origin.name} cannot work here: {reason}. {INSTEAD}")


def reason_against(origin: Origin) -> str:
    """Why a plain vision model cannot feed the method; empty when it can."""
    if issubclass(origin.config, peft.PromptLearningConfig):
        return "it puts learned words before a prompt, and images have none"
    asked = (origin.switch, *(origin.nested or ())[:1]) if origin.switch else origin.fields
    return next((ASKED[field] for field in asked if field in ASKED), "")
