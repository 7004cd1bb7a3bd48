"""Whether too many are bad, judged as they come: a test that may be looked at after every request. Pure.

For counts of bad ones among independent requests the likelihood ratio of "a share p is bad" to "a share p0 is" has an expectation of at
most one as long as the true share is at most p0, for each p above p0, and so has a mixture of such ratios. By Ville's inequality it ever
exceeds 1 / alpha with a probability of at most alpha, however often somebody looks, and whenever they stop (J. Ville, Étude critique de la
notion de collectif, 1939; Ramdas et al., Game-theoretic statistics and safe anytime-valid inference, 2023). Requests that fail together
are not independent: an outage of a moment weighs more than it should, which is on the safe side for a rollout.
"""

import math

TIMES = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0)
"""How many times as bad as is borne each part of the mixture supposes it to be."""
HIGHEST = 0.999
LEAST_RATIO = 1e-6


def evidence(bad: int, asked: int, most_ratio: float) -> float:
    """How strongly ``bad`` of ``asked`` speak against a share of at most ``most_ratio`` (0 to 1): the mixture's natural logarithm."""
    p0 = max(most_ratio, LEAST_RATIO)
    supposed = sorted({min(p0 * times, HIGHEST) for times in TIMES})
    if supposed[0] <= p0:
        return 0.0  # next to all may be bad: nothing speaks against that
    logs = [bad * math.log(p / p0) + (asked - bad) * math.log((1 - p) / (1 - p0)) for p in supposed]
    highest = max(logs)
    return highest + math.log(sum(math.exp(one - highest) for one in logs) / len(logs))


def is_too_many(bad: int, asked: int, most_ratio: float, false_alarm: float) -> bool:
    """Whether they are, where ``false_alarm`` is the chance that is borne of saying so, ever, though they are not."""
    return evidence(bad, asked, most_ratio) >= math.log(1 / false_alarm)
