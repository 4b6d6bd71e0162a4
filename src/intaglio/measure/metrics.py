"""Distance of a candidate's next-token distributions from a reference's, token by token.

Shape suffixes: T tokens of a window, V vocabulary.

The quantities are llama.cpp's (`llama-perplexity --kl-divergence`, tools/perplexity/perplexity.cpp):
KL(reference || candidate) over the full vocabulary, the share of tokens with the same most likely
successor, the root mean square change of the true token's probability, and perplexities. Three
things differ, each towards exactness: the reference's logits are float32 and not rounded to 16
bits, tokens less likely than e^-16 are counted, and every labelled position is scored, not only
the second half of a window.

Tokens of a window share their text, so their errors are correlated, and an error bar that takes
them for independent is too short. Here every interval is a 95% interval whose unit of resampling
is the window: it is computed from the scatter of the windows' own sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from intaglio.errors import ConfigError, InputError, WeightError

CHUNK_VALUES = 1 << 23  # logits in a chunk of rows: 32 MB in float32, and about six such arrays at once
NORMAL_975 = 1.959964  # 97.5% quantile of the normal distribution
STUDENT_975 = (12.7062, 4.3027, 3.1824, 2.7764)  # of Student's t with 1 to 4 degrees of freedom


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A candidate against a reference. `..._ci` is the half width of a 95% interval, None if there
    was only one window.

    runtime: what computed the candidate's logits, for example "transformers 5.23.0".
    simulated: whether the candidate was a fake-quantized model and not the artifact itself.
    tokens, windows: how many were scored.
    kl_..._nats: KL(reference || candidate) of a token: mean, median, percentiles, largest.
    same_top_share: of tokens whose most likely successor is the same.
    rms_delta_p: root mean square of the change of the true token's probability.
    perplexity_ratio: candidate / reference; its interval uses that both saw the same tokens.
    """

    runtime: str
    simulated: bool
    tokens: int
    windows: int
    kl_mean_nats: float
    kl_mean_ci_nats: float | None
    kl_median_nats: float
    kl_99_nats: float
    kl_999_nats: float
    kl_max_nats: float
    same_top_share: float
    same_top_ci: float | None
    rms_delta_p: float
    perplexity_reference: float
    perplexity_reference_ci: float | None
    perplexity_candidate: float
    perplexity_candidate_ci: float | None
    perplexity_ratio: float
    perplexity_ratio_ci: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with the fields' own names."""
        return asdict(self)


class TokenStats(NamedTuple):
    """One number a token of a window, float32 [T] each; nll is the label's -log p, in nats."""

    kl: np.ndarray
    nll_reference: np.ndarray
    nll_candidate: np.ndarray
    same_top: np.ndarray

    @property
    def delta_p(self) -> np.ndarray:
        difference: np.ndarray = np.exp(-self.nll_candidate) - np.exp(-self.nll_reference)
        return difference


