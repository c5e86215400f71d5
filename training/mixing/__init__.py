"""Training the gates, and adapters, that `experts.mixing` puts into a model, with TRL's SFTTrainer.

spec.py     what a run's configuration file says
data.py     examples: a chat with its answer, and whose adapter's data it is
trainer.py  the trainer: balance losses over the global batch, reports of load and entropy
train.py    a run from its configuration to the saved mixture
speed.py    a training pass through a mixing layer, beside PEFT's plain LoRA
compare.py  what each gate is worth on the pocket skills, beside what it must beat
"""
