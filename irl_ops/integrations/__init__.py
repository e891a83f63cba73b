"""IQLearn inside the trainers people use; each module names the one that it serves."""
