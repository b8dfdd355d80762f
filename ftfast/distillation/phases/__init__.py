"""The phases of a run: teacher, paraphraser, choice of weights, students, results."""
