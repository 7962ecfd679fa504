"""The parts of the demo model's training: scenes, questions, prompts, the network and its scores.

`train_demo_model.py` and `score_demo_model.py` put them together.
"""
