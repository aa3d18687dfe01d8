"""One class per role of RLHF (policy, critic, reference, reward, cost), over a trainable or a frozen model.

How a model is loaded, sharded, stepped or saved belongs to `workers.training` and `workers.parallel`.
"""
