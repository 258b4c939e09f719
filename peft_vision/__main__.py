"""``python -m peft_vision`` is ``peft-vision``."""

from __future__ import annotations

from peft_vision.cli import main

if __name__ == "__main__":
    main()
