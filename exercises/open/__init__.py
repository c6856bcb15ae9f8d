"""Open questions, one command each. Guess first: docs/open-questions.md has our predictions, and answers so far."""
import argparse

from support.files import between


def two_phases(name, about, dense_steps, steps):
    """The parser of a question that trains without gates and then with them, seed by seed: with these defaults."""
    found = argparse.ArgumentParser(usage=f"python -m exercises.open.{name} [options]", description=about)
    found.add_argument("--seeds", type=between(int, 1, 100), default=3, help="0, 1, ... (default 3)")
    for option, default, phase in (("--dense-steps", dense_steps, "without"), ("--steps", steps, "with")):
        help = f"{phase} gates (default {default})"
        found.add_argument(option, type=between(int, 1, 10**7), default=default, help=help)
    out = f"runs/{name.replace('_', '-')}"
    found.add_argument("--out", default=out, help=f"folder of the models (default {out})")
    return found
