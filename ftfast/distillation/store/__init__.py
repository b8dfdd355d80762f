"""The factor store: what a frozen teacher and paraphraser say about fixed views of the training images, on disk."""
