"""A model of lm-evaluation-harness that runs an artifact in its own runtime. Imports lm_eval, from the extra `tasks`.

Importing this module registers it as `intaglio`, for `simple_evaluate(model="intaglio", model_args="path=model.gguf")`.
Its command line with that model is `python -m intaglio.measure.harness`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from intaglio.errors import InputError
from intaglio.measure.candidates import open_engine
from intaglio.measure.engine import Prompter, scored, with_first, written
from intaglio.numerics.device import Device, device_for
from intaglio.plan.hub import ARTIFACT, find_model

CONTEXT_TOKENS = 4096
NEW_TOKENS = 256  # of an answer, where the task does not say: as lm_eval's own classes
GREEDY = ("temperature", "top_p", "top_k")  # settings that mean nothing without do_sample
_Base: Any = TemplateLM


class Harness(_Base):  # type: ignore[misc]
    """An artifact as lm_eval asks it: a .gguf in llama.cpp, a folder or a packed model in transformers.

    path: of it, or a name of the Hub. context_tokens: what a request may have at most; nothing is cut off. batch_size,
    max_batch_size: taken, since lm_eval passes them to every model, and not used. on_part: hears how many requests are
    done, and of how many. Raises as `find_model` and `open_engine`.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        context_tokens: int = CONTEXT_TOKENS,
        device: Device = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        on_part: Callable[[int, int], None] = lambda done, total: None,
    ):
        super().__init__()
        self.path, self.on_part, self.stack = find_model(path, files=ARTIFACT), on_part, ExitStack()
        self.prompter: Prompter | None = None
        self.engine = open_engine(self.path, self.stack, context_tokens=int(context_tokens), device=device_for(device))

    def close(self) -> None:
        """End the runtime."""
        self.stack.close()

    @property
    def eot_token_id(self) -> int:
        return min(self.engine.chat_format.ends)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has nothing before it."""
        first = self.engine.chat_format.first
        return first if first >= 0 else self.eot_token_id

    @property
    def tokenizer_name(self) -> str:
        return str(self.path.absolute()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **more: Any) -> list[int]:
        """Tokens of a text, behind the model's first token unless `add_special_tokens` is False."""
        tokens = self.engine.encode(string)
        return tokens if add_special_tokens is False else with_first(self.engine, tokens)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-probability of each continuation of a text, and whether it is what the model would write."""
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return scores

    def _loglikelihood_tokens(self, requests: Sequence[Any], **more: Any) -> list[tuple[float, bool]]:
        """Log-probability of each continuation. Choices of one token after the same text are one reading of it."""
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, (_, context, continuation) in enumerate(requests):
            groups[tuple([*context, *continuation][:-1])].append(place)
        found: dict[int, tuple[float, bool]] = {}
        for read, places in groups.items():
            self._check(len(read))
            scores = scored(self.engine, read, [requests[place][2] for place in places])
            for place, score in zip(places, scores, strict=True):
                found[place] = score
                self.cache_hook.add_partial("loglikelihood", requests[place][0], score)
            self.on_part(len(found), len(requests))
        return [found[place] for place in range(len(requests))]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text, in windows as long as the context.

        The first token is not scored. lm_eval's class for transformers reads it twice and scores the second.
        """
        sums = []
        for done, request in enumerate(requests, start=1):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.engine.context_tokens,
                context_len=1,
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            scores = [scored(self.engine, [*c, *t][:-1], [t])[0] for _, c, t in pairs]
            sums.append(sum(score for score, _ in scores))
            self.on_part(done, len(requests))
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each text up to a text that ends it, greedy unless the task samples at a temperature."""
        texts = []
        for done, request in enumerate(requests, start=1):
            prompt, settings = request.args
            texts.append(self._generate(prompt, dict(settings)))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            self.on_part(done, len(requests))
        return texts

    def _generate(self, prompt: str, settings: dict[str, Any]) -> str:
        until = settings.pop("until", None) or []
        until = [until] if isinstance(until, str) else until
        most = settings.pop("max_gen_toks", NEW_TOKENS)
        temperature = float(settings.pop("temperature", 1.0)) if settings.pop("do_sample", False) else 0.0
        unknown = {name: value for name, value in settings.items() if temperature or name not in GREEDY}
        if unknown:
            raise InputError(f"generation_kwargs {unknown}: expected until, max_gen_toks, do_sample and temperature")
        tokens, text = self.tok_encode(prompt), ""
        self._check(len(tokens) + most)
        for text in written(self.engine, tokens, most, temperature=temperature):
            if any(end in text for end in until):
                break
        for end in until:
            text = text.partition(end)[0]
        return text

    def _check(self, tokens: int) -> None:
        if tokens > self.engine.context_tokens:
            raise InputError(
                f"{self.path}: a question with its answer has {tokens} tokens: expected at most "
                f"{self.engine.context_tokens}: choose a larger --context (context_tokens)"
            )

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The model's own."""
        return self.engine.chat_format.template

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text, by the model's own template."""
        if self.prompter is None:
            self.prompter = self.stack.enter_context(Prompter(self.engine, self.path))
        return self.prompter.prompt(chat_history, ask=add_generation_prompt)


register_model("intaglio")(Harness)

if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
