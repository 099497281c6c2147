"""Defences at inference around a model: started for an evaluation, and put around every generator of the student.

They act wherever an attack decodes text from the student: prompts of every kind, prefills, samples, conversations, and
copies that an attacker fine-tunes, behind which the same server is assumed. Contrastive decoding also shapes the
distributions from which attackers pick tokens. Gradients and embeddings are those of the model alone, which no decoder
changes: a suffix or a soft prompt is searched without the defence; the suffix is then answered behind it, while a soft
prompt is answered without it, since it can only be read by someone who runs the weights himself.
"""
