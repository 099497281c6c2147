"""Child of the doctor: reads checkpoints and prompts of a run file exactly as a run would before it starts."""

from __future__ import annotations

import json
import sys

from raycomplete.config import RunConfig, parse
from raycomplete.doctor.child import tell
from raycomplete.runtime.errors import RefusedError


def main(config: RunConfig) -> None:
    from raycomplete.data.inputs import KINDS, prepare_models, prepare_prompts

    part = "checkpoints"
    try:
        models = prepare_models(config)
        head = models.heads["aligned"]
        words = f"{', '.join(models.paths)} fit together: {head.vocab_size} tokens, hidden size {head.hidden_size}."
        tell({part: {"found": words}})
        part = "prompts"
        prompts = prepare_prompts(config, models.codec)
        counts = [
            f"{len(sets[kind])} {kind} {name}"
            for name, sets in (("to train on", prompts.train), ("held out", prompts.evaluation))
            for kind in KINDS
        ]
        tell({part: {"found": f"{', '.join(counts)}."}})
    except RefusedError as error:
        tell({part: {"problem": error.problem, "remedy": error.remedy}})


if __name__ == "__main__":
    main(parse(json.loads(sys.argv[1]), "The run file", plugins=True))
