"""What a serving engine asks besides a plan: the loads it sees, and which replica each token goes to."""
