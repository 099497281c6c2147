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

__version__ = "0.1.0"
