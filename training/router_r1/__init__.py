"""Training of Router-R1's policy (arXiv 2506.09033): rollouts with experts, rewards, and GRPO through TRL.

`spec` is a run's configuration, `questions` what is asked, `environment` who replies, `rollout` how conversations with
the policy are sampled in batches, `rewards` what they are worth, `train` the run, `measure` what came of it.
"""
