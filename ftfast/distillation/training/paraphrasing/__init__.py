"""How a paraphraser learns from a teacher's feature maps, and what it is judged by."""
