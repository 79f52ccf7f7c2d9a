"""Distills a model's attention into a sparse or linear one: the student learns what the dense teacher does.

    python -m scripts.distill.cache_samples --model digits --count 1000 --steps 8 --out runs/samples
    python -m scripts.distill.pipeline --model digits --pattern "clear(radius=3)" --samples runs/samples \
        --out runs/clear
    visattn generate image --model digits --pattern "clear(radius=3)" --weights runs/clear/student.safetensors --out x

`accelerate launch -m scripts.distill.pipeline ...` runs the same on many GPUs. Stop or kill it at any time: the same
command goes on from the last checkpoint to the very weights of an uninterrupted run. --out gets
`checkpoint.safetensors`, `log.jsonl`, `samples/*.png` and at the end `student.safetensors`: the trained tensors and
nothing else.

What follows `--then` are options of one more run, which has those in front of the first `--then` too where it does not
give others, and starts from the student of the run before it:

    python -m scripts.distill.pipeline --model emoji --pattern mala --train all --out runs/mala/small \
        --samples runs/samples-128 --batch 64 --then --out runs/mala --samples runs/samples-256 --batch 16
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from scripts import cli
from scripts.distill.config import Config
from scripts.distill.settings import parse

THEN = "--then"


def main(arguments: list[str] | None = None) -> Path | None:
    """Entry point; returns the file of the result, nothing if the last run did not begin."""
    result = None
    with cli.told("distill"):
        runs = split(sys.argv[1:] if arguments is None else arguments)
        configs = [parse(Config, __doc__, words) for words in runs]
        check(configs)
        # Only now what takes seconds to import: a wrong setting is answered at once.
        from scripts.distill.loop import check_folder, prepared, train
        from scripts.distill.training import Training

        for config in configs[1:]:
            # Its start is not there yet.
            check_folder(config, {"weights"})
        for number, words in enumerate(runs):
            before = [] if result is None else ["--weights", str(result)]
            config = parse(Config, __doc__, [*words, *before])
            with prepared(config):
                training = Training(config)
                result = train(training)
            if training.done < 1 and number + 1 < len(runs):
                # Stopped: what follows would start from less than it should.
                return None
    return result


def check(configs: Sequence[Config]) -> None:
    """Looks at runs that follow each other, before the first begins.

    Raises:
        ValueError: If two of them have one folder, or one does not start from the student of the run before it.
    """
    for number, config in enumerate(configs):
        if config.out.resolve() in [other.out.resolve() for other in configs[:number]]:
            raise ValueError(f"--out {config.out} is that of two runs: give each one behind {THEN} its own")
        if number and config.weights != configs[0].weights:
            raise ValueError(
                f"--weights {config.weights} behind {THEN}, where a run starts from the one before it: leave it out"
            )


def split(words: list[str]) -> list[list[str]]:
    """The options of each run: those in front of the first `--then`, and behind them its own."""
    ends = [i for i, word in enumerate(words) if word == THEN] + [len(words)]
    own = [words[start + 1 : end] for start, end in pairwise(ends)]
    return [words[: ends[0]], *(words[: ends[0]] + more for more in own)]


if __name__ == "__main__":
    # A shell tells what it runs in its background to ignore this; who waits for a student asks for it so.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
