"""Training methods: what a step trains. One file a method, with its settings, rows, teacher contexts and loss terms.

Importable without torch, since a method is the section `method` of the run file.
"""

from raycomplete.methods import (  # noqa: F401  each registers itself
    augmentation,
    circuit_breakers,
    completion,
    door,
    latent_adversarial,
    npo,
    opct,
    policy_gradient,
    presto,
    sft,
    unlikelihood,
    w_door,
)
