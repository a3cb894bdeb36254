"""What changes a frozen model from outside: the LoRA family, hypernetworks, embeddings."""
