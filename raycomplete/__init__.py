"""raycomplete: finish the safety alignment of a language model, on Ray.

Find where safety training stopped, train the rest in, and show the result under attack. The rooms of the package, from
upper to lower (a lower room may import an upper one; rooms of the same line never import each other):

    errors, types, config              words, shapes, the run file
    core                               the method: base-favored sets, depth sampler, teacher, loss
    data                               prompts, chat templates, checkpoints, the model organism
    engine_options                     how every vLLM engine is started
    scoring  rollout  training  evaluation  report
    pipeline, cluster, cli             wiring and commands
"""

__version__ = "0.1.0"
