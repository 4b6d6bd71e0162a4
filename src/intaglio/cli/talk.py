"""A chat on the terminal: the verb chat."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from intaglio.cli.options import HUB, Json, app, located, print_json

if TYPE_CHECKING:
    from intaglio.runs.chat import Answer

# Characters that would steer the terminal, if a model wrote them, as U+FFFD.
HARMLESS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


@app.command()
def chat(
    artifact: Annotated[
        Path, typer.Argument(help=f".gguf, packed model or transformers folder, {HUB}.", show_default=False)
    ],
    beside: Annotated[
        Path | None, typer.Option(help=f"Answer with this model too: the original or another one, {HUB}.")
    ] = None,
    prompt: Annotated[
        list[str], typer.Option(help="Say this instead of asking on the terminal; several are one conversation.")
    ] = (),  # type: ignore[assignment]
    tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue each text, without chat template.")] = False,
    context: Annotated[int, typer.Option(min=2, help="Tokens of a conversation.")] = 4096,
    as_json: Json = False,
) -> None:
    """Talk with a model in its runtime. Ctrl-D or an empty line ends the chat, Ctrl-C an answer or the chat."""
    from intaglio.plan.hub import ARTIFACT
    from intaglio.runs.chat import chat as run_chat

    if as_json and not prompt:
        raise typer.BadParameter("--json prints the answers to --prompt: give one")
    terminal = _Terminal(named=beside is not None, silent=as_json)
    beside = None if beside is None else located(beside, *ARTIFACT)
    answers = run_chat(
        located(artifact, *ARTIFACT),
        prompt or terminal.prompts(),
        beside=beside,
        tokens=tokens,
        temperature=temperature,
        raw=raw,
        context_tokens=context,
        on_text=terminal.show,
    )
    if as_json:
        return print_json([asdict(answer) for answer in answers])
    for answer in answers:
        terminal.end(answer)


class _Terminal:
    """Asks for prompts and shows answers as they come: text on standard output, speed on standard error."""

    def __init__(self, *, named: bool, silent: bool):
        self.named, self.silent, self.begun, self.stopped = named, silent, False, False

    def prompts(self) -> Iterator[str]:
        """Lines of standard input, until its end, an empty line, or Ctrl-C."""
        asks = sys.stdin.isatty()
        with suppress(ImportError):
            import readline  # noqa: F401 - so that a line can be edited
        try:
            while line := input("> " if asks else ""):
                before = signal.signal(signal.SIGINT, self._stop)
                try:
                    yield line
                finally:
                    signal.signal(signal.SIGINT, before)
                    self.stopped = False
        except (EOFError, KeyboardInterrupt):
            typer.echo("\n" if asks else "", err=True, nl=False)  # the shell goes on in a line of its own

    def _stop(self, number: int, frame: FrameType | None) -> None:
        """End the answer after its next token. A second Ctrl-C ends the command."""
        self.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def show(self, model: str, text: str) -> bool:
        """Print what a model has written. False if it is to stop."""
        if self.named and not self.begun and not self.silent:
            typer.echo(f"{model}:")
        self.begun = True
        if not self.silent:
            typer.echo(text.translate(HARMLESS), nl=False)
        return not self.stopped

    def end(self, answer: Answer) -> None:
        """Print how fast the answer was."""
        self.begun = False
        rate = "" if answer.tokens_per_second is None else f", {answer.tokens_per_second:.1f} tokens/s"
        typer.echo("")
        typer.secho(
            f"[{answer.runtime}: {answer.tokens} tokens{rate}, the first after {answer.first_seconds:.1f} s]",
            err=True,
            dim=True,
        )
