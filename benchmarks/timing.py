"""Two ways of doing a thing, timed by turns, so that other work on the machine meets them alike."""

import statistics
import time
from collections.abc import Callable

Seconds = tuple[float, float]  # on the clock, of the processors: all threads together


def seconds(work: Callable[[], object]) -> Seconds:
    """Of one call; `work` returns when its results are there."""
    clock, processors = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processors


def by_turns(
    first: Callable[[], object], second: Callable[[], object], repeats: int
) -> list[tuple[Seconds, Seconds]]:
    """(of the first, of the second), `repeats` times after a call of each that does not count."""
    first(), second()
    pairs = []
    for repeat in range(repeats):
        order = (first, second) if repeat % 2 else (second, first)
        taken = {work: seconds(work) for work in order}
        pairs.append((taken[first], taken[second]))
    return pairs


def ratios(pairs: list[tuple[Seconds, Seconds]]) -> list[dict]:
    """First to second: by the clock, by the processors."""
    out = []
    for kind in (0, 1):
        firsts, seconds_ = ([times[kind] for times in side] for side in zip(*pairs, strict=True))
        ratio = sorted(a / b for a, b in zip(firsts, seconds_, strict=True))
        quarter = len(ratio) // 4
        out.append(
            {
                "median_of_ratios": round(statistics.median(ratio), 4),
                "middle_half": [round(ratio[quarter], 4), round(ratio[-1 - quarter], 4)],
                "ratio_of_minima": round(min(firsts) / min(seconds_), 4),
            }
        )
    return out
