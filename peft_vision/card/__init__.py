"""The model card of a saved folder, written from `peft_vision.json` alone.

What is not known is left out, or said to be not known; nothing is left to be filled in. No model is
needed, and torch is not loaded.
"""

from peft_vision.card.body import render_card

__all__ = ["render_card"]
