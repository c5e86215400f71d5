"""GLIDER end to end: from a folder of adapters of one base to a mixture that is steered by the query's task.

spec.py     what a run is about: the command's options and the tasks file
part.py     what belongs to one expert: the gate's vectors, its instruction, how it does on its own examples
train.py    all parts, side by side where there is a cluster, and the mixture and router that they make
writer.py   instructions from examples, by a configured expert
rules.py    the tasks and the small language model that the methods are compared on
compare.py  what the methods are worth, held-in and held-out
speed.py    what a gate over many adapters costs a decoding step

docs/glider.md says how to use it, and how it did.
"""
