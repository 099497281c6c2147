"""raycomplete: finish the safety alignment of a language model, on Ray.

Find where safety training stopped, train the rest in, and show the result under attack. The rooms of the package, from
upper to lower (a lower room may import an upper one; rooms of the same line never import each other):

    errors, types, config, files       words, shapes, the run file, atomic writes
    core                               the method: base-favored sets, depth sampler, teacher, loss
    data                               prompts, chat templates, checkpoints, the model organism
    engine_options, ray_calls          how every vLLM engine is started and every Ray actor waited for
    scoring  rollout  training  evaluation  report
    pipeline, placement, cluster, cli  wiring and commands
"""

import os

__version__ = "0.1.0"

# Read when torch is loaded, so it must stand before every room. Beside engines that keep the cores busy, a driver whose
# idle OpenMP threads spin did 300 tokens a second of the diagnosis walk (2 threads on 2 cores), and 1,050 with these.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
