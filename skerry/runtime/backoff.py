"""How long to wait before the next try: exponential with full jitter, so that a fleet does not come back in step.

Source: Marc Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
"""


def delay_s(attempt: int, chance: float, *, first_s: float, most_s: float) -> float:
    """Seconds before try ``attempt`` (0 is the first repeat); ``chance`` is a random number from 0 to 1.

    Half of the delay is certain, so that a storm of failures never becomes a busy loop.
    """
    ceiling = min(most_s, first_s * 2.0 ** min(attempt, 32))
    return ceiling * (0.5 + 0.5 * chance)
