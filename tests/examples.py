"""How many examples Hypothesis tries where each of them compiles."""

import os

from hypothesis import settings

_FEW = bool(os.environ.get("CI")) and not os.environ.get("SIMQAT_ALL_EXAMPLES")


def examples(most: int) -> settings:
    """Try `most` examples; on a submission two in five, `.ci/nightly` tries all."""
    return settings(max_examples=max(most * 2 // 5, 4) if _FEW else most, deadline=None)
