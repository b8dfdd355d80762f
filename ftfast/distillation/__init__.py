"""The distillation recipes: teacher, paraphraser and students from one command (``ftfast distill``)."""
