"""Codes and scales that explain stored floats bit for bit: the grid that a checkpoint was trained on, found again.

Shape suffixes: N blocks, K the values under one scale. Work is done on [K, N], so that a block's
reductions run over whole rows of memory.

A quantizer wrote `w = dtype(code x scale)`. Each stored value w confines the scale: it lies between the
two midpoints around |w|, divided by |code|, where rounding to the stored dtype still gives w. Codes are
right if these intervals of a block have a scale in common. What remains is to guess the code of the
block's extremum: there are few, and the tensor's own rule names the likely one.

A block counts as recovered only if `dtype(code x scale) == w` holds for each of its values (zeros of
either sign are equal: a code of zero has no sign). NaN and Inf never do, zeros always.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from intaglio.numerics.rounding import round_half, round_significant

# Width of the scale that explains a block; the lower the better for whoever has to store it.
ANY, BFLOAT16, HALF, FLOAT, NOTHING = 0, 1, 2, 3, 4
SCALE_NAMES = {ANY: "any", BFLOAT16: "bfloat16", HALF: "float16", FLOAT: "float32"}
# Values up to 127 steps high are rounded to 8 significant bits, and the upper ones do not tell their code before
# the step is known to more than 8 bits. It is found from values below this share of the peak, and then from
# all whose code is at most so high, in two steps.
SMALL_SHARE = 1 / 6
CERTAIN_CODES = (48, 96)
SMALL_EXTREMUM = 2.0**-100  # of a block that has one, values with a code other than zero may be subnormal
LOWEST_NORMAL_BITS = 0x00800000  # of float32
FAR = 3e38  # beyond any scale
GUESSED_AT_ONCE = 1 << 19  # values whose guesses are tried together: temporaries stay in the processor's cache


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule by which a quantizer may have rounded a block.

    code_min, code_max: inclusive. signed: the extremum's code is negative whatever its sign, as ggml has
    it, so that scales may be negative; else they are positive. peaks: magnitudes of the extremum's code,
    the likeliest first. narrow: whether a bfloat16 scale is preferred to a float16 one where both serve.
    """

    code_min: int
    code_max: int
    signed: bool = False
    peaks: tuple[int, ...]
    narrow: bool = True


@dataclass(frozen=True)
class Recovered:
    """codes: int8 [N, K]. scale: float32 [N]. peak: int16 [N], the guess that held, with its sign. width:
    uint8 [N], ANY for blocks of zeros and NOTHING where no guess held; there codes and scale are zero.
    """

    codes: Tensor
    scale: Tensor
    peak: Tensor
    width: Tensor

    @property
    def exact(self) -> Tensor:
        return self.width != NOTHING


def recover(values_NK: Tensor, rule: Rule) -> Recovered:
    """Codes and scales of blocks of bfloat16, float16 or float32 values, where there are any."""
    found = _recover(values_NK.t().contiguous(), rule, rule.peaks, quick=rule.narrow)
    return Recovered(found.codes.t(), found.scale, found.peak, found.width)


def _recover(stored_KN: Tensor, rule: Rule, peaks: tuple[int, ...], *, quick: bool) -> Recovered:
    """`recover` with codes [K, N]: a guess for all blocks, and the next ones for those where it does not hold.

    quick: try first what costs half as much, the bfloat16 scale that the extremum itself suggests.
    """
    x_KN = _computed(stored_KN)
    extremum = _extremum(x_KN)
    attempt = _quick_attempt if quick else _attempt
    found = attempt(stored_KN, x_KN, extremum, peaks_of(extremum, peaks[0], rule), rule)
    left = ((found.width == NOTHING) & torch.isfinite(extremum)).nonzero().squeeze(1)
    rest = peaks if quick else peaks[1:]
    if len(left) and rest:
        other = _recover(stored_KN[:, left], rule, rest, quick=rule.narrow and not quick)
        found.codes[:, left] = other.codes
        found.scale[left], found.peak[left], found.width[left] = other.scale, other.peak, other.width
    return found


def _quick_attempt(stored_KN: Tensor, x_KN: Tensor, extremum: Tensor, guess: Tensor, rule: Rule) -> Recovered:
    """A guess for blocks whose scale is the extremum divided by its code, rounded to bfloat16. x_KN is used up."""
    scale = round_significant((extremum / guess).float(), 8)
    inverse = torch.where(scale == 0, 0.0, 1 / scale.to(x_KN.dtype))
    codes_KN = x_KN.mul_(inverse).round_().clamp_(rule.code_min, rule.code_max)
    return _checked(stored_KN, codes_KN, scale, torch.full_like(guess, BFLOAT16, dtype=torch.uint8), extremum, guess)


