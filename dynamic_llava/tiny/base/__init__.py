"""How the shipped dense base is trained from scratch; nothing here is used by the sparse training or the evaluation."""
