# SPDX-License-Identifier: LGPL-2.1-or-later
"""Runs suites: each test once, in a guest that is booted anew when one was lost."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence

from vmtest.outcome import GuestFailedError, LostGuestError

from world.outcomes import Outcome
from world.suite import Bench, Part, Suite, Test, attempt

# In place of a test's name.
_AT_THE_START, _AT_THE_END = "at the start", "at the end"
# A part whose guests do not get ready so often does not get another one.
_SETBACKS_MAX = 2


def run_suite(
    suite: Suite,
    *,
    on: Sequence[str] = (),
    patterns: Sequence[str] = (),
    is_over: Callable[[], bool] = lambda: False,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Outcome]:
    """An outcome for each of its tests, or one for the suite where it cannot run. Another one where a guest or a bench
    failed outside of a test: "at the start" or "at the end".

    on        run the parts whose names match one of these alone, all if there are none
    patterns  the same for tests
    is_over   asked before each test; once it holds, those that are left are "not run"
    """
    if suite.missing:
        yield Outcome(suite.name, "", "all", "not run", why=suite.missing)
        return
    for part in [part for part in suite.parts if _matches(part.name, on)]:
        for name, why in part.inapplicable.items():
            yield Outcome(suite.name, part.name, name, "not run", why=why)
        yield from _run_part(suite, part, patterns, is_over, tell)


def _run_part(
    suite: Suite, part: Part, patterns: Sequence[str], is_over: Callable[[], bool], tell: Callable[[str], None]
) -> Iterator[Outcome]:
    left: list[Test] | None = None
    setbacks = 0
    while left is None or left:
        if is_over():
            yield from _not_run(suite, part, left, "time was up")
            return
        # What a failure is put down to: no failure is without an outcome.
        done, at = 0, _AT_THE_START
        tell(f"{suite.name}, {part.name}: booting a guest")
        try:
            with part.prepare() as bench:
                if left is None:
                    left = _chosen(part.tests(bench), patterns, part.inapplicable)
                while done < len(left) and not is_over():
                    at = left[done].name
                    found = _run_test(suite, part, bench, left[done])
                    done += 1
                    tell(f"  {found.test}: {found.result} in {found.seconds:.0f} s {found.why}".rstrip())
                    yield found
                at = _AT_THE_END
        except (LostGuestError, GuestFailedError) as error:
            kind = "lost" if isinstance(error, LostGuestError) else "failed"
            tell(f"  {kind}: {at}: {error}")
            yield Outcome(suite.name, part.name, at, kind, why=str(error))
            if at == _AT_THE_START:
                setbacks += 1
                if setbacks >= _SETBACKS_MAX:
                    yield from _not_run(suite, part, left, f"no guest for it: {error}")
                    return
            elif at != _AT_THE_END:
                done += 1
        left = left and left[done:]


def _run_test(suite: Suite, part: Part, bench: Bench, test: Test) -> Outcome:
    result, why, seconds, pages_out = attempt(bench.guest, test)
    return Outcome(suite.name, part.name, test.name, result, seconds, why, pages_out)


def _not_run(suite: Suite, part: Part, tests: Sequence[Test] | None, why: str) -> Iterator[Outcome]:
    for name in ["all"] if tests is None else [test.name for test in tests]:
        yield Outcome(suite.name, part.name, name, "not run", why=why)


def _chosen(tests: Sequence[Test], patterns: Sequence[str], inapplicable: dict[str, str]) -> list[Test]:
    return [test for test in tests if test.name not in inapplicable and _matches(test.name, patterns)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return not patterns or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