def guesses_that_hold(values_NK: Tensor, rule: Rule) -> Tensor:
    """True for the rule's peaks that explain each block: bool [number of peaks, N]. All of them do with zeros."""
    stored_KN = values_NK.t().contiguous()
    x_KN = _computed(stored_KN)
    extremum = _extremum(x_KN)
    at_once = max(1, GUESSED_AT_ONCE // max(1, values_NK.numel()))
    held = []
    for i in range(0, len(rule.peaks), at_once):
        peaks = rule.peaks[i : i + at_once]
        magnitude = torch.tensor(peaks).repeat_interleave(len(values_NK))
        stored, x, peak = (
            tensor.repeat(*(1,) * (tensor.ndim - 1), len(peaks)) for tensor in (stored_KN, x_KN, extremum)
        )
        held.append(_attempt(stored, x, peak, peaks_of(peak, magnitude, rule), rule).exact.view(len(peaks), -1))
    return torch.cat(held)


def _computed(stored: Tensor) -> Tensor:
    """The values in a dtype in which midpoints between neighbours of the stored one are exact."""
    return stored.double() if stored.dtype == torch.float32 else stored.float()


def blocks_of(values_RC: Tensor, width: int) -> Tensor:
    """[R, C] as [R x C / width, width]."""
    return values_RC.reshape(-1, width)


def peaks_of(extremum: Tensor, magnitude: Tensor | int, rule: Rule) -> Tensor:
    """The signed code of each block's extremum for a guessed magnitude; clipped, as a quantizer clips."""
    sign = -1.0 if rule.signed else extremum.sign()
    return (torch.ones_like(extremum) * sign * magnitude).clamp_(rule.code_min, rule.code_max)


def _extremum(x_KN: Tensor) -> Tensor:
    """The value of largest magnitude, NaN where there is one: [N]. Where both signs tie, the positive one."""
    low, high = x_KN.amin(0), x_KN.amax(0)
    return torch.where(high >= -low, high, low)


def _attempt(stored_KN: Tensor, x_KN: Tensor, extremum: Tensor, guess: Tensor, rule: Rule) -> Recovered:
    """One guess of the extremum's code for each block; codes are [K, N] here."""
    usable = (extremum != 0) & torch.isfinite(extremum)
    tiny = (extremum.abs() < SMALL_EXTREMUM) & usable
    any_tiny = bool(tiny.any())
    lifted_KN, lifted = x_KN, extremum
    if any_tiny:  # so that what a code is divided by is no subnormal, nor its inverse infinite
        lift = torch.where(tiny, 1 / SMALL_EXTREMUM, 1.0).to(extremum.dtype)
        lifted_KN, lifted = x_KN * lift, extremum * lift
    inverse = torch.where(usable, guess / lifted, 1.0)
    if rule.code_max > 8:
        inverse = _refined(stored_KN, lifted_KN, lifted, inverse)
    codes_KN = (lifted_KN * inverse).round_().clamp_(rule.code_min, rule.code_max)
    low, high = _interval(stored_KN, x_KN, codes_KN, 0 if any_tiny else LOWEST_NORMAL_BITS)
    scale, width = _scale_within(low, high, rule.narrow)
    scale = torch.where(usable, scale.copysign(inverse.float()), 0.0)
    return _checked(stored_KN, codes_KN, scale, width, extremum, guess)


def _checked(
    stored_KN: Tensor, codes_KN: Tensor, scale: Tensor, width: Tensor, extremum: Tensor, guess: Tensor
) -> Recovered:
    """Codes and scales where they give the stored values back; width NOTHING where they do not.

    A code of zero has the sign of its value times that of the step, so even zeros come back with their signs.
    codes_KN is used up.
    """
    codes = codes_KN.to(torch.int8)
    decoded_KN = codes_KN.float().mul_(scale).to(stored_KN.dtype)
    # NaN has the bits of NaN
    width = torch.where(_differs(decoded_KN, stored_KN) | ~torch.isfinite(extremum), NOTHING, width)
    width = torch.where(extremum == 0, ANY, width)
    scale = torch.where((width == NOTHING) | (width == ANY), 0.0, scale)
    return Recovered(codes, scale, guess.to(torch.int16), width)


def _differs(first_KN: Tensor, second_KN: Tensor) -> Tensor:
    """True for blocks that have a value whose bits differ: bool [N]. Of `first_KN` nothing is left."""
    bits = torch.int32 if first_KN.dtype == torch.float32 else torch.int16
    difference = first_KN.view(bits).bitwise_xor_(second_KN.view(bits))
    return (difference.amax(0) != 0) | (difference.amin(0) != 0)


def _refined(stored_KN: Tensor, x_KN: Tensor, extremum: Tensor, inverse: Tensor) -> Tensor:
    """1 / step, known to the bits that codes of 127 need: by least squares over small values, then by intervals.

    A value's bits say only so much of the step as of itself, and the extremum's error is that of its code.
    """
    small = x_KN * (x_KN.abs() < extremum.abs() * SMALL_SHARE)
    codes = (small * inverse).round_()
    along_x, along_code = (codes * small).sum(0).abs(), (codes * codes).sum(0)
    magnitude = torch.where(along_x > 0, along_code / along_x, inverse.abs())
    for certain in CERTAIN_CODES:
        codes = (x_KN * magnitude).round_()
        codes *= codes.abs() <= certain
        low, high = _interval(stored_KN, x_KN, codes, 0)
        middle = (low + high) / 2
        magnitude = torch.where((middle > 0) & (middle < FAR / 4), 1 / middle, magnitude)
    return magnitude.copysign(inverse)


def _interval(stored_KN: Tensor, x_KN: Tensor, codes_KN: Tensor, lowest_bits: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest magnitude of a scale that gives each value from its code: [N] and [N].

    Values with a code of zero confine nothing: whether they are zero is seen where the result is compared.
    """
    low, high = _neighbourhood(stored_KN, x_KN, lowest_bits)
    divisor = codes_KN.abs()
    free = (1 - divisor).clamp_min_(0).mul_(FAR)
    divisor.clamp_min_(0.5)
    return low.div_(divisor).sub_(free).amax(0), high.div_(divisor).add_(free).amin(0)


def _neighbourhood(stored_KN: Tensor, x_KN: Tensor, lowest_bits: int) -> tuple[Tensor, Tensor]:
    """Magnitudes that rounding to the stored dtype, ties to even, turns into the stored value: from and to.

    Bounds are midpoints between neighbours. They belong to the neighbour whose last bit is zero; for the
    other one they are moved inside by an amount that division by a code does not round away. `lowest_bits`
    of float32 replace lower ones of an upper bound: processors are slow with subnormals.
    """
    if stored_KN.dtype == torch.float32:
        magnitude = stored_KN.abs()
        below = torch.nextafter(magnitude, torch.zeros(())).double()
        above = torch.nextafter(magnitude, torch.full((), torch.inf)).double()
        inside = (stored_KN.view(torch.int32) & 1).double().mul_(2.0**-48)
        middle = magnitude.double()
        return below.add_(middle).mul_(0.5).mul_(1 + inside), above.add_(middle).mul_(0.5).mul_(1 - inside)
    odd = (stored_KN.view(torch.int16) & 1).to(torch.int32).mul_(4)
    magnitude = x_KN.abs()
    bits = magnitude.view(torch.int32)
    # half the distance of neighbours, in units of float32's last place
    reach = odd.neg().add_(1 << (15 if stored_KN.dtype == torch.bfloat16 else 12))
    low = (bits - reach).clamp_min_(0).view(torch.float32)
    high = reach.add_(bits).clamp_min_(lowest_bits).view(torch.float32)
    if stored_KN.dtype == torch.float16:  # whose subnormals lie 2^-24 apart
        subnormal = magnitude < 2.0**-14
        reach = 2.0**-25 - odd.float() * 2.0**-50
        low = torch.where(subnormal, (magnitude - reach).clamp_min_(0), low)
        high = torch.where(subnormal, magnitude + reach, high)
    return low, high


def _scale_within(low: Tensor, high: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """The scale in the middle of each interval, float32 [N], in the narrowest dtype that has one; and its width.

    If a dtype has any number in the interval, the one nearest to its middle is in it.
    """
    middle = ((low + high) / 2).float()
    scale, width = middle, torch.full(middle.shape, FLOAT, dtype=torch.uint8)
    half, brain = round_half(middle), round_significant(middle, 8)
    for candidate, kind in ((half, HALF), (brain, BFLOAT16)):
        within = (candidate >= low) & (candidate <= high) & (candidate > 0) & torch.isfinite(candidate)
        if kind == BFLOAT16 and not narrow:
            within &= width == FLOAT
        scale = torch.where(within, candidate, scale)
        width = torch.where(within, kind, width)
    return scale, width