class Accumulator:
    """Collects windows; keeps four float32 numbers a token and never a logit."""

    def __init__(self, *, runtime: str, simulated: bool):
        self.runtime = runtime
        self.simulated = simulated
        self._windows: list[TokenStats] = []

    def add(self, reference_logits_TV: Tensor, candidate_logits_TV: Tensor, labels_T: Tensor) -> None:
        """Score one window: row t of both logits predicts labels_T[t]. Any float dtype, any devices.

        Raises ConfigError for logits of different shapes, InputError for no rows, and WeightError for
        NaN or Inf in the logits.
        """
        if reference_logits_TV.shape != candidate_logits_TV.shape or len(labels_T) != len(reference_logits_TV):
            raise ConfigError(
                f"reference logits {list(reference_logits_TV.shape)}, candidate logits "
                f"{list(candidate_logits_TV.shape)}, {len(labels_T)} labels: expected the same tokens and vocabulary: "
                "compare models that share one tokenizer"
            )
        if not len(labels_T):
            raise InputError("a window without a label: expected at least two tokens in each window")
        rows = max(1, CHUNK_VALUES // reference_logits_TV.shape[1])
        parts = zip(reference_logits_TV.split(rows), candidate_logits_TV.split(rows), labels_T.split(rows), strict=True)
        chunks = [_score(*part) for part in parts]
        stats = TokenStats(*(torch.cat(column).cpu().numpy() for column in zip(*chunks, strict=True)))
        self._check_finite(stats)
        self._windows.append(stats)

    def _check_finite(self, stats: TokenStats) -> None:
        checked = {"the reference": stats.nll_reference, "the candidate": stats.nll_candidate, "either model": stats.kl}
        for side, values in checked.items():
            bad = np.flatnonzero(~np.isfinite(values))
            if bad.size:
                raise WeightError(
                    f"window {len(self._windows)}: NaN or Inf in the logits of {side} at {bad.size} of {values.size} "
                    f"tokens, first at position {bad[0]}: look for NaN, Inf or overflow in its weights"
                )

    @property
    def kl_mean_nats(self) -> float:
        """Mean KL of what was added so far, for progress displays."""
        return _mean_and_ci([window.kl for window in self._windows])[0]

    def result(self) -> Comparison:
        """Raises InputError if nothing was added."""
        if not self._windows:
            raise InputError("nothing to compare: expected at least one window")
        windows = self._windows
        kl = np.concatenate([w.kl for w in windows])
        median, p99, p999 = (float(np.quantile(kl, q)) for q in (0.5, 0.99, 0.999))
        kl_mean, kl_ci = _mean_and_ci([w.kl for w in windows])
        same_top, same_top_ci = _mean_and_ci([w.same_top for w in windows])
        delta_p_squared, _ = _mean_and_ci([np.square(w.delta_p) for w in windows])
        reference, reference_ci = _exp_mean_and_ci([w.nll_reference for w in windows])
        candidate, candidate_ci = _exp_mean_and_ci([w.nll_candidate for w in windows])
        ratio, ratio_ci = _exp_mean_and_ci([w.nll_candidate - w.nll_reference for w in windows])
        return Comparison(
            runtime=self.runtime,
            simulated=self.simulated,
            tokens=kl.size,
            windows=len(windows),
            kl_mean_nats=kl_mean,
            kl_mean_ci_nats=kl_ci,
            kl_median_nats=median,
            kl_99_nats=p99,
            kl_999_nats=p999,
            kl_max_nats=float(kl.max()),
            same_top_share=same_top,
            same_top_ci=same_top_ci,
            rms_delta_p=delta_p_squared**0.5,
            perplexity_reference=reference,
            perplexity_reference_ci=reference_ci,
            perplexity_candidate=candidate,
            perplexity_candidate_ci=candidate_ci,
            perplexity_ratio=ratio,
            perplexity_ratio_ci=ratio_ci,
        )


def recovered_share(kl: float, kl_stock: float) -> float:
    """Share of the loss of `kl_stock` that is gone: 1 for none left, 0 for no gain, < 0 for worse.

    Raises InputError if the stock rounding loses nothing.
    """
    if not kl_stock > 0:
        raise InputError(f"KL of the stock rounding is {kl_stock}: expected more than 0: there is nothing to recover")
    return 1 - kl / kl_stock


@torch.no_grad()
def _score(reference_TV: Tensor, candidate_TV: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The columns of TokenStats for a chunk of rows, float32 [T] on the reference's device."""
    device = reference_TV.device
    labels_T = labels_T.to(device)
    log_p = reference_TV.float().log_softmax(-1)
    log_q = candidate_TV.to(device).float().log_softmax(-1)
    same_top = log_p.argmax(-1) == log_q.argmax(-1)
    return _kl(log_p, log_q), label_nll(log_p, labels_T), label_nll(log_q, labels_T), same_top.float()


def label_nll(log_p_TV: Tensor, labels_T: Tensor) -> Tensor:
    """Minus the log-probability of each row's label, in nats [T]."""
    return -log_p_TV.gather(-1, labels_T.long().unsqueeze(-1)).squeeze(-1)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row, never negative.

    Summed as p (e^-d - 1 + d) with d = log p - log q. That adds sum q - sum p = 0 to the textbook
    sum p d, and makes every term positive, so the rounding of log_softmax (about 1e-6 of a row at
    262144 tokens, as large as the noise floor between two kernels) cancels in each term.
    """
    p, d = log_p.exp(), log_p - log_q
    small = p * (torch.expm1(-d) + d)
    large = log_q.exp() - p + p * d  # e^-d may overflow, and nothing cancels here
    return torch.where(d.abs() < 1, small, large).sum(-1)


def _mean_and_ci(windows: Sequence[np.ndarray]) -> tuple[float, float | None]:
    """Mean over all tokens and its 95% half width by the ratio estimator with windows as clusters."""
    sums = np.array([window.sum(dtype=np.float64) for window in windows])
    sizes = np.array([window.size for window in windows])
    mean = sums.sum() / sizes.sum()
    count = len(windows)
    if count < 2:
        return float(mean), None
    variance = np.square(sums - mean * sizes).sum() * count / (count - 1)
    return float(mean), float(student_975(count - 1) * np.sqrt(variance) / sizes.sum())


def _exp_mean_and_ci(windows: Sequence[np.ndarray]) -> tuple[float, float | None]:
    """exp of the mean over all tokens, and its half width to first order, as llama.cpp has it."""
    mean, ci = _mean_and_ci(windows)
    with np.errstate(over="ignore"):  # a candidate that is broken beyond 10^308 has perplexity inf
        value = float(np.exp(mean))
    return value, None if ci is None else value * ci


def student_975(freedom: int) -> float:
    """97.5% quantile of Student's t, within 0.2%: Abramowitz and Stegun 26.7.5."""
    if freedom <= len(STUDENT_975):
        return STUDENT_975[freedom - 1]
    z = NORMAL_975
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))
