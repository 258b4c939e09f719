"""`peft-vision push`: a saved folder to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def push(
    folder: Annotated[Path, typer.Argument(help="A folder that peft-vision saved.")],
    repo_id: Annotated[str, typer.Argument(metavar="USER/REPO", help="Where on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Create the repository as a private one.")
    ] = False,
    revision: Annotated[
        str | None, typer.Option(help="Branch; created when it is not there.")
    ] = None,
    token: Annotated[
        str | None, typer.Option(help="Access token; by default HF_TOKEN or the saved login.")
    ] = None,
    message: Annotated[str | None, typer.Option("--message", "-m", help="Of the commit.")] = None,
) -> None:
    """Check a saved folder and upload it with its model card."""
    from peft_vision.hub import push_folder

    url = push_folder(
        folder, repo_id, token=token, private=private, revision=revision, commit_message=message
    )
    print(url)
